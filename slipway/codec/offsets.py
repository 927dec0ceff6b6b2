"""Character offsets of tokens in the text that they make.

An offset counts characters of the whole text, wherever tokens cut these. Not here: which text is released, and when
(detokenizer.py); what one token stands for (token_text.py).
"""

from bisect import bisect_right
from collections.abc import Sequence

from slipway.codec.token_text import TokenTexts


class Offsets:
    """Offsets of the tokens of one text, each told once no later token can change it.

    A token that begins within a character has the character's offset, a token that the text leaves out that of the
    next one. `prompt`: tokens before the first one, whose text is not counted. `start`: the first token's offset.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int] = (), start: int = 0):
        self._texts = texts
        self._stream = texts.stream(prompt)
        self._held = self._stream.pending()  # bytes of tokens whose offsets are not certain
        self._num_before = len(self._held)  # the prompt's among them
        self._num_chars = 0  # of the held tokens' text, as far as the stream has told it
        self._position = start  # of the first held token, or else of the next one

    def push(self, token_id: int) -> list[int]:
        """Take one token; return the offsets that are certain now, in the order of the tokens."""
        self._held.append(self._texts.bytes_of(token_id))
        self._num_chars += len(self._stream.push(token_id))
        return [] if self._stream.is_pending else self._certain()

    def finish(self) -> list[int]:
        """End the text: return the offsets of all tokens that are left."""
        self._num_chars += len(self._stream.flush())
        return self._certain()

    def _certain(self) -> list[int]:
        starts = self._texts.character_starts(self._held)
        # characters stripped at the start of the text, or the prompt's
        num_left_out = max(0, len(starts) - self._num_chars)
        starts.append(sum(map(len, self._held)))
        found, at = [], 0
        for piece in self._held:
            found.append(self._position + max(0, bisect_right(starts, at) - 1 - num_left_out))
            at += len(piece)
        found = found[self._num_before :]
        self._position += self._num_chars
        self._held, self._num_before, self._num_chars = [], 0, 0
        return found


def spans_to_offsets(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the offsets of a text's tokens, of whose characters `spans` hold the first and the end.

    Spaces before a token that its span leaves out belong to it. A token that the tokenizer adds has an empty span.
    """
    found, end = list[int](), 0
    for first, after in spans:
        found.append(min(first, end) if after > first else end)
        end = max(end, after)
    return found
