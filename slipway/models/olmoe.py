"""OLMoE (Muennighoff et al., OLMoE: open mixture-of-experts language models, 2024)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.sparse import chosen_check
from slipway.nn.attention import Attention
from slipway.nn.moe import MoE, Router
from slipway.ops import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoeConfig(DenseConfig):
    """Fields of an OLMoE; ``intermediate_size`` is that of one expert.

    Queries and keys are normalized over all heads together.
    """

    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and those of its experts."""
        yield from super().checks()
        yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)


def declare_layer(config: OlmoeConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    bias = config.attention_bias
    attention = Attention.declare(
        config, config.windows[index], qkv_bias=bias, out_bias=bias, qk_norm="all heads"
    )
    routing = Routing(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
    )
    router = Router.declare(config.hidden_size, routing, rounds=True)
    experts = MoE.declare(config.hidden_size, config.intermediate_size, router)
    return DecoderLayer.declare(config, attention, experts)
