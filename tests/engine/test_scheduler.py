"""The scheduler under random arrivals, aborts, preemptions and ends.

Every request ends, and every step reads the tokens that were computed for it. The device is
modelled by an array of pages: each step writes, for each of its tokens, the text up to that token,
and its rows read these texts. A page that is lost, shared wrongly or freed too early shows up as a
wrong text.
"""

import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from slipway.cache.windows import FREED
from slipway.engine.params import SamplingParams
from slipway.engine.request import Request, RequestSpec, Sequence
from slipway.engine.scheduler import LOOKAHEAD, MAX_OVERTAKEN, Scheduler

pytestmark = pytest.mark.host
PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, STOP = 4, 16, 12, 7
LONGEST = PAGE_SIZE * TABLE_WIDTH


def make_scheduler(num_pages=64, **limits):
    return Scheduler(num_pages=num_pages, page_size=PAGE_SIZE, table_width=TABLE_WIDTH, **limits)


def make_request(number, prompt, max_tokens, n=1, **options):
    if isinstance(prompt, int):
        prompt = [100 * number + i for i in range(prompt)]
    scored = {"prompt_logprobs": 0} if options.pop("scored", False) else {}
    params = SamplingParams(n=n, max_tokens=max_tokens, **scored)
    request = Request(
        str(number), RequestSpec(prompt, params, **options), max_tokens, arrival=number
    )
    request.sequences = [Sequence(request, index, 0, frozenset({STOP}), None) for index in range(n)]
    return request


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
    sequence before the host.
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
    )
    def start(self, rows, spare, seed, caching, repeats, windows, tight):
        self.rows = rows
        self.budget = rows + spare
        self.random = random.Random(seed)
        self.repeats = repeats
        self.scheduler = Scheduler(
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            table_width=TABLE_WIDTH,
            max_num_seqs=rows,
            max_num_tokens=self.budget,
            prefix_caching=caching,
            windows=[(window, self.num_window_pages(window, tight)) for window in windows],
        )
        self.device = Device(self.scheduler, [(window, 0) for window in windows])
        self.live = []
        self.arrived = []
        self.texts = {}
        self.pending = []  # (sequence, token) of the call on the device
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
        if not late:
            self.take()
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
            assert len(self.texts[sequence]) >= chunk.start + chunk.num_tokens
        more = self.scheduler.spare_steps(chunks, self.repeats)
        if more:
            preemptions = self.scheduler.counts.preemptions
            self.scheduler.repeat(chunks, more)
            assert not self.scheduler.waiting
            assert self.scheduler.counts.preemptions == preemptions
        for step in range(1 + more):
            self.device.run(
                [chunk._replace(start=chunk.start + step) for chunk in chunks], self.texts
            )
            for chunk in chunks:
                if chunk.samples:
                    token = self.random.randrange(STOP + 1)
                    self.texts[chunk.sequence].append(token)
                    self.pending.append((chunk.sequence, token))
        for sequence, token in before:
            self.give(sequence, token)

    def take(self):
        before = self.pending
        self.pending = []
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
        assert sum(chunk.num_rows for chunk in chunks) <= self.rows
        assert len(chunks) == len({chunk.sequence for chunk in chunks}), "one chunk a sequence"
        moved = {chunk.sequence for chunk in chunks}
        assert moved == {
            s for s in self.scheduler.running if s in moved or s.length < s.max_length
        }, "all that run move"
        for sequence, start, count, samples, scored in chunks:
            assert count >= 1
            assert start + count == sequence.num_computed <= len(sequence.pages) * PAGE_SIZE
            assert samples == (start + count == len(self.texts[sequence])), (
                "who has computed all gets its next"
            )
            assert start + count <= max(start, sequence.num_tokens) + 1, (
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


def finish(scheduler, chunks, token=0):
    """Give a token to every chunk that samples."""
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.num_pending -= 1
            chunk.sequence.append(token, None)
            if chunk.sequence.finish_reason is not None:
                scheduler.release(chunk.sequence)


def run(scheduler, steps=1):
    """Run steps with results that arrive at once.

    Returns, for each step, the numbers of the requests that took part and their tokens.
    """
    seen = []
    for _ in range(steps):
        chunks = scheduler.schedule()
        seen.append(
            [(int(chunk.sequence.request.request_id), chunk.num_tokens) for chunk in chunks]
        )
        finish(scheduler, chunks)
    return seen


def add(scheduler, *requests):
    for request in requests:
        for sequence in request.sequences:
            scheduler.add(sequence)


def test_a_long_prompt_does_not_hold_up_those_that_decode():
    scheduler = make_scheduler(max_num_seqs=2, max_num_tokens=4, num_pages=NUM_PAGES)
    add(scheduler, make_request(0, 1, 20), make_request(1, 30, 1))
    assert run(scheduler, 10) == [[(0, 1), (1, 3)]] * 10


def test_a_small_request_does_not_overtake_one_that_waits_for_pages():
    scheduler = make_scheduler(max_num_seqs=4, max_num_tokens=16, num_pages=4)
    add(scheduler, make_request(0, 12, 4), make_request(1, 8, 4), make_request(2, 1, 1))
    assert run(scheduler, 2) == [[(0, 12)], [(0, 1)]]


def test_requests_of_one_step_share_what_the_first_of_them_computes():
    scheduler = make_scheduler(max_num_seqs=8, max_num_tokens=64)
    prefix = list(range(20))
    add(scheduler, *(make_request(number, [*prefix, 100 + number], 2) for number in range(6)))
    assert run(scheduler) == [[(0, 21), *((number, 1) for number in range(1, 6))]]
    assert scheduler.counts.cached_tokens == 5 * 20
    assert scheduler.counts.computed_tokens == 26


def test_samples_share_their_prompts_full_pages():
    scheduler = make_scheduler(max_num_seqs=8, max_num_tokens=64)
    add(scheduler, make_request(0, 10, 4, n=4))
    assert run(scheduler) == [[(0, 10), (0, 2), (0, 2), (0, 2)]]


def test_what_was_aborted_is_there_for_the_next():
    scheduler = make_scheduler(max_num_seqs=2, max_num_tokens=8)
    first = make_request(0, list(range(30)), 4)
    add(scheduler, first)
    run(scheduler, 2)  # 16 of its tokens
    scheduler.release(first.sequences[0])
    add(scheduler, make_request(1, list(range(30)), 4))
    assert run(scheduler, 2) == [[(1, 8)], [(1, 6)]]


def test_pages_that_run_out_are_taken_from_the_newest_and_the_least_important():
    scheduler = make_scheduler(max_num_seqs=3, max_num_tokens=24, num_pages=6)
    important = make_request(2, 4, 12, priority=-1)
    add(scheduler, make_request(0, 4, 12), make_request(1, 4, 12), important)
    outputs = {}
    for _ in range(200):
        (moved,) = run(scheduler)
        for number, _ in moved:
            outputs[number] = outputs.get(number, 0) + 1
        if not scheduler.waiting and not scheduler.running:
            break
    assert scheduler.counts.preemptions >= 1
    assert list(important.sequences[0].token_ids) == [0] * 12
    assert not scheduler.running
    assert not scheduler.waiting, "no sequence is lost"


def test_priority_goes_before_arrival():
    scheduler = make_scheduler(max_num_seqs=1, max_num_tokens=8)
    add(
        scheduler,
        make_request(0, 2, 1, priority=5),
        make_request(1, 2, 1),
        make_request(2, 2, 1, priority=-1),
    )
    assert run(scheduler, 3) == [[(2, 2)], [(1, 2)], [(0, 2)]]


def test_a_cached_prefix_goes_first_but_nobody_is_overtaken_for_ever():
    scheduler = make_scheduler(max_num_seqs=1, max_num_tokens=16)
    prefix = list(range(8))
    add(scheduler, make_request(0, [*prefix, 99], 1))
    run(scheduler)
    add(scheduler, make_request(1, [50, 51], 1), make_request(2, [*prefix, 98], 1))
    assert run(scheduler) == [[(2, 1)]], "what is cached goes first"
    order = []
    for number in range(3, 100):
        add(scheduler, make_request(number, [*prefix, 200 + number], 1))
        order += [number for step in run(scheduler) for number, _ in step]
        if 1 in order:
            break
    assert order.index(1) == MAX_OVERTAKEN - 1
    assert LOOKAHEAD > 1


def test_a_scored_prompt_uses_no_cache_and_no_more_rows_than_there_are():
    scheduler = make_scheduler(max_num_seqs=4, max_num_tokens=32)
    add(scheduler, make_request(0, list(range(10)), 1))
    run(scheduler)
    add(scheduler, make_request(1, list(range(10)), 1, scored=True))
    chunk = scheduler.schedule()[0]
    assert (chunk.start, chunk.num_tokens) == (0, 4)
    assert chunk.scored == range(4)
    assert chunk.num_rows == 4


def test_chunks_end_on_pages_so_that_others_can_go_on_from_there():
    scheduler = make_scheduler(max_num_seqs=2, max_num_tokens=11)
    add(scheduler, make_request(0, 30, 2))
    assert run(scheduler, 4) == [[(0, 8)], [(0, 8)], [(0, 8)], [(0, 6)]]


def test_steps_go_together_where_all_only_decode_and_nobody_waits():
    scheduler = make_scheduler(max_num_seqs=2, max_num_tokens=8, num_pages=8)
    add(scheduler, make_request(0, 3, 9), make_request(1, 2, 20))
    chunks = scheduler.schedule()
    assert scheduler.spare_steps(chunks, 4) == 0, "prompts"
    finish(scheduler, chunks)
    chunks = scheduler.schedule()
    assert [scheduler.spare_steps(chunks, most) for most in (0, 4, 7, 99)] == [0, 4, 7, 7], (
        "no more than one may get"
    )
    scheduler.repeat(chunks, 4)
    assert [(s.num_pending, s.num_computed, len(s.pages)) for s in scheduler.running] == [
        (5, 8, 2),
        (5, 7, 2),
    ]
    add(scheduler, make_request(2, 2, 2))
    chunks = scheduler.schedule()
    assert [chunk.num_tokens for chunk in chunks] == [1, 1]
    assert scheduler.spare_steps(chunks, 4) == 0, "one waits"
    scheduler.release(scheduler.waiting[0])
    spare = scheduler.pages.take(scheduler.pages.num_free)
    assert [scheduler.spare_steps(chunks, most) for most in (1, 2)] == [0, 0], (
        "the second needs a page"
    )
    scheduler.pages.give_back(spare)
    assert scheduler.spare_steps(chunks, 2) == 2


def test_who_is_preempted_with_several_tokens_on_the_device_waits_for_them():
    scheduler = make_scheduler(max_num_seqs=2, max_num_tokens=8, num_pages=4)
    add(scheduler, make_request(0, 3, 12), make_request(1, 3, 12))
    finish(scheduler, scheduler.schedule())
    chunks = scheduler.schedule()
    second = chunks[1].sequence
    assert scheduler.spare_steps(chunks, 4) == 4
    scheduler.repeat(chunks, 4)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [chunks[0].sequence], (
        "a page too few"
    )
    assert second in scheduler.waiting
    assert second.num_pending == 5
    scheduler.release(chunks[0].sequence)
    assert scheduler.schedule() == [], "four of its tokens are known to the device alone"
    for token in range(5):
        second.num_pending -= 1
        second.append(token, None)
    assert [(chunk.start, chunk.num_tokens) for chunk in scheduler.schedule()] == [(4, 5)]


def test_flat_tokens_of_a_sequence():
    (sequence,) = make_request(0, 6, 2).sequences
    sequence.append(5, None)
    np.testing.assert_array_equal(sequence.tokens[: sequence.num_tokens], [0, 1, 2, 3, 4, 5, 5])
