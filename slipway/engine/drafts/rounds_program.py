"""Program of several rounds on the device: verify drafts, sample, accept, and draft again.

Not here: the draft model's part of a round (draft_program.py), steps with chunks of prompts or with
rules for logits, which need the host between two steps (engine/programs.py).

The host gets the tokens of all rounds at once. How many tokens a round accepts is decided on the
device, so positions, pages and rows of the next round are computed there, too.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway.engine import batch, programs, sample
from slipway.engine.batch import Bucket, Sampling, Sizes
from slipway.engine.drafts.draft_program import (
    DRAFT_CACHES,
    DRAFT_WEIGHTS,
    Newest,
    draft_after,
    in_rows,
)
from slipway.engine.programs import CACHES, WEIGHTS
from slipway.engine.scheduler import Chunk
from slipway.ops import PageMap, StepInput
from slipway.runtime.runner import Program
from slipway.tree import module

ROUNDS = "rounds"
# Structures of the trees of target and draft model, and their leaves.
Held = tuple[tuple[Any, Any], list[jax.Array], list[jax.Array]]
Array = Any  # a NumPy array on the host, a traced JAX array inside the program


@module
class RoundsInput:
    """State of the rows before the first round. All arrays are int32.

    ``newest_B``: the last token of each row; ``lengths_B``: the number of its tokens;
    ``limits_B``: the largest number that it may reach. ``drafts_BK``: drafts of the tokens after
    the newest, of which ``num_drafts_B`` count. ``most_B``: most drafts that a round verifies.
    ``room_B``: tokens that the row's pages hold, and ``tables`` these pages, of each numbering.
    """

    num_rows_1: Array
    num_rounds_1: Array
    num_steps_1: Array
    newest_B: Array
    lengths_B: Array
    limits_B: Array
    prompt_lengths_B: Array
    drafts_BK: Array
    num_drafts_B: Array
    most_B: Array
    room_B: Array
    tables: tuple[Array, ...]
    sampling: Sampling


@module
class RoundsOutput:
    """Results of the rounds, one after the other.

    ``counts_B``: tokens that each row computed in a round: its rows of ``sampled``, in order;
    ``new_B``: how many of the tokens sampled there are part of the sequence. ``drafts_BK``: drafts
    that follow the last round.
    """

    sampled: sample.Sampled
    counts_B: Array
    new_B: Array
    drafts_BK: Array


def empty_input(bucket: Bucket, sizes: Sizes, max_drafts: int) -> RoundsInput:
    """Return the input of a call without rows."""
    B = bucket.num_rows

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    return RoundsInput(
        num_rows_1=zeros(1),
        num_rounds_1=zeros(1),
        num_steps_1=zeros(1),
        newest_B=zeros(B),
        lengths_B=zeros(B),
        limits_B=zeros(B),
        prompt_lengths_B=zeros(B),
        drafts_BK=zeros(B, max_drafts),
        num_drafts_B=zeros(B),
        most_B=zeros(B),
        room_B=zeros(B),
        tables=tuple(zeros(B, sizes.table_width) for _ in sizes.num_pages),
        sampling=batch.empty_sampling(B),
    )


def build_input(
    chunks: Sequence[Chunk],
    kept: batch.Builder,
    empty: RoundsInput,
    *,
    page_size: int,
    num_rounds: int,
    num_steps: int,
) -> RoundsInput:
    """Fill in the chunks of one copy of the weights, each the newest token and perhaps drafts."""
    empty.num_rows_1[0] = len(chunks)
    empty.num_rounds_1[0] = num_rounds
    empty.num_steps_1[0] = num_steps
    empty.sampling.num_rows_1[0] = len(chunks)
    for index, chunk in enumerate(chunks):
        sequence = chunk.sequence
        assert chunk.start + 1 == sequence.num_tokens, "the host has the newest token"
        empty.newest_B[index] = sequence.tokens[sequence.num_tokens - 1]
        empty.lengths_B[index] = sequence.num_tokens
        empty.limits_B[index] = sequence.max_length
        empty.prompt_lengths_B[index] = sequence.num_prompt
        empty.drafts_BK[index, : len(chunk.drafts)] = chunk.drafts
        empty.num_drafts_B[index] = len(chunk.drafts)
        empty.most_B[index] = num_steps
        empty.room_B[index] = len(sequence.pages) * page_size
    kept.fill(chunks, empty.sampling, empty.tables)
    return empty


def program(
    structures: tuple[Any, Any], copies: int, sizes: Sizes, *, max_drafts: int, max_rounds: int
) -> Program:
    """Return the program; its result is RoundsOutput.

    ``structures``: of the trees of the target and the draft model.
    """

    def inputs(bucket: Bucket) -> tuple[RoundsInput]:
        return (batch.join([empty_input(bucket, sizes, max_drafts)] * copies),)

    return Program(
        ROUNDS,
        functools.partial(_rounds, structures, sizes=sizes, max_rounds=max_rounds),
        inputs,
        reads=(WEIGHTS, DRAFT_WEIGHTS, CACHES, DRAFT_CACHES),
        writes=(CACHES, DRAFT_CACHES),
        donates=(CACHES, DRAFT_CACHES),
        results=(P(),),
    )


def _rounds(
    structures: tuple[Any, Any],
    leaves: list[jax.Array],
    draft_leaves: list[jax.Array],
    caches: tuple[Any, ...],
    draft_caches: tuple[Any, ...],
    given: RoundsInput,
    *,
    sizes: Sizes,
    max_rounds: int,
) -> tuple[tuple[Any, ...], tuple[Any, ...], RoundsOutput]:
    """Compute the rounds; traced under shard_map."""
    B, K = given.drafts_BK.shape
    copies = jax.lax.axis_size(meshes.DATA)
    held = structures, leaves, draft_leaves

    def body(index: jax.Array, carry: Any) -> Any:
        caches, draft_caches, rows, found = carry
        caches, draft_caches, output = _round(held, caches, draft_caches, rows=rows, sizes=sizes)
        first_B = jnp.cumsum(output.counts_B).astype(jnp.int32) - output.counts_B
        newest_B = output.sampled.token_B[jnp.maximum(first_B + output.new_B - 1, 0)]
        rows = dataclasses.replace(
            rows,
            newest_B=jnp.where(output.new_B > 0, newest_B, rows.newest_B),
            lengths_B=rows.lengths_B + output.new_B,
            drafts_BK=output.drafts_BK,
            num_drafts_B=jnp.minimum(rows.most_B, rows.num_steps_1[0]),
        )
        return caches, draft_caches, rows, _put(found, jax.tree.map(meshes.all_rows, output), index)

    tokens_B = jnp.zeros(max_rounds * copies * B * (1 + K), jnp.int32)
    rows_B = jnp.zeros(max_rounds * copies * B, jnp.int32)
    found = RoundsOutput(
        sample.without_logprobs(tokens_B, min(sizes.num_logprobs, sizes.vocab_size)),
        counts_B=rows_B,
        new_B=rows_B,
        drafts_BK=jnp.zeros((copies * B, K), jnp.int32),
    )
    carry = caches, draft_caches, given, found
    caches, draft_caches, _, found = jax.lax.fori_loop(
        jnp.int32(0), given.num_rounds_1[0], body, init_val=carry
    )
    return caches, draft_caches, found


def _round(
    held: Held,
    caches: tuple[Any, ...],
    draft_caches: tuple[Any, ...],
    *,
    rows: RoundsInput,
    sizes: Sizes,
) -> tuple[tuple[Any, ...], tuple[Any, ...], RoundsOutput]:
    """Compute one round: -> (caches, caches of the draft model, its results)."""
    structures, leaves, draft_leaves = held
    model = jax.tree.unflatten(structures[1], draft_leaves)
    B, K = rows.drafts_BK.shape
    step = _step(rows, B * (1 + K), sizes)
    caches, logits_TV, seen, _ = programs.forward(
        structures[0],
        False,
        model.reads,
        leaves=leaves,
        caches=caches,
        newest_R=rows.newest_B,
        step=step,
    )
    sampling = _of_tokens(rows.sampling, step)
    token_T = sample.sample(logits_TV, sampling)
    sampled = programs.reported(logits_TV, sampling, token_T, num_logprobs=sizes.num_logprobs)
    accepted_B = _accepted(token_T, rows, step)
    draft_caches, drafts_BK = _drafted(
        held,
        draft_caches,
        seen,
        step=step,
        rows=rows,
        token_T=token_T,
        accepted_B=accepted_B,
        sizes=sizes,
    )
    is_used_B = jnp.arange(B, dtype=jnp.int32) < rows.num_rows_1[0]
    new_B = jnp.where(is_used_B & (rows.lengths_B < rows.limits_B), accepted_B + 1, 0)
    return caches, draft_caches, RoundsOutput(sampled, step.counts_B, new_B, drafts_BK=drafts_BK)


def _step(rows: RoundsInput, T: int, sizes: Sizes) -> StepInput:
    """Return the input of a round: of each row the newest token, and its drafts after it.

    A row at its limit computes its newest token again, and writes nothing.
    """
    B = len(rows.newest_B)
    is_used_B = jnp.arange(B, dtype=jnp.int32) < rows.num_rows_1[0]
    is_active_B = is_used_B & (rows.lengths_B < rows.limits_B)
    left_B = jnp.minimum(rows.limits_B - 1, rows.room_B) - rows.lengths_B
    num_drafts_B = jnp.where(is_active_B, jnp.clip(left_B, 0, rows.num_drafts_B), 0)
    counts_B = jnp.where(is_used_B, 1 + num_drafts_B, 0)
    starts_B, row_T, offset_T, is_token_T = in_rows(counts_B, T)
    num_tokens_1 = starts_B[-1:] + counts_B[-1:]
    drafts_T = rows.drafts_BK[row_T, jnp.clip(offset_T - 1, 0, rows.drafts_BK.shape[1] - 1)]
    ids_T = jnp.where(offset_T == 0, rows.newest_B[row_T], drafts_T)
    positions_T = jnp.where(is_token_T, rows.lengths_B[row_T] - 1 + offset_T, 0)
    is_written_T = is_token_T & is_active_B[row_T] & (positions_T < rows.room_B[row_T])

    def placed(table_BM: jax.Array, num_pages: int) -> PageMap:
        page_T = table_BM[row_T, jnp.minimum(positions_T // sizes.page_size, sizes.table_width - 1)]
        slots_T = page_T * sizes.page_size + positions_T % sizes.page_size
        outside = jnp.int32(num_pages * sizes.page_size)
        return PageMap(jnp.where(is_written_T, slots_T, outside), table_BM)

    return StepInput(
        num_tokens_1=num_tokens_1,
        ids_T=ids_T,
        positions_T=positions_T,
        prompt_lengths_T=rows.prompt_lengths_B[row_T],
        row_T=jnp.where(is_token_T, row_T, 0),
        starts_B=starts_B,
        counts_B=counts_B,
        lengths_B=jnp.where(is_used_B, rows.lengths_B - 1 + counts_B, 0),
        pages=tuple(map(placed, rows.tables, sizes.num_pages)),
        num_samples_1=num_tokens_1,
        sample_at_B=jnp.arange(T, dtype=jnp.int32),
    )


def _of_tokens(sampling: Sampling, step: StepInput) -> Sampling:
    """Return the sampling parameters of every token of a round, from those of the rows."""
    kept = {name: getattr(sampling, name)[step.row_T] for name in batch.KEPT}
    none_T = jnp.full(len(step.row_T), -1, jnp.int32)
    return dataclasses.replace(
        sampling,
        **kept,
        num_rows_1=step.num_tokens_1,
        position_B=step.positions_T + 1,
        given_B=none_T,
        last_B=none_T,
    )


def _accepted(token_T: jax.Array, rows: RoundsInput, step: StepInput) -> jax.Array:
    """Return how many leading drafts of each row equal the tokens sampled in their places."""
    at_1K = jnp.arange(rows.drafts_BK.shape[1], dtype=jnp.int32)[None]
    is_draft_BK = at_1K < (step.counts_B - 1)[:, None]
    sampled_BK = token_T[jnp.where(is_draft_BK, step.starts_B[:, None] + at_1K, 0)]
    right_BK = (sampled_BK == rows.drafts_BK) & is_draft_BK
    return jnp.sum(jnp.cumprod(right_BK.astype(jnp.int32), axis=1), axis=1).astype(jnp.int32)


def _drafted(
    held: Held,
    caches: tuple[Any, ...],
    seen: tuple[jax.Array, ...],
    *,
    step: StepInput,
    rows: RoundsInput,
    token_T: jax.Array,
    accepted_B: jax.Array,
    sizes: Sizes,
) -> tuple[tuple[Any, ...], jax.Array]:
    """Compute the draft model at the tokens of a round, and draft after the accepted ones."""
    structures, leaves, draft_leaves = held
    target = jax.tree.unflatten(structures[0], leaves)
    model = jax.tree.unflatten(structures[1], draft_leaves)
    last_B = jnp.maximum(step.starts_B + accepted_B, 0)
    drafts_BK, caches = draft_after(
        (target, model),
        seen,
        caches,
        step=step,
        newest=Newest(following_T=token_T, last_B=last_B, room_B=rows.room_B),
        num_steps=rows.num_steps_1[0],
        sampling=rows.sampling,
        sizes=sizes,
        max_drafts=rows.drafts_BK.shape[1],
    )
    return caches, drafts_BK


def _put(found: RoundsOutput, of_round: RoundsOutput, index: jax.Array) -> RoundsOutput:
    """Return the results with those of one more round."""

    def put(all_R: jax.Array, one_B: jax.Array) -> jax.Array:
        start = index * one_B.shape[0]
        return jax.lax.dynamic_update_slice_in_dim(all_R, one_B, start_index=start, axis=0)

    parts = {
        name: jax.tree.map(put, getattr(found, name), getattr(of_round, name))
        for name in ("sampled", "counts_B", "new_B")
    }
    return RoundsOutput(**parts, drafts_BK=of_round.drafts_BK)
