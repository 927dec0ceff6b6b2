"""Tokenizer of a tiktoken vocabulary file, as Qwen 1 has it (qwen.tiktoken).

A line of the file is a token's bytes in base64, and its rank. The pattern that cuts a text, the
special tokens behind the vocabulary and the chat template are code in Qwen's repository; they are
restated here, because code of a repository is never imported.

Not here: tokenizer.json (tokenizer.py).
"""

import base64
import binascii
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from slipway.errors import CheckpointError

# Pattern that cuts a text into words before merges are applied within them.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, BEGIN_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NUM_EXTRAS = 205
SPECIAL = (END, BEGIN_TURN, END_TURN, *(f"<|extra_{i}|>" for i in range(NUM_EXTRAS)))
# Turns of Qwen-Chat, with its system prompt if a conversation has none.
CHAT_TEMPLATE = (
    "{% if messages and messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def find(directory: Path) -> Path | None:
    """Return the vocabulary file of a directory, or None."""
    found = sorted(directory.glob("*.tiktoken"))
    return found[0] if found else None


def load(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a vocabulary file.

    Raises CheckpointError for a line that is no token, and for ranks that are not 0 to n - 1.
    """
    ranks = _ranks(path)
    vocabulary = {_shown(token): rank for token, rank in ranks.items()}
    merges = [(_shown(left), _shown(right)) for left, right in _merges(ranks)]
    raw = tokenizers.Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    words = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated", invert=False)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    return raw


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            problem = f"{path.name}: line {number} is not a token in base64 and its rank"
            raise CheckpointError(path.parent, [problem]) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        problem = f"{path.name}: ranks are not 0 to {len(ranks) - 1}, each once"
        raise CheckpointError(path.parent, [problem])
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pairs that form each token, in the order of the tokens' ranks.

    tiktoken merges the neighbours that form the token of the lowest rank. Of the pairs that form
    one token, only those of two tokens of lower rank can meet.
    """
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs


def _byte_letters() -> dict[int, str]:
    """Return the letter for each byte in byte-level vocabularies (Radford et al., GPT-2, 2019)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    letters = {byte: chr(byte) for byte in kept}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _shown(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)
