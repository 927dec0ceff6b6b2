"""MiniMax-M2 (MiniMax, 2025): experts in every layer, norms over all heads together."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models import mixtral
from slipway.models.config import PartlyRotatedConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.naming import Naming
from slipway.models.sparse import chosen_check
from slipway.nn.attention import Attention
from slipway.nn.moe import MoE, Router
from slipway.ops import Routing

CHOICE_BIAS = "e_score_correction_bias"
NAMING = Naming(
    {f"mlp.gate.{CHOICE_BIAS}": f"block_sparse_moe.{CHOICE_BIAS}", **mixtral.NAMING.renames}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniMaxM2Config(PartlyRotatedConfig):
    """Fields of a MiniMax-M2; ``intermediate_size`` is that of one expert."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_experts": "num_local_experts",
        **PartlyRotatedConfig.aliases,
    }

    head_dim: int = 128
    max_position_embeddings: int = 196608
    rope_theta: float = 5e6
    num_local_experts: int = 256
    num_experts_per_tok: int = 8

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and those of its experts."""
        yield from super().checks()
        yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts)


def declare_layer(config: MiniMaxM2Config, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    routing = Routing(
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        score="sigmoid",
        normalize=True,
    )
    router = Router.declare(config.hidden_size, routing, choice_bias=True, rounds=True)
    experts = MoE.declare(config.hidden_size, config.intermediate_size, router)
    attention = Attention.declare(config, config.windows[index], qk_norm="all heads")
    return DecoderLayer.declare(config, attention, experts)
