"""Tokenizer of nano: byte-level BPE with 4,096 entries, for Python sources.

This module sets the pre-tokenizer, the special tokens and the chat template.

Not here: the text that it is trained on (data.py).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.data import END_OF_TEXT, TURN_END, TURN_START

VOCABULARY_SIZE = 4096

# Qwen2's pattern with two changes. It has no English contractions ('s begins a string in Python),
# and
# a line break includes the next line's indentation except its last space, which belongs to the next
# word as everywhere else.
_LINE_BREAK = r"[\r\n]+(?:[ \t]+(?=[ \t]))?"
PRE_TOKENIZER_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        rf" ?[^\s\p{{L}}\p{{N}}]+(?:{_LINE_BREAK})?",
        rf"\s*{_LINE_BREAK}",
        r"\s+(?!\S)",
        r"\s+",
    )
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer on texts.

    Encoding and decoding give any text back: there is no normalizer, and all 256 bytes are entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The class is transformers' generic one, which uses tokenizer.json unchanged; its Qwen2 classes
    would replace the pre-tokenizer by their own.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
