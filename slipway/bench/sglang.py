"""`slipway bench sglang`: whether SGLang and our engine choose the same tokens from one directory, greedy, in float32.

Decides how SGLang is installed for a CPU, in a virtual environment of its own in the user's cache: without what it
requires for CUDA, beside the torch that PyPI builds for CPUs. sglang_greedy.py says what is missing then.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

from slipway.bench.greedy import GreedyBench, Program

PACKAGE = "sglang==0.5.23"
NEEDED = (  # of its some seventy requirements those that a text model's imports reach
    "torch==2.13.0", "transformers==5.19.0", "triton", "xgrammar==0.2.7", "apache-tvm-ffi==0.1.11",
    "compressed-tensors==0.18.0", "openai==2.8.0", "llguidance<2.0.0", "fastapi", "uvicorn", "uvloop",
    "python-multipart", "aiohttp", "requests", "orjson", "pybase64", "msgspec", "pyzmq", "psutil", "setproctitle",
    "prometheus-client", "partial-json-parser", "interegular", "IPython", "einops", "gguf", "scipy", "pillow", "dill",
    "cloudpickle", "xxhash", "zstandard", "tiktoken", "sentencepiece", "watchfiles", "nvidia-ml-py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SglangBench(GreedyBench):
    """Greedy tokens and log-probabilities of a directory, ours beside SGLang's; or transformers', of a torch twin."""

    def program(self) -> Program:
        """SGLang's engine on torch's own operations."""
        return Program("sglang", environment(), "sglang_greedy.py", {})


def environment() -> Path:
    """The Python of an environment that has SGLang; made, and some 1 GB fetched, on the first call."""
    folder = Path.home() / ".cache" / "slipway" / "peers" / "sglang"
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *NEEDED], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", PACKAGE], check=True)
        stamp.touch()
    return python
