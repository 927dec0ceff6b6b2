"""Qwen3, dense (Yang et al., Qwen3 technical report, 2025)."""

import dataclasses

from slipway.models.config import WindowedConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.mtp import Mtp
from slipway.models.naming import Naming
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP

# Qwen's names of a prediction layer, as Qwen3-Next has them.
MTP = Mtp(
    naming=Naming(
        {
            "model.layers.{}.enorm": "mtp.pre_fc_norm_embedding",
            "model.layers.{}.hnorm": "mtp.pre_fc_norm_hidden",
            "model.layers.{}.eh_proj": "mtp.fc",
            "model.layers.{}.shared_head.norm": "mtp.norm",
            "model.layers": "mtp.layers",
        }
    ),
    is_numbered_apart=True,
    has_head=False,
    skips_first=False,
    chains_normed=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(WindowedConfig):
    """Fields of a Qwen3: the queries and keys of each head are normalized."""

    head_dim: int = 128
    attention_bias: bool = False
    num_nextn_predict_layers: int = 0

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Glob patterns of tensors that a checkpoint may hold and the model does not use."""
        return ("mtp.*",)


def declare_layer(config: Qwen3Config, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    bias = config.attention_bias
    attention = Attention.declare(
        config, config.windows[index], qkv_bias=bias, out_bias=bias, qk_norm="head"
    )
    return DecoderLayer.declare(
        config, attention, MLP.declare(config.hidden_size, config.intermediate_size)
    )
