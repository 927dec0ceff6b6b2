"""The runner of other engines' tests: its files, its counts, and vLLM's flags as ours."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import rivals_tests

pytestmark = pytest.mark.host


@pytest.fixture
def standin(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "template.jinja").write_text("plain")
    monkeypatch.setenv("SLIPWAY_COMMAND", '["slipway", "serve"]')
    monkeypatch.setenv("SLIPWAY_MODELS", json.dumps({"": str(tmp_path / "model"), "a/b": "/other"}))
    monkeypatch.setenv("SLIPWAY_TEMPLATE", str(tmp_path / "template.jinja"))
    monkeypatch.setenv("SLIPWAY_THINKING_TEMPLATE", str(tmp_path / "thinking.jinja"))
    return importlib.reload(importlib.import_module("benchmarks.rivals_standin"))


def test_flags_are_translated_and_unknown_ones_stay(standin, tmp_path):
    given = [
        "--dtype=bfloat16",
        "--enforce-eager",
        "--max-model-len",
        "2048",
        "--lora-modules",
        "x=y",
        "z=w",
    ]
    words = standin.translated(
        "a/b", [*given, "--max-logprobs", "151936", "--root-path", "/llm"], {}
    )
    assert words[0] == "/other" and words[words.index("--served-model-name") + 1] == "a/b"
    assert json.loads(words[words.index("--hf-overrides") + 1]) == {"max_position_embeddings": 2048}
    assert (
        words[words.index("--max-logprobs") + 1] == "-1"
        and words[words.index("--root-path") + 1] == "/llm"
    )
    assert not {"--enforce-eager", "--lora-modules", "x=y", "z=w", "bfloat16"} & set(words)
    assert words[words.index("--chat-template") + 1] == str(tmp_path / "template.jinja")
    thinking = standin.translated(
        "c", ["--reasoning-parser", "qwen3", "--served-model-name", "d"], {}
    )
    assert thinking[0] == str(tmp_path / "model") and thinking.count("--served-model-name") == 1
    assert thinking[thinking.index("--chat-template") + 1] == str(tmp_path / "thinking.jinja")
    as_text = standin.translated("c", ["--chat-template", "{{ a }}\n{{ b }}"], {})
    written = Path(as_text[as_text.index("--chat-template") + 1])
    assert written.read_text() == "{{ a }}\n{{ b }}"


def test_files_that_start_a_server_are_taken(tmp_path):
    root = tmp_path / "entrypoints"
    texts = {
        "openai/test_a.py": "RemoteOpenAIServer",
        "openai/test_unit.py": "nothing",
        "openai/helper.py": "",
        "multimodal/test_b.py": "RemoteOpenAIServer",
        "serve/conftest.py": "RemoteOpenAIServer",
        "serve/test_c.py": "",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    chosen, left_out = rivals_tests.files(tmp_path, [])
    assert chosen == ["openai/test_a.py", "serve/test_c.py"]
    assert left_out == {"multimodal/test_b.py": "pictures and sound"}
    assert rivals_tests.files(tmp_path, ["multimodal/*"])[0] == ["multimodal/test_b.py"]


def test_a_test_counts_once_and_its_worst_outcome(capsys):
    def outcome(test, outcome, why=""):
        return {"test": test, "outcome": outcome, "why": why, "where": ""}

    outcomes = [
        outcome("a", "passed"),
        outcome("a", "failed", "\n  tear-down\nmore"),
        outcome("b", "passed"),
    ]
    outcomes += [outcome("c", "skipped"), outcome("d", "failed", "tear-down")]
    result = rivals_tests.counted(outcomes, "missing")
    assert (result["passed"], result["failed"], result["skipped"], result["error"]) == (1, 2, 1, "")
    assert rivals_tests.counted([], "missing")["error"] == "missing"
    rivals_tests.report({"x.py": result}, {})
    printed = capsys.readouterr().out
    assert "2: tear-down" in printed and "1 passed, 2 failed, 1 skipped in 1 files" in printed
