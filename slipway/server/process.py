"""Settings of a whole Python process: its event loop and its garbage collector.

Not here: the loop's work (serve.py), an engine's process (worker.py).
"""

import asyncio
import gc
import importlib.util
from collections.abc import Coroutine
from typing import Any, TypeVar

# Containers allocated between two collections. Python's default of 700 causes several collections
# in every step.
GC_THRESHOLD = 50_000
Result = TypeVar("Result")


def run_event_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, on uvloop if it is installed.

    uvloop halves the cost of writing to sockets.
    """
    has_uvloop = importlib.util.find_spec("uvloop") is not None
    factory = importlib.import_module("uvloop").new_event_loop if has_uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def tune_garbage_collector() -> None:
    """Exempt all present objects from garbage collection and make later collections rare.

    Call it when everything that lives until the end of the process is loaded.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 10, 10)
