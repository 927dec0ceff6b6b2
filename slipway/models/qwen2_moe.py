"""Qwen1.5-MoE and Qwen2-MoE (Qwen team, Qwen1.5-MoE, 2024): experts, and a gated shared MLP."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from slipway.models.config import WindowedConfig
from slipway.models.decoder import DecoderLayer
from slipway.models.naming import Naming
from slipway.models.sparse import chosen_check
from slipway.nn.attention import Attention
from slipway.nn.mlp import MLP
from slipway.nn.moe import MoE, Router
from slipway.ops import Routing

NAMING = Naming({"mlp.shared_experts": "mlp.shared_expert"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenMoeConfig(WindowedConfig):
    """Fields that the MoE models of Qwen share."""

    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, index: int) -> bool:
        """Return whether the layer at ``index`` has experts."""
        has_experts = self.num_experts > 0 and index not in self.mlp_only_layers
        return has_experts and (index + 1) % self.decoder_sparse_step == 0

    def router(self) -> Router:
        """Declare the router of a layer."""
        routing = Routing(
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            normalize=self.norm_topk_prob,
        )
        return Router.declare(self.hidden_size, routing, rounds=True)

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and those of its experts."""
        yield from super().checks()
        if self.num_experts:
            yield chosen_check("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(QwenMoeConfig):
    """Fields of a Qwen2-MoE."""

    shared_expert_intermediate_size: int
    qkv_bias: bool = True

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer; without ``layer_types``, of every second one."""
        if not self.use_sliding_window or self.layer_types:
            return super().windows
        return tuple(
            self.sliding_window if index % 2 == 0 and index < self.max_window_layers else None
            for index in range(self.num_hidden_layers)
        )


def declare_layer(config: Qwen2MoeConfig, index: int) -> DecoderLayer:
    """Declare the layer at ``index``."""
    attention = Attention.declare(config, config.windows[index], qkv_bias=config.qkv_bias)
    if not config.is_sparse(index):
        mlp = MLP.declare(config.hidden_size, config.intermediate_size)
        return DecoderLayer.declare(config, attention, mlp)
    experts = MoE.declare(
        config.hidden_size,
        config.moe_intermediate_size,
        config.router(),
        shared=config.shared_expert_intermediate_size,
        shared_gate=True,
    )
    return DecoderLayer.declare(config, attention, experts)
