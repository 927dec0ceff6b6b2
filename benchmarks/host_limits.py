"""What this host could do at most: bytes read from memory and bf16 products a second; knows no engine."""

import statistics
import threading
import time
from collections.abc import Callable

import numpy as np

READ_BYTES = 1 << 30
MATRIX = 2048


def read_bandwidth(threads: int, rounds: int = 3) -> float:
    """GB/s at which ``threads`` threads sum integers that no cache holds."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
    return READ_BYTES / 1e9 / median_s(lambda: _together([lambda part=part: part.sum() for part in parts]), rounds)


def matmul_rate(rounds: int = 5) -> float:
    """GFLOP/s of torch's bf16 product of two square matrices."""
    import torch  # a test extra

    a, b = (torch.randn(MATRIX, MATRIX).to(torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / 1e9 / median_s(lambda: a @ b, rounds)


def _together(jobs: list[Callable]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def median_s(job: Callable, rounds: int) -> float:
    """Seconds of a job, run once before."""
    job()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
