"""Where tokens are kept: a pool of pages, and the radix tree that finds them again by their tokens; knows no JAX."""
