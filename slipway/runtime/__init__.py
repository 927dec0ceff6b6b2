"""Models on devices: loading, compiled programs, and several processes.

Not here: requests and language models (engine/), formats of files (checkpoint/).
"""
