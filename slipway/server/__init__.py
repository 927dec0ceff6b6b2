"""OpenAI-compatible server: one HTTP process, and one process for each engine.

Not here: scheduling and computation of requests (engine/).
"""
