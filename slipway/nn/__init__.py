"""Layers: declarations of tensors, and the computations with them.

Not here: architectures (models/), the ops that layers call (ops/), files (checkpoint/).
"""
