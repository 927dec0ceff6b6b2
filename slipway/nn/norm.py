"""Normalization; decides that it is computed in f32; knows no layer around it."""

import jax
import jax.numpy as jnp

from slipway import tree
from slipway.tree import Param, Tensor, module, static


@module
class RMSNorm:
    """Root mean square norm over the last dimension (Zhang and Sennrich, 2019)."""

    weight: Tensor
    eps: float = static()

    @staticmethod
    def declare(axis: str, size: int, eps: float) -> "RMSNorm":
        """A norm over ``axis``."""
        return RMSNorm(Param(axis, {axis: size}, init="ones"), eps)

    def __call__(self, x):
        """The same shape and dtype; as in transformers, rounded to it before the weight is applied."""
        x32 = x.astype(jnp.float32)
        normed = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(tree.value(self.weight), range(x.ndim - 1))
