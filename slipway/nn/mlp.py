"""Gated feed-forward layer."""

from slipway import ops
from slipway.nn.linear import Linear
from slipway.tree import Param, module, static


@module
class MLP:
    """Layer ``down(silu(gate(x)) * up(x))`` (Shazeer, GLU variants improve transformer, 2020)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @staticmethod
    def declare(embed: int, mlp: int, bias: bool = False, axis: str = "mlp") -> "MLP":
        """Declare a layer of input size ``embed`` and hidden size ``mlp``.

        ``axis``: the name of the hidden axis, which a mesh splits.
        """
        sizes = {"embed": embed, axis: mlp}
        up = Linear.declare(axis, "embed", sizes, bias=bias)
        return MLP(up, up, Linear.declare("embed", axis, sizes, bias=bias))

    def __call__(self, x_TD, step):
        """Compute the layer: [T, embed] -> ([T, embed], None, as it has no experts)."""
        return self.down_proj(self._hidden(x_TD, step), step), None

    def partial_sums(self, x_TD, step):
        """Compute this device's part of the layer: [T, embed] -> f32 [T, embed].

        The sum over the devices that split the hidden axis is the result of a layer without biases.
        """
        return ops.linear(self._hidden(x_TD, step), self.down_proj.matrix, step.num_tokens)

    def _hidden(self, x_TD, step):
        gate, up = self.gate_proj, self.up_proj
        options = {"gate_bias": gate.bias, "up_bias": up.bias, "dtype": x_TD.dtype}
        return ops.gated_linear(x_TD, gate.matrix, up.matrix, num_tokens=step.num_tokens, **options)

    @property
    def matrices(self) -> ops.ExpertMatrices:
        """The layer's matrices, stacked over experts, as ``ops.experts`` takes them."""
        into = self.gate_proj.matrix, self.up_proj.matrix
        return ops.ExpertMatrices(into, self.down_proj.matrix)


@module
class ClampedMLP:
    """Expert of gpt-oss: one matrix with the columns of gate and up in turn, and clamped results.

    ``down(min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clip(up, -limit, limit) + 1))``
    (gpt-oss model card, 2025). It has biases, and its matrices are (in, out), as in checkpoints.
    """

    gate_up_proj: Linear
    down_proj: Linear
    alpha: float = static()
    limit: float = static()

    @staticmethod
    def declare(embed: int, mlp: int, alpha: float, limit: float) -> "ClampedMLP":
        """Declare an expert of input size ``embed`` and hidden size ``mlp``."""
        sizes = {"embed": embed, "expert_mlp": mlp, "gate_and_up": 2}
        columns = "(expert_mlp gate_and_up)"
        into, out = Param(f"embed {columns}", sizes), Param("expert_mlp embed", sizes)
        return ClampedMLP(
            gate_up_proj=Linear(into, Param(columns, sizes, init="zeros"), sums_over="embed"),
            down_proj=Linear(out, Param("embed", sizes, init="zeros"), sums_over="expert_mlp"),
            alpha=alpha,
            limit=limit,
        )

    @property
    def matrices(self) -> ops.ExpertMatrices:
        """The layer's matrices, stacked over experts, as ``ops.experts`` takes them."""
        return ops.ExpertMatrices(
            (self.gate_up_proj.matrix,),
            self.down_proj.matrix,
            into_bias=self.gate_up_proj.bias,
            down_bias=self.down_proj.bias,
            clamp=(self.alpha, self.limit),
        )
