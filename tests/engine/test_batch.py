"""Batches hold what their chunks say, by a plain loop's account; buckets cover every step and no more than needed."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.engine.batch import Bucket, Builder, buckets, choose, empty, join
from slipway.engine.request import Request, SamplingParams, Sequence
from slipway.engine.scheduler import Chunk

pytestmark = pytest.mark.host
PAGE_SIZE, NUM_PAGES, TABLE_WIDTH = 4, 40, 6
LONGEST = PAGE_SIZE * TABLE_WIDTH


@st.composite
def chunks(draw, max_rows=5):
    """Chunks of sequences in any state: some of the prompt, the rest of it, or a generated token."""
    pages = iter(draw(st.permutations(range(NUM_PAGES))))
    found = []
    for number in range(draw(st.integers(0, max_rows))):
        prompt = draw(st.integers(1, LONGEST - 4))
        params = SamplingParams(
            temperature=draw(st.sampled_from([0, 0.5])), top_k=draw(st.integers(-1, 3)), top_p=0.75,
            min_p=0.25, logprobs=draw(st.sampled_from([None, 0, 3])),
        )  # fmt: skip
        request = Request(str(number), None, [100 * number + i for i in range(prompt)], params, 4)
        sequence = Sequence(request, 0, draw(st.integers(0, 2**32 - 1)), frozenset(), None)
        sequence.token_ids = [100 * number + 50 + i for i in range(draw(st.integers(0, 3)))]
        sequence.num_tokens += len(sequence.token_ids)
        sequence.pages = [next(pages) for _ in range(-(-sequence.max_length // PAGE_SIZE))]
        sequence.page_row = np.zeros(TABLE_WIDTH, np.int32)
        sequence.page_row[: len(sequence.pages)] = sequence.pages
        start = draw(st.integers(0, sequence.num_tokens - 1))
        found.append(Chunk(sequence, start, draw(st.integers(1, sequence.num_tokens - start))))
    return found


def reference(chunks_, batch):
    """The same as ``Builder.build``, token by token and row by row, over an empty batch."""
    t = 0
    for row, (sequence, start, count) in enumerate(chunks_):
        tokens, params = sequence.request.prompt_token_ids + sequence.token_ids, sequence.request.params
        batch.starts_B[row], batch.counts_B[row], batch.lengths_B[row] = t, count, start + count
        for position in range(start, start + count):
            batch.ids_T[t], batch.positions_T[t] = tokens[position], position
            batch.contexts_T[t] = max(len(sequence.request.prompt_token_ids), position + 1)
            batch.slots_T[t] = sequence.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            t += 1
        batch.page_table_BM[row, : len(sequence.pages)] = sequence.pages
        batch.sample_at_B[row] = t - 1
        sampling = batch.sampling
        sampling.wants_logprobs_B[row] = params.logprobs is not None
        sampling.temperature_B[row], sampling.top_k_B[row] = params.temperature, max(params.top_k, 0)
        sampling.top_p_B[row], sampling.min_p_B[row] = params.top_p, params.min_p
        sampling.seed_B[row], sampling.position_B[row] = sequence.seed, start + count
    batch.num_tokens_1[0] = t
    return batch


def arrays(batch):
    """Every array of a batch by its name."""
    return {jax.tree_util.keystr(path): array for path, array in jax.tree_util.tree_leaves_with_path(batch)}


def same(got, expected):
    for (name, a), b in zip(arrays(got).items(), arrays(expected).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype, name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chunks())
def test_build_is_what_a_plain_loop_builds(found):
    bucket = Bucket(5 * LONGEST, 7)
    expected = reference(found, empty(bucket, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH))
    same(Builder(PAGE_SIZE, NUM_PAGES, TABLE_WIDTH).build(found, bucket), expected)


def test_a_builder_forgets_what_no_longer_runs():
    builder, bucket = Builder(PAGE_SIZE, NUM_PAGES, TABLE_WIDTH), Bucket(8, 4)

    def running(number, pages):
        params = SamplingParams(temperature=number / 8)
        sequence = Sequence(Request(str(number), None, [1, 2, 3], params, 4), 0, number, frozenset(), None)
        sequence.pages, sequence.page_row = pages, np.array(pages + [0] * (TABLE_WIDTH - len(pages)), np.int32)
        return Chunk(sequence, 0, 3)

    one, two, three = running(1, [5, 6]), running(2, [7, 8]), running(3, [9, 10])
    for step in ([one, two], [one, two], [two], [two, three], [], [three]):
        same(builder.build(step, bucket), reference(step, empty(bucket, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH)))


def test_padding_points_past_the_last_page_and_asks_for_nothing():
    batch = empty(Bucket(8, 4), PAGE_SIZE, NUM_PAGES, TABLE_WIDTH)
    assert (batch.slots_T >= NUM_PAGES * PAGE_SIZE).all()
    for name in (".num_tokens_1", ".counts_B", ".lengths_B", ".sampling.wants_logprobs_B", ".sampling.temperature_B"):
        assert not arrays(batch)[name].any(), name


@settings(max_examples=10, deadline=None, derandomize=True)
@given(chunks(), chunks())
def test_join_puts_the_ranks_one_after_the_other(first, second):
    bucket = Bucket(5 * LONGEST, 5)
    parts = [Builder(PAGE_SIZE, NUM_PAGES, TABLE_WIDTH).build(rank, bucket) for rank in (first, second)]
    joined = arrays(join(parts))
    for rank, part in enumerate(parts):
        for name, array in arrays(part).items():
            block = joined[name][rank * len(array) : (rank + 1) * len(array)]
            np.testing.assert_array_equal(block, array, err_msg=name)
            assert len(joined[name]) == 2 * len(array)


@given(st.integers(1, 70), st.integers(0, 600))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_buckets_cover_every_step_the_scheduler_may_ask_for(rows, spare):
    tokens = rows + spare
    shapes = buckets(rows, tokens)
    assert shapes == sorted(shapes, key=lambda bucket: bucket.num_tokens) and len({*shapes}) == len(shapes) <= 8
    assert shapes[-1].num_tokens == max(2, tokens) and max(shape.num_rows for shape in shapes) >= rows
    for shape in shapes:
        assert 2 <= shape.num_rows <= shape.num_tokens, "as many rows as tokens could need"
        assert shape.num_rows >= min(rows, shape.num_tokens)
    for count in {1, rows, tokens // 2 + 1, tokens}:
        stub = [Chunk(None, 0, 1)] * min(rows, count)
        stub[0] = Chunk(None, 0, count - len(stub) + 1)
        chosen = choose(shapes, [[], stub])
        assert chosen == min((s for s in shapes if s.num_tokens >= count), key=lambda s: s.num_tokens)
        assert chosen.num_rows >= len(stub)
