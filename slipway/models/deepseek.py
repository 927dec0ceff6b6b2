"""DeepSeek-V2 and DeepSeek-V3 (DeepSeek-AI, 2024, and DeepSeek-V3 technical report, 2024)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import DenseConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.sparse import chosen_check, group_checks, layer, sigmoid_routing
from slipway.nn.latent_attention import LatentAttention
from slipway.nn.moe import Router
from slipway.nn.rope import magnitude
from slipway.ops import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(DenseConfig):
    """Fields that both versions share; the first layers are dense."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }

    attention_bias: bool = False
    mlp_bias: bool = False
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 0

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that are rotated."""
        return self.qk_rope_head_dim

    @property
    def score_scale(self) -> float:
        """Factor of the scores of attention; YaRN with ``mscale_all_dim`` enlarges it."""
        scaling, scale = self.rope_scaling, (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if scaling.rope_type == "default" or not scaling.mscale_all_dim:
            return scale
        return scale * magnitude(scaling.factor, scaling.mscale_all_dim) ** 2

    def router(self) -> Router:
        """Declare the router of a layer."""
        raise NotImplementedError

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder, and those of its heads and experts."""
        yield from super().checks()
        size = self.qk_rope_head_dim
        yield "qk_rope_head_dim", size, size % 2 == 0, "an even number"
        yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.n_routed_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(DeepseekConfig):
    """Fields of a DeepSeek-V2: softmax scores, and perhaps groups of experts."""

    topk_method: str = "greedy"
    n_shared_experts: int = 2
    n_group: int | None = None
    topk_group: int | None = None

    def router(self) -> Router:
        """Declare the router of a layer."""
        has_groups = self.topk_method == "group_limited_greedy"
        routing = Routing(
            num_experts=self.n_routed_experts,
            top_k=self.num_experts_per_tok,
            num_groups=(has_groups and self.n_group) or 1,
            top_groups=(has_groups and self.topk_group) or 1,
            scale=self.routed_scaling_factor,
        )
        return Router.declare(self.hidden_size, routing)

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of both versions and that of the choice of experts."""
        yield from super().checks()
        methods = ("greedy", "group_limited_greedy")
        yield "topk_method", self.topk_method, self.topk_method in methods, " or ".join(methods)
        if self.topk_method == "group_limited_greedy":
            expected = "a number, for group_limited_greedy"
            yield "n_group", self.n_group, self.n_group is not None, expected
            yield "topk_group", self.topk_group, self.topk_group is not None, expected
            yield from group_checks(self, "n_group", "topk_group", experts=self.n_routed_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DeepseekConfig):
    """Fields of a DeepSeek-V3: sigmoid scores, a bias for the choice, groups of experts."""

    max_position_embeddings: int = 4096
    n_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 1

    def router(self) -> Router:
        """Declare the router of a layer."""
        routing = sigmoid_routing(self, self.n_routed_experts, self.norm_topk_prob)
        return Router.declare(self.hidden_size, routing, choice_bias=True)

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of both versions and those of the groups of experts."""
        yield from super().checks()
        yield from group_checks(self, "n_group", "topk_group", experts=self.n_routed_experts)


def declare_layer(config: DeepseekConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    attention = LatentAttention.declare(config, config.rope_interleave, config.score_scale)
    router, shared = config.router(), config.n_shared_experts
    return layer(config, index, attention, router=router, shared=shared)
