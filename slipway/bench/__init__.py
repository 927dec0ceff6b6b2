"""Benchmarks that users run: a server, an offline load, the engine.

Only the command line imports them. Not here: comparisons with other engines (benchmarks/).
"""
