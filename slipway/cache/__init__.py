"""Bookkeeping of the KV cache on the host, without JAX: a pool of pages and a radix tree over them.

Not here: the arrays that hold the keys and values (ops/kv_cache.py).
"""
