"""`slipway bench vllm`: whether vLLM and our engine choose the same tokens from one directory, greedy, in float32.

Decides where vLLM is installed: in a virtual environment of its own in the user's cache, because it pins much.
"""

import dataclasses

from benchmarks import environments, script
from benchmarks.greedy import GreedyBench, Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmBench(GreedyBench):
    """Greedy tokens and log-probabilities of a directory, ours beside vLLM's; or transformers', of a torch twin."""

    def program(self) -> Program:
        """vLLM's build for CPUs."""
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        return Program("vllm", environments.vllm(), "worker_greedy_vllm.py", variables)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("greedy_vllm", VllmBench)


if __name__ == "__main__":
    main()
