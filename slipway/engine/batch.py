"""From scheduled chunks to the arrays of a step: bucket shapes, positions, slots; knows no model and no device.

Every step has one of a few shapes, so that nothing compiles once the engine is warm. A bucket is a number of flat
tokens; it has as many rows as that, but no more than may run at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from slipway.engine.config import MAX_LOGPROBS
from slipway.engine.scheduler import Chunk
from slipway.ops import PageMap, StepInput
from slipway.tree import module

Array = Any  # NumPy on the host; inside the step what JAX makes of it
SMALLEST, SMALLEST_CHUNK, GROWTH = 2, 16, 4  # XLA's one-row dot is slower than its two-row dot


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The shape of a step on one copy of the weights."""

    num_tokens: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Decode steps that one call may make: the shape of each, and how many at the most."""

    bucket: Bucket
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that the arrays of every batch follow. ``num_pages``: of each numbering, for one copy of the weights."""

    page_size: int
    num_pages: tuple[int, ...]
    table_width: int
    vocab_size: int
    max_model_len: int
    num_logprobs: int = MAX_LOGPROBS  # of the likeliest tokens, beside each token


@module
class Sampling:
    """How each row's token is drawn; ``position_B``: the token's place in its sequence.

    ``given_B``: a token whose log probability is asked for instead, or -1. ``last_B``: the row of the last step's
    results that holds the sequence's newest token, or -1 where the host knew it.
    """

    num_rows_1: Array
    temperature_B: Array
    top_k_B: Array  # 0: all
    top_p_B: Array
    min_p_B: Array
    seed_B: Array
    position_B: Array
    given_B: Array
    last_B: Array
    wants_logprobs_B: Array


@module
class Batch:
    """Input of a step's two halves. Copies of the weights lie one after the other along the first axis of arrays."""

    step: StepInput
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
    """Makes the batches of one copy of the weights; keeps, slot by slot, what stays while a sequence runs."""

    def __init__(self, sizes: Sizes, page_tables: Sequence[np.ndarray]):
        """``page_tables``: the scheduler's, one for each numbering of pages; read here."""
        slots = len(page_tables[0])
        self._sizes = sizes
        self._page_tables = page_tables
        self._owners: list[Any] = [None] * slots
        self._prompts = np.zeros(slots, np.int32)
        self._sampling = empty_sampling(slots)

    def build(self, chunks: Sequence[Chunk], bucket: Bucket) -> Batch:
        """The arrays of a step; tells each sequence that samples its row of the results.

        Slots of padding lie past the last page.
        """
        sequences = [chunk.sequence for chunk in chunks]
        for sequence in sequences:
            if self._owners[sequence.slot] is not sequence:
                self._enter(sequence)
        B, page_size = len(chunks), self._sizes.page_size
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
        first = np.array([chunk.start for chunk in chunks], np.int32)
        known = np.array([sequence.num_tokens for sequence in sequences], np.int32)
        newest = np.array([sequence.last_row for sequence in sequences], np.int32)
        newest = np.where(first + counts > known, newest, -1)  # rows of the last step, where the host knows no token

        ids_T, positions_T, contexts_T, row_T = np.zeros((4, bucket.num_tokens), np.int32)
        starts_B, counts_B, lengths_B = np.zeros((3, bucket.num_rows), np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        T, starts = int(counts.sum()), ends - counts
        row_of_token = np.repeat(np.arange(B), counts)
        at = np.arange(T, dtype=np.int32) + (first - starts)[row_of_token]
        for index in np.flatnonzero(first < known).tolist():
            chunk, end = chunks[index], int(ends[index])
            held = chunk.sequence.tokens[chunk.start : min(chunk.start + chunk.num_tokens, chunk.sequence.num_tokens)]
            ids_T[end - chunk.num_tokens :][: len(held)] = held
        ids_T[ends[newest >= 0] - 1] = -1 - newest[newest >= 0]
        positions_T[:T], contexts_T[:T] = at, np.maximum(at + 1, self._prompts[slots][row_of_token])
        row_T[:T] = row_of_token
        starts_B[:B], counts_B[:B], lengths_B[:B] = starts, counts, first + counts
        token_slots, at_page, offset = slots[row_of_token], at // page_size, at % page_size
        pages = []
        for num_pages, page_table in zip(self._sizes.num_pages, self._page_tables):
            slots_T = np.full(bucket.num_tokens, num_pages * page_size, np.int32)
            slots_T[:T] = page_table[token_slots, at_page] * page_size + offset
            page_table_BM = np.zeros((bucket.num_rows, self._sizes.table_width), np.int32)
            page_table_BM[:B] = page_table[slots]
            pages.append(PageMap(slots_T, page_table_BM))
        sample_at_B, sampling = self._rows(chunks, bucket, slots, ends=ends, newest=newest)
        step = StepInput(
            num_tokens_1=np.array([T], np.int32), ids_T=ids_T, positions_T=positions_T, contexts_T=contexts_T,
            row_T=row_T, starts_B=starts_B, counts_B=counts_B, lengths_B=lengths_B, pages=tuple(pages),
            num_samples_1=sampling.num_rows_1, sample_at_B=sample_at_B,
        )  # fmt: skip
        return Batch(step, sampling)

    def _rows(
        self, chunks: Sequence[Chunk], bucket: Bucket, slots: Array, *, ends: Array, newest: Array
    ) -> tuple[Array, Sampling]:
        """Rows of results, chunk after chunk: first those that score the prompt, then the one that samples."""
        num_rows = np.array([len(chunk.scored) + chunk.samples for chunk in chunks], np.int32)
        last_rows = np.cumsum(num_rows, dtype=np.int32) - 1
        of_row = np.repeat(np.arange(len(chunks)), num_rows)
        n, sampling = len(of_row), empty_sampling(bucket.num_rows)
        sample_at_B = np.zeros(bucket.num_rows, np.int32)
        sample_at_B[:n], sampling.last_B[:n], sampling.num_rows_1[0] = ends[of_row] - 1, newest[of_row], n
        sampling.position_B[:n] = np.array([chunk.start + chunk.num_tokens for chunk in chunks], np.int32)[of_row]
        for name in ("temperature_B", "top_k_B", "top_p_B", "min_p_B", "seed_B", "wants_logprobs_B"):
            getattr(sampling, name)[:n] = getattr(self._sampling, name)[slots[of_row]]
        for index, (chunk, last_row) in enumerate(zip(chunks, last_rows.tolist())):
            sequence = chunk.sequence
            if chunk.scored:
                end = last_row + 1 - chunk.samples
                rows, positions = slice(end - len(chunk.scored), end), np.array(chunk.scored, np.int32)
                sample_at_B[rows] = ends[index] - (chunk.start + chunk.num_tokens - positions)
                sampling.given_B[rows], sampling.position_B[rows] = sequence.tokens[positions + 1], positions + 1
                sampling.last_B[rows] = -1
            if chunk.samples:
                sequence.last_row = last_row
        return sample_at_B, sampling

    def _enter(self, sequence: Any) -> None:
        """Keep what does not change while a sequence runs."""
        slot, params, sampling = sequence.slot, sequence.request.spec.params, self._sampling
        self._owners[slot], self._prompts[slot] = sequence, sequence.num_prompt
        sampling.temperature_B[slot], sampling.top_k_B[slot] = params.temperature, max(0, params.top_k)
        sampling.top_p_B[slot], sampling.min_p_B[slot] = params.top_p, params.min_p
        sampling.seed_B[slot], sampling.wants_logprobs_B[slot] = sequence.seed, sequence.wants_logprobs


def empty_sampling(num_rows: int) -> Sampling:
    """Rows that take the likeliest token."""
    B = num_rows
    return Sampling(
        num_rows_1=np.zeros(1, np.int32), temperature_B=np.zeros(B, np.float32), top_k_B=np.zeros(B, np.int32),
        top_p_B=np.ones(B, np.float32), min_p_B=np.zeros(B, np.float32), seed_B=np.zeros(B, np.uint32),
        position_B=np.zeros(B, np.int32), given_B=np.full(B, -1, np.int32), last_B=np.full(B, -1, np.int32),
        wants_logprobs_B=np.zeros(B, np.bool_),
    )  # fmt: skip


def empty_step(bucket: Bucket, sizes: Sizes) -> StepInput:
    """Return the input of a step that is all padding."""
    T, B = bucket.num_tokens, bucket.num_rows

    def zeros(size: int) -> np.ndarray:
        return np.zeros(size, np.int32)

    def page_map(num_pages: int) -> PageMap:
        slots_T = np.full(T, num_pages * sizes.page_size, np.int32)
        return PageMap(slots_T, np.zeros((B, sizes.table_width), np.int32))

    return StepInput(
        num_tokens_1=zeros(1), ids_T=zeros(T), positions_T=zeros(T), contexts_T=zeros(T), row_T=zeros(T),
        starts_B=zeros(B), counts_B=zeros(B), lengths_B=zeros(B),
        pages=tuple(page_map(num_pages) for num_pages in sizes.num_pages),
        num_samples_1=zeros(1), sample_at_B=zeros(B),
    )  # fmt: skip


def join(batches: Sequence[Any]) -> Any:
    """Join the batches, or parts of them, of every copy of the weights."""
    if len(batches) == 1:
        return batches[0]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
