"""Benchmarks that users run: a server, an offline load, the engine. Imported by the command line only."""
