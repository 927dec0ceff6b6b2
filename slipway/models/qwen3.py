"""Qwen3, dense (Yang et al., Qwen3 technical report, 2025)."""

import dataclasses

from slipway.models.config import WindowedConfig
from slipway.models.decoder import DecoderLayer
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(WindowedConfig):
    """Fields of a Qwen3: the queries and keys of each head are normalized."""

    head_dim: int = 128
    attention_bias: bool = False


def declare_layer(config: Qwen3Config, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    bias = config.attention_bias
    attention = Attention.declare(
        config, config.windows[index], qkv_bias=bias, out_bias=bias, qk_norm="head"
    )
    return DecoderLayer.declare(
        config, attention, MLP.declare(config.hidden_size, config.intermediate_size)
    )
