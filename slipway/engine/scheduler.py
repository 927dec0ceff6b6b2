"""Scheduler: which sequences run, and which tokens each of them computes in the next step.

Not here: the pages of sequences and of cached prefixes (paging.py), the arrays of a step
(batch.py), its dispatch (pipeline.py). Nothing here imports JAX.

A step. Every step computes a chunk of tokens for each of some sequences, at most ``max_num_tokens``
tokens in all. Running sequences are served before waiting ones are admitted, so a new prompt never
stops a sequence that decodes: one token is reserved for each running sequence, and the rest of the
budget goes to prompts, in chunks. If every running sequence decodes and none waits, the engine may
make several decode steps in one call of the device (``spare_steps``, ``repeat``).

Computed tokens. The device runs steps in the order in which they were scheduled. A token therefore
counts as computed as soon as its chunk is scheduled: later steps, and the other rows of the same
step, may read its keys and values. For the same reason a full page enters the prefix tree at once,
before the device has written it.

Order of waiting sequences. By priority, then by arrival. Among the first LOOKAHEAD sequences of
equal priority, the one with the longest cached prefix is admitted first; a sequence that was
overtaken MAX_OVERTAKEN times goes first anyway.

Shortage of pages. First, pages of the tree that no sequence reads are evicted. If that is not
enough, the last running sequence is preempted: it gives its pages back, waits at the head of the
sequences of its priority, and later computes its lost tokens again.
"""

import bisect
import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from slipway.engine.paging import Paging
from slipway.engine.request import Sequence

LOOKAHEAD = 8  # the number of waiting sequences among which the longest cached prefix is chosen
MAX_OVERTAKEN = 16


class Chunk(NamedTuple):
    """``num_tokens`` tokens of one sequence, from position ``start`` on, that one step computes.

    ``samples``: the chunk ends with the last token of the sequence, so the step samples the next
    token. ``scored``: positions of prompt tokens after which the log probability of the next prompt
    token is reported. ``drafts``: the chunk's last tokens, which are not part of the sequence yet;
    the step also samples the token before and after each of them (engine/drafts/).
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    scored: range = range(0)
    drafts: Many[int] = ()

    @property
    def decodes(self) -> bool:
        """Whether it is the newest token of a sequence, perhaps with drafts after it."""
        return self.samples and self.num_tokens == 1 + len(self.drafts)

    @property
    def num_rows(self) -> int:
        """Rows of results: one for each scored position, and one for each sampled token."""
        return len(self.scored) + self.samples + len(self.drafts)


@dataclasses.dataclass
class Counts:
    """Sums since the start.

    ``queried_tokens``: prompt tokens of sequences that were admitted for the first time.
    ``cached_tokens``: tokens of prompts that did not have to be computed because the prefix tree
    held them.
    """

    queried_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Waiting and running sequences of one copy of the weights, and the pages that they own.

    A sequence is added once, runs when it has a slot (its row of the page tables), may be preempted
    and admitted again, and is released once.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        table_width: int,
        max_num_seqs: int,
        max_num_tokens: int,
        max_rows: int | None = None,
        prefix_caching: bool = True,
        windows: Iterable[tuple[int, int]] = (),
    ):
        """Create an empty scheduler.

        ``table_width``: the most pages of one sequence. ``max_rows``: the most rows of results of a
        step; default: one for each sequence. ``windows``: (window in positions, number of pages)
        for each sliding window of the model; each has a pool of its own.
        """
        self._paging = Paging(
            num_pages=num_pages,
            page_size=page_size,
            table_width=table_width,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
            windows=windows,
        )
        # Parts of the paging: pools, prefix tree, and the page tables that batch.py reads.
        self.pages = self._paging.pages
        self.windows = self._paging.windows
        self.tree = self._paging.tree
        self.page_tables = self._paging.page_tables
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self.max_rows = max_num_seqs if max_rows is None else max_rows
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        # Both lists are sorted by Sequence.order.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        # Between ``hold`` and ``resume``: the sequences that may not be admitted. None otherwise.
        self._held: list[Sequence] | None = None
        # Sum of the greatest lengths that the waiting and running sequences can reach.
        self.load = 0
        self.counts = Counts()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; admission.py has checked that its ``max_length`` fits the pool."""
        assert self._paging.num_for(sequence.max_length) <= self.pages.num_pages, (
            "admission refuses a sequence that is larger than the pool"
        )
        bisect.insort(self.waiting if self._held is None else self._held, sequence, key=_order)
        self.load += sequence.max_length

    def hold(self) -> None:
        """Stop admitting sequences until ``resume``, except those of requests that have begun."""
        if self._held is None:
            self._held = [s for s in self.waiting if not s.request.has_begun]
            self.waiting = [s for s in self.waiting if s.request.has_begun]

    def resume(self) -> None:
        """Admit all waiting sequences again, after ``hold``; without a ``hold`` nothing changes."""
        self.waiting = sorted(self.waiting + (self._held or []), key=_order)
        self._held = None

    def preempt_all(self) -> None:
        """Preempt every running sequence, so that all tokens are computed again.

        Prompts with scored positions are scored again, from the start.
        """
        for sequence in self.running.copy():
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.forget_scores()

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait, including those that ``hold`` keeps back."""
        return len(self.waiting) + len(self._held or [])

    @property
    def num_free_slots(self) -> int:
        """Number of sequences that could run beside the running ones."""
        return len(self._slots)

    def schedule(self) -> list[Chunk]:
        """Plan the next step: return a chunk for each sequence that takes part in it.

        The chunks have their pages and count as computed. At most ``max_num_tokens`` tokens and
        ``max_rows`` rows of results. Empty if no sequence can advance. The caller may have at most
        one earlier step on the device that has not given its results to the sequences yet; none if
        a chunk of it has drafts.
        """
        chunks: list[Chunk] = []
        # What is left of the step, after one token and one row for each running sequence.
        tokens = self.max_num_tokens - len(self.running)
        rows = self.max_rows - len(self.running)
        for sequence in self.running.copy():
            # Skip a sequence that was preempted in this loop, or that waits for its last token from
            # the device.
            start, length = sequence.num_computed, sequence.length
            if sequence.slot < 0 or length >= sequence.max_length:
                continue
            if start + 1 == length and not sequence.is_scoring:  # it decodes, as nearly all do
                drafts = self._drafts(sequence, min(tokens, rows)) if sequence.drafts else ()
                chunk = Chunk(sequence, start, 1 + len(drafts), samples=True, drafts=drafts)
            else:
                if sequence.num_tokens - start > self.page_size:
                    self._adopt(sequence)
                chunk = self._chunk(sequence, tokens, rows)
            if self._grow(sequence, chunk):
                chunks.append(chunk)
                tokens -= chunk.num_tokens - 1
                if chunk.scored or chunk.drafts:
                    rows -= chunk.num_rows - 1
        while self.waiting and self._slots and tokens > 0 and rows > 0:
            admitted = self._admit()
            if admitted is None:
                break
            chunk = self._chunk(admitted, tokens - 1, rows - 1)
            grown = self._grow(admitted, chunk)
            assert grown, "a sequence is admitted only if its pages are available"
            chunks.append(chunk)
            tokens -= chunk.num_tokens
            rows -= max(1, chunk.num_rows)
        return chunks

    def spare_steps(self, chunks: list[Chunk], most: int) -> int:
        """Return how many decode steps may follow the step of ``chunks`` in the same device call.

        At most ``most``, and at most the number of tokens that any of the sequences may still get.
        0 if a sequence waits; if a chunk does anything but decode one token; if the logits of a row
        depend on the tokens sampled before (penalties, grammars); or if the pages could only be had
        by a preemption.
        """
        if self.waiting or not all(_only_decodes(chunk) for chunk in chunks):
            return 0
        steps = min(
            [most, *(chunk.sequence.max_length - chunk.sequence.length for chunk in chunks)]
        )
        return steps if self._missing(chunks, steps) <= self._paging.num_available() else 0

    def repeat(self, chunks: list[Chunk], steps: int) -> None:
        """Add ``steps`` decode steps to the step of ``chunks``; at most ``spare_steps`` of them.

        Each sequence gets the pages of its ``steps`` further tokens, which count as computed and
        pending.
        """
        self.extend(chunks, steps)
        for chunk in chunks:
            chunk.sequence.num_pending += steps

    def can_extend(self, chunks: list[Chunk], tokens: int) -> bool:
        """Whether ``extend`` finds pages without a preemption, and no sequence waits."""
        return not self.waiting and self._missing(chunks, tokens) <= self._paging.num_available()

    def extend(self, chunks: list[Chunk], tokens: int) -> None:
        """Count up to ``tokens`` more tokens of each chunk's sequence as computed, with pages.

        At most as many as the sequence may still get. Those that are not computed after all are to
        be taken back (``reject``).
        """
        self._paging.make_free(self._missing(chunks, tokens))
        for sequence, start, *_ in chunks:
            self._paging.slide(sequence, start)
            more = min(tokens, sequence.max_length - sequence.num_computed)
            sequence.num_computed += more
            needed = self._paging.num_for(sequence.num_computed) - len(sequence.pages)
            self._paging.take(sequence, max(0, needed))
            self.counts.computed_tokens += more

    def reject(self, sequence: Sequence, count: int) -> None:
        """Take back the last ``count`` computed tokens of a running sequence: rejected drafts.

        The next tokens are written over their keys and values. Their pages stay the sequence's.
        """
        sequence.num_computed -= count

    def release(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended or was aborted, waiting or running.

        Its full pages stay in the prefix tree for other prompts; all its other pages are free
        afterwards.
        """
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._leave(sequence)
            self.load -= sequence.max_length
        for queue in (self.waiting, self._held or []):
            if sequence in queue:
                queue.remove(sequence)
                self.load -= sequence.max_length

    def cached(self, salt: str, prompt: np.ndarray) -> int:
        """Return how many tokens of a prompt are cached; ``salt``: the request's ``cache_salt``."""
        blocks = self._paging.blocks(prompt, len(prompt) - 1)
        return self._paging.match(salt, blocks).depth * self.page_size

    def _chunk(self, sequence: Sequence, spare_tokens: int, spare_rows: int) -> Chunk:
        """Return the next chunk of a sequence.

        ``spare_tokens`` and ``spare_rows``: what it may take of the step beside the one token and
        the one row that are reserved for it.
        """
        start = sequence.num_computed
        count = min(sequence.length - start, spare_tokens + 1)
        scored = range(0)
        if sequence.is_scoring:
            count = min(count, spare_rows + 1)
            scored = range(
                max(start, sequence.num_scored), min(start + count, sequence.num_prompt - 1)
            )
        elif start + count < sequence.length and count > self.page_size:
            # End on a page boundary: other sequences can share full pages only.
            count -= (start + count) % self.page_size
        samples = start + count == sequence.length
        return Chunk(sequence, start, count, samples=samples, scored=scored)

    def _drafts(self, sequence: Sequence, most: int) -> Many[int]:
        """Return the drafts of a sequence that the next step verifies, at most ``most``.

        At most as many as it may still get tokens beside the sampled one, and as fit into pages
        that others do not need. The sequence's ``tokens`` hold them, after its own.
        """
        length = sequence.num_tokens
        assert not sequence.num_pending, "drafts follow the newest token"
        spare = max(0, self._paging.num_available() - len(self.running))
        room = (len(sequence.pages) + spare) * self.page_size - length
        drafts = sequence.drafts[: max(0, min(most, room, sequence.max_length - length - 1))]
        sequence.drafts = []
        sequence.tokens[length : length + len(drafts)] = drafts
        return drafts

    def _grow(self, sequence: Sequence, chunk: Chunk) -> bool:
        """Give a sequence the pages of its chunk and count the chunk as computed.

        While pages are missing, the last running sequence is preempted. Returns False if that was
        ``sequence`` itself.
        """
        assert sequence.node is not None
        end = chunk.start + chunk.num_tokens
        if end > len(sequence.pages) * self.page_size:
            self._paging.slide(sequence, chunk.start)
            needed = self._paging.num_for(end) - len(sequence.pages)
            while needed > self._paging.make_free(needed):
                last = self.running[-1]
                self._preempt(last)
                if last is sequence:
                    return False
            self._paging.take(sequence, needed)
        sequence.num_computed = end
        sequence.num_pending += chunk.samples
        if chunk.scored:
            sequence.num_scored = chunk.scored.stop
        self.counts.computed_tokens += chunk.num_tokens
        unpublished = sequence.num_tokens - sequence.node.depth * self.page_size
        if unpublished >= self.page_size and self.prefix_caching:
            self._paging.publish(sequence)
        return True

    def _missing(self, chunks: list[Chunk], steps: int) -> int:
        """Return how many more pages the chunks' sequences need for ``steps`` tokens each."""
        needed = 0
        for sequence in (chunk.sequence for chunk in chunks):
            end = min(sequence.num_computed + steps, sequence.max_length)
            needed += max(0, self._paging.num_for(end) - len(sequence.pages))
        return needed

    def _admit(self) -> Sequence | None:
        """Move the next waiting sequence to the running ones; return it, or None if it must wait.

        It must wait while there are too few pages for all its tokens beside those that running
        sequences may still need. A sequence that would run alone is always admitted.
        """
        sequence = self._next()
        # It was preempted while several of its tokens were on the device: the host does not have
        # them yet, so it cannot compute them again.
        if sequence.num_pending > 1:
            return None
        node = self._paging.match(sequence.request.spec.cache_salt, self._matchable(sequence))
        self.tree.lock(node)
        pages = self._paging.share(node, 0)
        needed = self._paging.num_for(sequence.num_tokens) - node.depth
        if self.running and not self._has_room(needed):
            self.tree.unlock(node)
            self._paging.drop_windows(pages[1:])
            return None
        if sequence is not self.waiting[0]:
            self.waiting[0].overtaken += 1
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_order)
        sequence.slot = self._slots.pop()
        sequence.node = node
        sequence.num_computed = node.depth * self.page_size
        sequence.window_pages = [[] for _ in self.windows]
        self._paging.hold(sequence, pages)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.counts.queried_tokens += sequence.num_prompt
            self.counts.cached_tokens += sequence.num_computed
        return sequence

    def _has_room(self, needed: int) -> bool:
        """Whether ``needed`` pages are available beside those reserved for running sequences.

        Reserved for each of them are the missing pages of its tokens so far, and one page more.
        """
        missing = [max(0, self._paging.num_for(s.num_tokens) - len(s.pages)) for s in self.running]
        available = self.pages.num_free + self.tree.num_unlocked
        if needed + sum(1 + count for count in missing) > available:
            return False
        for pool in self.windows:
            span = pool.span(self.max_num_tokens)
            owed = sum(1 + min(count, span) for count in missing)
            if min(needed, span) + owed > pool.num_available:
                return False
        return True

    def _next(self) -> Sequence:
        """Return the waiting sequence to admit next.

        That is, among the first LOOKAHEAD with the priority of the first, the one with the longest
        cached prefix; or the first itself, if it was overtaken MAX_OVERTAKEN times.
        """
        first = self.waiting[0]
        if first.overtaken >= MAX_OVERTAKEN or not self.prefix_caching or len(self.waiting) == 1:
            return first
        equals = [
            s
            for s in self.waiting[:LOOKAHEAD]
            if s.request.spec.priority == first.request.spec.priority
        ]
        return max(
            equals,
            key=lambda s: self._paging.match(s.request.spec.cache_salt, self._matchable(s)).depth,
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Move a running sequence back to the waiting ones, where no other one overtakes it."""
        self.running.remove(sequence)
        self._leave(sequence)
        sequence.num_computed = 0
        sequence.overtaken = MAX_OVERTAKEN
        bisect.insort(self.waiting, sequence, key=_order)
        self.counts.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Take pages and slot from a running sequence; its pages in the tree stay, unlocked."""
        assert sequence.node is not None
        self._paging.publish(sequence)
        self.pages.give_back(sequence.pages[sequence.node.depth :] + sequence.duplicates)
        self._paging.drop_windows(sequence.window_pages)
        self.tree.unlock(sequence.node)
        self._slots.append(sequence.slot)
        sequence.drafts = []
        sequence.pages = []
        sequence.window_pages = []
        sequence.duplicates = []
        sequence.node = None
        sequence.slot = -1

    def _adopt(self, sequence: Sequence) -> None:
        """Skip the tokens that other sequences have computed since this one was admitted.

        The sequence shares their pages. Only for a sequence that stands at a page boundary and need
        not compute every token of its prompt.
        """
        node = sequence.node
        assert node is not None
        if sequence.needs_every_token or sequence.num_computed != node.depth * self.page_size:
            return
        first, target = node.depth, node
        for block in self._paging.blocks(sequence.tokens, sequence.num_tokens - 1, first):
            if (child := target.children.get(block)) is None:
                break
            target = child
        target = self._paging.usable(target)
        if target.depth <= first:
            return
        for block in self._paging.blocks(sequence.tokens, target.depth * self.page_size, first):
            node = self.tree.descend(node, node.children[block])
        self.counts.cached_tokens += (node.depth - first) * self.page_size
        self._paging.slide(sequence, node.depth * self.page_size)
        self._paging.hold(sequence, self._paging.share(node, first))
        sequence.node = node
        sequence.num_computed = node.depth * self.page_size

    def _matchable(self, sequence: Sequence) -> list[bytes]:
        """Return the blocks of the sequence to look up in the prefix tree.

        The last token is left out: it must be computed to sample the next one. Empty if the
        sequence must compute every token.
        """
        if not self.prefix_caching or sequence.needs_every_token:
            return []
        return self._paging.blocks(sequence.tokens, sequence.num_tokens - 1)


def _only_decodes(chunk: Chunk) -> bool:
    """Whether a chunk is one token that samples the next, with no scores and no logit rules."""
    return (
        chunk.num_tokens == 1
        and chunk.samples
        and not chunk.scored
        and chunk.sequence.request.rules is None
    )


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
