"""Batches against a plain loop that builds the same arrays, and buckets for every step."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.engine.batch import (
    Batch,
    Bucket,
    Builder,
    Sizes,
    buckets,
    choose,
    empty_sampling,
    empty_step,
    join,
)
from slipway.engine.params import SamplingParams
from slipway.engine.request import Request, RequestSpec, Sequence
from slipway.engine.scheduler import Chunk

pytestmark = pytest.mark.host
PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, SLOTS, VOCAB = 4, 40, 6, 7, 70
LONGEST = PAGE_SIZE * TABLE_WIDTH
SIZES = Sizes(PAGE_SIZE, (NUM_PAGES, NUM_PAGES), TABLE_WIDTH, VOCAB, LONGEST)


def empty(bucket, sizes):
    return Batch(empty_step(bucket, sizes), empty_sampling(bucket.num_rows))


@st.composite
def steps(draw, max_rows=5):
    """Chunks of sequences in any state, and the page table.

    A chunk is a part of a prompt, its rest, or a generated token, perhaps with drafts after it; the
    newest token of some sequences is still on the device.
    """
    pages = iter(draw(st.permutations(range(NUM_PAGES))))
    slots = iter(draw(st.permutations(range(SLOTS))))
    found, page_table = [], np.zeros((SLOTS, TABLE_WIDTH), np.int32)
    for number in range(draw(st.integers(0, max_rows))):
        prompt = draw(st.integers(1, LONGEST - 5))
        params = SamplingParams(
            temperature=draw(st.sampled_from([0, 0.5])),
            top_k=draw(st.integers(-1, 3)),
            top_p=0.75,
            min_p=0.25,
            logprobs=draw(st.sampled_from([None, 0, 3])),
            max_tokens=5,
        )
        request = Request(
            str(number), RequestSpec([100 * number + i for i in range(prompt)], params), 5
        )
        sequence = Sequence(request, 0, draw(st.integers(0, 2**32 - 1)), frozenset(), None)
        for i in range(draw(st.integers(0, 3))):
            sequence.append(100 * number + 50 + i, None)
        sequence.num_pending = draw(st.integers(0, 1))
        sequence.last_row = draw(st.integers(0, 6))
        sequence.pages = [next(pages) for _ in range(-(-sequence.max_length // PAGE_SIZE))]
        sequence.slot = next(slots)
        page_table[sequence.slot, : len(sequence.pages)] = sequence.pages
        start = draw(st.integers(0, sequence.length - 1))
        count = draw(st.integers(1, sequence.length - start))
        scored = (
            range(start, min(start + count, prompt - 1))
            if draw(st.booleans()) and count <= 2
            else range(0)
        )
        drafts = []
        if start + count == sequence.length == sequence.num_tokens:
            most = min(3, sequence.max_length - sequence.length)
            drafts = draw(st.lists(st.integers(0, VOCAB - 1), max_size=most))
        sequence.tokens[sequence.num_tokens :][: len(drafts)] = drafts
        samples = start + count == sequence.length
        found.append(Chunk(sequence, start, count + len(drafts), samples, scored, drafts))
    return found, page_table


def reference(chunks, batch):
    """Fill an empty batch like ``Builder.build``, token by token and row by row."""
    tokens, sampling, t, row = batch.step, batch.sampling, 0, 0
    for index, (sequence, start, count, samples, scored, drafts) in enumerate(chunks):
        ids = [*sequence.tokens[: sequence.num_tokens], *drafts]
        prompt = sequence.request.spec.token_ids
        tokens.starts_B[index] = t
        tokens.counts_B[index] = count
        tokens.lengths_B[index] = start + count
        for numbering, pages in enumerate(tokens.pages):
            padded = np.pad(sequence.pages, (0, TABLE_WIDTH - len(sequence.pages)))
            pages.page_table_BM[index] = moved(padded, numbering)
        for position in range(start, start + count):
            known = position < len(ids)
            tokens.ids_T[t] = ids[position] if known else -1 - sequence.last_row
            tokens.positions_T[t] = position
            tokens.prompt_lengths_T[t] = len(prompt)
            tokens.row_T[t] = index
            for numbering, pages in enumerate(tokens.pages):
                page = moved(sequence.pages, numbering)[position // PAGE_SIZE]
                pages.slots_T[t] = page * PAGE_SIZE + position % PAGE_SIZE
            for wanted in ([prompt[position + 1]] if position in scored else []) + (
                [-1] if samples and position >= start + count - 1 - len(drafts) else []
            ):
                tokens.sample_at_B[row] = t
                sampling.given_B[row], sampling.position_B[row] = wanted, position + 1
                sampling.last_B[row] = sequence.last_row if not known else -1
                _fill(sampling, row, sequence)
                row += 1
            t += 1
    tokens.num_tokens_1[0], tokens.num_samples_1[0], sampling.num_rows_1[0] = t, row, row
    return batch


def moved(pages, numbering):
    """Return the same pages in another numbering."""
    return (np.asarray(pages) + numbering) % NUM_PAGES


def tables(page_table):
    return [page_table, moved(page_table, 1)]


def _fill(sampling, row, sequence):
    params = sequence.request.spec.params
    sampling.wants_logprobs_B[row] = params.logprobs is not None
    sampling.temperature_B[row], sampling.top_k_B[row] = params.temperature, max(params.top_k, 0)
    sampling.top_p_B[row], sampling.min_p_B[row] = params.top_p, params.min_p
    sampling.seed_B[row] = sequence.seed


def arrays(batch):
    """Return every array of a batch by its name."""
    return {
        jax.tree_util.keystr(path): array
        for path, array in jax.tree_util.tree_leaves_with_path(batch)
    }


def same(got, expected):
    for (name, a), b in zip(arrays(got).items(), arrays(expected).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype, name


@settings(max_examples=100, deadline=None, derandomize=True)
@given(steps())
def test_build_is_what_a_plain_loop_builds(step):
    chunks, page_table = step
    bucket = Bucket(5 * LONGEST, 25)
    expected = reference(chunks, empty(bucket, SIZES))
    rows = np.cumsum([chunk.num_rows for chunk in chunks]).tolist()
    same(Builder(SIZES, tables(page_table)).build(chunks, bucket), expected)
    for chunk, end in zip(chunks, rows):
        assert not chunk.samples or chunk.sequence.last_row == end - 1, "who samples knows its row"


def test_a_builder_forgets_what_no_longer_runs():
    page_table = (
        np.arange(SLOTS * TABLE_WIDTH, dtype=np.int32).reshape(SLOTS, TABLE_WIDTH) % NUM_PAGES
    )
    bucket = Bucket(8, 4)
    builder = Builder(SIZES, tables(page_table))

    def running(number, slot):
        params = SamplingParams(temperature=number / 8)
        sequence = Sequence(
            Request(str(number), RequestSpec([1, 2, 3], params), 4), 0, number, frozenset(), None
        )
        sequence.pages = page_table[slot].tolist()
        sequence.slot = slot
        return Chunk(sequence, 0, 3, True)

    one, two, three = running(1, 0), running(2, 1), running(3, 0)
    for step in ([one, two], [one, two], [two], [two, three], [], [three]):
        same(builder.build(step, bucket), reference(step, empty(bucket, SIZES)))


def test_padding_points_past_the_last_page_and_asks_for_nothing():
    batch = empty(Bucket(8, 4), SIZES)
    assert (batch.step.pages[0].slots_T >= NUM_PAGES * PAGE_SIZE).all()
    for name in (
        ".step.num_tokens_1",
        ".step.num_samples_1",
        ".step.counts_B",
        ".sampling.wants_logprobs_B",
        ".sampling.temperature_B",
    ):
        assert not arrays(batch)[name].any(), name


@settings(max_examples=10, deadline=None, derandomize=True)
@given(steps(), steps())
def test_join_puts_the_ranks_one_after_the_other(first, second):
    bucket = Bucket(5 * LONGEST, 25)
    parts = [
        Builder(SIZES, tables(page_table)).build(chunks, bucket)
        for chunks, page_table in (first, second)
    ]
    joined = arrays(join(parts))
    for rank, part in enumerate(parts):
        for name, array in arrays(part).items():
            block = joined[name][rank * len(array) : (rank + 1) * len(array)]
            np.testing.assert_array_equal(block, array, err_msg=name)
            assert len(joined[name]) == 2 * len(array)


@given(st.integers(1, 70), st.integers(0, 600), st.integers(0, 8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_buckets_cover_every_step_the_scheduler_may_ask_for(sequences, spare, drafts):
    tokens = sequences + spare
    rows = min(tokens, sequences * (1 + drafts))
    shapes = buckets(sequences, tokens, max_rows=rows)
    assert shapes == sorted(shapes, key=lambda bucket: bucket.num_tokens)
    assert len({*shapes}) == len(shapes) <= 8
    assert shapes[-1].num_tokens == max(2, tokens)
    assert max(shape.num_rows for shape in shapes) >= rows
    for shape in shapes:
        assert 2 <= shape.num_rows <= shape.num_tokens, "as many rows as tokens could need"
        assert shape.num_rows >= min(rows, shape.num_tokens)
    for count in {1, rows, tokens // 2 + 1, tokens}:
        stub = [Chunk(None, 0, 1, False)] * min(rows, count)
        stub[0] = Chunk(None, 0, count - len(stub) + 1, False)
        chosen = choose(shapes, [[], stub])
        assert chosen == min(
            (s for s in shapes if s.num_tokens >= count), key=lambda s: s.num_tokens
        )
        assert chosen.num_rows >= len(stub)
