"""From logits to tokens, row by row; decides where randomness comes from; knows no request.

Order, as in vLLM: what is not allowed is ruled out, biases, penalties, temperature, min_p, top_k, top_p, then a draw by
one random number of the row's own (its seed, folded with the position), so that a row's token depends on nothing else
in the batch. Log probabilities are the model's own, before all that.
"""

import jax
import jax.numpy as jnp
from jax import lax

from slipway import ops
from slipway.engine.edits import WORD_BITS
from slipway.tree import module

BANNED = -jnp.inf


@module
class Sampled:
    """One step's choice for every row; all but the token are zeros unless some row wants log probabilities."""

    token_B: jax.Array
    logprob_B: jax.Array
    rank_B: jax.Array
    top_id_BX: jax.Array
    top_logprob_BX: jax.Array


def sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, seed_B, position_B):
    """A token per row; temperature 0: the likeliest."""
    uniform_B = jax.vmap(_uniform)(seed_B, position_B)
    return ops.sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)


def edit(logits_BV, edits, position_B, newest_B):
    """The logits with what each row bans, adds and penalizes.

    ``position_B``: how many tokens the row's sequence has; ``newest_B``: the last of them, or -1 if the history has it.
    """
    bits_W = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    bits_BWX = (edits.allowed_BW[:, :, None] >> bits_W[None, None]) & jnp.uint32(1)
    allowed_BV = bits_BWX.reshape(logits_BV.shape[0], -1)[:, : logits_BV.shape[1]] == 1
    row_B1 = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)[:, None]
    logits_BV = jnp.where(allowed_BV, logits_BV, BANNED)
    logits_BV = logits_BV.at[row_B1, edits.bias_id_BX].add(edits.bias_BX, mode="drop")
    penalizes_B = (edits.repetition_B != 1) | (edits.frequency_B != 0) | (edits.presence_B != 0)
    return lax.cond(
        jnp.any(penalizes_B), lambda: _penalized(logits_BV, edits, position_B, newest_B, row_B1), lambda: logits_BV
    )


def _penalized(logits_BV, edits, position_B, newest_B, row_B1):
    """Repetition: Keskar et al., CTRL, 2019, section 4.1; frequency and presence: OpenAI's API reference."""
    at_1C = jnp.arange(edits.history_BC.shape[1], dtype=jnp.int32)[None]
    is_newest_BC = (at_1C == position_B[:, None] - 1) & (newest_B >= 0)[:, None]
    history_BC = jnp.where(is_newest_BC, newest_B[:, None], edits.history_BC)
    nobody = jnp.int32(logits_BV.shape[1])
    held_BC = jnp.where(at_1C < position_B[:, None], history_BC, nobody)
    output_BC = jnp.where(at_1C >= edits.num_prompt_B[:, None], held_BC, nobody)
    zeros_BV = jnp.zeros(logits_BV.shape, jnp.int32)
    seen_BV = zeros_BV.at[row_B1, held_BC].set(1, mode="drop") == 1
    count_BV = zeros_BV.at[row_B1, output_BC].add(1, mode="drop").astype(jnp.float32)
    repetition_B1 = edits.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, repeated_BV, logits_BV) - edits.frequency_B[:, None] * count_BV
    return logits_BV - edits.presence_B[:, None] * (count_BV > 0).astype(jnp.float32)


def without_logprobs(token_B, num_top: int):
    """Tokens alone, shaped like ``logprobs``."""
    rows_B, tops_BX = jnp.zeros(token_B.shape), jnp.zeros((*token_B.shape, num_top))
    return Sampled(token_B, rows_B, rows_B.astype(jnp.int32), tops_BX.astype(jnp.int32), tops_BX)


def logprobs(logits_BV, num_rows, token_B, num_top: int):
    """Return the log probability and rank of each row's token, and the ``num_top`` likeliest with theirs.

    A row's numbers have the same bits whatever other rows there are (ops.log_normalizer).
    """
    largest_B, log_sum_B = ops.log_normalizer(logits_BV, num_rows)
    all_BV = logits_BV - largest_B[:, None] - log_sum_B[:, None]
    chosen_B = jnp.take_along_axis(all_BV, token_B[:, None], axis=-1)
    rank_B = 1 + jnp.sum(all_BV > chosen_B, axis=-1).astype(jnp.int32)
    top_logprob_BX, top_id_BX = lax.top_k(all_BV, num_top)
    return Sampled(token_B, chosen_B[:, 0], rank_B, top_id_BX.astype(jnp.int32), top_logprob_BX)


def _uniform(seed, position):
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))
