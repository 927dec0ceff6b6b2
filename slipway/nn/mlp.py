"""The gated feed-forward layer; knows no experts and no norm."""

import jax
import jax.numpy as jnp

from slipway.nn.linear import Linear
from slipway.tree import module


@module
class MLP:
    """``down(silu(gate(x)) * up(x))`` (Shazeer, GLU variants improve transformer, 2020)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    @staticmethod
    def declare(embed: int, mlp: int, bias: bool = False) -> "MLP":
        """Hidden size ``mlp``."""
        sizes = {"embed": embed, "mlp": mlp}
        up = Linear.declare("mlp", "embed", sizes, bias)
        return MLP(up, up, Linear.declare("embed", "mlp", sizes, bias))

    def __call__(self, x_TD, num_tokens):
        """[T, embed] -> [T, embed]."""
        gate_TF = self.gate_proj(x_TD, num_tokens).astype(jnp.float32)
        return self.down_proj(jax.nn.silu(gate_TF).astype(x_TD.dtype) * self.up_proj(x_TD, num_tokens), num_tokens)
