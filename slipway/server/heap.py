"""How often a server's process looks for garbage in cycles; knows nothing of what is in it."""

import gc

OBJECTS = 50_000  # more containers than that since the last look; Python's 700 are some looks in every step


def settle() -> None:
    """What is there now stays to the end: never look at it again, and at the rest seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS, 10, 10)
