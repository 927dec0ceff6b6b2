"""Conversion of other libraries' JAX trees to Hugging Face directories, and back.

``rules`` defines what a rule means, ``mappings`` holds the built-in rules, ``plan`` resolves them
against names and shapes, ``executor`` moves the numbers to a ``writer``, and ``verify`` reads the
result back. Not here: loading of a converted directory (slipway/checkpoint).
"""
