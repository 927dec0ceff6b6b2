"""Qwen3-MoE (Yang et al., Qwen3 technical report, 2025): experts without a shared MLP."""

import dataclasses

from slipway.models.decoder import DecoderLayer
from slipway.models.qwen2_moe import QwenMoeConfig
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP
from slipway.nn.moe import MoE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(QwenMoeConfig):
    """Fields of a Qwen3-MoE: the queries and keys of each head are normalized."""

    attention_bias: bool = False

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer: all layers have the same."""
        window = self.sliding_window if self.use_sliding_window else None
        return (window,) * self.num_hidden_layers


def declare_layer(config: Qwen3MoeConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    bias, embed = config.attention_bias, config.hidden_size
    attention = Attention.declare(
        config, config.windows[index], qkv_bias=bias, out_bias=bias, qk_norm="head"
    )
    if config.is_sparse(index):
        experts = MoE.declare(embed, config.moe_intermediate_size, config.router())
        return DecoderLayer.declare(config, attention, experts)
    return DecoderLayer.declare(config, attention, MLP.declare(embed, config.intermediate_size))
