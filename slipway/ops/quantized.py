"""Weights of 4 or 8 bits: their packing in 32-bit words, and the numbers that they stand for.

Not here: packing while loading (checkpoint/quantize.py), layers (nn/linear.py).

The layout is "pack-quantized" of compressed-tensors, which vLLM and SGLang read: a 32-bit word
holds neighbours along ``in``, the first in the lowest bits, without a sign. A number is (stored -
2^(bits - 1)) * scale.
"""

from typing import Any

import jax.numpy as jnp

from slipway.tree import Tensor, module, static


@module
class Quantized:
    """Weight (out, in): ``packed`` int32 [out, in * bits / 32], and ``scale`` [out, in / group].

    With ``group`` 0 there is one scale for each row: [out, 1].
    """

    packed: Tensor
    scale: Tensor
    bits: int = static()
    group: int = static()


def integers(packed_OW, bits: int):
    """Unpack words to signed integers: int32 [..., O, W] -> int32 [..., O, W * 32 / bits]."""
    shifts_I = jnp.arange(0, 32, bits, dtype=jnp.int32)
    shifts_OWI = jnp.expand_dims(shifts_I, tuple(range(packed_OW.ndim)))
    stored_OWI = (packed_OW[..., None] >> shifts_OWI) & ((1 << bits) - 1)
    return stored_OWI.reshape(*packed_OW.shape[:-1], -1) - (1 << (bits - 1))


def dequantized(weight: Quantized, rows: Any = slice(None)):
    """Return the numbers of the weight's ``rows`` (or those of all stacked weights), in f32."""
    q_OI = integers(weight.packed[rows], weight.bits).astype(jnp.float32)
    scale_OG = weight.scale[rows].astype(jnp.float32)
    return (q_OI.reshape(*scale_OG.shape, -1) * scale_OG[..., None]).reshape(q_OI.shape)
