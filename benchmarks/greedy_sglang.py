"""Greedy tokens of SGLang's engine on a CPU beside Slipway's, from one directory, in float32.

Not here: the comparison (greedy.py), what runs in SGLang's environment (worker_greedy_sglang.py).
"""

import dataclasses

from benchmarks import environments, script
from benchmarks.greedy import GreedyBench, OtherEngine


@dataclasses.dataclass(frozen=True, kw_only=True)
class SglangBench(GreedyBench):
    """Greedy tokens and log-probabilities of a directory, ours beside SGLang's.

    With --twin: those of transformers beside SGLang's.
    """

    def other(self) -> OtherEngine:
        """Describe SGLang's engine with torch's operations, installed on the first call."""
        return OtherEngine(
            name="sglang",
            python=environments.sglang(),
            script="worker_greedy_sglang.py",
            variables={},
        )


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("greedy_sglang", SglangBench)


if __name__ == "__main__":
    main()
