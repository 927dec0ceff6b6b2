"""Conversion between trees of declared arrays and Hugging Face directories.

``files`` opens and checks directories, ``hub`` locates them, ``tensor_reader`` reads arrays and
``save`` writes them. Not here: trees of other libraries (slipway/convert).
"""
