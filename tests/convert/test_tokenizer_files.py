"""Tokenizer files: names that transformers' tokenizers read, and copies."""

import re
import shutil
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer

from slipway.checkpoint.quantize import Scheme
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source
from slipway.convert.quantize_directory import quantize_directory
from slipway.convert.tokenizer import copy_tokenizer, tokenizer_files
from tests.convert.twins import NANO

OTHERS = [
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "tokenizer.4.0.0.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
]
NO_TOKENIZER = [
    "config.json",
    "modeling.py",
    "tokenization_x.py",
    "model.safetensors",
    "pytorch_model.bin",
    "additional_chat_templates/x.py",
    "onnx/tokenizer.json",
    "README.md",
]


def names_of_transformers() -> set[str]:
    """Return every file name that a tokenizer of transformers lists."""
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization*.py")
    tables = (
        re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL)
        for path in sources
    )
    return {
        name for found in tables for table in found for name in re.findall(r':\s*"([^"]+)"', table)
    }


def test_all_files_that_belong_to_a_tokenizer_are_copied(tmp_path):
    wanted = {*names_of_transformers(), *OTHERS}
    assert {"spiece.model", "sentencepiece.bpe.model", "merges.txt"} < wanted
    for name in (*wanted, *NO_TOKENIZER):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    assert len(tokenizer_files(tmp_path / "from")) == len(wanted), "each once"
    (tmp_path / "to").mkdir()
    copy_tokenizer(tmp_path / "from", tmp_path / "to")
    copies = [path for path in (tmp_path / "to").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "to")) for path in copies} == wanted
    assert all(path.read_text() == str(path.relative_to(tmp_path / "to")) for path in copies)


@pytest.fixture
def templated(tmp_path) -> Path:
    """A copy of nano with named templates."""
    folder = Path(shutil.copytree(NANO, tmp_path / "templated"))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


def test_named_templates_go_along(templated, tmp_path):
    before = AutoTokenizer.from_pretrained(templated).chat_template
    assert sorted(before) == ["default", "tool_use"]
    convert(
        open_source(NANO),
        tmp_path / "out",
        ConvertConfig(config=NANO, tokenizer=templated, mapping="hf"),
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == before
    quantize_directory(str(templated), tmp_path / "packed", Scheme(8, 0))
    assert AutoTokenizer.from_pretrained(tmp_path / "packed").chat_template == before
