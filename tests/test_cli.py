"""Command line: its output, and short refusals with exit code 2."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slipway import cli, parity
from slipway.errors import CheckpointError
from slipway.models import ARCHITECTURES

CHECKPOINT = "training/checkpoint"


@pytest.fixture
def slipway(monkeypatch, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["slipway", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.host
@pytest.mark.parametrize("name", cli.PROGRESS_LOGGERS)
def test_progress_is_logged_by_a_module_that_exists(name):
    assert importlib.import_module(name).logger.name == name


@pytest.mark.host
def test_models_lists_every_architecture(slipway, monkeypatch):
    monkeypatch.setattr(cli.hub, "cached", lambda: ["somebody/something"])
    code, out, _ = slipway("models")
    assert code == 0
    for name in (*ARCHITECTURES, "nano", "somebody/something"):
        assert name in out


REFUSED = {
    "no model": (["generate", "{empty}", "-p", "x"], "config.json"),
    "no directory": (["generate", "{empty}/absent", "-p", "x"], "no such directory"),
    "an option out of range": (["generate", "nano", "-p", "x", "--page-size", "0"], "page_size"),
    "options that contradict": (
        ["generate", "nano", "-p", "x", "--max-num-seqs", "999"],
        "max_num_batched_tokens",
    ),
    "a parameter out of range": (
        ["generate", "nano", "-p", "x", "--temperature", "-1"],
        "temperature",
    ),
    "too many devices": (
        ["generate", "nano", "-p", "x", "--tensor-parallel-size", "64"],
        "at most 8 devices",
    ),
    "no prompt": (["generate", "nano"], "--prompt"),
    "no such command": (["serv"], "serv"),
    "no such flag": (["generate", "nano", "-p", "x", "--temprature", "1"], "temprature"),
    "broken JSON": (["generate", "nano", "-p", "x", "--hf-overrides", "{"], "hf-overrides"),
}


@pytest.mark.host
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_words(slipway, tmp_path, name):
    words, expected = REFUSED[name]
    filled = [word.format(empty=tmp_path) if "{e" in word else word for word in words]
    code, out, err = slipway(*filled)
    assert code == 2
    assert out == ""
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.host
def test_a_refusal_is_one_line(slipway):
    _, _, err = slipway("generate", "nano", "-p", "x", "--tensor-parallel-size", "64")
    assert err.count("\n") == 1
    assert err.startswith("slipway: InvalidConfig: ")


def test_generate_prints_the_prompt_and_what_follows():
    command = Path(sys.executable).parent / "slipway"
    options = ["--max-tokens", "4", "--max-num-batched-tokens", "2"]
    words = [command, "generate", "-p", "def f(", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(")
    assert len(done.stdout.strip()) > len("def f(")


def test_convert_verifies_with_the_engine_and_transformers(slipway, tmp_path):
    files = ["--config", cli.NANO, "--tokenizer", cli.NANO]
    code, out, err = slipway("convert", CHECKPOINT, tmp_path / "out", *files, "--verify")
    assert code == 0, err
    assert "68 of 68 written ones are bit for bit" in out
    assert "slipway and transformers agree on 32 tokens" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["logits"]["same_choices"]
    assert report["logits"]["max_logprob_difference"] < 1e-4


DEFAULT_ROPE = Path(__file__).parent / "data" / "maxtext" / "llama3_default_rope_orbax"
ORIGINAL = (DEFAULT_ROPE / "ids.npy", DEFAULT_ROPE / "logits.npy")
NOT_COMPARED = "not compared with the original's logits"


@pytest.mark.parametrize("mapping", ["maxtext-halves", "maxtext-interleaved"])
def test_verify_without_the_originals_logits_is_only_consistent(slipway, mapping, tmp_path):
    options = ["--config", DEFAULT_ROPE, "--mapping", mapping, "--verify"]
    code, out, err = slipway("convert", DEFAULT_ROPE, tmp_path / "out", *options)
    assert code == 0, err
    assert out.splitlines()[-1] == NOT_COMPARED
    assert "a wrong rule has a wrong inverse" in out
    assert f"as --mapping {mapping} says" in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["original"] is None


@pytest.mark.host
@pytest.mark.parametrize("to", ["maxtext", "npz", "orbax"])
def test_verify_of_the_way_back_says_so_too(slipway, to, tmp_path):
    directory = DEFAULT_ROPE.parent / "hf_llama"
    code, out, err = slipway("convert", directory, tmp_path / "out", "--to", to, "--verify")
    assert code == 0, err
    assert out.splitlines()[-1] == NOT_COMPARED


def test_expected_logits_pass_the_right_rule_and_fail_the_wrong_one(slipway, tmp_path):
    words = ["--config", DEFAULT_ROPE, "--expect", *ORIGINAL]
    code, out, err = slipway("convert", DEFAULT_ROPE, tmp_path / "out", *words)
    assert code == 0, err
    assert "likeliest token the same at 100.0% of 32 positions" in out.splitlines()[-1]
    assert NOT_COMPARED not in out
    original = json.loads((tmp_path / "out" / "report.json").read_text())["original"]
    assert original["max_difference"] < 1e-4
    assert original["quantity"] == "logits"
    words += ["--mapping", "maxtext-interleaved"]
    code, _, err = slipway("convert", DEFAULT_ROPE, tmp_path / "wrong", *words)
    assert code == 2
    assert "differ from the original's by 3.8" in err
    assert "Traceback" not in err


@pytest.mark.host
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--expect", *ORIGINAL, "--explain"], "expect"),
        (["--expect", *ORIGINAL, "--to", "maxtext"], "--to hf"),
        (["--expect-tolerance", "0.1"], "expect_tolerance"),
        (["--expect", *ORIGINAL, "--expect-tolerance", "0"], "above 0"),
        (["--expect", *ORIGINAL, "--expect-tolerance", "nan"], "above 0"),
        (["--expect", "nowhere.npy", ORIGINAL[1]], "nowhere.npy"),
        (["--expect", ORIGINAL[1], ORIGINAL[0]], "integers"),
    ],
)
def test_expect_is_honoured_or_refused_before_anything_is_written(slipway, words, told, tmp_path):
    words = ["--config", DEFAULT_ROPE, *words]
    code, _, err = slipway("convert", DEFAULT_ROPE, tmp_path / "out", *words)
    assert code == 2
    assert told in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_parity_notices_another_model(tmp_path, monkeypatch):
    answers = parity._complete(Path(cli.NANO), [list(range(100, 124))] * 4)
    monkeypatch.setattr(parity, "_complete", lambda directory, prompts: answers)
    other = shutil.copytree(cli.NANO, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="differ by"):
        parity.compare(other, config["vocab_size"])


@pytest.mark.host
def test_convert_explains_and_writes_nothing(slipway, tmp_path):
    words = ["--config", cli.NANO, "--explain"]
    code, out, _ = slipway("convert", CHECKPOINT, tmp_path / "out", *words)
    assert code == 0
    assert not (tmp_path / "out").exists()
    assert "layers.0.mlp.down_proj.kernel" in out
    assert "mlp embed -> embed mlp" in out


@pytest.mark.host
def test_convert_refuses_with_all_problems_and_leaves_nothing(slipway, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "num_attention_heads": 3}')
    config = tmp_path / "config.json"
    code, _, err = slipway("convert", CHECKPOINT, tmp_path / "out", "--config", config)
    assert code == 2
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    for field in ("num_attention_heads: got 3", "rope_theta: missing", "rms_norm_eps: missing"):
        assert field in err


@pytest.mark.host
def test_the_command_line_and_conversion_start_without_jax():
    code = "import sys, slipway.cli, slipway.convert.conversion; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
