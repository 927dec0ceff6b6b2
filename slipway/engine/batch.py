"""Batch: the host arrays of a step, made from the chunks of the scheduler, in one of a few shapes.

Not here: the choice of the chunks (scheduler.py), the programs that read the arrays (programs.py).

Every step has one of a few shapes (buckets), so that nothing compiles while the engine serves. A
bucket is a number of tokens, flat along one axis, and a number of rows: one for each token, but at
most ``max_num_seqs``.
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

Array = Any  # a NumPy array on the host, a traced JAX array inside the step
# Tokens of the smallest bucket: XLA's one-row dot is slower than its two-row dot.
SMALLEST = 2
# Tokens of the smallest bucket that exists for the chunks of prompts, not for decoding only.
SMALLEST_CHUNK = 16
# Ratio of the sizes of neighbouring buckets.
GROWTH = 4


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The shape of a step on one copy of the weights."""

    num_tokens: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Several decode steps in one device call: the bucket of each, and their largest number."""

    bucket: Bucket
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that are the same for every batch.

    ``num_pages``: the pages of each pool (full attention first, then each sliding window), for one
    copy of the weights. ``table_width``: the most pages of one sequence. ``num_logprobs``: how many
    of the likeliest tokens are reported beside each token.
    """

    page_size: int
    num_pages: tuple[int, ...]
    table_width: int
    vocab_size: int
    max_model_len: int
    num_logprobs: int = MAX_LOGPROBS


@module
class Sampling:
    """Sampling parameters of each row of results.

    ``position_B``: the position in its sequence of the token to sample. ``given_B``: a token to
    report the log probability of, instead of the sampled one, or -1. ``last_B``: the row of the
    last step's results that holds the sequence's newest token, or -1 if the host has that token.
    """

    num_rows_1: Array
    temperature_B: Array
    top_k_B: Array  # 0: no limit
    top_p_B: Array
    min_p_B: Array
    seed_B: Array
    position_B: Array
    given_B: Array
    last_B: Array
    wants_logprobs_B: Array


# The fields of Sampling that do not change while a sequence runs.
KEPT = ("temperature_B", "top_k_B", "top_p_B", "min_p_B", "seed_B", "wants_logprobs_B")


@module
class Batch:
    """Input of a step: of the forward pass, and of the sampler.

    The parts of the copies of the weights follow each other along the first axis of every array.
    """

    step: StepInput
    sampling: Sampling


def buckets(max_num_seqs: int, max_num_tokens: int, max_rows: int) -> list[Bucket]:
    """Return the buckets, smallest first.

    Their numbers of tokens: SMALLEST times powers of GROWTH, ``max_num_seqs`` (all sequences
    decode) and ``max_num_tokens``. Sizes below SMALLEST_CHUNK are left out unless decoding needs
    them. ``max_rows``: the most rows of results of a step.
    """
    sizes, size = {max(SMALLEST, max_num_seqs), max(SMALLEST, max_num_tokens)}, SMALLEST
    while size < max_num_tokens:
        if size <= max_rows or size == SMALLEST or size >= SMALLEST_CHUNK:
            sizes.add(size)
        size *= GROWTH
    return [Bucket(size, min(size, max(SMALLEST, max_rows))) for size in sorted(sizes)]


def choose(shapes: Sequence[Bucket], chunks: Sequence[Sequence[Chunk]]) -> Bucket:
    """Return the smallest of ``shapes`` that holds the chunks of every copy of the weights."""
    tokens = max(sum(chunk.num_tokens for chunk in rank) for rank in chunks)
    return next(bucket for bucket in shapes if bucket.num_tokens >= tokens)


class Builder:
    """Builder of the batches of one copy of the weights.

    It keeps, for each slot, the values that do not change while a sequence runs in it.
    """

    def __init__(self, sizes: Sizes, page_tables: Sequence[np.ndarray]):
        """Create a builder that reads ``page_tables``, those of the scheduler."""
        slots = len(page_tables[0])
        self._sizes = sizes
        self._page_tables = page_tables
        self._owners: list[Any] = [None] * slots
        self._prompts = np.zeros(slots, np.int32)
        self._sampling = empty_sampling(slots)

    def fill(
        self, chunks: Sequence[Chunk], sampling: Sampling, tables: Sequence[Array] = ()
    ) -> None:
        """Fill in the kept parameters of each chunk's sequence, a row each, and its page tables."""
        self._enter_all(chunks)
        slots = np.array([chunk.sequence.slot for chunk in chunks], np.int32)
        for name in KEPT:
            getattr(sampling, name)[: len(slots)] = getattr(self._sampling, name)[slots]
        for table_BM, page_table in zip(tables, self._page_tables):
            table_BM[: len(slots)] = page_table[slots]

    def build(self, chunks: Sequence[Chunk], bucket: Bucket) -> Batch:
        """Return the arrays of a step; sets ``last_row`` of each sequence that samples.

        Slots of padding tokens lie past the last page. An id of -1 - row stands for a token that
        the host does not have yet: it is in that row of the last step's results.
        """
        self._enter_all(chunks)
        sequences = [chunk.sequence for chunk in chunks]
        B = len(chunks)
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
        first = np.array([chunk.start for chunk in chunks], np.int32)
        known = np.array([c.sequence.num_tokens + len(c.drafts) for c in chunks], np.int32)
        newest = np.array([sequence.last_row for sequence in sequences], np.int32)
        # The row of the last step's results with the newest token, if the host does not have it.
        newest = np.where(first + counts > known, newest, -1)

        ids_T, positions_T, prompt_lengths_T, row_T = np.zeros((4, bucket.num_tokens), np.int32)
        starts_B, counts_B, lengths_B = np.zeros((3, bucket.num_rows), np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        T, starts = int(counts.sum()), ends - counts
        row_of_token = np.repeat(np.arange(B), counts)
        at = np.arange(T, dtype=np.int32) + (first - starts)[row_of_token]
        for index in np.flatnonzero(first < known).tolist():
            chunk, end = chunks[index], int(ends[index])
            last = min(chunk.start + chunk.num_tokens, int(known[index]))
            held = chunk.sequence.tokens[chunk.start : last]
            ids_T[end - chunk.num_tokens :][: len(held)] = held
        ids_T[ends[newest >= 0] - 1] = -1 - newest[newest >= 0]
        positions_T[:T] = at
        prompt_lengths_T[:T] = self._prompts[slots][row_of_token]
        row_T[:T] = row_of_token
        starts_B[:B] = starts
        counts_B[:B] = counts
        lengths_B[:B] = first + counts
        pages = self._pages(bucket, slots, at, slots_of_tokens=slots[row_of_token])
        sample_at_B, sampling = self._rows(chunks, bucket, slots, ends=ends, newest=newest)
        step = StepInput(
            num_tokens_1=np.array([T], np.int32),
            ids_T=ids_T,
            positions_T=positions_T,
            prompt_lengths_T=prompt_lengths_T,
            row_T=row_T,
            starts_B=starts_B,
            counts_B=counts_B,
            lengths_B=lengths_B,
            pages=pages,
            num_samples_1=sampling.num_rows_1,
            sample_at_B=sample_at_B,
        )
        return Batch(step, sampling)

    def _pages(
        self, bucket: Bucket, slots: Array, positions: Array, *, slots_of_tokens: Array
    ) -> tuple[PageMap, ...]:
        """Return the places of tokens in each pool of pages.

        ``slots``: the scheduler's slot of each row, ``slots_of_tokens``: of each token.
        """
        page_size = self._sizes.page_size
        at_page, offset = positions // page_size, positions % page_size
        pages = []
        for num_pages, page_table in zip(self._sizes.num_pages, self._page_tables):
            slots_T = np.full(bucket.num_tokens, num_pages * page_size, np.int32)
            slots_T[: len(positions)] = page_table[slots_of_tokens, at_page] * page_size + offset
            page_table_BM = np.zeros((bucket.num_rows, self._sizes.table_width), np.int32)
            page_table_BM[: len(slots)] = page_table[slots]
            pages.append(PageMap(slots_T, page_table_BM))
        return tuple(pages)

    def _rows(
        self, chunks: Sequence[Chunk], bucket: Bucket, slots: Array, *, ends: Array, newest: Array
    ) -> tuple[Array, Sampling]:
        """Return the token and the sampling parameters of each row of results.

        Rows follow the chunks; in a chunk the rows that score the prompt precede those that sample.
        """
        num_rows = np.array([chunk.num_rows for chunk in chunks], np.int32)
        last_rows = np.cumsum(num_rows, dtype=np.int32) - 1
        of_row = np.repeat(np.arange(len(chunks)), num_rows)
        n, sampling = len(of_row), empty_sampling(bucket.num_rows)
        sample_at_B = np.zeros(bucket.num_rows, np.int32)
        sample_at_B[:n] = ends[of_row] - 1
        sampling.last_B[:n] = newest[of_row]
        sampling.num_rows_1[0] = n
        next_positions = np.array([chunk.start + chunk.num_tokens for chunk in chunks], np.int32)
        sampling.position_B[:n] = next_positions[of_row]
        for name in KEPT:
            getattr(sampling, name)[:n] = getattr(self._sampling, name)[slots[of_row]]
        for index, (chunk, last_row) in enumerate(zip(chunks, last_rows.tolist())):
            sequence = chunk.sequence
            if chunk.scored:
                end = last_row + 1 - chunk.samples - len(chunk.drafts)
                rows = slice(end - len(chunk.scored), end)
                positions = np.array(chunk.scored, np.int32)
                sample_at_B[rows] = ends[index] - (chunk.start + chunk.num_tokens - positions)
                sampling.given_B[rows] = sequence.tokens[positions + 1]
                sampling.position_B[rows] = positions + 1
                sampling.last_B[rows] = -1
            if chunk.drafts:
                rows = slice(last_row - len(chunk.drafts), last_row + 1)
                before = np.arange(-len(chunk.drafts), 1, dtype=np.int32)
                sample_at_B[rows] += before
                sampling.position_B[rows] += before
            if chunk.samples:
                sequence.last_row = last_row
        return sample_at_B, sampling

    def _enter_all(self, chunks: Sequence[Chunk]) -> None:
        """Store the kept values of sequences that have begun to run in their slots."""
        for chunk in chunks:
            if self._owners[chunk.sequence.slot] is not chunk.sequence:
                self._enter(chunk.sequence)

    def _enter(self, sequence: Any) -> None:
        """Store the values of a sequence that do not change while it runs, at its slot."""
        slot, params, sampling = sequence.slot, sequence.request.spec.params, self._sampling
        self._owners[slot] = sequence
        self._prompts[slot] = sequence.num_prompt
        sampling.temperature_B[slot] = params.temperature
        sampling.top_k_B[slot] = max(0, params.top_k)
        sampling.top_p_B[slot] = params.top_p
        sampling.min_p_B[slot] = params.min_p
        sampling.seed_B[slot] = sequence.seed
        sampling.wants_logprobs_B[slot] = sequence.wants_logprobs


def empty_sampling(num_rows: int) -> Sampling:
    """Return the parameters of ``num_rows`` rows that take the likeliest token."""
    B = num_rows
    return Sampling(
        num_rows_1=np.zeros(1, np.int32),
        temperature_B=np.zeros(B, np.float32),
        top_k_B=np.zeros(B, np.int32),
        top_p_B=np.ones(B, np.float32),
        min_p_B=np.zeros(B, np.float32),
        seed_B=np.zeros(B, np.uint32),
        position_B=np.zeros(B, np.int32),
        given_B=np.full(B, -1, np.int32),
        last_B=np.full(B, -1, np.int32),
        wants_logprobs_B=np.zeros(B, np.bool_),
    )


def empty_step(bucket: Bucket, sizes: Sizes) -> StepInput:
    """Return the input of a step that is all padding."""
    T, B = bucket.num_tokens, bucket.num_rows

    def zeros(size: int) -> np.ndarray:
        return np.zeros(size, np.int32)

    def page_map(num_pages: int) -> PageMap:
        slots_T = np.full(T, num_pages * sizes.page_size, np.int32)
        return PageMap(slots_T, np.zeros((B, sizes.table_width), np.int32))

    return StepInput(
        num_tokens_1=zeros(1),
        ids_T=zeros(T),
        positions_T=zeros(T),
        prompt_lengths_T=zeros(T),
        row_T=zeros(T),
        starts_B=zeros(B),
        counts_B=zeros(B),
        lengths_B=zeros(B),
        pages=tuple(page_map(num_pages) for num_pages in sizes.num_pages),
        num_samples_1=zeros(1),
        sample_at_B=zeros(B),
    )


def join(batches: Sequence[Any]) -> Any:
    """Join the batches, or parts of them, of every copy of the weights."""
    if len(batches) == 1:
        return batches[0]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
