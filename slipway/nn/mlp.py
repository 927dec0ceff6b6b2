"""Gated feed-forward layer."""

from slipway import ops
from slipway.nn.linear import Linear
from slipway.tree import module


@module
class MLP:
    """Layer ``down(silu(gate(x)) * up(x))`` (Shazeer, GLU variants improve transformer, 2020)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @staticmethod
    def declare(embed: int, mlp: int, bias: bool = False) -> "MLP":
        """Declare a layer of input size ``embed`` and hidden size ``mlp``."""
        sizes = {"embed": embed, "mlp": mlp}
        up = Linear.declare("mlp", "embed", sizes, bias=bias)
        return MLP(up, up, Linear.declare("embed", "mlp", sizes, bias=bias))

    def __call__(self, x_TD, step):
        """Compute the layer: [T, embed] -> [T, embed]."""
        gate, up = self.gate_proj, self.up_proj
        options = {"gate_bias": gate.bias, "up_bias": up.bias, "dtype": x_TD.dtype}
        y_TF = ops.gated_linear(x_TD, gate.matrix, up.matrix, num_tokens=step.num_tokens, **options)
        return self.down_proj(y_TF, step)
