"""Engine: requests to tokens, by scheduling, batching, device steps and sampling.

Not here: text (codec/), HTTP (server/), threads and processes around the engine (async_engine.py).
"""
