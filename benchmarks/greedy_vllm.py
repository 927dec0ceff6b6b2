"""Greedy tokens of vLLM's build for CPUs beside Slipway's, from one directory, in float32.

Not here: the comparison (greedy.py), what runs in vLLM's environment (worker_greedy_vllm.py).
"""

import dataclasses

from benchmarks import environments, script
from benchmarks.greedy import GreedyBench, OtherEngine


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmBench(GreedyBench):
    """Greedy tokens and log-probabilities of a directory, ours beside vLLM's.

    With --twin: those of transformers beside vLLM's.
    """

    def other(self) -> OtherEngine:
        """Describe vLLM's build for CPUs, installed on the first call."""
        return OtherEngine(
            name="vllm",
            python=environments.vllm(),
            script="worker_greedy_vllm.py",
            variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
        )


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("greedy_vllm", VllmBench)


if __name__ == "__main__":
    main()
