"""The scheduler: which sequences run, wait, share pages and give them back, case by case.

Not here: random runs (test_scheduler_machine.py).
"""

import numpy as np
import pytest

from slipway.engine.scheduler import LOOKAHEAD, MAX_OVERTAKEN
from tests.engine.scheduling import (
    NUM_PAGES,
    make_request,
    make_scheduler,
)

pytestmark = pytest.mark.host


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
