"""Payload <-> tokens, on the host: tokenizer, chat template, streamed text and stop strings; knows no JAX."""
