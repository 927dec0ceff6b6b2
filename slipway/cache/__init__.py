"""Where tokens are kept: pages now, the radix prefix tree beside them later; knows no JAX."""
