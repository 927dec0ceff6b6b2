"""Threads that populate the memory of a new array while the processor is idle.

Not here: the array itself (ops.zeros), the C++ threads (csrc/).
"""

import ctypes
from typing import Any

import jax

from slipway import native


class Populating:
    """Threads that populate the host memory of an array of ``ops.zeros`` on an idle processor.

    The system provides such memory only when it is first written. Without these threads, the first
    requests would wait for every page of memory that they write.
    """

    def __init__(self, array: jax.Array):
        library: Any = native.library()
        self._started: list[int] = []
        if library is None:
            return
        # Looked up here, as ``end`` may run while the interpreter shuts down.
        self._end = library.slipway_end_populate
        self._end.argtypes = [ctypes.c_void_p]
        library.slipway_populate.restype = ctypes.c_void_p
        for shard in array.addressable_shards:
            part = shard.data.block_until_ready()
            address = ctypes.c_void_p(part.unsafe_buffer_pointer())
            size = ctypes.c_int64(part.nbytes)
            self._started.append(library.slipway_populate(address, size))

    def end(self) -> None:
        """Stop the threads, and return when none writes the array's memory any more."""
        while self._started:
            self._end(self._started.pop())

    __del__ = end
