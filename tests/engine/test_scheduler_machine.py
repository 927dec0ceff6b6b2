"""The scheduler under random arrivals, aborts, preemptions and ends.

Every request ends, and every step reads the tokens that were computed for it. The device is
modelled by an array of pages: each step writes, for each of its tokens, the text up to that token,
and its rows read these texts. A page that is lost, shared wrongly or freed too early shows up as a
wrong text.
"""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from slipway.cache.windows import FREED
from slipway.engine.scheduler import Scheduler
from tests.engine.scheduling import LONGEST, NUM_PAGES, PAGE_SIZE, STOP, TABLE_WIDTH, make_request

pytestmark = pytest.mark.host


class Device:
    """Content of the caches, by numbering, page and offset: the text that ends with a token."""

    def __init__(self, scheduler, windows):
        self.scheduler = scheduler
        self.slots = {}
        self.windows = [LONGEST, *(window for window, _ in windows)]

    def run(self, chunks, texts):
        """Run steps with results that arrive at once.

        Returns, for each step, the numbers of the requests that took part and their tokens.
        """
        for numbering, window in enumerate(self.windows):
            for sequence, start, count, *_ in chunks:
                for position in range(start, start + count):
                    text = (sequence.request.spec.cache_salt, *texts[sequence][: position + 1])
                    self.slots[self.slot(numbering, sequence, position)] = text
            for sequence, start, count, *_ in chunks:
                for position in range(max(0, start - window + 1), start + count):
                    expected = (sequence.request.spec.cache_salt, *texts[sequence][: position + 1])
                    assert self.slots[self.slot(numbering, sequence, position)] == expected

    def slot(self, numbering, sequence, position):
        page = self.scheduler.page_tables[numbering][sequence.slot, position // PAGE_SIZE]
        assert page == [sequence.pages, *sequence.window_pages][numbering][position // PAGE_SIZE]
        return numbering, page, position % PAGE_SIZE


class SchedulerMachine(RuleBasedStateMachine):
    """Random runs; the tokens are random numbers, and token STOP ends a sequence.

    Results arrive one step late, as from a device, or at once. The device has the text of a
    sequence before the host. Drafts of the next tokens may be verified where the host has the
    newest token; then the results are taken before the next step.
    """

    scheduler: Scheduler | None = None

    @initialize(
        rows=st.integers(1, 5),
        spare=st.integers(0, 12),
        seed=st.integers(0, 2**16),
        caching=st.booleans(),
        repeats=st.integers(0, 6),
        windows=st.lists(st.sampled_from([1, 3, 6, 14]), unique=True, max_size=2),
        tight=st.booleans(),
        drafts=st.integers(0, 4),
    )
    def start(self, rows, spare, seed, caching, repeats, windows, tight, drafts):
        self.rows = rows
        self.drafts = drafts
        self.budget = rows + spare
        self.random = random.Random(seed)
        self.repeats = repeats
        self.scheduler = Scheduler(
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            table_width=TABLE_WIDTH,
            max_num_seqs=rows,
            max_num_tokens=self.budget,
            max_rows=min(self.budget, rows * (1 + drafts)),
            prefix_caching=caching,
            windows=[(window, self.num_window_pages(window, tight)) for window in windows],
        )
        self.device = Device(self.scheduler, [(window, 0) for window in windows])
        self.live = []
        self.arrived = []
        self.texts = {}
        self.pending = []  # (sequence, token) of the call on the device
        self.rejected = []  # (sequence, number of drafts that the call on the device rejects)
        self.scored = {}

    def num_window_pages(self, window, tight):
        """Return the fewest pages that a sequence may need at once, or those of full attention."""
        return (
            min(NUM_PAGES, (window - 1 + self.budget + self.repeats) // PAGE_SIZE + 2)
            if tight
            else NUM_PAGES
        )

    @rule(
        shared=st.integers(0, 3),
        own=st.integers(1, 20),
        output=st.integers(1, LONGEST),
        n=st.integers(1, 3),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "a"]),
        scored=st.booleans(),
    )
    def arrive(self, shared, own, output, n, priority, salt, scored):
        number = len(self.arrived)
        prompt = [shared] * (5 * shared) + [100 * number + i for i in range(own)]
        request = make_request(
            number,
            prompt,
            min(output, LONGEST - len(prompt)),
            n,
            priority=priority,
            cache_salt=salt,
            scored=scored,
        )
        for sequence in request.sequences:
            self.texts[sequence] = list(prompt)
            self.scored[sequence] = []
            self.scheduler.add(sequence)
        self.live += request.sequences
        self.arrived += request.sequences

    @rule(data=st.data())
    def abort(self, data):
        if self.live:
            request = data.draw(st.sampled_from(self.live)).request
            for sequence in [sequence for sequence in self.live if sequence.request is request]:
                self.end(sequence, "abort")

    @rule()
    def flush(self):
        self.scheduler.tree.flush()

    @rule(steps=st.integers(1, 4), late=st.booleans())
    def run(self, steps, late):
        for _ in range(steps):
            self.step(late)

    def step(self, late=True):
        if not late or self.rejected:
            self.take()
            self.propose()
        chunks = self.scheduler.schedule()
        ends = any(s.num_pending for s in self.live)
        assert chunks or ends or not self.live, "a sequence advances, or is about to end"
        self.check(chunks)
        before = self.pending
        self.pending = []
        for chunk in (
            chunks
        ):  # what this step reads was written by those before it, the one on the device included
            sequence = chunk.sequence
            self.scored[sequence] += chunk.scored
            assert len(self.texts[sequence]) + len(chunk.drafts) >= chunk.start + chunk.num_tokens
        more = self.scheduler.spare_steps(chunks, self.repeats)
        if more:
            preemptions = self.scheduler.counts.preemptions
            self.scheduler.repeat(chunks, more)
            assert not self.scheduler.waiting
            assert self.scheduler.counts.preemptions == preemptions
        for step in range(1 + more):
            drafted = {chunk.sequence: chunk.drafts for chunk in chunks}
            self.device.run(
                [chunk._replace(start=chunk.start + step) for chunk in chunks],
                {s: [*text, *drafted.get(s, ())] for s, text in self.texts.items()},
            )
            for chunk in chunks:
                if chunk.samples:
                    accepted = self.random.randint(0, len(chunk.drafts))
                    if chunk.drafts:
                        self.rejected.append((chunk.sequence, len(chunk.drafts) - accepted))
                    for token in [*chunk.drafts[:accepted], self.random.randrange(STOP + 1)]:
                        self.texts[chunk.sequence].append(token)
                        self.pending.append((chunk.sequence, token))
        for sequence, token in before:
            self.give(sequence, token)

    def propose(self):
        """Give drafts to some of the sequences that decode."""
        for sequence in self.scheduler.running:
            if self.drafts and sequence.awaits_a_step and self.random.random() < 0.7:
                count = self.random.randint(1, self.drafts + 2)
                sequence.drafts = [self.random.randrange(STOP + 1) for _ in range(count)]

    def take(self):
        before, rejected = self.pending, self.rejected
        self.pending = []
        self.rejected = []
        for sequence, count in rejected:
            if sequence.finish_reason is None:
                self.scheduler.reject(sequence, count)
        # Of a sequence with drafts there is one more token than drafts that were accepted.
        for sequence, count in Counter(sequence for sequence, _ in before).items():
            if sequence.num_pending == 1:
                sequence.num_pending = count
        for sequence, token in before:
            self.give(sequence, token)

    def give(self, sequence, token):
        if sequence.finish_reason is not None:
            return
        sequence.num_pending -= 1
        sequence.append(token, None)
        output = self.texts[sequence][sequence.num_prompt :]
        assert sequence.token_ids == output[: len(sequence.token_ids)]
        if sequence.finish_reason is not None:
            self.end(sequence, sequence.finish_reason)

    def end(self, sequence, reason):
        sequence.finish(reason)
        self.scheduler.release(sequence)
        assert sequence.pages == []
        assert sequence.slot == -1
        self.live.remove(sequence)

    def check(self, chunks):
        assert sum(chunk.num_tokens for chunk in chunks) <= self.budget
        assert len(chunks) <= self.rows
        assert sum(chunk.num_rows for chunk in chunks) <= self.scheduler.max_rows
        assert len(chunks) == len({chunk.sequence for chunk in chunks}), "one chunk a sequence"
        moved = {chunk.sequence for chunk in chunks}
        assert moved == {
            s for s in self.scheduler.running if s in moved or s.length < s.max_length
        }, "all that run move"
        for sequence, start, count, samples, scored, drafts in chunks:
            assert sequence.drafts == []
            assert len(drafts) <= max(0, sequence.max_length - sequence.length)
            assert count >= 1
            assert start + count == sequence.num_computed <= len(sequence.pages) * PAGE_SIZE
            text = len(self.texts[sequence]) + len(drafts)
            assert samples == (start + count == text), "who has computed all gets its next"
            assert start + count - len(drafts) <= max(start, sequence.num_tokens) + 1, (
                "the device keeps one token a row"
            )
            assert set(scored) <= set(range(start, start + count))

    @invariant()
    def pages_belong_to_the_running_and_the_tree(self):
        if self.scheduler is None:
            return
        scheduler, tree = self.scheduler, set()
        stack = list(scheduler.tree._roots.values()) + [s.node for s in scheduler.running]
        for node in stack:
            while node.parent is not None:  # flushed paths are reached from their readers alone
                tree.add(node.page)
                node = node.parent
        stack = list(scheduler.tree._roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            tree |= {node.page} if node.parent is not None else set()
        own = [
            page
            for s in self.arrived
            if s.slot >= 0
            for page in s.pages[s.node.depth :] + s.duplicates
        ]
        assert len(own) == len({*own}), "a page has one owner"
        assert not tree & {*own}, "a page has one owner"
        assert len(own) + scheduler.tree.num_pages == NUM_PAGES - scheduler.pages.num_free, (
            "no page is lost"
        )
        assert tree <= set(range(NUM_PAGES))
        assert len(tree) <= scheduler.tree.num_pages
        assert all(s in scheduler.running for s in self.arrived if s.pages)
        for numbering, pool in enumerate(scheduler.windows):
            used = {
                page
                for s in self.arrived
                if s.slot >= 0
                for page in s.window_pages[numbering]
                if page != FREED
            }
            assert len(used) == pool.num_pages - pool.num_available, "no page of a window is lost"
            for sequence in self.arrived:
                if sequence.slot >= 0:
                    pages = sequence.window_pages[numbering]
                    held = sum(page != FREED for page in pages)
                    assert held <= pool.span(self.budget + self.repeats) + 1, (
                        "pages behind the window are freed"
                    )
        assert scheduler.load == sum(s.max_length for s in self.live)
        assert scheduler.num_free_slots == self.rows - len(scheduler.running)
        assert scheduler.running == sorted(scheduler.running, key=lambda s: s.order)

    def teardown(self):
        if self.scheduler is None:
            return
        for _ in range(2 * LONGEST * max(1, len(self.live))):
            if not self.live:
                break
            self.step()
        assert not self.live, "every request ends"
        self.take()
        assert self.scheduler.schedule() == []
        self.scheduler.tree.flush()
        assert self.scheduler.pages.num_free == NUM_PAGES
        assert self.scheduler.tree.num_pages == 0
        assert all(pool.num_available == pool.num_pages for pool in self.scheduler.windows)
        assert all(len(s.token_ids) <= s.request.max_tokens for s in self.arrived)
        for sequence, scored in self.scored.items():
            if sequence.scores and sequence.finish_reason != "abort":
                assert scored == list(range(sequence.num_prompt - 1)), (
                    "each token of the prompt is scored once"
                )
            elif not sequence.scores:
                assert scored == []


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, derandomize=True
)
