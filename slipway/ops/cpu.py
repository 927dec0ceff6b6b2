"""The C++ bodies (csrc/): decides what they serve and how XLA is told of them; computes nothing.

They run on XLA's own threads, read weights where they are mapped, and touch live tokens only. A row's sums run in one
order whatever else is in the batch. The environment variable SLIPWAY_ISA names the instruction set to use instead of
the best one that the processor has, or is ``xla`` for the portable bodies of ops/xla.py. Unset and empty are alike.
"""

import ctypes
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slipway import native
from slipway.errors import InvalidConfig
from slipway.ops.quantized import Quantized
from slipway.tree import Pick

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
ISA_VARIABLE = "SLIPWAY_ISA"
PORTABLE_BODIES = "xla"  # the value of SLIPWAY_ISA that turns the kernels off
PAGE_MULTIPLE = 16  # the keys that the widest vector holds
_TARGETS = ("linear", "embed", "norm", "rotate", "write_kv", "attention", "sample", "log_normalizer", "zeros")


@functools.cache
def isa() -> str | None:
    """Return the instruction set in use, and register its kernels with XLA; None where the portable bodies serve.

    Raises InvalidConfig where SLIPWAY_ISA names a set that is not compiled or that this processor does not run.
    """
    library = native.library()
    asked = os.environ.get(ISA_VARIABLE, "")
    if asked not in _choices(library):
        what = "one of this machine's instruction sets" if library else "no instruction set: built without a compiler"
        choices = " ".join(_choices(library)[1:])
        raise InvalidConfig(ISA_VARIABLE, asked, f"{what} ({choices}), or nothing for the best")
    if library is None or asked == PORTABLE_BODIES:
        return None
    library.slipway_isa.restype = ctypes.c_char_p
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"slipway_{target}"))
        jax.ffi.register_ffi_target(f"slipway_{target}", handler, platform="cpu")
    return library.slipway_isa().decode()


def _choices(library: ctypes.CDLL | None) -> list[str]:
    """Return the values that SLIPWAY_ISA may have here, the empty one first."""
    if library is None:
        return ["", PORTABLE_BODIES]
    library.slipway_isa_choices.restype = ctypes.c_char_p
    return ["", *library.slipway_isa_choices().decode().split(), PORTABLE_BODIES]


def refuses(*leaves: Any) -> str:
    """Why no kernel takes these arrays, Picks and Quantized, or None for absent ones, together; empty if they do."""
    numbers = [leaf.scale if isinstance(leaf, Quantized) else leaf for leaf in leaves if leaf is not None]
    dtypes = {array.dtype for leaf in numbers for array in _arrays(leaf)}
    return "unlike dtypes" if len(dtypes) > 1 else refuses_dtype(dtypes.pop())


def refuses_dtype(dtype: Any) -> str:
    """Why no kernel takes numbers of ``dtype`` here; empty if they do."""
    if isa() is None:
        return f"turned off by {ISA_VARIABLE}" if native.library() else "built without a C++ compiler"
    return "" if jnp.dtype(dtype) in DTYPES else jnp.dtype(dtype).name


def refuses_row(x_TD) -> str:
    """Why no kernel takes weights with rows of this size: they are read 32 bits at a time."""
    return "rows of no whole 32-bit units" if x_TD.shape[1] * x_TD.dtype.itemsize % 4 else ""


def refuses_cache(kv, dtype: Any) -> str:
    """Why ``write_kv`` and ``paged_attention`` do not take this cache of ``dtype``; empty if they do."""
    if kv.shape[4] % PAGE_MULTIPLE:
        return f"a page of {kv.shape[4]} tokens, no multiple of {PAGE_MULTIPLE}"
    return f"head_dim {kv.shape[5]}" if kv.shape[5] % 2 else refuses_dtype(dtype)


def refuses_table(table) -> str:
    """Why ``embed`` does not take this table; empty if it does."""
    rows_of_bytes = not isinstance(table, Quantized) or (table.bits, table.group) == (8, 0)
    return refuses(table) or ("" if rows_of_bytes else f"a packed table of {table.bits} bits, group {table.group}")


def embed(ids_T, table_VD, num_tokens):
    """As ops.embed."""
    packed = isinstance(table_VD, Quantized)
    held = (table_VD.packed, table_VD.scale) if packed else (table_VD,)
    size = held[0].shape[1] * (4 if packed else 1)
    call = jax.ffi.ffi_call("slipway_embed", jax.ShapeDtypeStruct((ids_T.shape[0], size), held[-1].dtype))
    return call(ids_T, jnp.int32(num_tokens), *held)


def linears(x_TD, weights, num_tokens, biases, dtype):
    """As ops.linears; weights, or what Quantized ones hold, and biases may be Picks."""
    return tuple(_linear(x_TD, weights, num_tokens, biases, dtype, gated=False))


def gated_linear(x_TD, gate, up, num_tokens, gate_bias, up_bias, dtype):
    """As ops.gated_linear."""
    return _linear(x_TD, [gate, up], num_tokens, [gate_bias, up_bias], dtype, gated=True)[0]


def _linear(x_TD, weights, num_tokens, biases, dtype, gated):
    packed, groups, sizes = isinstance(weights[0], Quantized), [], []
    bits, group = (weights[0].bits, weights[0].group) if packed else (0, 0)
    for weight, bias in zip(weights, biases):
        own, size = _operands(weight, bias, x_TD.shape[1])
        groups += own
        sizes.append(size)
    assert not gated or len(set(sizes)) == 1, "gate and up are of one size"
    outs = [jax.ShapeDtypeStruct((x_TD.shape[0], size), dtype) for size in sizes[: 1 if gated else None]]
    call = jax.ffi.ffi_call("slipway_linear", outs)
    arrays = [array for leaf in groups for array in _arrays(leaf)]
    static = {"gated": gated, "biased": biases[0] is not None, "bits": bits, "group": group}
    return call(x_TD, jnp.int32(num_tokens), _index(groups[0]), *arrays, **static)


def _operands(weight, bias, in_size):
    """What the kernel takes of one matrix, of checked shapes, and its number of outputs."""
    leaves, rows = [weight], [in_size]
    if isinstance(weight, Quantized):
        leaves = [weight.packed, weight.scale]
        rows = [in_size * weight.bits // 32, in_size // weight.group if weight.group else 1]
    out_size = _arrays(leaves[0])[0].shape[0]
    for leaf, row in zip(leaves, rows):
        assert {array.shape for array in _arrays(leaf)} == {(out_size, row)}, "weights are (out, in)"
    biases = [] if bias is None else [bias]
    assert all(array.shape == (out_size,) for leaf in biases for array in _arrays(leaf)), "a bias is (out,)"
    return leaves + biases, out_size


def rms_norm(x_TD, weight, num_tokens, eps):
    """As ops.rms_norm."""
    call = jax.ffi.ffi_call("slipway_norm", jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    return call(x_TD, jnp.int32(num_tokens), _index(weight), *_arrays(weight), eps=np.float32(eps))


def rotate(x_TNH, weight, angles, num_tokens, eps):
    """As ops.rotate."""
    call = jax.ffi.ffi_call("slipway_rotate", jax.ShapeDtypeStruct(x_TNH.shape, x_TNH.dtype))
    arrays = () if weight is None else _arrays(weight)
    return call(x_TNH, *angles, jnp.int32(num_tokens), _index(weight), *arrays, eps=np.float32(eps))


def sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B):
    """As ops.sample."""
    call = jax.ffi.ffi_call("slipway_sample", jax.ShapeDtypeStruct(temperature_B.shape, jnp.int32))
    return call(logits_BV, jnp.int32(num_rows), temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)


def log_normalizer(logits_BV, num_rows):
    """As ops.log_normalizer."""
    row = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.float32)
    return jax.ffi.ffi_call("slipway_log_normalizer", (row, row))(logits_BV, jnp.int32(num_rows))


def zeros(shape, dtype):
    """As ops.zeros: the system hands out empty memory where it is touched."""
    return jax.ffi.ffi_call("slipway_zeros", jax.ShapeDtypeStruct(shape, dtype))()


def write_kv(kv, layer, k_TKH, v_TKH, ragged):
    """As ops.write_kv; within a page the order is csrc/kernels.h's."""
    call = jax.ffi.ffi_call("slipway_write_kv", jax.ShapeDtypeStruct(kv.shape, kv.dtype), input_output_aliases={0: 0})
    return call(kv, jnp.int32(layer), k_TKH, v_TKH, ragged.num_tokens, ragged.slots_T)


def paged_attention(q_TNH, kv, layer, ragged, sinks_N, *, scale, window, soft_cap):
    """As ops.paged_attention."""
    call = jax.ffi.ffi_call("slipway_attention", jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype))
    return call(
        q_TNH, kv, jnp.int32(layer), ragged.positions_T, ragged.starts_B, ragged.counts_B, ragged.page_table_BM,
        *(() if sinks_N is None else (sinks_N.astype(jnp.float32),)),
        scale=np.float32(scale), window=int(window or 0), soft_cap=np.float32(soft_cap or 0),
    )  # fmt: skip


def _arrays(leaf: Any) -> tuple[jax.Array, ...]:
    return leaf.arrays if isinstance(leaf, Pick) else (leaf,)


def _index(leaf: Any) -> jax.Array:
    return jnp.int32(leaf.index) if isinstance(leaf, Pick) else jnp.int32(0)
