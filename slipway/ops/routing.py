"""Experts of a token: the rule of their choice, the portable body of ``ops.route``, their matrices.

Not here: the layer (slipway/nn/moe.py), the rules of the families (docs/experts.md).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from slipway.tree import Tensor, module, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Choice of ``top_k`` of ``num_experts`` experts, from one logit for each.

    ``score``: of the logits; ``softmax_of_chosen`` chooses by the logits and applies the softmax to
    the chosen ones only. A bias, if the router has one, is added to the scores for the choice, not
    to the weights. With ``num_groups`` > 1, the experts are cut into groups of neighbours, and only
    those of the best ``top_groups`` can be chosen; ``group_score``: of a group, its largest score
    or the sum of its two largest. Of equal scores, the one with the lower index is chosen. The
    weights of the chosen experts are their scores, divided by ``their sum + epsilon`` if
    ``normalize``, times ``scale``.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["largest", "sum_of_two"] = "largest"
    normalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0


@module
class ExpertLoad:
    """Number of tokens that each expert of each layer has computed: uint32 [layers, experts].

    It counts from 0 again after 2^32. A program gets it behind the caches and returns it.
    """

    counts_LE: Tensor

    def add(self, layer: Any, experts_TK: Any, num_tokens: Any) -> "ExpertLoad":
        """Count the experts that the first ``num_tokens`` tokens chose in one layer."""
        is_live = (jnp.arange(experts_TK.shape[0]) < num_tokens)[:, None]
        ones = jnp.broadcast_to(is_live, experts_TK.shape).astype(jnp.uint32)
        return ExpertLoad(self.counts_LE.at[layer, experts_TK].add(ones))


@module
class ExpertMatrices:
    """Matrices of E experts of one layer, stacked along their first axis.

    ``into``: gate and up, [E, F, D] each, and ``down``: [E, D, F]. Or they lie transposed: ``into``
    is one matrix [E, D, 2 F], with the columns of gate and up in turn, and ``down`` [E, F, D]; then
    there are ``into_bias`` [E, 2 F] and ``down_bias`` [E, D], and ``clamp``: alpha and limit of a
    clamped gate (slipway/nn/mlp.py). ``parts``: the number of devices that split each expert; each
    adds its part of ``down_bias``.
    """

    into: tuple[Any, ...]
    down: Any
    into_bias: Tensor | None = None
    down_bias: Tensor | None = None
    clamp: tuple[float, ...] = static(default=())
    parts: int = static(default=1)

    @property
    def lie_transposed(self) -> bool:
        """Whether the rows of the matrices run along the outputs."""
        return len(self.into) == 1


def route(logits_TE, bias_E, num_tokens, rule):
    """Choose experts by a Routing, in f32."""
    del num_tokens
    scores_TE = logits_TE
    if rule.score != "softmax_of_chosen":
        scores_TE = jax.nn.sigmoid(logits_TE)
    if rule.score == "softmax":
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E[None]
    if rule.num_groups > 1:
        choice_TE = jnp.where(_in_best_groups(choice_TE, rule), choice_TE, -jnp.inf)
    experts_TK = lax.top_k(choice_TE, rule.top_k)[1]
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if rule.score == "softmax_of_chosen":
        weights_TK = jax.nn.softmax(weights_TK, axis=-1)
    if rule.normalize:
        weights_TK = weights_TK / (jnp.sum(weights_TK, axis=-1, keepdims=True) + rule.epsilon)
    return experts_TK, weights_TK * rule.scale


def _in_best_groups(choice_TE, rule):
    """Return whether each expert is in one of the best groups of its token."""
    groups_TGX = choice_TE.reshape(choice_TE.shape[0], rule.num_groups, -1)
    best = lax.top_k(groups_TGX, 2 if rule.group_score == "sum_of_two" else 1)[0]
    chosen = lax.top_k(jnp.sum(best, axis=-1), rule.top_groups)[1]
    held_TG = jnp.any(chosen[..., None] == jnp.arange(rule.num_groups)[None, None], axis=1)
    return jnp.repeat(held_TG, groups_TGX.shape[-1], axis=1)
