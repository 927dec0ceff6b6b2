"""JAX models inside other engines: Slipway's own architectures and MaxText's under vLLM on TPU, torch twins there."""
