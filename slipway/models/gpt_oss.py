"""gpt-oss (OpenAI, gpt-oss-120b and gpt-oss-20b model card, 2025)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.naming import Naming
from slipway.models.sparse import chosen_check
from slipway.nn.attention import Attention
from slipway.nn.mlp import ClampedMLP
from slipway.nn.moe import MoE, Router
from slipway.ops import Routing

EXPERT = "mlp.experts.{}"
NAMING = Naming(
    {
        "mlp.gate": "mlp.router",
        f"{EXPERT}.gate_up_proj.weight": "mlp.experts[{}].gate_up_proj",
        f"{EXPERT}.gate_up_proj.bias": "mlp.experts[{}].gate_up_proj_bias",
        f"{EXPERT}.down_proj.weight": "mlp.experts[{}].down_proj",
        f"{EXPERT}.down_proj.bias": "mlp.experts[{}].down_proj_bias",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(DenseConfig):
    """Fields of a gpt-oss; ``intermediate_size`` is that of one expert.

    Without ``layer_types``, every second layer has the sliding window, from the first one on.
    """

    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}
    default_rope: ClassVar[Mapping[str, Any]] = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }

    head_dim: int = 64
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    attention_bias: bool = True
    sliding_window: int | None = 128
    layer_types: tuple[str, ...] = ()
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer in positions, None for full attention."""
        if not self.layer_types:
            every_second = (self.sliding_window, None) * self.num_hidden_layers
            return every_second[: self.num_hidden_layers]
        slides = (kind == "sliding_attention" for kind in self.layer_types)
        return tuple(self.sliding_window if each else None for each in slides)

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder, its windows and its experts."""
        yield from super().checks()
        yield self.layer_types_check(self.layer_types)
        yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts)


def declare_layer(config: GptOssConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    bias = config.attention_bias
    attention = Attention.declare(
        config, config.windows[index], qkv_bias=bias, out_bias=bias, sinks=True
    )
    routing = Routing(
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        score="softmax_of_chosen",
    )
    embed = config.hidden_size
    expert = ClampedMLP.declare(
        embed, config.intermediate_size, alpha=config.swiglu_alpha, limit=config.swiglu_limit
    )
    router = Router.declare(embed, routing, bias=True, rounds=True)
    return DecoderLayer.declare(config, attention, MoE.of(router, expert))
