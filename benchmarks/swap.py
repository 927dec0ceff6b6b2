"""Time of new weights beside a copy of their bytes, and 100 exchanges under load.

Decides the loads and what they are compared with: by turns in one run, medians, ratios. Knows no arrays of the engine.
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
    "continue",
    "recompute",
    "finish",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapBench:
    """Time of an update from host arrays and from files, and updates under a load of requests."""

    model: str = "qwen3-0.6b"
    """qwen3-0.6b: its shape with random bf16 weights, made for it; or a directory, or nano."""
    rounds: int = 9
    """Alternating rounds of each way."""
    swaps: int = 100
    """Under load."""
    requests: int = 32
    """That run meanwhile."""

    def run(self) -> None:
        """Measure and print."""
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(NANO if self.model == "nano" else self.model)
            if self.model == "qwen3-0.6b":
                directory = Path(folder)
                write_random_model(QWEN3_SHAPE, directory)
            print(json.dumps(self.measure(directory), indent=2))

    def measure(self, directory: Path) -> dict[str, Any]:
        """Seconds and ratios; what was lost and compiled under load, and memory."""
        from slipway.checkpoint import files

        checkpoint = files.open_checkpoint(directory)
        arrays = {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}
        llm = LLM(directory, max_num_seqs=self.requests, max_model_len=256, skip_tokenizer_init=True)
        figures: dict[str, Any] = {"weights_gb": sum(x.nbytes for x in arrays.values()) / 1e9}
        figures |= _times(llm, directory, arrays, self.rounds)
        figures["under_load"] = asyncio.run(_under_load(llm, arrays, self.swaps, self.requests))
        return figures


def _times(llm: LLM, directory: Path, arrays: dict[str, np.ndarray], rounds: int) -> dict[str, Any]:
    """Medians of each way, by turns. All memory that is written to has been touched before."""
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
                view, held = memoryview(buffer.data), 0
                while count := file.readinto(view[held:]):
                    held += count

    ways: dict[str, Callable[[], Any]] = {
        "memcpy": copy, "from_arrays": lambda: llm.update_weights(arrays),
        "read_file": read, "from_files": lambda: llm.update_weights(directory),
    }  # fmt: skip
    beside: dict[str, Callable[[], Any]] = {
        "memcpy": copy, "from_arrays_atomic": lambda: llm.update_weights(arrays, mode="atomic"),
        "read_file": read, "from_files_atomic": lambda: llm.update_weights(directory, mode="atomic"),
    }  # fmt: skip
    return {
        "inplace": _by_turns(ways, rounds),
        "atomic": _by_turns(beside, rounds),
    }  # an exchange in place frees memory


def _by_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Medians, lowest and highest, and the two ratios."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 2):  # two sets of memory are touched for the first time
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
    copied, from_arrays, read, from_files = (statistics.median(times[2:]) for times in taken.values())
    return {
        "first_s": {name: round(times[0], 4) for name, times in taken.items()},
        "median_s": {name: round(statistics.median(times[2:]), 4) for name, times in taken.items()},
        "spread_s": {name: [round(min(times[2:]), 4), round(max(times[2:]), 4)] for name, times in taken.items()},
        "arrays_to_memcpy": round(from_arrays / copied, 2),
        "files_to_reading": round(from_files / read, 2),
    }


async def _under_load(llm: LLM, arrays: dict[str, np.ndarray], swaps: int, requests: int) -> dict[str, Any]:
    """Exchange weights while as many requests always run."""
    from slipway.async_engine import AsyncEngine

    engine, compiled = AsyncEngine(llm.engine), llm.engine.num_compiled
    rng, ended, going, begun = np.random.default_rng(0), [0, 0], True, 0

    async def client() -> None:
        nonlocal begun
        while going:
            prompt = rng.integers(0, llm.engine.limits.vocab_size, PROMPT_TOKENS).tolist()
            params, count, begun = (
                SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True),
                0,
                begun + 1,
            )
            async for delta in engine.generate(prompt, params):
                count += sum(len(sample.token_ids) for sample in delta.outputs)
            ended[count == OUTPUT_TOKENS] += 1

    clients = [asyncio.create_task(client()) for _ in range(requests)]
    await asyncio.sleep(1)
    memory, seconds = [], []
    for number in range(swaps):
        started = time.perf_counter()
        await engine.update_weights(arrays, policy=POLICIES[number % len(POLICIES)])
        seconds.append(time.perf_counter() - started)
        memory.append(_resident_mb())
    going = False
    await asyncio.gather(*clients)
    versions = engine.weights_version
    new_programs = llm.engine.num_compiled - compiled
    await asyncio.to_thread(engine.close)
    return {
        "swaps": swaps, "version": versions, "requests_begun": begun, "requests_whole": ended[1],
        "requests_lost": begun - ended[1], "compilations": new_programs,
        "median_s": {
            policy: round(statistics.median(seconds[number::3]), 3)
            for number, policy in enumerate(POLICIES) if seconds[number::3]
        },
        "resident_mb": {"after_10": memory[min(10, swaps) - 1], "after_all": memory[-1], "most": max(memory)},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def _resident_mb() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("swap", SwapBench)


if __name__ == "__main__":
    main()
