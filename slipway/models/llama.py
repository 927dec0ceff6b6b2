"""Llama 2 and 3 (Touvron et al., Llama 2, 2023; Grattafiori et al., The Llama 3 herd of models,
2024)."""

import dataclasses

from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DenseConfig):
    """Fields of a Llama; both kinds of layers may have biases."""

    attention_bias: bool = False
    mlp_bias: bool = False


def declare_layer(config: LlamaConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    bias = config.attention_bias
    attention = Attention.declare(config, config.windows[index], qkv_bias=bias, out_bias=bias)
    mlp = MLP.declare(config.hidden_size, config.intermediate_size, config.mlp_bias)
    return DecoderLayer.declare(config, attention, mlp)
