"""From scheduled chunks to the arrays of a step: bucket shapes, positions, slots; knows no model and no device.

Every step has one of a few shapes, so that nothing compiles once the engine is warm. A bucket is a number of flat
tokens; it has as many rows as that, but no more than may run at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from slipway.engine.scheduler import Chunk
from slipway.tree import module

Array = Any  # NumPy on the host; inside the step what JAX makes of it
SMALLEST, GROWTH = 2, 4  # XLA's one-row dot is slower than its two-row dot


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The shape of a step on one copy of the weights."""

    num_tokens: int
    num_rows: int


@module
class Sampling:
    """How each row's token is drawn; ``position_B``: the token's place in its sequence."""

    temperature_B: Array
    top_k_B: Array  # 0: all
    top_p_B: Array
    min_p_B: Array
    seed_B: Array
    position_B: Array
    wants_logprobs_B: Array


@module
class Batch:
    """One step's input. Copies of the weights lie one after the other along the first axis of each array.

    ``sample_at_B``: the flat token whose hidden state a row samples from.
    """

    num_tokens_1: Array
    ids_T: Array
    positions_T: Array
    contexts_T: Array
    slots_T: Array
    starts_B: Array
    counts_B: Array
    lengths_B: Array
    page_table_BM: Array
    sample_at_B: Array
    sampling: Sampling


def buckets(max_num_seqs: int, max_num_tokens: int) -> list[Bucket]:
    """Every shape, smallest first: powers of four, the most rows that decode together, the most tokens."""
    sizes, size = {max(SMALLEST, max_num_seqs), max(SMALLEST, max_num_tokens)}, SMALLEST
    while size < max_num_tokens:
        sizes.add(size)
        size *= GROWTH
    return [Bucket(size, min(size, max(SMALLEST, max_num_seqs))) for size in sorted(sizes)]


def choose(shapes: Sequence[Bucket], chunks: Sequence[Sequence[Chunk]]) -> Bucket:
    """The smallest bucket that holds the chunks of every copy of the weights."""
    tokens = max(sum(chunk.num_tokens for chunk in rank) for rank in chunks)
    return next(bucket for bucket in shapes if bucket.num_tokens >= tokens)


def build(chunks: Sequence[Chunk], bucket: Bucket, page_size: int, num_pages: int, table_width: int) -> Batch:
    """The arrays of one copy of the weights. Slots of padding lie past the last page."""
    batch = empty(bucket, page_size, num_pages, table_width)
    if not chunks:
        return batch
    B, counts_B = len(chunks), np.array([chunk.num_tokens for chunk in chunks], np.int32)
    sequences = [chunk.sequence for chunk in chunks]
    params = [sequence.request.params for sequence in sequences]
    ends_B, first_B = np.cumsum(counts_B, dtype=np.int32), np.array([chunk.start for chunk in chunks], np.int32)
    T, starts_B = int(ends_B[-1]), ends_B - counts_B
    row_T = np.repeat(np.arange(B), counts_B)
    positions_T = np.arange(T, dtype=np.int32) + (first_B - starts_B)[row_T]
    prompts_B = np.array([len(sequence.request.prompt_token_ids) for sequence in sequences], np.int32)

    batch.num_tokens_1[0] = T
    batch.ids_T[:T] = [token for chunk in chunks for token in chunk.sequence.tokens(chunk.start, chunk.num_tokens)]
    batch.positions_T[:T] = positions_T
    batch.contexts_T[:T] = np.maximum(positions_T + 1, prompts_B[row_T])
    batch.page_table_BM[:B] = [sequence.page_row for sequence in sequences]
    pages_T = batch.page_table_BM[row_T, positions_T // page_size]
    batch.slots_T[:T] = pages_T * page_size + positions_T % page_size
    batch.starts_B[:B], batch.counts_B[:B], batch.lengths_B[:B] = starts_B, counts_B, first_B + counts_B
    batch.sample_at_B[:B] = ends_B - 1
    sampling = batch.sampling
    sampling.temperature_B[:B] = [p.temperature for p in params]
    sampling.top_k_B[:B] = [max(0, p.top_k) for p in params]
    sampling.top_p_B[:B] = [p.top_p for p in params]
    sampling.min_p_B[:B] = [p.min_p for p in params]
    sampling.seed_B[:B] = [sequence.seed for sequence in sequences]
    sampling.position_B[:B] = first_B + counts_B
    sampling.wants_logprobs_B[:B] = [chunk.samples and p.logprobs is not None for chunk, p in zip(chunks, params)]
    return batch


def empty(bucket: Bucket, page_size: int, num_pages: int, table_width: int) -> Batch:
    """A batch of nothing but padding."""
    T, B = bucket.num_tokens, bucket.num_rows

    def zeros(size: int, dtype: type = np.int32) -> np.ndarray:
        return np.zeros(size, dtype)

    sampling = Sampling(
        temperature_B=zeros(B, np.float32), top_k_B=zeros(B), top_p_B=np.ones(B, np.float32),
        min_p_B=zeros(B, np.float32), seed_B=zeros(B, np.uint32), position_B=zeros(B),
        wants_logprobs_B=zeros(B, np.bool_),
    )  # fmt: skip
    return Batch(
        num_tokens_1=zeros(1), ids_T=zeros(T), positions_T=zeros(T), contexts_T=zeros(T),
        slots_T=np.full(T, num_pages * page_size, np.int32), starts_B=zeros(B), counts_B=zeros(B), lengths_B=zeros(B),
        page_table_BM=np.zeros((B, table_width), np.int32), sample_at_B=zeros(B), sampling=sampling,
    )  # fmt: skip


def join(batches: Sequence[Batch]) -> Batch:
    """The batches of every copy of the weights as one."""
    if len(batches) == 1:
        return batches[0]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
