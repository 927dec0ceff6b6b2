"""Tokenizer files of a model: names, copies, and checks against the vocabulary.

Not here: tokenization (slipway/codec/tokenizer.py).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
# The files that transformers, mistral-common and tiktoken read; no code.
PATTERNS = (
    "tokenizer.json", "tokenizer.*.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab-*.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt",
    "emoji.json", "byte_maps.json", "entity_vocab.json", "target_vocab.json", "normalizer.json",
    "word_shape.json",
    "word_pronunciation.json", "prophetnet.tokenizer",
    "*.model", "tokenizer.model.v*", "*.spm", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def tokenizer_files(directory: Path | None) -> list[Path]:
    """Return the paths of the tokenizer's and the processor's files in ``directory``."""
    if directory is None:
        return []
    return [
        path for pattern in PATTERNS for path in sorted(directory.glob(pattern)) if path.is_file()
    ]


def copy_tokenizer(directory: Path | None, target: Path) -> None:
    """Copy the tokenizer's files and chat templates from ``directory`` to ``target``."""
    for path in tokenizer_files(directory):
        assert directory is not None
        copy = target / path.relative_to(directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def generation_file(config: Path | None, source: Path | None) -> Path | None:
    """Return the path of the generation_config.json that belongs to the config.json, if any."""
    directory = config or source
    return (
        directory / GENERATION
        if directory is not None and (directory / GENERATION).is_file()
        else None
    )


def tokenizer_problems(
    directory: Path | None, generation: Path | None, config: Mapping[str, Any]
) -> Iterator[str]:
    """Yield ids beyond the vocabulary, and a directory without a tokenizer."""
    vocab_size = config.get("vocab_size")
    if directory is not None:
        if not tokenizer_files(directory):
            yield f"{directory}: no tokenizer files"
        elif (directory / "tokenizer.json").is_file() and isinstance(vocab_size, int):
            yield from _beyond(
                directory / "tokenizer.json", _largest_id(directory / "tokenizer.json"), vocab_size
            )
    if generation is not None and isinstance(vocab_size, int):
        values = json.loads(generation.read_bytes())
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = values.get(field)
            numbers = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
            yield from _beyond(f"{GENERATION}: {field}", max(numbers, default=-1), vocab_size)


def _beyond(where: object, largest: int, vocab_size: int) -> Iterator[str]:
    if largest >= vocab_size:
        yield f"{where}: id {largest}, but the vocabulary has {vocab_size} entries (vocab_size)"


def _largest_id(path: Path) -> int:
    content = json.loads(path.read_bytes())
    vocab = content["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    return max([*ids, *(token["id"] for token in content.get("added_tokens", []))], default=-1)
