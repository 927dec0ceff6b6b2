"""Qwen2 and Qwen2.5 (Yang et al., Qwen2 technical report, 2024)."""

import dataclasses

from slipway.models.config import WindowedConfig
from slipway.models.decoder import DecoderLayer
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    """Fields of a Qwen2: the projections of queries, keys and values always have a bias."""


def declare_layer(config: Qwen2Config, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    attention = Attention.declare(config, config.windows[index], qkv_bias=True)
    return DecoderLayer.declare(
        config, attention, MLP.declare(config.hidden_size, config.intermediate_size)
    )
