"""Models inside other engines: JAX models in vLLM on TPU, torch twins in vLLM and SGLang."""
