"""From logits to tokens, row by row; decides where randomness comes from; knows no request.

Order, as in vLLM: temperature, min_p, top_k, top_p, then a draw by one random number of the row's own (its seed, folded
with the position), so that a row's token depends on nothing else in the batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

from slipway import ops
from slipway.tree import module


@module
class Sampled:
    """One step's choice for every row; all but the token are zeros unless some row wants log probabilities."""

    token_B: jax.Array
    logprob_B: jax.Array
    rank_B: jax.Array
    top_id_BX: jax.Array
    top_logprob_BX: jax.Array


def sample(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, seed_B, position_B):
    """A token per row; temperature 0: the likeliest."""
    uniform_B = jax.vmap(_uniform)(seed_B, position_B)
    return ops.sample(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)


def logprobs(logits_BV, token_B, num_top: int):
    """Log probability and rank of each row's token, and the ``num_top`` likeliest with theirs."""
    all_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(all_BV, token_B[:, None], axis=-1)
    rank_B = 1 + jnp.sum(all_BV > chosen_B, axis=-1).astype(jnp.int32)
    top_logprob_BX, top_id_BX = lax.top_k(all_BV, num_top)
    return Sampled(token_B, chosen_B[:, 0], rank_B, top_id_BX.astype(jnp.int32), top_logprob_BX)


def _uniform(seed, position):
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))
