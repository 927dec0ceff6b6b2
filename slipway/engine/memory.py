"""How much memory there is, how many pages it gives and when a cache's is taken; knows shapes and no requests."""

import ctypes
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from slipway import native
from slipway.errors import OutOfMemory

logger = logging.getLogger(__name__)

CPU_FRACTION, DEVICE_FRACTION = 0.25, 0.9


@dataclasses.dataclass(frozen=True)
class Budget:
    """One device's memory, in bytes: what may be used, and what weights and one page take of it."""

    total: int
    weights: int
    page: int

    def pages(self, temp: int, useful: int) -> int:
        """How many pages fit beside ``temp`` bytes of temporaries, no more than could ever be ``useful``.

        Raises OutOfMemory if not a single one does.
        """
        fit = (self.total - self.weights - temp) // self.page
        if fit < 1:
            raise OutOfMemory(
                f"memory budget {gib(self.total)}: weights take {gib(self.weights)}, temporaries {gib(temp)}, "
                f"a page {gib(self.page)}; raise memory_fraction or lower max_num_batched_tokens"
            )
        return min(fit, useful)


def budget(fraction: float | None, device: jax.Device, devices_sharing: int, weights: int, page: int) -> Budget:
    """The budget of one of ``devices_sharing`` devices; virtual CPU devices share the host's memory."""
    default = CPU_FRACTION if device.platform == "cpu" else DEVICE_FRACTION
    share = devices_sharing if device.platform == "cpu" else 1
    return Budget(int(free_bytes(device) * (fraction or default)) // share, weights, page)


def free_bytes(device: jax.Device) -> int:
    """Bytes that nobody holds: the device's, or on a CPU what the host and the container's limit leave."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")  # version 2; what its files hold in the page cache is given back when needed
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])
        available = min(available, int(limit) - int((group / "memory.current").read_text()) + cached)
    return max(0, available)


class Populating:
    """Takes an empty array's memory from the system while the processor has nothing better to do, until it ends.

    A CPU's cache is born without any (``ops.zeros``); else the first requests would wait for every page they write.
    """

    def __init__(self, array: jax.Array):
        on_cpu = next(iter(array.devices())).platform == "cpu"
        library: Any = native.library() if on_cpu else None
        self._started: list[int] = []
        if library is None:
            return
        self._end = library.slipway_end_populate  # all that is needed when the interpreter has gone
        self._end.argtypes, library.slipway_populate.restype = [ctypes.c_void_p], ctypes.c_void_p
        for shard in array.addressable_shards:
            part = shard.data.block_until_ready()
            address, size = ctypes.c_void_p(part.unsafe_buffer_pointer()), ctypes.c_int64(part.nbytes)
            self._started.append(library.slipway_populate(address, size))

    def end(self) -> None:
        """Return once nothing touches the array's memory."""
        while self._started:
            self._end(self._started.pop())

    __del__ = end


def gib(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.1f} MiB"
