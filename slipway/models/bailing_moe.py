"""Ling and Ring of Bailing: MoE models (Ling team, Every FLOP counts, 2025), and their second form.

The reference is the code of the models' authors; transformers has no class for them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from slipway.models.config import PartlyRotatedConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.mtp import Mtp
from slipway.models.naming import Naming
from slipway.models.sparse import chosen_check, group_checks, layer, sigmoid_routing
from slipway.nn.attention import Attention
from slipway.nn.moe import Router
from slipway.ops import Routing

NAMING = Naming(
    {
        "model.embed_tokens": "model.word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    },
    {"attention.query_key_value": tuple(f"self_attn.{name}_proj" for name in "qkv")},
)


# The published code applies the layer's norm before it passes the hidden state on.
MTP = Mtp(
    naming=Naming(dict(NAMING.renames) | {"shared_head.norm": "final_layernorm"}, NAMING.fused),
    has_head=False,
    skips_first=False,
    chains_normed=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BailingMoeConfig(PartlyRotatedConfig):
    """Fields of a Ling: softmax over all experts, and shared experts without a gate."""

    without_effect = (
        "embedding_dropout", "max_window_layers", "mtp_loss_scaling_factor", "output_dropout",
        "output_router_logits", "router_dtype", "seq_length", "sliding_window", "use_rmsnorm",
    )  # fmt: skip

    rope_theta: float = 600000.0
    use_qkv_bias: bool = False
    use_bias: bool = False
    norm_head: bool = False
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 0
    moe_intermediate_size: int
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True
    use_sliding_window: bool = False

    @property
    def normalizes_head(self) -> bool:
        """Whether each column of the output head is divided by its norm."""
        return self.norm_head

    @property
    def routing(self) -> Routing:
        """Rule of the choice of experts."""
        return Routing(
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            normalize=self.num_experts_per_tok > 1 and self.norm_topk_prob,
        )

    def router(self) -> Router:
        """Declare the router of a layer."""
        return Router.declare(self.hidden_size, self.routing, rounds=True)

    def attention(self, index: int) -> Attention:
        """Declare the attention of the layer at ``index``."""
        return Attention.declare(
            self, self.windows[index], qkv_bias=self.use_qkv_bias, out_bias=self.use_bias
        )

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and those of its experts."""
        yield from super().checks()
        yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)
        yield "use_sliding_window", self.use_sliding_window, not self.use_sliding_window, "false"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BailingMoeV2Config(BailingMoeConfig):
    """Fields of a Ling 2 or Ring 2: sigmoid scores, a bias for the choice, groups of experts."""

    rms_norm_eps: float = 1e-6
    use_qk_norm: bool = True
    moe_router_enable_expert_bias: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 8
    topk_group: int = 4
    score_function: str = "sigmoid"
    num_nextn_predict_layers: int = 0

    @property
    def routing(self) -> Routing:
        """Rule of the choice of experts."""
        return sigmoid_routing(self, self.num_experts, self.num_experts_per_tok > 1)

    def router(self) -> Router:
        """Declare the router of a layer."""
        choice_bias = self.moe_router_enable_expert_bias
        return Router.declare(self.hidden_size, self.routing, choice_bias=choice_bias)

    def attention(self, index: int) -> Attention:
        """Declare the attention of the layer at ``index``."""
        return Attention.declare(
            self,
            self.windows[index],
            qkv_bias=self.use_qkv_bias,
            out_bias=self.use_bias,
            qk_norm="head" if self.use_qk_norm else "",
        )

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a Ling and those of its groups."""
        yield from super().checks()
        yield from group_checks(self, "n_group", "topk_group", experts=self.num_experts)
        is_sigmoid = self.score_function == "sigmoid"
        yield "score_function", self.score_function, is_sigmoid, "sigmoid"


def declare_layer(config: BailingMoeConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    router, shared = config.router(), config.num_shared_experts
    return layer(config, index, config.attention(index), router=router, shared=shared)
