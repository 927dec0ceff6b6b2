"""`slipway bench adapters`: our model classes through tpu-inference's own loader and step, beside transformers.

Decides where vLLM for TPUs is installed (in the user's cache: Python 3.12, some 11 GB) and what is compared there. On a
host without a TPU its attention kernel is replaced by its own reference, called back from the compiled step.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slipway.errors import InvalidConfig

PACKAGE = "vllm-tpu==0.32.0"
CHILD = Path(__file__).parent / "worker_tpu_inference.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersBench:
    """Logits of a random Qwen3 inside tpu-inference and in transformers: prompts in chunks, then decoding."""

    python: str = "python3.12"
    """For the virtual environment."""
    tensor_parallel_size: int = 1
    """Virtual devices of the CPU."""

    def run(self) -> None:
        """Compare and print."""
        print(json.dumps(self.measure(environment(self.python)), indent=2))

    def measure(self, python: Path) -> dict[str, Any]:
        """What the child found."""
        flags = f"--xla_force_host_platform_device_count={self.tensor_parallel_size}"
        command = [str(python), "-P", str(CHILD), str(self.tensor_parallel_size)]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "slipway").symlink_to(Path(__file__).parents[1])  # and nothing else of this environment
            variables = {
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": folder,
            }  # fmt: skip
            ran = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | variables, text=True, check=True)
        return json.loads(ran.stdout.splitlines()[-1])


def environment(python: str) -> Path:
    """The Python of an environment that has vLLM for TPUs; made on the first call."""
    folder = Path.home() / ".cache" / "slipway" / "peers" / "vllm_tpu"
    inside, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists():
        if shutil.which(python) is None:
            raise InvalidConfig("python", python, "a Python 3.12 that is installed: vllm-tpu wants that")
        subprocess.run([python, "-m", "venv", str(folder)], check=True, stdout=sys.stderr)
        subprocess.run([str(inside), "-m", "pip", "install", "--quiet", PACKAGE], check=True, stdout=sys.stderr)
        stamp.touch()
    return inside
