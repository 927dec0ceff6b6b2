"""Normalization of hidden states and heads."""

import jax
import jax.numpy as jnp

from slipway import mesh, ops, tree
from slipway.tree import Param, Tensor, module, static


@module
class RMSNorm:
    """Root mean square norm over the last dimension (Zhang and Sennrich, 2019)."""

    weight: Tensor
    eps: float = static()

    @staticmethod
    def declare(axis: str, size: int, eps: float) -> "RMSNorm":
        """Declare a norm over ``axis``."""
        return RMSNorm(Param(axis, {axis: size}, init="ones"), eps)

    def __call__(self, x_TD, step):
        """Normalize each row in f32: [T, D] -> [T, D].

        As in transformers, the result is rounded to the dtype of x before the weight is applied.
        """
        return ops.rms_norm(x_TD, self.weight, step.num_tokens, eps=self.eps)


@module
class JointNorm:
    """Root mean square norm over all heads of a token together, which a mesh may split."""

    weight: Tensor
    axis: str = static()
    eps: float = static()

    @staticmethod
    def declare(axes: str, sizes: dict[str, int], eps: float) -> "JointNorm":
        """Declare a norm over a group of axes, such as ``"(heads head_dim)"``."""
        outer = axes.strip("()").split()[0]
        return JointNorm(Param(axes, sizes, init="ones"), outer, eps)

    def __call__(self, x_TD, step):
        """Normalize each row in f32, over the parts of all devices: [T, D] -> [T, D]."""
        if not mesh.splits(self.axis):
            return ops.rms_norm(x_TD, self.weight, step.num_tokens, eps=self.eps)
        x32_TD = x_TD.astype(jnp.float32)
        squares_T1 = mesh.psum(jnp.sum(x32_TD * x32_TD, axis=-1, keepdims=True), self.axis)
        mean_T1 = squares_T1 / (x_TD.shape[1] * mesh.parts_here(self.axis))
        normed_TD = (x32_TD * jax.lax.rsqrt(mean_T1 + self.eps)).astype(x_TD.dtype)
        return normed_TD * tree.value(self.weight)[None]
