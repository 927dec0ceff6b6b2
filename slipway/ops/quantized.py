"""Weights of 4 or 8 bits as an operand: how numbers lie in words, and what they mean; knows no files and no layers.

The layout is compressed-tensors' "pack-quantized", which vLLM and SGLang read: 32-bit words of neighbours along ``in``,
the first in the lowest bits, stored without a sign; a number is (stored - 2^(bits - 1)) * scale.
"""

from typing import Any

import jax.numpy as jnp

from slipway.tree import Tensor, module, static


@module
class Quantized:
    """A weight (out, in): ``packed`` int32 [out, in * bits / 32], ``scale`` [out, in / group]; group 0: one a row."""

    packed: Tensor
    scale: Tensor
    bits: int = static()
    group: int = static()


def integers(packed_OW, bits: int):
    """The signed integers of packed words: int32 [O, W] -> int32 [O, W * 32 / bits]."""
    shifts_11I = jnp.arange(0, 32, bits, dtype=jnp.int32)[None, None]
    stored_OWI = (packed_OW[..., None] >> shifts_11I) & ((1 << bits) - 1)
    return stored_OWI.reshape(*packed_OW.shape[:-1], -1) - (1 << (bits - 1))


def dequantized(weight: Quantized, rows: Any = slice(None)):
    """The numbers of ``rows``, in f32."""
    q_OI = integers(weight.packed[rows], weight.bits).astype(jnp.float32)
    scale_OG = weight.scale[rows].astype(jnp.float32)
    return (q_OI.reshape(*scale_OG.shape, -1) * scale_OG[..., None]).reshape(q_OI.shape)
