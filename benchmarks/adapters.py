"""`slipway bench adapters`: our model classes through tpu-inference's own loader and step, beside transformers.

Decides where vLLM for TPUs and MaxText are installed (in the user's cache: Python 3.12, some 11 GB) and what is run
there. On a host without a TPU the kernels are replaced by their own references.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import slipway
from benchmarks import environments, script


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
        python = environments.vllm_tpu(self.python)
        found = self.measure(environments.maxtext(python) if self.maxtext else python)
        print(json.dumps(found, indent=2))

    def measure(self, python: Path) -> dict[str, Any]:
        """What the child found."""
        child = Path(__file__).with_name("worker_maxtext.py" if self.maxtext else "worker_tpu_inference.py")
        flags = f"--xla_force_host_platform_device_count={self.tensor_parallel_size}"
        command = [str(python), "-P", str(child), str(self.tensor_parallel_size)]
        with tempfile.TemporaryDirectory() as folder:
            # the two packages, and nothing else of this environment
            for package in (Path(__file__).parent, Path(slipway.__file__).parent):
                (Path(folder) / package.name).symlink_to(package)
            variables = {
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": folder,
            } | ({"NEW_MODEL_DESIGN": "1"} if self.maxtext else {})  # fmt: skip
            ran = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | variables, text=True, check=True)
        return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("adapters", AdaptersBench)


if __name__ == "__main__":
    main()
