"""Mixtral (Jiang et al., Mixtral of experts, 2024)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.naming import Naming
from slipway.models.sparse import chosen_check
from slipway.nn.attention import Attention
from slipway.nn.moe import MoE, Router
from slipway.ops import Routing

NAMING = Naming(
    {
        "mlp.experts.{}.gate_proj": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
        "mlp.experts.{}.up_proj": "block_sparse_moe.experts.{}.w3",
        "mlp.gate": "block_sparse_moe.gate",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(DenseConfig):
    """Fields of a Mixtral; ``intermediate_size`` is that of one expert."""

    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}

    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer: all layers have the same."""
        return (self.sliding_window,) * self.num_hidden_layers

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and those of its experts."""
        yield from super().checks()
        yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts)


def declare_layer(config: MixtralConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    routing = Routing(
        num_experts=config.num_local_experts, top_k=config.num_experts_per_tok, normalize=True
    )
    router = Router.declare(config.hidden_size, routing, rounds=True)
    experts = MoE.declare(config.hidden_size, config.intermediate_size, router)
    attention = Attention.declare(config, config.windows[index])
    return DecoderLayer.declare(config, attention, experts)
