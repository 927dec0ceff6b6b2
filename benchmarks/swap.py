"""Time of new weights beside a copy of their bytes, and 100 exchanges under load.

Comparisons alternate within one run: medians, and ratios of medians.
Not here: the exchange itself (slipway/engine/updates.py).
"""

import asyncio
import dataclasses
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import script
from slipway.bench.random_model import QWEN3_SHAPE, write_random_model
from slipway.engine.params import SamplingParams
from slipway.llm import LLM, NANO

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 16
POLICIES: tuple[Literal["continue", "recompute", "finish"], ...] = (
    "continue", "recompute", "finish"
)  # fmt: skip
# Rounds that are not counted, because two sets of memory are touched for the first time in them.
WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapBench:
    """Time of an update from host arrays and from files, and updates under a load of requests."""

    model: str = "qwen3-0.6b"
    """qwen3-0.6b: that shape with random bf16 weights; or a directory, or nano."""
    rounds: int = 9
    """Alternating rounds of each way."""
    swaps: int = 100
    """Updates under load."""
    requests: int = 32
    """Requests that always run during the updates."""

    def run(self) -> None:
        """Measure and print."""
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(NANO if self.model == "nano" else self.model)
            if self.model == "qwen3-0.6b":
                directory = Path(folder)
                write_random_model(QWEN3_SHAPE, directory)
            print(json.dumps(self.measure(directory), indent=2))

    def measure(self, directory: Path) -> dict[str, Any]:
        """Return seconds and ratios of updates; lost requests and memory under load."""
        from slipway.checkpoint import files

        checkpoint = files.open_checkpoint(directory)
        arrays = {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}
        llm = LLM(
            directory, max_num_seqs=self.requests, max_model_len=256, skip_tokenizer_init=True
        )
        size_gb = sum(array.nbytes for array in arrays.values()) / 1e9
        return {
            "weights_gb": size_gb,
            **_times(llm, directory, arrays, rounds=self.rounds),
            "under_load": asyncio.run(
                _under_load(llm, arrays, swaps=self.swaps, num_requests=self.requests)
            ),
        }


def _times(
    llm: LLM, directory: Path, arrays: dict[str, np.ndarray], *, rounds: int
) -> dict[str, Any]:
    """Return figures of updates in place and of atomic updates, beside a copy and beside reading.

    The buffers of the copy and of reading have been touched before.
    """
    targets = [np.ones_like(array).reshape(-1).view(np.uint8) for array in arrays.values()]
    sources = [array.reshape(-1).view(np.uint8) for array in arrays.values()]
    shards = sorted(directory.glob("*.safetensors"))
    buffers = [np.ones(shard.stat().st_size, np.uint8) for shard in shards]

    def copy() -> None:
        for target, source in zip(targets, sources):
            np.copyto(target, source)

    def read() -> None:
        for shard, buffer in zip(shards, buffers):
            with shard.open("rb", buffering=0) as file:
                view, size = memoryview(buffer.data), 0
                while count := file.readinto(view[size:]):
                    size += count

    in_place: dict[str, Callable[[], Any]] = {
        "memcpy": copy,
        "from_arrays": lambda: llm.update_weights(arrays),
        "read_file": read,
        "from_files": lambda: llm.update_weights(directory),
    }
    atomic: dict[str, Callable[[], Any]] = {
        "memcpy": copy,
        "from_arrays_atomic": lambda: llm.update_weights(arrays, mode="atomic"),
        "read_file": read,
        "from_files_atomic": lambda: llm.update_weights(directory, mode="atomic"),
    }
    # the two kinds do not alternate with each other, because an update in place frees memory
    return {"inplace": _alternate(in_place, rounds), "atomic": _alternate(atomic, rounds)}


def _alternate(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Time each way in turn; return medians, the lowest and highest, and the two ratios."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + WARM_UP):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    warm = {name: each[WARM_UP:] for name, each in times.items()}
    medians = {name: statistics.median(each) for name, each in warm.items()}
    copied, from_arrays, read, from_files = medians.values()
    return {
        "first_s": {name: round(each[0], 4) for name, each in times.items()},
        "median_s": {name: round(median, 4) for name, median in medians.items()},
        "spread_s": {
            name: [round(min(each), 4), round(max(each), 4)] for name, each in warm.items()
        },
        "arrays_to_memcpy": round(from_arrays / copied, 2),
        "files_to_reading": round(from_files / read, 2),
    }


async def _under_load(
    llm: LLM, arrays: dict[str, np.ndarray], *, swaps: int, num_requests: int
) -> dict[str, Any]:
    """Exchange weights while ``num_requests`` requests always run; return what became of them."""
    from slipway.async_engine import AsyncEngine

    engine, compiled = AsyncEngine(llm.engine), llm.engine.num_compiled
    rng, vocab = np.random.default_rng(0), llm.engine.limits.vocab_size
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    going, begun, whole = True, 0, 0

    async def client() -> None:
        nonlocal begun, whole
        while going:
            begun += 1
            prompt, count = rng.integers(0, vocab, PROMPT_TOKENS).tolist(), 0
            async for delta in engine.generate(prompt, params):
                count += sum(len(sample.token_ids) for sample in delta.outputs)
            whole += count == OUTPUT_TOKENS

    clients = [asyncio.create_task(client()) for _ in range(num_requests)]
    await asyncio.sleep(1)
    memory: list[int] = []
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for number in range(swaps):
        policy = POLICIES[number % len(POLICIES)]
        started = time.perf_counter()
        await engine.update_weights(arrays, policy=policy)
        seconds[policy].append(time.perf_counter() - started)
        memory.append(_resident_mb())
    going = False
    await asyncio.gather(*clients)
    version, new_programs = engine.weights_version, llm.engine.num_compiled - compiled
    await asyncio.to_thread(engine.close)
    medians = {
        policy: round(statistics.median(each), 3) for policy, each in seconds.items() if each
    }
    return {
        "swaps": swaps,
        "version": version,
        "requests_begun": begun,
        "requests_whole": whole,
        "requests_lost": begun - whole,
        "compilations": new_programs,
        "median_s": medians,
        "resident_mb": {
            "after_10": memory[min(10, swaps) - 1],
            "after_all": memory[-1],
            "most": max(memory),
        },
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _resident_mb() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("swap", SwapBench)


if __name__ == "__main__":
    main()
