"""Small tokenizers of each kind, trained here on the docstrings of Python's library."""

import argparse
import asyncio
import collections
import difflib
import json
import logging
import pathlib
import subprocess
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from slipway.codec.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus() -> list[str]:
    modules = (argparse, asyncio, collections, difflib, json, logging, pathlib, subprocess)
    owners = [owner for module in modules for owner in (module, *vars(module).values())]
    docs = {owner.__doc__ for owner in owners if isinstance(owner.__doc__, str)}
    return [*sorted(docs), "naïve café, déjà vu — “quoted” 日本語のテキスト 😀😀 \t\n"]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE, as in Qwen and Llama 3."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    raw.add_tokens(["<think>", "naïve tag"])
    return raw


def byte_fallback() -> tokenizers.Tokenizer:
    """BPE with byte fallback, as in Llama 2."""
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # makes words into tokens; Llama 2 has no pre-tokenizer
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    text = [doc for doc in corpus() if doc.isascii()]
    raw.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=700, special_tokens=tokens, show_progress=False)
    )
    raw = tokenizers.Tokenizer.from_str(_as_llama(raw.to_str()))
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return raw


def metaspace(scheme: str = "always") -> tokenizers.Tokenizer:
    """Unigram, as in T5: the decoder strips only the first token, or none with scheme "never"."""
    raw = tokenizers.Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(corpus()[:60], trainer)
    return raw


def no_decoder() -> tokenizers.Tokenizer:
    """Whole words joined by spaces, without a decoder."""
    words = ["<unk>", "</s>", *sorted({word for text in corpus()[:40] for word in text.split()})]
    raw = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<unk>", "</s>"])
    return raw


def word_piece() -> tokenizers.Tokenizer:
    """WordPiece, as in BERT: "##ing" continues a word, and no space remains before a comma."""
    raw = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    raw.train_from_iterator(corpus()[:60], trainer)
    ends = [(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return raw


TOKENIZERS = {
    "byte_level": (byte_level, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "byte_fallback": (
        byte_fallback,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "metaspace": (metaspace, {"eos_token": "</s>", "unk_token": "<unk>"}),
    "metaspace_never": (lambda: metaspace("never"), {"eos_token": "</s>", "unk_token": "<unk>"}),
    "metaspace_first": (lambda: metaspace("first"), {"eos_token": "</s>", "unk_token": "<unk>"}),
    "word_piece": (
        word_piece,
        {"cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
    ),
    "no_decoder": (no_decoder, {"eos_token": "</s>", "unk_token": "<unk>"}),
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory for each tokenizer, as transformers saves it."""
    found = {}
    for name, (build, special_tokens) in TOKENIZERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        fast = PreTrainedTokenizerFast(tokenizer_object=build(), **special_tokens)
        fast.chat_template = CHATML
        fast.save_pretrained(found[name])
    return found


@pytest.fixture(scope="session", params=TOKENIZERS)
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def _as_llama(source: str) -> str:
    """Make the byte tokens ordinary ones.

    A trainer can reserve them only as special tokens, which decoding would leave out.
    """
    config = json.loads(source) | {"pre_tokenizer": None}
    config["added_tokens"] = [
        token for token in config["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return json.dumps(config)
