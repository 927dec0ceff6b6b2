"""GLM-4.5 to 4.7 (GLM team, GLM-4.5: agentic, reasoning and coding foundation models, 2025)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import PartlyRotatedConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.sparse import group_checks, layer, sigmoid_routing
from slipway.nn.attention import Attention
from slipway.nn.moe import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(PartlyRotatedConfig):
    """Fields of a GLM-4 with experts; its first layers are dense."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    default_share: ClassVar[float] = 0.5

    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    use_qk_norm: bool = False
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 1
    num_nextn_predict_layers: int = 1

    def router(self) -> Router:
        """Declare the router of a layer."""
        routing = sigmoid_routing(self, self.n_routed_experts, self.norm_topk_prob)
        return Router.declare(self.hidden_size, routing, choice_bias=True)

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and those of its groups of experts."""
        yield from super().checks()
        yield from group_checks(self, "n_group", "topk_group", experts=self.n_routed_experts)


def declare_layer(config: Glm4MoeConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    attention = Attention.declare(
        config,
        config.windows[index],
        qkv_bias=config.attention_bias,
        qk_norm="head" if config.use_qk_norm else "",
    )
    router, shared = config.router(), config.n_shared_experts
    return layer(config, index, attention, router=router, shared=shared)
