"""Threads that take the memory of a new array from the system while the processor is idle."""

import ctypes
from typing import Any

import jax

from slipway import native


class Populating:
    """Takes an empty array's memory from the system while the processor has nothing better to do, until it ends.

    Arrays of ``ops.zeros`` in host memory start without any; otherwise the first requests would wait for every page of
    the system that they write.
    """

    def __init__(self, array: jax.Array):
        library: Any = native.library()
        self._started: list[int] = []
        if library is None:
            return
        self._end = library.slipway_end_populate  # bound here: ``end`` may run when the interpreter has gone
        self._end.argtypes = [ctypes.c_void_p]
        library.slipway_populate.restype = ctypes.c_void_p
        for shard in array.addressable_shards:
            part = shard.data.block_until_ready()
            address, size = ctypes.c_void_p(part.unsafe_buffer_pointer()), ctypes.c_int64(part.nbytes)
            self._started.append(library.slipway_populate(address, size))

    def end(self) -> None:
        """Return once no thread writes the array's memory."""
        while self._started:
            self._end(self._started.pop())

    __del__ = end
