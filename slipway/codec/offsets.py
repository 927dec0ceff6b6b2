"""Character offsets of tokens in their decoded text.

An offset counts characters of the whole text, also where a token begins within a character.

Not here: when text is released (detokenizer.py), the text of one token (token_text.py).
"""

from bisect import bisect_right
from collections.abc import Sequence

from slipway.codec.token_text import TokenTexts


class Offsets:
    """Offsets of the tokens of one growing text, each returned when no later token can change it.

    A token that begins within a character has the offset of that character. A token without text
    has the offset of the next token. `prompt` holds the tokens before the first one; its text is
    not counted. `start` is the offset of the first token.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int] = (), start: int = 0):
        self._texts = texts
        self._stream = texts.stream(prompt)
        # bytes of the tokens with offsets that a later token can still change
        self._held = self._stream.pending()
        # number of items of ``_held`` that belong to the prompt
        self._num_before = len(self._held)
        # characters of the held tokens' text that the stream has returned
        self._num_chars = 0
        # offset of the first held token, or of the next token if none is held
        self._position = start

    def push(self, token_id: int) -> list[int]:
        """Add one token; return the offsets that are certain now, in the order of their tokens."""
        self._held.append(self._texts.bytes_of(token_id))
        self._num_chars += len(self._stream.push(token_id))
        return [] if self._stream.is_pending else self._certain()

    def finish(self) -> list[int]:
        """End the text; return the offsets of all remaining tokens."""
        self._num_chars += len(self._stream.flush())
        return self._certain()

    def _certain(self) -> list[int]:
        starts = self._texts.character_starts(self._held)
        # characters that the decoder strips at the start of the text, or that belong to the prompt
        num_left_out = max(0, len(starts) - self._num_chars)
        starts.append(sum(map(len, self._held)))
        found, at = [], 0
        for piece in self._held:
            found.append(self._position + max(0, bisect_right(starts, at) - 1 - num_left_out))
            at += len(piece)
        found = found[self._num_before :]
        self._position += self._num_chars
        self._held = []
        self._num_before = 0
        self._num_chars = 0
        return found


def spans_to_offsets(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the offset of each token from its span: its first character and its end.

    Spaces between the end of a span and the next span belong to the next token. A token that the
    tokenizer adds, such as a bos token, has an empty span.
    """
    found, end = list[int](), 0
    for first, after in spans:
        found.append(min(first, end) if after > first else end)
        end = max(end, after)
    return found
