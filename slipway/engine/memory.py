"""Memory budget: free bytes of a device, and the number of pages that fit.

Not here: the sizes of pages (caches.py), measuring of temporaries (runtime/runner.py).
"""

import dataclasses
from pathlib import Path

import jax

from slipway.errors import OutOfMemory
from slipway.ops import backend


@dataclasses.dataclass(frozen=True)
class PageCost:
    """Cost and numbers of the pages of one pool.

    ``size_bytes``: of one page in all caches of the pool. ``needed``: the most pages that running
    sequences use at once. ``useful``: the most pages that could ever hold anything, those that the
    prefix cache keeps included.
    """

    size_bytes: int
    needed: int
    useful: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory of one device, in bytes: the total that may be used, the weights, and the pages."""

    total: int
    weights: int
    pages: tuple[PageCost, ...]

    @property
    def useful(self) -> tuple[int, ...]:
        """Most pages of each pool that could ever hold anything."""
        return tuple(cost.useful for cost in self.pages)

    def fit(self, temp: int) -> tuple[int, ...]:
        """Return how many pages of each pool fit beside ``temp`` bytes of temporaries.

        All pools get the same number of pages, each up to its ``needed``; what is left is shared in
        the same way up to ``useful``. Raises OutOfMemory if not a single page fits.
        """
        left = self.total - self.weights - temp
        needed = self._equally(left, [0] * len(self.pages), [cost.needed for cost in self.pages])
        if min(needed) < 1:
            page = sum(cost.size_bytes for cost in self.pages)
            raise OutOfMemory(
                f"memory budget {gib(self.total)}: weights take {gib(self.weights)}, "
                f"temporaries {gib(temp)}, a page {gib(page)}; "
                "raise memory_fraction or lower max_num_batched_tokens"
            )
        left -= sum(cost.size_bytes * count for cost, count in zip(self.pages, needed))
        return tuple(self._equally(left, needed, list(self.useful)))

    def _equally(self, left: int, held: list[int], most: list[int]) -> list[int]:
        """Return the numbers of pages after ``left`` bytes are added to ``held`` ones.

        The pools with the fewest pages grow first, each up to its ``most``.
        """
        count = min(held)
        for level in sorted({*held, *most}):
            growing = [i for i in range(len(held)) if held[i] <= count < most[i]]
            page_bytes = sum(self.pages[i].size_bytes for i in growing)
            more = min(level - count, left // page_bytes) if page_bytes else level - count
            if more <= 0:
                continue
            left -= more * page_bytes
            held = [number + more if i in growing else number for i, number in enumerate(held)]
            count += more
            if count < level:
                break
        return held


def budget(
    fraction: float | None,
    device: jax.Device,
    devices_sharing: int,
    *,
    weights: int,
    pages: tuple[PageCost, ...],
) -> Budget:
    """Return the budget of one of ``devices_sharing`` devices.

    ``fraction``: the share of the free memory to use; None: the platform's default. Virtual CPU
    devices share the host's memory.
    """
    platform = backend.of(device.platform)
    share = devices_sharing if platform.uses_host_memory else 1
    total = int(free_bytes(device) * (fraction or platform.memory_fraction)) // share
    return Budget(total, weights, pages)


def free_bytes(device: jax.Device) -> int:
    """Return the free bytes of a device: on a CPU those of the host, in the container's limit."""
    if not backend.of(device.platform).uses_host_memory:
        stats = device.memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"]
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    # Control groups, version 2. Their page cache is given back when memory is needed, so it counts
    # as free.
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (
        limit := (group / "memory.max").read_text().strip()
    ) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])
        available = min(
            available, int(limit) - int((group / "memory.current").read_text()) + cached
        )
    return max(0, available)


def gib(size_bytes: int) -> str:
    """Format a size for people, in MiB or GiB."""
    return (
        f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.1f} MiB"
    )
