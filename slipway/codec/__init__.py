"""Conversion between requests and tokens on the host, without JAX.

Tokenizer, chat templates, streamed text, stop strings, grammars, tool calls and reasoning.
"""
