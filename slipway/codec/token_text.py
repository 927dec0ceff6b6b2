"""Text of single tokens and of a growing sequence of tokens, from the decoder in tokenizer.json.

tokenizers.DecodeStream decodes a window of recent tokens again and again. It must guess where the
window may start, and raises on bytes that are not UTF-8 (huggingface/tokenizers#1705,
vllm-project/vllm#17448). This module reads the decoder instead and needs no guess:

    ByteLevel       A token is a few bytes. All bytes are decoded as UTF-8: `ByteStream`.
    anything else   A token is a piece of text, which differs only at the start of the sequence:
                    `TextStream`. A run of byte tokens ("<0xE2>") is decoded as a whole; one invalid
                    byte turns each byte of the run into U+FFFD.

A completion continues the text of its prompt. Its first token therefore keeps the space that a
decoder strips from the first token of a text, and a character that begins in the prompt and ends in
the completion belongs to the completion as a whole.

Not here: stop strings (detokenizer.py), character offsets (offsets.py).
"""

import codecs
import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import tokenizers

from slipway.errors import UnsupportedModel

# Decoders that treat each token by itself, except at the start of the text and in runs of byte
# tokens.
TOKENWISE = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"})


class Stream(Protocol):
    """Text of one sequence, token by token.

    The results of all pushes and of the flush, joined, equal the decoding of all ids.
    """

    def push(self, token_id: int) -> str:
        """Add one token; return the new text that no later token can change."""
        ...

    def flush(self) -> str:
        """End the sequence; return the rest of its text."""
        ...

    @property
    def is_pending(self) -> bool:
        """Whether a later token can still change the text of a token that was pushed."""
        ...

    def pending(self) -> list[bytes]:
        """Return the bytes of text that a later token can still change.

        `TextStream` returns one item for each token, `ByteStream` one item in all.
        """
        ...


class TokenTexts(Protocol):
    """Texts of the tokens of one vocabulary, computed once and shared by all streams."""

    def stream(self, prompt: Sequence[int] = ()) -> Stream:
        """Return a stream for the tokens after those of `prompt`, without the prompt's text."""
        ...

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds after other text; empty for a dropped id."""
        ...

    def prompt_text(self, prompt: Sequence[int]) -> str:
        """Return the text of `prompt` without a character that is unfinished at its end."""
        ...

    def character_starts(self, tokens: Sequence[bytes]) -> list[int]:
        """Return the positions at which characters begin in the joined bytes of `tokens`.

        These include the characters U+FFFD that replace invalid bytes.
        """
        ...


def token_texts(raw: tokenizers.Tokenizer, skip_special_tokens: bool) -> TokenTexts:
    """Return the token texts of `raw`.

    Raises UnsupportedModel if its decoder cannot be applied token by token.
    """
    decoders = _decoders(raw)
    kinds = [decoder["type"] for decoder in decoders]
    if kinds == ["ByteLevel"]:
        return ByteLevelTexts(raw, skip_special_tokens)
    if not all(map(_is_tokenwise, decoders)):
        raise UnsupportedModel(
            "tokenizer.json decoder", kinds, f"only ByteLevel, or any of {sorted(TOKENWISE)}"
        )
    return TokenwiseTexts(raw, skip_special_tokens, byte_fallback="ByteFallback" in kinds)


class ByteLevelTexts(dict[int, str | bytes]):
    """Cache of token id -> text, or bytes if these are not whole characters.

    The text of an id that decoding drops is empty.
    """

    def __init__(self, raw: tokenizers.Tokenizer, skip_special_tokens: bool):
        super().__init__()
        self._raw = raw
        self._dropped = special_ids(raw) if skip_special_tokens else frozenset()
        self._byte_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> str | bytes:
        token = None if token_id in self._dropped else self._raw.id_to_token(token_id)
        if token is None:
            piece = b""
        elif all(char in self._byte_of for char in token):
            piece = bytes(self._byte_of[char] for char in token)
        else:  # an added token is written in plain text, not in the byte alphabet
            piece = token.encode()
        self[token_id] = text = _text_or_bytes(piece)
        return text

    def stream(self, prompt: Sequence[int] = ()) -> "ByteStream":
        """Return a stream for the tokens after those of `prompt`."""
        return ByteStream(self, prompt)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the token's bytes; empty for an id that decoding drops."""
        piece = self[token_id]
        return piece if isinstance(piece, bytes) else piece.encode()

    def prompt_text(self, prompt: Sequence[int]) -> str:
        """Return the text of `prompt` without a character that is unfinished at its end."""
        skip = bool(self._dropped)
        text = self._raw.decode(list(prompt), skip_special_tokens=skip)
        return text[:-1] if self.stream(prompt).is_pending else text

    def character_starts(self, tokens: Sequence[bytes]) -> list[int]:
        """Return where characters begin, with one U+FFFD per maximal invalid subpart of bytes."""
        joined, found, at = b"".join(tokens), list[int](), 0
        while at < len(joined):
            try:
                joined[at:].decode()
                end, bad = len(joined), len(joined)
            except UnicodeDecodeError as error:
                end, bad = at + error.start, at + error.end
            found += _lead_bytes(joined[at:end], at)
            if end < bad:
                found.append(end)
            at = bad
        return found


class ByteStream:
    """Stream that holds back the bytes of an unfinished character, at most three."""

    def __init__(self, texts: ByteLevelTexts, prompt: Sequence[int] = ()):
        self._texts = texts
        # "replace" writes one U+FFFD per maximal invalid subpart, as the Rust decoder's
        # from_utf8_lossy does.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(_last_bytes(texts, prompt))
        self._unfinished = bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        """Add one token; return the new text that no later token can change."""
        piece = self._texts[token_id]
        if isinstance(piece, str):
            if not self._unfinished:  # nearly always; this path costs a fifth of the decoder's
                return piece
            piece = piece.encode()
        text = self._decoder.decode(piece)
        self._unfinished = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """End the sequence; return the rest of its text."""
        self._unfinished = False
        return self._decoder.decode(b"", True)

    @property
    def is_pending(self) -> bool:
        """Whether a character is unfinished."""
        return self._unfinished

    def pending(self) -> list[bytes]:
        """Return the bytes of the unfinished character."""
        return [self._decoder.getstate()[0]] if self._unfinished else []


def _last_bytes(texts: ByteLevelTexts, prompt: Sequence[int]) -> bytes:
    """Return the end of the prompt's bytes: an unfinished character in it has at most three."""
    tail = b""
    for token_id in reversed(prompt):
        piece = texts[token_id]
        if isinstance(piece, bytes):
            tail = piece + tail
        # no character is unfinished after a token of whole characters
        if len(tail) > 3 or (piece and isinstance(piece, str)):
            break
    return tail


def _lead_bytes(text: bytes, start: int) -> list[int]:
    """Return the positions, counted from `start`, of all bytes that are not continuation bytes."""
    return [at for at, byte in enumerate(text, start) if byte & 0xC0 != 0x80]


def _text_or_bytes(piece: bytes) -> str | bytes:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece


class TokenwiseTexts(dict[int, str | None]):
    """Cache of token id -> text after other text; None for an id that decoding drops.

    The text of a token is the text that it adds to that of `anchor`, an ordinary token before it.
    """

    def __init__(self, raw: tokenizers.Tokenizer, skip_special_tokens: bool, byte_fallback: bool):
        super().__init__()
        vocab = raw.get_vocab()
        special = special_ids(raw)
        self._raw = raw
        self._skip = skip_special_tokens
        self._dropped = special if skip_special_tokens else frozenset()
        is_byte = re.compile(r"<0x[0-9A-Fa-f]{2}>").fullmatch
        found = {
            i: int(token[3:5], 16) for token, i in vocab.items() if byte_fallback and is_byte(token)
        }
        self.byte_of = {i: byte for i, byte in found.items() if i not in self._dropped}
        ordinary = (i for i in sorted(vocab.values()) if i not in special and i not in self.byte_of)
        self.anchor = next(i for i in ordinary if self.decode([i]).strip())
        self._anchor_text = self.decode([self.anchor])

    def __missing__(self, token_id: int) -> str | None:
        dropped = token_id in self._dropped or self._raw.id_to_token(token_id) is None
        self[token_id] = piece = None if dropped else self.continuation([token_id])
        return piece

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` at the start of a sequence."""
        return self._raw.decode(ids, skip_special_tokens=self._skip)

    def continuation(self, ids: list[int]) -> str:
        """Return the text of `ids` after other text."""
        text = self.decode([self.anchor, *ids])
        assert text.startswith(self._anchor_text), "a tokenwise decoder rewrote an earlier token"
        return text[len(self._anchor_text) :]

    def stream(self, prompt: Sequence[int] = ()) -> "TextStream":
        """Return a stream for the tokens after those of `prompt`."""
        return TextStream(self, prompt)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds after other text; empty for a dropped id."""
        byte = self.byte_of.get(token_id)
        return (self[token_id] or "").encode() if byte is None else bytes([byte])

    def prompt_text(self, prompt: Sequence[int]) -> str:
        """Return the text of `prompt` without a character that is unfinished at its end."""
        kept, num_left = list(prompt), self.stream(prompt).num_unfinished
        while num_left:
            num_left -= kept.pop() in self.byte_of
        return self.decode(kept)

    def character_starts(self, tokens: Sequence[bytes]) -> list[int]:
        """Return where characters begin; an invalid run of byte tokens has one U+FFFD per byte."""
        joined = b"".join(tokens)
        if _num_unfinished(joined) == 0:
            return _lead_bytes(joined, 0)
        found, at = list[int](), 0
        for token in tokens:
            found += [at] if len(token) == 1 else _lead_bytes(token, at)
            at += len(token)
        return found


class TextStream:
    """Stream that holds back a run of byte tokens until an ordinary token or the end closes it."""

    def __init__(self, texts: TokenwiseTexts, prompt: Sequence[int] = ()):
        self._texts = texts
        self._at_start = True
        self._pending: list[int] = []
        # characters of the pending tokens' text that belong to the prompt
        self._num_shown = 0
        # bytes at the end of the prompt that begin a character
        self.num_unfinished = 0
        if prompt:
            self._follow(prompt)

    def push(self, token_id: int) -> str:
        """Add one token; return the new text that no later token can change."""
        piece = self._texts[token_id]
        if piece is None:  # dropped before decoding: it does not close a run of byte tokens
            return ""
        if token_id in self._texts.byte_of:
            self._pending.append(token_id)
            return ""
        if not self._at_start and not self._pending:
            return piece
        self._pending.append(token_id)
        return self.flush()

    def flush(self) -> str:
        """End the open run, or the sequence; return the rest of its text."""
        if self._at_start:
            text = self._texts.decode(self._pending)
            # only stripped spaces so far: a space of the next token may be stripped too
            if not text:
                return ""
            self._at_start = False
        else:
            text = self._texts.continuation(self._pending)[self._num_shown :]
            self._num_shown = 0
        self._pending.clear()
        return text

    @property
    def is_pending(self) -> bool:
        """Whether a run of byte tokens is open, or the text has not begun."""
        return bool(self._pending)

    def pending(self) -> list[bytes]:
        """Return the bytes of each token of the open run, or of each token so far without text."""
        return [self._texts.bytes_of(token) for token in self._pending]

    def _follow(self, prompt: Sequence[int]) -> None:
        """Move to the end of the prompt's text.

        Only two parts of the prompt matter: its first token with text, and the run of byte tokens
        at its end.
        """
        byte_of = self._texts.byte_of
        first = next((number for number, token in enumerate(prompt, 1) if self.push(token)), None)
        if first is not None:
            for token in islice(reversed(prompt), len(prompt) - first):
                if token in byte_of:
                    self._pending.append(token)
                elif self._texts[token] is not None:
                    break
            self._pending.reverse()
        num_bytes = next(
            (n for n, i in enumerate(reversed(self._pending)) if i not in byte_of),
            len(self._pending),
        )
        run = bytes(byte_of[i] for i in self._pending[len(self._pending) - num_bytes :])
        num_unfinished = _num_unfinished(run)
        # the prompt's text has one U+FFFD for each byte of the run, which stays invalid
        if num_unfinished is None:
            self._at_start = False
            self._pending = self._pending[len(self._pending) - num_bytes :]
            self._num_shown = num_bytes
            return
        self.num_unfinished = num_unfinished
        num_finished = len(self._pending) - num_unfinished
        if not self._at_start or self._texts.decode(self._pending[:num_finished]):
            self._at_start = False
            del self._pending[:num_finished]


def _num_unfinished(run: bytes) -> int | None:
    """Return the number of bytes at the end of `run` that begin a character.

    The result is None if `run` is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        decoder.decode(run)
    except UnicodeDecodeError:
        return None
    return len(decoder.getstate()[0])


def special_ids(raw: tokenizers.Tokenizer) -> frozenset[int]:
    """Return the ids that decoding with skip_special_tokens leaves out."""
    return frozenset(i for i, token in raw.get_added_tokens_decoder().items() if token.special)


def _decoders(raw: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """Return the decoders of tokenizer.json, sequences flattened; [] if it has none.

    Without a decoder, the texts of tokens are joined by a space.
    """
    if raw.decoder is None:
        return []
    found, left = [], [json.loads(raw.decoder.__getstate__())]
    while left:
        decoder = left.pop(0)
        if decoder["type"] == "Sequence":
            left = decoder["decoders"] + left
        else:
            found.append(decoder)
    return found


def _is_tokenwise(decoder: dict[str, Any]) -> bool:
    match decoder:
        case {"type": "Replace", "pattern": {"String": str(pattern)}}:
            return len(pattern) == 1  # a longer pattern could match across two fused tokens
        case {"type": "Replace"}:
            return False
        case {"type": "Strip", "stop": stop}:
            return bool(stop == 0)  # a stream cannot strip an end that it has not reached
    return decoder["type"] in TOKENWISE


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's byte alphabet, character -> byte.

    A printable byte is its own character; the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }
