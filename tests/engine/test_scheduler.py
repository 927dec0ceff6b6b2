"""The scheduler under random arrivals, aborts and ends: everyone moves and ends, no page or token too many."""

import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from slipway.engine.request import Request, SamplingParams, Sequence
from slipway.engine.scheduler import Scheduler

pytestmark = pytest.mark.host
PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, STOP = 4, 16, 12, 7
LONGEST = PAGE_SIZE * TABLE_WIDTH


def make_request(number, prompt_length, max_tokens, n=1):
    params = SamplingParams(n=n, max_tokens=max_tokens)
    request = Request(str(number), None, list(range(prompt_length)), params, max_tokens)
    request.sequences = [Sequence(request, index, 0, frozenset({STOP}), None) for index in range(n)]
    return request


class SchedulerMachine(RuleBasedStateMachine):
    """The model that samples is a random number generator; token STOP ends a sequence."""

    scheduler: Scheduler | None = None

    @initialize(rows=st.integers(1, 5), spare=st.integers(0, 12), seed=st.integers(0, 2**16))
    def start(self, rows, spare, seed):
        self.rows, self.budget, self.random = rows, rows + spare, random.Random(seed)
        self.scheduler = Scheduler(NUM_PAGES, PAGE_SIZE, TABLE_WIDTH, rows, self.budget)
        self.live, self.arrived, self.admitted = [], [], []

    @rule(prompt=st.integers(1, LONGEST - 1), output=st.integers(1, LONGEST), n=st.integers(1, 3))
    def arrive(self, prompt, output, n):
        request = make_request(len(self.arrived), prompt, min(output, LONGEST - prompt), n)
        self.live += request.sequences
        self.arrived += request.sequences
        for sequence in request.sequences:
            self.scheduler.add(sequence)

    @rule(data=st.data())
    def abort(self, data):
        if self.live:
            request = data.draw(st.sampled_from(self.live)).request
            mine = [sequence for sequence in self.live if sequence.request is request]
            self.scheduler.abort(mine)
            for sequence in mine:
                sequence.finish("abort")
                assert sequence.pages == []
            self.live = [sequence for sequence in self.live if sequence not in mine]

    @rule(steps=st.integers(1, 4))
    def run(self, steps):
        for _ in range(steps):
            self.step()

    def step(self):
        chunks = self.scheduler.schedule()
        assert bool(chunks) == bool(self.live), "there is work exactly as long as someone lives"
        assert sum(chunk.num_tokens for chunk in chunks) <= self.budget and len(chunks) <= self.rows
        moved = [chunk.sequence for chunk in chunks]
        assert len(moved) == len({*moved}), "one chunk a sequence"
        assert moved == self.scheduler.running, "every running sequence moves"
        self.admitted += [sequence for sequence in moved if sequence not in self.admitted]
        for sequence, start, count in chunks:
            assert count >= 1 and start == sequence.num_computed
            assert start + count <= min(sequence.num_tokens, len(sequence.pages) * PAGE_SIZE)
            np.testing.assert_array_equal(sequence.page_row[: len(sequence.pages)], sequence.pages)
            if start >= len(sequence.request.prompt_token_ids):
                assert count == 1, "who decodes gets its one token"
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.append(self.random.randrange(STOP + 1), None)
        self.scheduler.commit(chunks)
        self.live = [sequence for sequence in self.live if sequence.finish_reason is None]

    @invariant()
    def pages_belong_to_the_running(self):
        if self.scheduler is not None:
            owned = [page for sequence in self.arrived for page in sequence.pages]
            assert len(owned) == len({*owned}) == NUM_PAGES - self.scheduler.pages.num_free
            assert all(sequence in self.scheduler.running for sequence in self.arrived if sequence.pages)
            assert self.scheduler.load == sum(sequence.max_length for sequence in self.live)

    def teardown(self):
        if self.scheduler is None:
            return
        for _ in range(LONGEST * max(1, len(self.live))):
            if not self.live:
                break
            self.step()
        assert not self.live and self.scheduler.schedule() == [], "every request ends"
        assert self.scheduler.pages.num_free == NUM_PAGES
        order = [sequence for sequence in self.arrived if sequence in self.admitted]
        assert self.admitted == order, "first come, first served"
        assert all(len(s.token_ids) <= s.request.max_tokens for s in self.arrived)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=20, deadline=None, derandomize=True)


def test_a_long_prompt_does_not_hold_up_those_that_decode():
    scheduler = Scheduler(NUM_PAGES, PAGE_SIZE, TABLE_WIDTH, max_num_seqs=2, max_num_tokens=4)
    first, second = make_request(0, 1, 20), make_request(1, 30, 1)
    for request in (first, second):
        scheduler.add(request.sequences[0])
    counts = []
    while not second.finished:
        chunks = scheduler.schedule()
        counts.append(tuple(chunk.num_tokens for chunk in chunks))
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.append(0, None)
        scheduler.commit(chunks)
    assert counts == [(1, 3)] * 10 and len(first.sequences[0].token_ids) == 10


def test_a_small_request_does_not_overtake_one_that_waits_for_pages():
    scheduler = Scheduler(4, PAGE_SIZE, TABLE_WIDTH, max_num_seqs=4, max_num_tokens=8)
    requests = [make_request(0, 8, 4), make_request(1, 8, 4), make_request(2, 1, 1)]
    for request in requests:
        scheduler.add(request.sequences[0])
    assert [chunk.sequence.request for chunk in scheduler.schedule()] == requests[:1]
    scheduler.abort(requests[0].sequences)
    assert [chunk.sequence.request for chunk in scheduler.schedule()] == requests[1:]


def test_chunks_sample_where_they_reach_the_end():
    scheduler = Scheduler(NUM_PAGES, PAGE_SIZE, TABLE_WIDTH, max_num_seqs=1, max_num_tokens=4)
    request = make_request(0, 6, 2)
    scheduler.add(request.sequences[0])
    seen = []
    while not request.finished:
        (chunk,) = scheduler.schedule()
        seen.append((chunk.start, chunk.num_tokens, chunk.samples))
        if chunk.samples:
            chunk.sequence.append(0, None)
        scheduler.commit([chunk])
    assert seen == [(0, 4, False), (4, 2, True), (6, 1, True)]
