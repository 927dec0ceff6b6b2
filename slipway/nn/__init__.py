"""Layers: a declaration of tensors and what is computed with them; knows no architecture, file or request."""
