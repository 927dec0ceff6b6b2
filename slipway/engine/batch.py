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
SMALLEST, SMALLEST_CHUNK, GROWTH = 2, 16, 4  # XLA's one-row dot is slower than its two-row dot


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
    """Every shape, smallest first: powers of four, the most rows that decode together, the most tokens.

    Below SMALLEST_CHUNK only those that decoding needs.
    """
    sizes, size = {max(SMALLEST, max_num_seqs), max(SMALLEST, max_num_tokens)}, SMALLEST
    while size < max_num_tokens:
        if size <= max_num_seqs or size == SMALLEST or size >= SMALLEST_CHUNK:
            sizes.add(size)
        size *= GROWTH
    return [Bucket(size, min(size, max(SMALLEST, max_num_seqs))) for size in sorted(sizes)]


def choose(shapes: Sequence[Bucket], chunks: Sequence[Sequence[Chunk]]) -> Bucket:
    """The smallest bucket that holds the chunks of every copy of the weights."""
    tokens = max(sum(chunk.num_tokens for chunk in rank) for rank in chunks)
    return next(bucket for bucket in shapes if bucket.num_tokens >= tokens)


class Builder:
    """Makes the batches of one copy of the weights; remembers what stays while the same sequences run."""

    def __init__(self, page_size: int, num_pages: int, table_width: int):
        self._page_size, self._num_pages, self._table_width = page_size, num_pages, table_width
        self._lasting: tuple[Bucket, list, Array, Array, Sampling] | None = None

    def build(self, chunks: Sequence[Chunk], bucket: Bucket) -> Batch:
        """The arrays of a step. Slots of padding lie past the last page."""
        sequences = [chunk.sequence for chunk in chunks]
        if self._lasting is None or self._lasting[0] != bucket or self._lasting[1] != sequences:
            batch = empty(bucket, self._page_size, self._num_pages, self._table_width)
            self._lasting = (bucket, sequences, *_lasting(sequences, batch))
        _, _, prompts_B, page_table_BM, sampling = self._lasting
        ids_T, positions_T, contexts_T, slots_T = np.zeros((4, bucket.num_tokens), np.int32)
        starts_B, counts_B, lengths_B, sample_at_B = np.zeros((4, bucket.num_rows), np.int32)
        B, page_size = len(chunks), self._page_size

        counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
        first = np.array([chunk.start for chunk in chunks], np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        T, starts = int(counts.sum()), ends - counts
        row_of_token = np.repeat(np.arange(B), counts)
        at = np.arange(T, dtype=np.int32) + (first - starts)[row_of_token]
        ids_T[:T] = [token for sequence, start, count in chunks for token in sequence.tokens(start, count)]
        positions_T[:T], contexts_T[:T] = at, np.maximum(at + 1, prompts_B[row_of_token])
        slots_T[:T] = page_table_BM[row_of_token, at // page_size] * page_size + at % page_size
        slots_T[T:] = self._num_pages * page_size
        starts_B[:B], counts_B[:B], lengths_B[:B], sample_at_B[:B] = starts, counts, first + counts, ends - 1
        return Batch(
            np.array([T], np.int32), ids_T, positions_T, contexts_T, slots_T, starts_B, counts_B, lengths_B,
            page_table_BM, sample_at_B, dataclasses.replace(sampling, position_B=lengths_B),
        )  # fmt: skip


def _lasting(sequences: Sequence[Any], batch: Batch) -> tuple[Array, Array, Sampling]:
    """What does not change while sequences run: prompt lengths, the page table, parameters of sampling."""
    rows, sampling, params = slice(len(sequences)), batch.sampling, [s.request.params for s in sequences]
    for row, sequence in enumerate(sequences):
        batch.page_table_BM[row] = sequence.page_row
    sampling.temperature_B[rows] = [p.temperature for p in params]
    sampling.top_k_B[rows] = [max(0, p.top_k) for p in params]
    sampling.top_p_B[rows] = [p.top_p for p in params]
    sampling.min_p_B[rows] = [p.min_p for p in params]
    sampling.seed_B[rows] = [sequence.seed for sequence in sequences]
    sampling.wants_logprobs_B[rows] = [p.logprobs is not None for p in params]
    prompts_B = np.array([len(sequence.request.prompt_token_ids) for sequence in sequences], np.int32)
    return prompts_B, batch.page_table_BM, sampling


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
