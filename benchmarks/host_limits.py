"""Limits of this host: bytes a second from memory, and bf16 operations a second."""

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

READ_BYTES = 1 << 30
MATRIX = 2048


def read_bandwidth(threads: int, rounds: int = 3) -> float:
    """Return the GB/s at which threads sum integers that are too many for any cache."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
    jobs: list[Callable] = [part.sum for part in parts]
    return READ_BYTES / 1e9 / median_s(lambda: _run_together(jobs), rounds)


def read_files(paths: Iterable[Path]) -> None:
    """Read files, so that the system holds them in memory if there is room."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def matmul_rate(rounds: int = 5) -> float:
    """Return the GFLOP/s of torch's bf16 product of two square matrices."""
    import torch  # part of the test extra

    a, b = (torch.randn(MATRIX, MATRIX).to(torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / 1e9 / median_s(lambda: a @ b, rounds)


def median_s(job: Callable, rounds: int) -> float:
    """Return the median seconds of a job, after one run that is not counted."""
    job()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _run_together(jobs: list[Callable]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
