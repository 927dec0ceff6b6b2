"""Which sequences compute which tokens in the next step; knows pages and the prefix tree, and no JAX.

Who runs goes first, so that a prompt never holds up those that decode: each gets a token, and what is left of the
step's budget goes to prompts, in chunks. Where all only decode and nobody waits, several steps may go in one call.
Steps run on the device in the order in which they are scheduled, so what one has been asked to compute counts as
computed for all later ones, and within a step for the other rows: pages go into the prefix tree at once.

Waiting requests come by priority, then by arrival; of the first few equals, the one with the longest cached prefix goes
first, but nobody is overtaken more than MAX_OVERTAKEN times. When pages run out, unlocked pages of the tree go, then
the last of those that run is preempted: it waits again, at the head of its equals, and computes anew what was lost.
"""

import bisect
import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from slipway.cache.pages import Pages
from slipway.cache.radix import Node, RadixTree
from slipway.cache.windows import FREED, WindowPages
from slipway.engine.request import Sequence

LOOKAHEAD = 8  # waiting sequences whose cached prefixes are compared
MAX_OVERTAKEN = 16


class Chunk(NamedTuple):
    """``num_tokens`` tokens of a sequence from position ``start`` on.

    ``samples``: the last of them is the sequence's last, so the step chooses the next. ``scored``: the positions
    of those whose results say how likely the prompt's next token is.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    scored: range = range(0)

    @property
    def num_rows(self) -> int:
        """Rows of results."""
        return len(self.scored) + self.samples


@dataclasses.dataclass
class Counts:
    """Sums since the start. Tokens asked of the tree, and found there, are those of prompts when they first run."""

    queried_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """The waiting and the running sequences of one copy of the weights, and the pages that they own."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        table_width: int,
        max_num_seqs: int,
        max_num_tokens: int,
        prefix_caching: bool = True,
        windows: Iterable[tuple[int, int]] = (),
    ):
        """``windows``: for each numbering of pages for a sliding window, the window and the number of pages."""
        self.pages = Pages(num_pages)
        self.windows = [
            WindowPages(count, window=window, page_size=page_size, numbering=numbering)
            for numbering, (window, count) in enumerate(windows)
        ]
        self.tree = RadixTree(self._forget)
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        # One for each numbering, the windows' after the first. Entries of pages before a window are stale.
        self.page_tables = [np.zeros((max_num_seqs, table_width), np.int32) for _ in range(1 + len(self.windows))]
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self.waiting: list[Sequence] = []  # both in order of Sequence.order
        self.running: list[Sequence] = []
        self._held: list[Sequence] | None = None  # those that wait for ``resume``, where ``hold`` was called
        self.load = 0  # tokens that its sequences may come to, at the most
        self.counts = Counts()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its pages must fit the pool."""
        assert self._pages_for(sequence.max_length) <= self.pages.num_pages, "refused when the request came in"
        bisect.insort(self.waiting if self._held is None else self._held, sequence, key=_order)
        self.load += sequence.max_length

    def hold(self) -> None:
        """Let nobody begin until ``resume``, but those whose request has begun."""
        if self._held is None:
            self._held = [s for s in self.waiting if not s.request.has_begun]
            self.waiting = [s for s in self.waiting if s.request.has_begun]

    def resume(self) -> None:
        """Undo ``hold``."""
        self.waiting = sorted(self.waiting + (self._held or []), key=_order)
        self._held = None

    def preempt_all(self) -> None:
        """Let all that run wait, and compute anew what they had, prompts that are scored included."""
        for sequence in self.running.copy():
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.forget_scores()

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, or are held."""
        return len(self.waiting) + len(self._held or [])

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: one a sequence, at most ``max_num_tokens`` tokens; empty if nobody can move.

        At the most one step may be on the device whose results the sequences have not been given.
        """
        chunks: list[Chunk] = []
        tokens, rows = self.max_num_tokens - len(self.running), self.max_num_seqs - len(self.running)
        for sequence in self.running.copy():
            if sequence.slot < 0 or sequence.length >= sequence.max_length:
                continue  # preempted just now, or its last token is on the device
            if sequence.num_tokens - sequence.num_computed > self.page_size:
                self._adopt(sequence)
            chunk = self._chunk(sequence, tokens, rows)
            if self._grow(sequence, chunk):
                chunks.append(chunk)
                tokens -= chunk.num_tokens - 1
                if chunk.scored:
                    rows -= chunk.num_rows - 1
        while self.waiting and self._slots and tokens > 0 and rows > 0 and (admitted := self._admit()) is not None:
            chunk = self._chunk(admitted, tokens - 1, rows - 1)
            grown = self._grow(admitted, chunk)
            assert grown, "its pages were there when it was admitted"
            chunks.append(chunk)
            tokens, rows = tokens - chunk.num_tokens, rows - max(1, chunk.num_rows)
        return chunks

    def spare_steps(self, chunks: list[Chunk], most: int) -> int:
        """How many steps more than the one of ``chunks`` may be one call with it: ``most``, or fewer, or none.

        None where someone waits, where a chunk is more than a token that gives the next, where what a row may say
        depends on what it said, and where the pages could only be had by preempting; no more than a sequence may get.
        """
        if self.waiting or not all(_only_decodes(chunk) for chunk in chunks):
            return 0
        steps = min([most, *(chunk.sequence.max_length - chunk.sequence.length for chunk in chunks)])
        return steps if self._missing(chunks, steps) <= self._num_available() else 0

    def repeat(self, chunks: list[Chunk], steps: int) -> None:
        """Count as many tokens more of each chunk's sequence as computed and on the device: ``spare_steps`` of them."""
        self._free(self._missing(chunks, steps))
        for sequence, start, *_ in chunks:
            self._slide(sequence, start)
            sequence.num_computed += steps
            sequence.num_pending += steps
            self._take(sequence, self._pages_for(sequence.num_computed) - len(sequence.pages))
        self.counts.computed_tokens += steps * len(chunks)

    def release(self, sequence: Sequence) -> None:
        """Drop a sequence that has ended or is aborted; what it computed stays in the tree. Its pages are free."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._leave(sequence)
            self.load -= sequence.max_length
        for queue in (self.waiting, self._held or []):
            if sequence in queue:
                queue.remove(sequence)
                self.load -= sequence.max_length

    def cached(self, salt: str, prompt: np.ndarray) -> int:
        """Return how many tokens of a prompt the cache holds."""
        return self._match(salt, self._blocks(prompt, len(prompt) - 1)).depth * self.page_size

    def _chunk(self, sequence: Sequence, spare_tokens: int, spare_rows: int) -> Chunk:
        """What a sequence computes next, with as much beside its own token and row as is left."""
        start = sequence.num_computed
        if start + 1 == sequence.length and not sequence.scores:
            return Chunk(sequence, start, 1, True)  # decoding, nearly always
        count = min(sequence.length - start, spare_tokens + 1)
        scored = range(0)
        if sequence.scores and sequence.num_scored < sequence.num_prompt - 1:
            count = min(count, spare_rows + 1)
            scored = range(max(start, sequence.num_scored), min(start + count, sequence.num_prompt - 1))
        elif start + count < sequence.length and count > self.page_size:
            count -= (start + count) % self.page_size  # whole pages, so that others can go on from there
        return Chunk(sequence, start, count, start + count == sequence.length, scored)

    def _grow(self, sequence: Sequence, chunk: Chunk) -> bool:
        """Give a sequence the pages of its chunk and count that as computed; False if it was preempted instead."""
        assert sequence.node is not None
        end = chunk.start + chunk.num_tokens
        if end > len(sequence.pages) * self.page_size:
            self._slide(sequence, chunk.start)
            needed = self._pages_for(end) - len(sequence.pages)
            while needed > self._free(needed):
                last = self.running[-1]
                self._preempt(last)
                if last is sequence:
                    return False
            self._take(sequence, needed)
        sequence.num_computed = end
        sequence.num_pending += chunk.samples
        if chunk.scored:
            sequence.num_scored = chunk.scored.stop
        self.counts.computed_tokens += chunk.num_tokens
        if sequence.num_tokens >= (sequence.node.depth + 1) * self.page_size:
            self._publish(sequence)
        return True

    def _missing(self, chunks: list[Chunk], steps: int) -> int:
        """The pages that ``steps`` more tokens of each chunk's sequence need beside those that it holds."""
        sequences = [chunk.sequence for chunk in chunks]
        return sum(self._pages_for(s.num_computed + steps) - len(s.pages) for s in sequences)

    def _free(self, needed: int) -> int:
        """Return how many pages of every numbering can be taken, after evicting those that are needed from the tree."""
        if needed > self.pages.num_free:
            self.tree.evict(needed - self.pages.num_free)
        return min([self.pages.num_free, *(pool.num_available for pool in self.windows)])

    def _num_available(self) -> int:
        """Return how many pages of every numbering could be taken without a preemption."""
        of_tree = self.pages.num_free + self.tree.num_unlocked
        return min([of_tree, *(pool.num_available for pool in self.windows)])

    def _take(self, sequence: Sequence, count: int) -> None:
        """Give a sequence its next pages, of every numbering."""
        taken = [self.pages.take(count), *(pool.take(count) for pool in self.windows)]
        self._hold(sequence, taken)

    def _slide(self, sequence: Sequence, position: int) -> None:
        """Drop the pages that the tokens from ``position`` on no longer see."""
        for pool, pages in zip(self.windows, sequence.window_pages):
            for index in range(min(pool.first_seen(position), len(pages)) - 1, -1, -1):
                if pages[index] == FREED:
                    break  # as are all before it
                pool.drop(pages[index])
                pages[index] = FREED

    def _forget(self, node: Node) -> None:
        """Take back the pages of a node that leaves the tree."""
        self.pages.give_back([node.page])
        for pool in self.windows:
            pool.forget(node)

    def _match(self, salt: str, blocks: list[bytes]) -> Node:
        """Return the deepest node on the path of ``blocks`` from which a sequence can go on."""
        return self._usable(self.tree.match(salt, blocks))

    def _usable(self, node: Node) -> Node:
        """Return the deepest node, at or above ``node``, with every page that the token after it sees."""
        while any(hole := pool.hole(node) for pool in self.windows):
            assert hole is not None and hole.parent is not None
            node = hole.parent
        return node

    def _pages_of(self, node: Node, first: int) -> list[list[int]]:
        """Share the pages of the path to ``node`` from index ``first`` on, by numbering; FREED before a window."""
        found = [self.tree.pages(node)[first:]]
        for pool in self.windows:
            pages = [FREED] * (node.depth - first)
            for seen in pool.seen(node):
                if seen.depth > first:
                    pool.share(pool.page(seen))
                    pages[seen.depth - 1 - first] = pool.page(seen)
            found.append(pages)
        return found

    def _admit(self) -> Sequence | None:
        """Let the next waiting sequence run, if pages for all its tokens are there beside what the others will need."""
        sequence = self._next()
        if sequence.num_pending > 1:
            return None  # preempted just now, and what it has to compute anew is not all known here yet
        node = self._match(sequence.request.spec.cache_salt, self._matchable(sequence))
        self.tree.lock(node)
        pages = self._pages_of(node, 0)
        if self.running and not self._has_room(self._pages_for(sequence.num_tokens) - node.depth):
            self.tree.unlock(node)
            self._drop_windows(pages[1:])
            return None
        if sequence is not self.waiting[0]:
            self.waiting[0].overtaken += 1
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)
        sequence.slot, sequence.node = self._slots.pop(), node
        sequence.num_computed = node.depth * self.page_size
        sequence.window_pages = [[] for _ in self.windows]
        self._hold(sequence, pages)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.counts.queried_tokens += sequence.num_prompt
            self.counts.cached_tokens += sequence.num_computed
        return sequence

    def _has_room(self, needed: int) -> bool:
        """Whether a sequence that needs so many pages can run beside what the running ones may still need."""
        missing = [max(0, self._pages_for(s.num_tokens) - len(s.pages)) for s in self.running]
        if needed + sum(1 + count for count in missing) > self.pages.num_free + self.tree.num_unlocked:
            return False
        for pool in self.windows:
            span = pool.span(self.max_num_tokens)
            owed = sum(1 + min(count, span) for count in missing)
            if min(needed, span) + owed > pool.num_available:
                return False
        return True

    def _drop_windows(self, held: Iterable[list[int]]) -> None:
        """Drop a sequence's pages of each sliding window."""
        for pool, pages in zip(self.windows, held):
            for page in pages:
                if page != FREED:
                    pool.drop(page)

    def _next(self) -> Sequence:
        """Of the first few equals, who has most of its tokens in the tree, unless the first was overtaken enough."""
        first = self.waiting[0]
        if first.overtaken >= MAX_OVERTAKEN or not self.prefix_caching or len(self.waiting) == 1:
            return first
        equals = [s for s in self.waiting[:LOOKAHEAD] if s.request.spec.priority == first.request.spec.priority]
        return max(equals, key=lambda s: self._match(s.request.spec.cache_salt, self._matchable(s)).depth)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._leave(sequence)
        sequence.num_computed, sequence.overtaken = 0, MAX_OVERTAKEN
        bisect.insort(self.waiting, sequence, key=_order)
        self.counts.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence's pages and slot; those that the tree holds stay there, unlocked."""
        assert sequence.node is not None
        self._publish(sequence)
        self.pages.give_back(sequence.pages[sequence.node.depth :] + sequence.duplicates)
        self._drop_windows(sequence.window_pages)
        self.tree.unlock(sequence.node)
        self._slots.append(sequence.slot)
        sequence.pages, sequence.window_pages, sequence.duplicates = [], [], []
        sequence.node, sequence.slot = None, -1

    def _hold(self, sequence: Sequence, pages: list[list[int]]) -> None:
        """Append pages to a sequence's own, of each numbering, and to its rows of the page tables."""
        for held, table, more in zip([sequence.pages, *sequence.window_pages], self.page_tables, pages, strict=True):
            table[sequence.slot, len(held) : len(held) + len(more)] = more
            held += more

    def _publish(self, sequence: Sequence) -> None:
        """Hand the pages to the tree that are full of tokens known here, and computed."""
        node = sequence.node
        assert node is not None
        full = min(sequence.num_computed, sequence.num_tokens) // self.page_size
        if full == node.depth or not self.prefix_caching:
            return
        for block in self._blocks(sequence.tokens, full * self.page_size, node.depth):
            child, page = node.children.get(block), sequence.pages[node.depth]
            if child is None:
                node = self.tree.extend(node, block, page)
                node.windows = [FREED] * len(self.windows)
            else:  # another sequence computed the same; this one may be writing its own page yet, and keeps it
                node = self.tree.descend(node, child)
                sequence.duplicates.append(page)
            for pool, pages in zip(self.windows, sequence.window_pages):
                if pool.page(node) == FREED != pages[node.depth - 1]:
                    pool.publish(pages[node.depth - 1], node)
        sequence.node = node

    def _adopt(self, sequence: Sequence) -> None:
        """Go past pages that another sequence has computed since this one began."""
        node = sequence.node
        assert node is not None
        if sequence.needs_every_token or sequence.num_computed != node.depth * self.page_size:
            return  # all must be computed, or it is in the midst of a page
        first, target = node.depth, node
        for block in self._blocks(sequence.tokens, sequence.num_tokens - 1, first):
            if (child := target.children.get(block)) is None:
                break
            target = child
        target = self._usable(target)
        if target.depth <= first:
            return
        for block in self._blocks(sequence.tokens, target.depth * self.page_size, first):
            node = self.tree.descend(node, node.children[block])
        self.counts.cached_tokens += (node.depth - first) * self.page_size
        self._slide(sequence, node.depth * self.page_size)
        self._hold(sequence, self._pages_of(node, first))
        sequence.node, sequence.num_computed = node, node.depth * self.page_size

    def _matchable(self, sequence: Sequence) -> list[bytes]:
        """The pages that the tree may hold: not that of the last token, which gives the next, or of scored ones."""
        if not self.prefix_caching or sequence.needs_every_token:
            return []
        return self._blocks(sequence.tokens, sequence.num_tokens - 1)

    def _blocks(self, tokens: np.ndarray, count: int, first: int = 0) -> list[bytes]:
        size = self.page_size
        return [tokens[page * size : (page + 1) * size].tobytes() for page in range(first, count // size)]

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def _only_decodes(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.samples and not chunk.scored and chunk.sequence.request.rules is None


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
