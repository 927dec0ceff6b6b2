"""Mixture-of-experts layer: a router, experts, and an MLP that every token passes.

Not here: the choice of experts and the computation with them (ops/), the routing rules of the
families (docs/experts.md).

Shazeer et al., Outrageously large neural networks, 2017; shared experts: Dai et al., DeepSeekMoE,
2024.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slipway import mesh, ops, tree
from slipway.nn import expert_exchange
from slipway.nn.expert_exchange import Exchange
from slipway.nn.linear import Linear
from slipway.nn.mlp import MLP, ClampedMLP
from slipway.tree import Param, Stack, Tensor, module, static


@module
class Router:
    """Linear layer from hidden states to one logit for each expert, and the rule of the choice.

    ``e_score_correction_bias``: is added to the scores for the choice (DeepSeek-V3, 2024). The
    logits are sums in f32; ``rounds``: they are rounded to the dtype of the hidden states, if the
    reference of the family computes them in that dtype.
    """

    weight: Tensor
    bias: Tensor | None
    e_score_correction_bias: Tensor | None
    routing: ops.Routing = static()
    rounds: bool = static(default=False)

    @staticmethod
    def declare(
        embed: int,
        routing: ops.Routing,
        bias: bool = False,
        choice_bias: bool = False,
        rounds: bool = False,
    ) -> "Router":
        """Declare a router; ``choice_bias``: it has an ``e_score_correction_bias``."""
        # Another name than that of the stacked experts: every device has the whole router.
        sizes = {"choices": routing.num_experts, "embed": embed}
        return Router(
            weight=Param("choices embed", sizes),
            bias=Param("choices", sizes, init="zeros") if bias else None,
            e_score_correction_bias=(
                Param("choices", sizes, init="zeros", dtype="float32") if choice_bias else None
            ),
            routing=routing,
            rounds=rounds,
        )

    def __call__(self, x_TD: Any, step: ops.StepInput) -> tuple[Any, Any]:
        """Choose experts: [T, embed] -> (int32 [T, top_k] experts, f32 [T, top_k] weights)."""
        dtype = x_TD.dtype if self.rounds else jnp.float32
        logits_TE = ops.linear(x_TD, self.weight, step.num_tokens, bias=self.bias, dtype=dtype)
        bias_E = self.e_score_correction_bias
        bias_E = None if bias_E is None else tree.value(bias_E)
        logits_TE = logits_TE.astype(jnp.float32)
        return ops.route(logits_TE, bias_E, step.num_tokens, rule=self.routing)


@module
class MoE:
    """Sum of the chosen experts of each token, times their weights, and of a shared MLP.

    ``shared_expert_gate``: the sigmoid of its result is a factor on the shared MLP. ``exchange``:
    how the results of experts on different devices are joined.
    """

    gate: Router
    experts: Stack
    shared_experts: MLP | None = None
    shared_expert_gate: Linear | None = None
    exchange: Exchange = static(default="sum")

    @staticmethod
    def declare(
        embed: int, mlp: int, gate: Router, shared: int = 0, shared_gate: bool = False
    ) -> "MoE":
        """Declare a layer of experts of hidden size ``mlp``.

        ``shared``: the hidden size of the shared MLP, 0: none.
        """
        ones = {"one": 1, "embed": embed}
        return MoE.of(
            gate,
            MLP.declare(embed, mlp, axis="expert_mlp"),
            shared_experts=MLP.declare(embed, shared) if shared else None,
            shared_expert_gate=Linear.declare("one", "embed", ones) if shared_gate else None,
        )

    @staticmethod
    def of(gate: Router, expert: MLP | ClampedMLP, **shared: Any) -> "MoE":
        """Declare a layer of equal experts, with the fields ``shared`` of this class."""
        stacked = tree.stack(expert, gate.routing.num_experts, axis="experts")
        return MoE(gate=gate, experts=stacked, **shared)

    def __call__(self, x_TD: Any, step: ops.StepInput) -> tuple[Any, Any]:
        """Compute the layer: [T, embed] -> ([T, embed], experts [T, top_k] of each token)."""
        experts_TK, weights_TK = self.gate(x_TD, step)
        matrices = self.experts.body.matrices
        # Each device adds its part of a bias.
        matrices = dataclasses.replace(matrices, parts=mesh.parts_here("expert_mlp"))
        num_local = self.gate.routing.num_experts // mesh.parts_here("experts")
        first = mesh.local_offset("experts", num_local)
        y_TD = ops.experts(
            x_TD,
            experts_TK - first,
            weights_TK,
            matrices=matrices,
            num_tokens=step.num_tokens,
            num_experts=num_local,
        )
        shared_TD = self._shared(x_TD, step)
        if self._sends_rows(x_TD):
            y_TD = expert_exchange.by_sending(
                y_TD,
                shared_TD,
                experts_TK,
                num_local=num_local,
                num_tokens=step.num_tokens,
                dtype=x_TD.dtype,
            )
            return y_TD, experts_TK
        # Experts and the shared MLP are split over the same devices: one sum for both.
        y_TD = y_TD if shared_TD is None else y_TD + shared_TD
        return mesh.psum(y_TD, "mlp").astype(x_TD.dtype), experts_TK

    def sends_rows(self, shape: tuple[int, int], itemsize: int, *, groups: int, parts: int) -> bool:
        """Return whether the results for hidden states of a shape are joined by an exchange.

        ``itemsize``: bytes of a number of the hidden states. ``groups``: devices with different
        experts; ``parts``: those that split one expert. A number of rows that the groups do not
        divide is joined by a sum in any case.
        """
        if self.exchange == "sum" or groups == 1 or shape[0] % groups:
            return False
        return self.exchange == "all-to-all" or expert_exchange.moves_less(
            *shape,
            itemsize,
            top_k=self.gate.routing.top_k,
            groups=groups,
            parts=parts,
            shared=self.shared_experts is not None,
        )

    def _sends_rows(self, x_TD: Any) -> bool:
        groups, parts = mesh.parts_here("experts"), mesh.parts_here("expert_mlp")
        return self.sends_rows(x_TD.shape, x_TD.dtype.itemsize, groups=groups, parts=parts)

    def _shared(self, x_TD: Any, step: ops.StepInput) -> Any:
        """Compute this device's part of the shared MLP: [T, embed] -> f32 [T, embed], or None."""
        if self.shared_experts is None:
            return None
        shared_TD = self.shared_experts.partial_sums(x_TD, step)
        if self.shared_expert_gate is None:
            return shared_TD
        gate_T1 = ops.linear(x_TD, self.shared_expert_gate.matrix, step.num_tokens)
        return shared_TD * jax.nn.sigmoid(gate_T1)


def layers(model: Any) -> list[MoE]:
    """Return the layers of experts of a model; a stack of layers is one."""
    nodes = jax.tree.leaves(model, is_leaf=_is_moe)
    return [node for node in nodes if _is_moe(node)]


def exchange_of(model: Any) -> Exchange | None:
    """Return how devices join the results of experts in a model, None if it has no experts."""
    found = layers(model)
    return found[0].exchange if found else None


def with_exchange(model: Any, exchange: Exchange) -> Any:
    """Return a model with this way of joining the results of experts on different devices."""

    def one(node: Any) -> Any:
        return dataclasses.replace(node, exchange=exchange) if _is_moe(node) else node

    return jax.tree.map(one, model, is_leaf=_is_moe)


def _is_moe(node: Any) -> bool:
    return isinstance(node, MoE)
