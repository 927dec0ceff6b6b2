"""Other people's JAX trees <-> HF directories: source -> rules -> plan -> pieces -> sink, one way.

``rules`` says what a rule means, ``mappings`` hold them, ``plan`` resolves them against names and shapes, ``run`` moves
the numbers, ``verify`` brings them back. Decides nothing itself.
"""
