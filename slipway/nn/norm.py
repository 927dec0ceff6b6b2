"""Normalization; decides that it is computed in f32; knows no layer around it."""

from slipway import ops
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

    def __call__(self, x_TD, num_tokens):
        """The same shape and dtype; as in transformers, rounded to it before the weight is applied."""
        return ops.rms_norm(x_TD, self.weight, num_tokens, self.eps)
