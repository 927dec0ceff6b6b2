"""Slipway's and MaxText's model classes inside tpu-inference, compared with transformers.

The classes run through tpu-inference's own loader and step, in an environment that has vLLM for
TPUs (Python 3.12, some 11 GB). On a host without a TPU its kernels are replaced by their
references. Not here: the environments (environments.py), the comparison (worker_tpu_inference.py
and worker_maxtext.py).
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

WORKER = Path(__file__).with_name("worker_tpu_inference.py")
WORKER_MAXTEXT = Path(__file__).with_name("worker_maxtext.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersBench:
    """Logits of random models in tpu-inference and in transformers: prompts, then decoding."""

    python: str = "python3.12"
    """Interpreter for the virtual environment."""
    tensor_parallel_size: int = 1
    """Virtual devices of the CPU."""
    maxtext: bool = False
    """Compare MaxText's models instead of Slipway's; MaxText is installed, too."""

    def run(self) -> None:
        """Compare and print."""
        python = environments.vllm_tpu(self.python)
        found = self.measure(environments.maxtext(python) if self.maxtext else python)
        print(json.dumps(found, indent=2))

    def measure(self, python: Path) -> dict[str, Any]:
        """Run the comparison with the Python of another environment, and return its results."""
        worker = WORKER_MAXTEXT if self.maxtext else WORKER
        command = [str(python), "-P", str(worker), str(self.tensor_parallel_size)]
        with tempfile.TemporaryDirectory() as folder:
            # the two packages, and nothing else of this environment
            for package in (Path(__file__).parent, Path(slipway.__file__).parent):
                (Path(folder) / package.name).symlink_to(package)
            devices = f"--xla_force_host_platform_device_count={self.tensor_parallel_size}"
            variables = {
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": devices,
                "VLLM_LOGGING_LEVEL": "ERROR",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": folder,
            }
            if self.maxtext:
                variables["NEW_MODEL_DESIGN"] = "1"
            ran = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                env=os.environ | variables,
                text=True,
                check=True,
            )
        return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("adapters", AdaptersBench)


if __name__ == "__main__":
    main()
