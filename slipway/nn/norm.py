"""Normalization of hidden states and heads."""

from slipway import ops
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
