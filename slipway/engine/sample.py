"""Sampling: logits to tokens, row by row, and log probabilities.

Not here: the rules of a request that change logits (logit_rules.py), top_k and top_p themselves
(ops/xla.py, csrc/).

The order is vLLM's: first tokens that are not allowed are excluded, then follow biases, penalties,
temperature, min_p, top_k and top_p, then a draw by one random number for the row, made from its
seed and position. So a row's token does not depend on the other rows of the batch. Log
probabilities are those of the model, before all these changes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from slipway import ops
from slipway.engine.batch import Sampling
from slipway.engine.logit_rules import WORD_BITS
from slipway.tree import module

BANNED = -jnp.inf


@module
class Sampled:
    """Tokens of one step, one for each row.

    The other fields are zeros unless a row asks for log probabilities.
    """

    token_B: jax.Array
    logprob_B: jax.Array
    rank_B: jax.Array
    top_id_BX: jax.Array
    top_logprob_BX: jax.Array


def sample(logits_BV, sampling: Sampling):
    """Draw a token for each row: [B, V] -> [B]; temperature 0 takes the likeliest."""
    return ops.sample(
        logits_BV,
        sampling.num_rows_1[0],
        temperature_B=sampling.temperature_B,
        top_k_B=sampling.top_k_B,
        top_p_B=sampling.top_p_B,
        min_p_B=sampling.min_p_B,
        uniform_B=jax.vmap(_uniform)(sampling.seed_B, sampling.position_B),
    )


def edit(logits_BV, edits, position_B, newest_B):
    """Return the logits with the bans, biases and penalties of each row applied.

    ``position_B``: the number of tokens of the row's sequence. ``newest_B``: the last of them, or
    -1 if ``edits.history_BC`` has it already.
    """
    bits_W = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    bits_BWX = (edits.allowed_BW[:, :, None] >> bits_W[None, None]) & jnp.uint32(1)
    allowed_BV = bits_BWX.reshape(logits_BV.shape[0], -1)[:, : logits_BV.shape[1]] == 1
    row_B1 = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)[:, None]
    logits_BV = jnp.where(allowed_BV, logits_BV, BANNED)
    logits_BV = logits_BV.at[row_B1, edits.bias_id_BX].add(edits.bias_BX, mode="drop")
    penalizes_B = (edits.repetition_B != 1) | (edits.frequency_B != 0) | (edits.presence_B != 0)
    penalized = partial(
        _penalized, logits_BV, edits, row_B1, position_B=position_B, newest_B=newest_B
    )
    return lax.cond(jnp.any(penalizes_B), penalized, lambda: logits_BV)


def _penalized(logits_BV, edits, row_B1, position_B, newest_B):
    """Apply penalties: repetition, frequency and presence.

    Repetition: Keskar et al., CTRL, 2019, section 4.1. Frequency and presence: OpenAI's API.
    """
    at_1C = jnp.arange(edits.history_BC.shape[1], dtype=jnp.int32)[None]
    is_newest_BC = (at_1C == position_B[:, None] - 1) & (newest_B >= 0)[:, None]
    history_BC = jnp.where(is_newest_BC, newest_B[:, None], edits.history_BC)
    no_token = jnp.int32(logits_BV.shape[1])
    held_BC = jnp.where(at_1C < position_B[:, None], history_BC, no_token)
    output_BC = jnp.where(at_1C >= edits.num_prompt_B[:, None], held_BC, no_token)
    zeros_BV = jnp.zeros(logits_BV.shape, jnp.int32)
    seen_BV = zeros_BV.at[row_B1, held_BC].set(1, mode="drop") == 1
    count_BV = zeros_BV.at[row_B1, output_BC].add(1, mode="drop").astype(jnp.float32)
    repetition_B1 = edits.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, repeated_BV, logits_BV) - edits.frequency_B[:, None] * count_BV
    return logits_BV - edits.presence_B[:, None] * (count_BV > 0).astype(jnp.float32)


def without_logprobs(token_B, num_top: int):
    """Return the tokens in the shape of ``logprobs``, with zeros for the rest."""
    rows_B, tops_BX = jnp.zeros(token_B.shape), jnp.zeros((*token_B.shape, num_top))
    return Sampled(
        token_B=token_B,
        logprob_B=rows_B,
        rank_B=rows_B.astype(jnp.int32),
        top_id_BX=tops_BX.astype(jnp.int32),
        top_logprob_BX=tops_BX,
    )


def logprobs(logits_BV, num_rows, token_B, num_top: int):
    """Return log probability and rank of each row's token, and the ``num_top`` likeliest tokens.

    The numbers of a row have the same bits in every batch (ops.log_normalizer).
    """
    largest_B, log_sum_B = ops.log_normalizer(logits_BV, num_rows)
    all_BV = logits_BV - largest_B[:, None] - log_sum_B[:, None]
    chosen_B = jnp.take_along_axis(all_BV, token_B[:, None], axis=-1)
    rank_B = 1 + jnp.sum(all_BV > chosen_B, axis=-1).astype(jnp.int32)
    top_logprob_BX, top_id_BX = lax.top_k(all_BV, num_top)
    return Sampled(
        token_B=token_B,
        logprob_B=chosen_B[:, 0],
        rank_B=rank_B,
        top_id_BX=top_id_BX.astype(jnp.int32),
        top_logprob_BX=top_logprob_BX,
    )


def _uniform(seed, position):
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))
