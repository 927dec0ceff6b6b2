"""Drafts from repeated text: the tokens that followed the last occurrence of a sequence's ending.

Not here: the search itself (csrc/ngram.cc), how many drafts a step verifies (lengths.py).
"""

import ctypes
import weakref
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from slipway import native
from slipway.engine.request import Sequence
from slipway.errors import InvalidConfig

# Between the texts of a shared index.
SEPARATOR = np.array([-1], np.int32)


class NgramIndex:
    """Runs of tokens in a text, and where they were last (csrc/ngram.cc)."""

    def __init__(self, shortest: int, longest: int):
        """Create an empty index; ``shortest`` and ``longest``: tokens of a match."""
        library: Any = native.library()
        library.slipway_ngram_new.restype = ctypes.c_void_p
        self.handle = library.slipway_ngram_new(ctypes.c_int64(shortest), ctypes.c_int64(longest))
        weakref.finalize(self, library.slipway_ngram_free, ctypes.c_void_p(self.handle))

    def add(self, tokens: np.ndarray) -> None:
        """Append int32 tokens."""
        library: Any = native.library()
        given = np.ascontiguousarray(tokens, np.int32)
        pointers = ctypes.c_void_p(self.handle), ctypes.c_void_p(given.ctypes.data)
        library.slipway_ngram_add(*pointers, ctypes.c_int64(given.size))


class NgramDrafter:
    """Prompt lookup: a draft repeats what followed the longest earlier match of the last tokens.

    Earlier means: in the sequence's own prompt and output and, if ``shared_tokens`` is not 0, in
    about as many of the newest output tokens of the engine.
    """

    def __init__(self, shortest: int, longest: int, most: int, shared_tokens: int = 0):
        """Create a drafter of at most ``most`` tokens for matches of ``shortest`` to ``longest``.

        Raises InvalidConfig if slipway was installed without its compiled library.
        """
        if native.library() is None:
            expected = "another method: slipway was installed without a C++ compiler"
            raise InvalidConfig("speculative_config: method", "ngram", expected)
        self._shortest = shortest
        self._longest = longest
        self._most = most
        self._indexes: dict[Sequence, NgramIndex] = {}
        self._room = shared_tokens // 2
        # The engine's newest outputs: indexes of up to ``_room`` tokens, the newest first.
        self._shared = [self._index(), self._index()] if shared_tokens else []
        self._num_shared = 0

    def draft(self, sequences: Many[Sequence]) -> list[tuple[list[int], int]]:
        """Return drafts of the tokens that follow the newest one of each sequence.

        Their basis is the number of tokens of the match.
        """
        library: Any = native.library()
        rows = len(sequences)
        indexes = [self._of(sequence).handle for sequence in sequences]
        tokens = [sequence.tokens.ctypes.data for sequence in sequences]
        counts = [sequence.num_tokens for sequence in sequences]
        shared = [index.handle for index in self._shared]
        drafts = np.empty((rows, self._most), np.int32)
        lengths, matches = np.empty((2, rows), np.int32)
        given = np.array([indexes, tokens, counts], np.int64)
        numbers = [ctypes.c_int64(number) for number in (rows, len(shared), self._most)]
        arrays = [
            ctypes.c_void_p(array.ctypes.data) for array in (*given, drafts, lengths, matches)
        ]
        library.slipway_ngram_draft(*numbers, *arrays, (ctypes.c_void_p * len(shared))(*shared))
        found = zip(drafts.tolist(), lengths.tolist(), matches.tolist())
        return [(ids[:count], match) for ids, count, match in found]

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence; its output may be repeated in others."""
        self._indexes.pop(sequence, None)
        if not self._shared or sequence.request.spec.cache_salt:
            return
        output = sequence.tokens[sequence.num_prompt : sequence.num_tokens]
        if self._num_shared + len(output) > self._room:
            self._shared = [self._index(), self._shared[0]]
            self._num_shared = 0
        self._shared[0].add(np.concatenate([output, SEPARATOR]))
        self._num_shared += len(output) + 1

    def _of(self, sequence: Sequence) -> NgramIndex:
        if sequence not in self._indexes:
            self._indexes[sequence] = self._index()
        return self._indexes[sequence]

    def _index(self) -> NgramIndex:
        return NgramIndex(self._shortest, self._longest)
