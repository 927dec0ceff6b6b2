"""How much memory there is and how many pages it gives; knows shapes and the compiled step, no requests."""

import dataclasses
import logging
from pathlib import Path

import jax

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


def gib(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.1f} MiB"
