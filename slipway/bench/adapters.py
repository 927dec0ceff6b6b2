"""`slipway bench adapters`: our model classes through tpu-inference's own loader and step, beside transformers.

Decides where vLLM for TPUs and MaxText are installed (in the user's cache: Python 3.12, some 11 GB) and what is run
there. On a host without a TPU the kernels are replaced by their own references.
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
MAXTEXT = ("maxtext==0.2.5", "qwix==0.1.8")  # tpu-inference pins a qwix that MaxText cannot import
MAXTEXT_NEEDS = ("omegaconf==2.4.0", "grain==0.2.18", "aqtp==0.9.0", "drjax==0.2.1", "jsonlines", "ml-collections")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersBench:
    """Logits of random models inside tpu-inference and in transformers: prompts in chunks, then decoding."""

    python: str = "python3.12"
    """For the virtual environment."""
    tensor_parallel_size: int = 1
    """Virtual devices of the CPU."""
    maxtext: bool = False
    """MaxText's models instead of ours: MaxText is installed beside."""

    def run(self) -> None:
        """Compare and print."""
        python = environment(self.python)
        found = self.measure(maxtext_environment(python) if self.maxtext else python)
        print(json.dumps(found, indent=2))

    def measure(self, python: Path) -> dict[str, Any]:
        """What the child found."""
        child = Path(__file__).with_name("worker_maxtext.py" if self.maxtext else "worker_tpu_inference.py")
        flags = f"--xla_force_host_platform_device_count={self.tensor_parallel_size}"
        command = [str(python), "-P", str(child), str(self.tensor_parallel_size)]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "slipway").symlink_to(Path(__file__).parents[1])  # and nothing else of this environment
            variables = {
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": folder,
            } | ({"NEW_MODEL_DESIGN": "1"} if self.maxtext else {})  # fmt: skip
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


def maxtext_environment(vllm: Path) -> Path:
    """The Python of an environment that has MaxText, and behind its own packages those of ``vllm``'s environment."""
    folder = Path.home() / ".cache" / "slipway" / "peers" / "maxtext"
    inside, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.exists():
        subprocess.run([str(vllm), "-m", "venv", str(folder)], check=True, stdout=sys.stderr)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        theirs, ours = (
            subprocess.run([str(python), "-c", where], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            for python in (vllm, inside)
        )
        Path(ours, "vllm_tpu.pth").write_text(theirs + "\n")
        for packages in (("--no-deps", *MAXTEXT), MAXTEXT_NEEDS):
            subprocess.run([str(inside), "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        stamp.touch()
    return inside
