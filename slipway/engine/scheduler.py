"""Which sequences compute which tokens in the next step; knows pages by number, and no JAX.

First come, first served. A sequence is admitted once all pages that it could ever need are free, so nothing that runs
can run out. Running sequences come first, so that a long prompt never holds up those that decode; what is left of the
step's token budget goes to prompts, in chunks.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from slipway.cache.pages import Pages
from slipway.engine.request import Sequence


class Chunk(NamedTuple):
    """``num_tokens`` tokens of a sequence from position ``start`` on."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the sequence's last, so that the step chooses the next."""
        return self.start + self.num_tokens == self.sequence.num_tokens


class Scheduler:
    """The waiting and the running sequences of one copy of the weights, and the pages that they own."""

    def __init__(self, num_pages: int, page_size: int, table_width: int, max_num_seqs: int, max_num_tokens: int):
        self.pages = Pages(num_pages)
        self.page_size, self.table_width = page_size, table_width
        self.max_num_seqs, self.max_num_tokens = max_num_seqs, max_num_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.load = 0  # tokens that its sequences may come to, at the most

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its pages must fit the pool."""
        assert self._pages_for(sequence) <= self.pages.num_pages, "refused when the request came in"
        self.waiting.append(sequence)
        self.load += sequence.max_length

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: one a sequence, at most ``max_num_tokens`` tokens; empty if there is no work."""
        self._admit()
        chunks: list[Chunk] = []
        budget = self.max_num_tokens - len(self.running)  # everyone decodes, or moves on by a token
        for sequence in self.running:
            left = sequence.num_tokens - sequence.num_computed
            count = min(left, budget + 1)
            budget -= count - 1
            chunks.append(Chunk(sequence, sequence.num_computed, count))
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The step has computed ``chunks``; pages of what has finished are free again."""
        for sequence, start, count in chunks:
            sequence.num_computed = start + count
        for sequence in self.running:
            if sequence.finish_reason is not None:
                self._release(sequence)
        self.running = [sequence for sequence in self.running if sequence.finish_reason is None]

    def abort(self, sequences: list[Sequence]) -> None:
        """Drop those of the sequences that are here; their pages are free at once."""
        for sequence in sequences:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
                self.load -= sequence.max_length
            elif sequence in self.running:
                self.running.remove(sequence)
                self._release(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            needed = self._pages_for(self.waiting[0])
            if needed > self.pages.num_free:
                break
            sequence = self.waiting.popleft()
            sequence.pages = self.pages.take(needed)
            sequence.page_row = np.zeros(self.table_width, np.int32)
            sequence.page_row[:needed] = sequence.pages
            self.running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.load -= sequence.max_length
        self.pages.give_back(sequence.pages)
        sequence.pages, sequence.page_row = [], None

    def _pages_for(self, sequence: Sequence) -> int:
        return -(-sequence.max_length // self.page_size)
