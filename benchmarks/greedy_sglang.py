"""`slipway bench sglang`: whether SGLang and our engine choose the same tokens from one directory, greedy, in float32.

Decides how SGLang is installed for a CPU, in a virtual environment of its own in the user's cache: without what it
requires for CUDA, beside the torch that PyPI builds for CPUs. sglang_greedy.py says what is missing then.
"""

import dataclasses

from benchmarks import environments, script
from benchmarks.greedy import GreedyBench, Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class SglangBench(GreedyBench):
    """Greedy tokens and log-probabilities of a directory, ours beside SGLang's; or transformers', of a torch twin."""

    def program(self) -> Program:
        """SGLang's engine on torch's own operations."""
        return Program("sglang", environments.sglang(), "worker_greedy_sglang.py", {})


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("greedy_sglang", SglangBench)


if __name__ == "__main__":
    main()
