"""Parts that families with experts share: routing in groups, layers, checks of their numbers.

Not here: the layer of experts (nn/moe.py), one family each (qwen3_moe.py, deepseek.py, ...).
"""

from collections.abc import Iterator
from typing import Any

from slipway.models.decoder import DecoderLayer
from slipway.nn.attention import Attention
from slipway.nn.latent_attention import LatentAttention
from slipway.nn.mlp import MLP
from slipway.nn.moe import MoE, Router
from slipway.ops import Routing


def sigmoid_routing(config: Any, experts: int, normalize: bool) -> Routing:
    """Return the routing of DeepSeek-V3 and its followers: sigmoid scores, groups, a scale."""
    return Routing(
        num_experts=experts,
        top_k=config.num_experts_per_tok,
        score="sigmoid",
        num_groups=config.n_group,
        top_groups=config.topk_group,
        group_score="sum_of_two",
        normalize=normalize,
        epsilon=1e-20,
        scale=config.routed_scaling_factor,
    )


def layer(
    config: Any, index: int, attention: Attention | LatentAttention, *, router: Router, shared: int
) -> DecoderLayer:
    """Declare a layer of experts, or a dense one below ``first_k_dense_replace``.

    ``shared``: the number of experts that every token passes.
    """
    embed, size = config.hidden_size, config.moe_intermediate_size
    if index < config.first_k_dense_replace:
        bias = getattr(config, "mlp_bias", False)
        dense = MLP.declare(embed, config.intermediate_size, bias)
        return DecoderLayer.declare(config, attention, dense)
    experts = MoE.declare(embed, size, router, shared=size * shared)
    return DecoderLayer.declare(config, attention, experts)


def chosen_check(field: str, chosen: int, experts: int) -> tuple[str, Any, bool, str]:
    """Return the check of the number of experts that a token has, for ``checks``."""
    return field, chosen, chosen <= experts, f"at most the {experts} experts"


def group_checks(
    config: Any, groups: str, chosen: str, experts: int
) -> Iterator[tuple[str, Any, bool, str]]:
    """Yield the checks of groups of experts, for ``checks``.

    ``groups`` and ``chosen``: the fields with the number of groups, and of those that a token may
    use.
    """
    count, best, top_k = (getattr(config, name) for name in (groups, chosen, "num_experts_per_tok"))
    is_divisor = experts % count == 0
    yield groups, count, is_divisor, f"a divisor of the {experts} experts"
    yield chosen, best, best <= count, f"at most the {count} groups"
    if is_divisor:
        available = best * (experts // count)
        expected = f"at most {available}, the experts of {best} groups"
        yield "num_experts_per_tok", top_k, top_k <= available, expected
