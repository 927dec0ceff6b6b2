"""Program that drafts on the device, with a draft model.

Not here: draft models themselves (models/mtp.py, eagle.py, draft_lm.py), the target's step
(engine/programs.py), how many drafts are wanted (lengths.py).

A call follows each step of the target. It computes the draft model at all tokens of the step, and
then drafts after the newest token of each row, one token after the other.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway.engine import batch, sample
from slipway.engine.batch import Bucket, Sampling, Sizes
from slipway.engine.programs import NEWEST, SEEN, WEIGHTS
from slipway.engine.scheduler import Chunk
from slipway.ops import CacheSpec, KVCache, PageMap, StepInput
from slipway.runtime.runner import Program
from slipway.tree import module

# Programs: one that drafts, and one that only writes the keys and values of a step's tokens.
DRAFT, FILL = "draft", "fill"
# Names of device state: arrays and caches of the draft model.
DRAFT_WEIGHTS, DRAFT_CACHES = "draft weights", "draft caches"
Array = Any  # a NumPy array on the host, a traced JAX array inside the program


class DraftModel(Protocol):
    """Model that drafts tokens: a tree of declared tensors, or the same tree with arrays."""

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Caches that it needs, in the order in which ``__call__`` takes them."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads: as in ``CausalLM.run``."""

    @property
    def offset(self) -> int:
        """Position of a token in its caches, less that in the sequence: -1 or 0.

        -1: it computes a token together with the target's hidden state at the token before.
        """

    def features(self, hidden: tuple[Any, ...], step: StepInput) -> Any:
        """Return what it reads beside tokens, from the target's hidden states ``reads``."""

    def __call__(
        self, target: Any, h_TD: Any, step: StepInput, *, caches: tuple[KVCache, ...]
    ) -> tuple[Any, Any, tuple[KVCache, ...]]:
        """Compute the tokens of a step: -> (input of ``logits``, next ``h_TD``, caches).

        ``step.positions_T``: those of the tokens, plus ``offset``. ``h_TD``: ``features`` there, or
        the second result for the draft before.
        """

    def logits(self, target: Any, y_BD: Any, num_rows: Any) -> Any:
        """Compute f32 logits [B, vocab], in the target's vocabulary, of results of ``__call__``."""


@module
class DraftInput:
    """Input of drafting beside that of the step. All arrays are int32.

    ``next_ids_T``: the token after each of the step's tokens; -1 - r: the one in row r of the
    step's results. ``first_row_B``: the first row of results of each row of the step;
    ``num_drafts_B``: how many of its last tokens are drafts. ``room_B``: tokens that its pages
    hold. ``num_steps_1``: drafts wanted for each row. ``sampling``: of each row of the step; its
    ``position_B`` is not used.
    """

    next_ids_T: Array
    first_row_B: Array
    num_drafts_B: Array
    room_B: Array
    num_steps_1: Array
    sampling: Sampling


def empty_input(bucket: Bucket) -> DraftInput:
    """Return the input of a call that drafts nothing."""
    T, B = bucket.num_tokens, bucket.num_rows
    first_row_B, num_drafts_B, room_B = np.zeros((3, B), np.int32)
    return DraftInput(
        next_ids_T=np.zeros(T, np.int32),
        first_row_B=first_row_B,
        num_drafts_B=num_drafts_B,
        room_B=room_B,
        num_steps_1=np.zeros(1, np.int32),
        sampling=batch.empty_sampling(B),
    )


def build_input(
    chunks: Sequence[Chunk], kept: batch.Builder, bucket: Bucket, *, page_size: int, num_steps: int
) -> DraftInput:
    """Return the input for the chunks of one copy of the weights; ``kept``: its builder."""
    found = empty_input(bucket)
    found.num_steps_1[0] = num_steps
    found.sampling.num_rows_1[0] = len(chunks)
    row = token = 0
    for index, chunk in enumerate(chunks):
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        row += len(chunk.scored)
        sampled = chunk.samples + len(chunk.drafts)
        known = chunk.num_tokens - sampled
        next_ids = found.next_ids_T[token : token + chunk.num_tokens]
        next_ids[:known] = sequence.tokens[chunk.start + 1 : end + 1 - sampled]
        next_ids[known:] = -1 - np.arange(row, row + sampled)
        found.first_row_B[index] = row
        found.num_drafts_B[index] = len(chunk.drafts)
        found.room_B[index] = len(sequence.pages) * page_size if chunk.samples else 0
        row += sampled
        token += chunk.num_tokens
    kept.fill(chunks, found.sampling)
    return found


def programs(
    structures: tuple[Any, Any], copies: int, sizes: Sizes, *, max_drafts: int
) -> list[Program]:
    """Return both programs; the result of the first is the drafts [B, max_drafts] of each row.

    ``structures``: of the trees of the target and the draft model.
    """

    def inputs(bucket: Bucket) -> tuple[StepInput, DraftInput]:
        each = batch.empty_step(bucket, sizes), empty_input(bucket)
        step, given = (batch.join([part] * copies) for part in each)
        return step, given

    def made(name: str, body: Any, results: tuple[P, ...]) -> Program:
        return Program(
            name,
            functools.partial(body, structures, sizes=sizes, max_drafts=max_drafts),
            inputs,
            reads=(WEIGHTS, DRAFT_WEIGHTS, DRAFT_CACHES, SEEN, NEWEST),
            writes=(DRAFT_CACHES,),
            donates=(DRAFT_CACHES,),
            results=results,
        )

    return [made(DRAFT, _draft, (P(),)), made(FILL, _fill, ())]


def _fill(
    structures: tuple[Any, Any],
    leaves: list[jax.Array],
    draft_leaves: list[jax.Array],
    caches: tuple[KVCache, ...],
    seen: tuple[jax.Array, ...],
    newest_R: jax.Array,
    step: StepInput,
    given: DraftInput,
    *,
    sizes: Sizes,
    max_drafts: int,
) -> tuple[tuple[KVCache, ...]]:
    """Compute the draft model's caches only; traced under shard_map.

    What a layer computes behind its keys and values is not part of the compiled program.
    """
    models = _models(structures, leaves, draft_leaves)
    newest = _newest(newest_R, step, given, max_drafts=max_drafts)
    _, caches = _extend(models, seen, caches, step=step, newest=newest, sizes=sizes)
    return (caches,)


def _draft(
    structures: tuple[Any, Any],
    leaves: list[jax.Array],
    draft_leaves: list[jax.Array],
    caches: tuple[KVCache, ...],
    seen: tuple[jax.Array, ...],
    newest_R: jax.Array,
    step: StepInput,
    given: DraftInput,
    *,
    sizes: Sizes,
    max_drafts: int,
) -> tuple[tuple[KVCache, ...], jax.Array]:
    """Compute the draft model's caches and drafts [B, max_drafts]; traced under shard_map."""
    drafts_BK, caches = draft_after(
        _models(structures, leaves, draft_leaves),
        seen,
        caches,
        step=step,
        newest=_newest(newest_R, step, given, max_drafts=max_drafts),
        num_steps=given.num_steps_1[0],
        sampling=given.sampling,
        sizes=sizes,
        max_drafts=max_drafts,
    )
    return caches, meshes.all_rows(drafts_BK)


def _models(
    structures: tuple[Any, Any], leaves: list[jax.Array], draft_leaves: list[jax.Array]
) -> tuple[Any, DraftModel]:
    """Return the trees of the target and the draft model, with their arrays."""
    return jax.tree.unflatten(structures[0], leaves), jax.tree.unflatten(
        structures[1], draft_leaves
    )


def _newest(
    newest_R: jax.Array, step: StepInput, given: DraftInput, *, max_drafts: int
) -> "Newest":
    """Return the newest tokens after a step, of which ``newest_R`` are the results."""
    accepted_B = _accepted(newest_R, step, given, max_drafts=max_drafts)
    ids_T = given.next_ids_T
    ids_T = jnp.where(ids_T < 0, newest_R[jnp.maximum(-1 - ids_T, 0)], ids_T)
    last_B = jnp.maximum(step.starts_B + step.counts_B - 1 - given.num_drafts_B + accepted_B, 0)
    return Newest(following_T=ids_T, last_B=last_B, room_B=given.room_B)


@dataclasses.dataclass(frozen=True)
class Newest:
    """Newest token of each row after a step.

    ``following_T``: the token after each of the step's. ``last_B``: the index of the last accepted
    token of each row; the one that follows it is the row's newest. ``room_B``: tokens that a row's
    pages hold.
    """

    following_T: jax.Array
    last_B: jax.Array
    room_B: jax.Array


def draft_after(
    models: tuple[Any, DraftModel],
    seen: tuple[jax.Array, ...],
    caches: tuple[KVCache, ...],
    *,
    step: StepInput,
    newest: Newest,
    num_steps: jax.Array,
    sampling: Sampling,
    sizes: Sizes,
    max_drafts: int,
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Compute the draft model at the tokens of a step, and draft after the newest ones.

    Returns the drafts [B, max_drafts] and the caches. ``seen``: the token ids of the step, and the
    hidden states that the model reads. ``num_steps``: drafts of each row. ``sampling``: of each
    row; the positions are not used.
    """
    state, caches = _extend(models, seen, caches, step=step, newest=newest, sizes=sizes)
    return _draft_chain(
        models,
        state,
        caches,
        step=step,
        newest_B=step.positions_T[newest.last_B] + 1,
        room_B=newest.room_B,
        num_steps=num_steps,
        sampling=sampling,
        sizes=sizes,
        max_drafts=max_drafts,
    )


def _extend(
    models: tuple[Any, DraftModel],
    seen: tuple[jax.Array, ...],
    caches: tuple[KVCache, ...],
    *,
    step: StepInput,
    newest: Newest,
    sizes: Sizes,
) -> tuple[tuple[jax.Array, jax.Array], tuple[KVCache, ...]]:
    """Compute the draft model at the tokens of a step: -> (results at the newest ones, caches)."""
    target, model = models
    h_TD = model.features(seen[1:], step)
    if model.offset:
        step, at_B = dataclasses.replace(step, ids_T=newest.following_T), newest.last_B
    else:
        step, at_B = _with_newest(dataclasses.replace(step, ids_T=seen[0]), newest, sizes)
    y_TD, h_TD, caches = model(target, h_TD, step, caches=caches)
    return (y_TD[at_B], h_TD[at_B]), caches


def _with_newest(step: StepInput, newest: Newest, sizes: Sizes) -> tuple[StepInput, jax.Array]:
    """Return a step's accepted tokens with the newest after them, and the index of the last ones.

    A token for which a row's pages have no room is left out.
    """
    T, is_used_B, last_B = len(step.ids_T), step.counts_B > 0, newest.last_B
    accepted_B = jnp.where(is_used_B, last_B - step.starts_B + 1, 0)
    newest_B = step.positions_T[last_B] + 1
    counts_B = accepted_B + (is_used_B & (newest_B < newest.room_B)).astype(jnp.int32)
    starts_B, row_T, offset_T, is_token_T = in_rows(counts_B, T + len(counts_B))
    is_newest_T = offset_T == accepted_B[row_T]
    shift_T = is_newest_T.astype(jnp.int32)
    before_T = jnp.clip(step.starts_B[row_T] + offset_T - shift_T, 0, T - 1)
    positions_T = step.positions_T[before_T] + shift_T

    def placed(pages: PageMap, num_pages: int) -> PageMap:
        at_T = jnp.minimum(positions_T // sizes.page_size, sizes.table_width - 1)
        new_T = pages.page_table_BM[row_T, at_T] * sizes.page_size + positions_T % sizes.page_size
        slots_T = jnp.where(is_newest_T, new_T, pages.slots_T[before_T])
        outside = jnp.int32(num_pages * sizes.page_size)
        return dataclasses.replace(pages, slots_T=jnp.where(is_token_T, slots_T, outside))

    ends_B = starts_B + counts_B
    extended = dataclasses.replace(
        step,
        num_tokens_1=ends_B[-1:],
        ids_T=jnp.where(is_newest_T, newest.following_T[before_T], step.ids_T[before_T]),
        positions_T=positions_T,
        prompt_lengths_T=step.prompt_lengths_T[before_T],
        row_T=jnp.where(is_token_T, row_T, 0),
        starts_B=starts_B,
        counts_B=counts_B,
        lengths_B=jnp.where(is_used_B, newest_B + counts_B - accepted_B, 0),
        pages=tuple(map(placed, step.pages, sizes.num_pages)),
    )
    return extended, jnp.maximum(ends_B - 1, 0)


def in_rows(counts_B: jax.Array, T: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Lay out rows of tokens along an axis of ``T``, one after the other.

    Returns the first index of each row; and of each token its row, its index in the row, and
    whether it is one.
    """
    ends_B = jnp.cumsum(counts_B).astype(jnp.int32)
    starts_B = ends_B - counts_B
    at_T = jnp.arange(T, dtype=jnp.int32)
    row_T = jnp.searchsorted(ends_B, at_T, side="right").astype(jnp.int32)
    row_T = jnp.minimum(row_T, len(counts_B) - 1)
    return starts_B, row_T, jnp.maximum(at_T - starts_B[row_T], 0), at_T < ends_B[-1]


def _draft_chain(
    models: tuple[Any, DraftModel],
    state: tuple[jax.Array, jax.Array],
    caches: tuple[KVCache, ...],
    *,
    step: StepInput,
    newest_B: jax.Array,
    room_B: jax.Array,
    num_steps: jax.Array,
    sampling: Sampling,
    sizes: Sizes,
    max_drafts: int,
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Draft ``num_steps`` tokens of each row, one after the other: -> ([B, max_drafts], caches).

    ``state``: the draft model's results at the newest token of each row, which has the position
    ``newest_B`` in its sequence. ``room_B``: tokens that a row's pages hold. ``sampling``: of each
    row; the positions are not used.
    """
    target, model = models

    def drawn(y_BD: jax.Array, index: jax.Array) -> jax.Array:
        # With the random number of the token that the draft may equal.
        at = dataclasses.replace(sampling, position_B=newest_B + 1 + index)
        logits_BV = model.logits(target, y_BD, sampling.num_rows_1[0])
        return sample.sample(logits_BV, at)

    def body(index: jax.Array, carry: Any) -> Any:
        drafts_BK, token_B, h_BD, caches = carry
        positions_B = newest_B + index + model.offset
        at = _one_token_each(step, token_B, positions_B, room_B=room_B, sizes=sizes)
        y_BD, h_BD, caches = model(target, h_BD, at, caches=caches)
        token_B = drawn(y_BD, index)
        return put(drafts_BK, token_B, index), token_B, h_BD, caches

    def put(drafts_BK: jax.Array, token_B: jax.Array, index: jax.Array) -> jax.Array:
        column_B1 = token_B[:, None]
        return jax.lax.dynamic_update_slice_in_dim(drafts_BK, column_B1, start_index=index, axis=1)

    y_BD, h_BD = state
    none_B = jnp.zeros(len(newest_B), jnp.int32)
    first = jnp.int32(0)
    token_B = jax.lax.cond(num_steps > 0, lambda: drawn(y_BD, first), lambda: none_B)
    drafts_BK = put(jnp.zeros((len(newest_B), max_drafts), jnp.int32), token_B, first)
    carry = drafts_BK, token_B, h_BD, caches
    drafts_BK, _, _, caches = jax.lax.fori_loop(jnp.int32(1), num_steps, body, init_val=carry)
    return drafts_BK, caches


def _one_token_each(
    step: StepInput, ids_B: jax.Array, positions_B: jax.Array, *, room_B: jax.Array, sizes: Sizes
) -> StepInput:
    """Return the input of a step of one token of each row of ``step``.

    ``room_B``: the number of tokens that a row's pages hold. A token at a position outside them is
    computed at their last position instead, and not written.
    """
    rows_B = jnp.arange(len(positions_B), dtype=jnp.int32)
    is_used_B = step.counts_B > 0
    fits_B = (positions_B < room_B) & is_used_B
    positions_B = jnp.where(fits_B, positions_B, jnp.maximum(room_B - 1, 0))
    at_page_B = positions_B // sizes.page_size

    def placed(pages: PageMap, num_pages: int) -> PageMap:
        page_B = pages.page_table_BM[rows_B, at_page_B]
        slots_B = page_B * sizes.page_size + positions_B % sizes.page_size
        outside = jnp.int32(num_pages * sizes.page_size)
        return dataclasses.replace(pages, slots_T=jnp.where(fits_B, slots_B, outside))

    return dataclasses.replace(
        step,
        num_tokens_1=jnp.sum(is_used_B.astype(jnp.int32))[None],
        ids_T=ids_B,
        positions_T=positions_B,
        prompt_lengths_T=step.prompt_lengths_T[step.starts_B],
        row_T=rows_B,
        starts_B=rows_B,
        counts_B=is_used_B.astype(jnp.int32),
        lengths_B=positions_B + 1,
        pages=tuple(map(placed, step.pages, sizes.num_pages)),
    )


def _accepted(
    newest_R: jax.Array, step: StepInput, given: DraftInput, *, max_drafts: int
) -> jax.Array:
    """Return how many leading drafts of each row equal the tokens sampled in their places."""
    at_1K = jnp.arange(max_drafts, dtype=jnp.int32)[None]
    first_B1 = (step.starts_B + step.counts_B - given.num_drafts_B)[:, None]
    is_draft_BK = at_1K < given.num_drafts_B[:, None]
    drafts_BK = step.ids_T[jnp.where(is_draft_BK, first_B1 + at_1K, 0)]
    sampled_BK = newest_R[jnp.where(is_draft_BK, given.first_row_B[:, None] + at_1K, 0)]
    right_BK = (drafts_BK == sampled_BK) & is_draft_BK
    return jnp.sum(jnp.cumprod(right_BK.astype(jnp.int32), axis=1), axis=1).astype(jnp.int32)
