"""Examples: they run and print what their documentation says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lines(*command, devices=1, code=0):
    """Return the JSON objects that a command prints."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags}
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def test_weight_swap():
    ready, swapped, said = lines("examples/weight_swap.py", "--tp", "2", devices=2)
    phases = [line["phase"] for line in (ready, swapped, said)]
    assert phases == ["engine_ready_dummy", "weights_swapped", "generate_result"]
    assert [line["weights_version"] for line in (ready, swapped, said)] == ["0", "1", "1"]
    assert {line["leaves"] for line in (ready, swapped, said)} == {68}
    assert said["tp"] == 2
    assert said["text"]
    assert len(said["token_ids"]) == 32
    assert said["weights"] == [[0, "1"]]


def test_weight_swap_says_what_went_wrong(tmp_path):
    *_, error = lines("examples/weight_swap.py", "--weights", str(tmp_path), code=1)
    assert (error["phase"], error["during"]) == ("weights_swap_error", "weights_swapped")
    assert error["error"] == "CheckpointError"
    assert error["hint"]
    assert "model.safetensors" in error["message"]


def test_grpo():
    first, second = lines("-m", "examples.grpo_nano", "--steps", "2", "--group", "2")
    assert (first["weights_version"], second["weights_version"]) == ("1", "2")
    apart = max(first["logprobs_apart"], second["logprobs_apart"])
    assert apart < 1e-4, "the engine samples with the trainer's weights"
    assert 0 <= first["reward"] <= 1
