"""CPU backend: calls of the C++ bodies (csrc/), and the arguments that each of them accepts.

Not here: the portable bodies (xla.py), loading of the C++ library (native.py).

The C++ bodies run on XLA's own threads, read weights from the mapped files, and skip padding. They
add the numbers of a row in the same order in every batch. The environment variable SLIPWAY_ISA
names the instruction set to use instead of the best one of the processor; ``xla`` turns the C++
bodies off. Unset and empty mean the same.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slipway import native, tree
from slipway.errors import InvalidConfig
from slipway.mesh import parts
from slipway.ops.addresses import Addresses
from slipway.ops.backend import Backend, Body
from slipway.ops.quantized import Quantized
from slipway.tree import IndexedArray

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
ISA_VARIABLE = "SLIPWAY_ISA"
PORTABLE_BODIES = "xla"  # the value of SLIPWAY_ISA that turns the C++ bodies off
PAGE_MULTIPLE = 16  # tokens of a page: a multiple of the keys in the widest vector
_TARGETS = (
    "linear",
    "embed",
    "experts",
    "norm",
    "rotate",
    "route",
    "write_kv",
    "attention",
    "sample",
    "log_normalizer",
    "zeros",
)


@functools.cache
def isa() -> str | None:
    """Return the instruction set in use, after registering its kernels with XLA; None for none.

    Raises InvalidConfig if SLIPWAY_ISA names a set that is not compiled or that this processor does
    not have.
    """
    library = native.library()
    asked = os.environ.get(ISA_VARIABLE, "")
    if asked not in _choices(library):
        what = (
            "one of this machine's instruction sets"
            if library
            else "no instruction set: built without a compiler"
        )
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
    """Return why no kernel takes these leaves together, "" if one does.

    Leaves: arrays, IndexedArrays, Quantized weights, and None for absent ones.
    """
    numbers = [
        leaf.scale if isinstance(leaf, Quantized) else leaf for leaf in leaves if leaf is not None
    ]
    dtypes = {array.dtype for leaf in numbers for array in _arrays(leaf)}
    return "unlike dtypes" if len(dtypes) > 1 else refuses_dtype(dtypes.pop())


def refuses_dtype(dtype: Any) -> str:
    """Return why no kernel takes numbers of ``dtype`` here, "" if one does."""
    if isa() is None:
        return (
            f"turned off by {ISA_VARIABLE}" if native.library() else "built without a C++ compiler"
        )
    return "" if jnp.dtype(dtype) in DTYPES else jnp.dtype(dtype).name


def _refuses_matrices(x_TD, weights: Sequence[Any], biases: Sequence[Any]) -> str:
    """Return why no kernel multiplies ``x_TD`` by these weights, "" if one does.

    Kernels read rows 32 bits at a time.
    """
    if len({bias is None for bias in biases}) > 1:
        return "biases of some matrices only"
    whole_units = x_TD.shape[1] * x_TD.dtype.itemsize % 4 == 0
    why_not = refuses(x_TD, *weights, *biases)
    return why_not or ("" if whole_units else "rows of no whole 32-bit units")


def _refuses_cache(kv, dtype: Any) -> str:
    """Return why no kernel writes or reads this cache for numbers of ``dtype``, "" if one does."""
    page_size, head_dim = kv.shape[4:]
    if page_size % PAGE_MULTIPLE:
        return f"a page of {page_size} tokens, no multiple of {PAGE_MULTIPLE}"
    return f"head_dim {head_dim}" if head_dim % 2 else refuses_dtype(dtype)


def _refuses_table(table) -> str:
    """Return why no kernel looks up rows of this table, "" if one does."""
    rows_of_bytes = not isinstance(table, Quantized) or (table.bits, table.group) == (8, 0)
    return refuses(table) or (
        "" if rows_of_bytes else f"a packed table of {table.bits} bits, group {table.group}"
    )


def embed(ids_T, table_VD, num_tokens):
    """Look up rows of a table, as described in ``ops.embed``."""
    packed = isinstance(table_VD, Quantized)
    held = (table_VD.packed, table_VD.scale) if packed else (table_VD,)
    size = held[0].shape[1] * (4 if packed else 1)
    call = jax.ffi.ffi_call(
        "slipway_embed", jax.ShapeDtypeStruct((ids_T.shape[0], size), held[-1].dtype)
    )
    return call(ids_T, jnp.int32(num_tokens), *held)


def linears(x_TD, weights, num_tokens, biases, dtype):
    """Multiply the same tokens by several matrices, as described in ``ops.linears``.

    Weights, or the arrays of Quantized ones, and biases may be IndexedArrays.
    """
    return tuple(_linear(x_TD, weights, num_tokens, biases=biases, dtype=dtype, gated=False))


def gated_linear(x_TD, gate, up, num_tokens, gate_bias, up_bias, dtype):
    """Compute a gated linear layer, as described in ``ops.gated_linear``."""
    biases = [gate_bias, up_bias]
    return _linear(x_TD, [gate, up], num_tokens, biases=biases, dtype=dtype, gated=True)[0]


def _linear(x_TD, weights, num_tokens, biases, dtype, gated):
    packed, groups, sizes = isinstance(weights[0], Quantized), [], []
    bits, group = (weights[0].bits, weights[0].group) if packed else (0, 0)
    for weight, bias in zip(weights, biases):
        own, size = _operands(weight, bias, x_TD.shape[1])
        groups += own
        sizes.append(size)
    assert not gated or len(set(sizes)) == 1, "gate and up are of one size"
    outs = [
        jax.ShapeDtypeStruct((x_TD.shape[0], size), dtype) for size in sizes[: 1 if gated else None]
    ]
    call = jax.ffi.ffi_call("slipway_linear", outs)
    arrays = [array for leaf in groups for array in _arrays(leaf)]
    static = {"gated": gated, "biased": biases[0] is not None, "bits": bits, "group": group}
    return call(x_TD, jnp.int32(num_tokens), _index(groups[0]), *arrays, **static)


def _operands(weight, bias, in_size):
    """Return the leaves of one matrix that the kernel takes, and the number of outputs.

    Their shapes are asserted.
    """
    leaves, rows = [weight], [in_size]
    if isinstance(weight, Quantized):
        leaves = [weight.packed, weight.scale]
        rows = [in_size * weight.bits // 32, in_size // weight.group if weight.group else 1]
    out_size = _arrays(leaves[0])[0].shape[0]
    for leaf, row in zip(leaves, rows):
        assert {array.shape for array in _arrays(leaf)} == {(out_size, row)}, (
            "weights are (out, in)"
        )
    biases = [] if bias is None else [bias]
    assert all(array.shape == (out_size,) for leaf in biases for array in _arrays(leaf)), (
        "a bias is (out,)"
    )
    return leaves + biases, out_size


def route(logits_TE, bias_E, num_tokens, rule):
    """Choose experts, as described in ``ops.route``."""
    choice = (logits_TE.shape[0], rule.top_k)
    results = jax.ShapeDtypeStruct(choice, jnp.int32), jax.ShapeDtypeStruct(choice, jnp.float32)
    static = {
        "score": ("softmax", "sigmoid", "softmax_of_chosen").index(rule.score),
        "groups": rule.num_groups,
        "top_groups": rule.top_groups,
        "two_of_group": rule.group_score == "sum_of_two",
        "normalize": rule.normalize,
        "epsilon": np.float32(rule.epsilon),
        "scale": np.float32(rule.scale),
    }
    bias = () if bias_E is None else (bias_E.astype(jnp.float32),)
    call = jax.ffi.ffi_call("slipway_route", results)
    return tuple(call(logits_TE, jnp.int32(num_tokens), *bias, **static))


def experts(x_TD, experts_TK, weights_TK, matrices, num_tokens, *, num_experts):
    """Compute the experts of each token, as described in ``ops.experts``.

    The matrices are Addresses, or Quantized of Addresses.
    """
    del num_experts  # the number of addresses in a table
    each = (*matrices.into, matrices.down)
    packed = isinstance(each[0], Quantized)
    tables = [matrix.packed if packed else matrix for matrix in each]
    rest = [matrix.scale for matrix in each] if packed else []
    bits, group = (each[0].bits, each[0].group) if packed else (0, 0)
    alpha, limit = matrices.clamp or (0.0, 0.0)
    if matrices.lie_transposed:
        rest = [matrices.into_bias, matrices.down_bias]
    call = jax.ffi.ffi_call("slipway_experts", jax.ShapeDtypeStruct(x_TD.shape, jnp.float32))
    arrays = [array for table in (*tables, *rest) for array in _arrays(table.table)]
    static = {
        "hidden": (tables[-1] if matrices.lie_transposed else tables[0]).shape[0],
        "bits": bits,
        "group": group,
        "transposed": matrices.lie_transposed,
        "bias_scale": np.float32(1 / matrices.parts),
        "alpha": np.float32(alpha),
        "limit": np.float32(limit),
    }
    routed = experts_TK.astype(jnp.int32), weights_TK
    return call(x_TD, jnp.int32(num_tokens), _index(tables[0].table), *routed, *arrays, **static)


def _has_addresses(x_TD, experts_TK, weights_TK, matrices, num_tokens, num_experts) -> bool:
    """Return whether experts are Addresses, as ``_layer_form`` arranges for those with kernels."""
    del x_TD, experts_TK, weights_TK, num_tokens, num_experts
    leaf = matrices.down.packed if isinstance(matrices.down, Quantized) else matrices.down
    return isinstance(leaf, Addresses)


def rms_norm(x_TD, weight, num_tokens, eps):
    """Normalize rows, as described in ``ops.rms_norm``."""
    call = jax.ffi.ffi_call("slipway_norm", jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    return call(x_TD, jnp.int32(num_tokens), _index(weight), *_arrays(weight), eps=np.float32(eps))


def rotate(x_TNH, weight, angles, num_tokens, eps):
    """Rotate heads, as described in ``ops.rotate``."""
    call = jax.ffi.ffi_call("slipway_rotate", jax.ShapeDtypeStruct(x_TNH.shape, x_TNH.dtype))
    arrays = () if weight is None else _arrays(weight)
    return call(x_TNH, *angles, jnp.int32(num_tokens), _index(weight), *arrays, eps=np.float32(eps))


def sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B):
    """Draw a token for each row, as described in ``ops.sample``."""
    call = jax.ffi.ffi_call("slipway_sample", jax.ShapeDtypeStruct(temperature_B.shape, jnp.int32))
    return call(logits_BV, jnp.int32(num_rows), temperature_B, top_k_B, top_p_B, min_p_B, uniform_B)


def log_normalizer(logits_BV, num_rows):
    """Return the normalizer of each row, as described in ``ops.log_normalizer``."""
    row = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.float32)
    return jax.ffi.ffi_call("slipway_log_normalizer", (row, row))(logits_BV, jnp.int32(num_rows))


def zeros(shape, dtype):
    """Return an array of zeros; the system provides its memory when it is first written."""
    return jax.ffi.ffi_call("slipway_zeros", jax.ShapeDtypeStruct(shape, dtype))()


def write_kv(kv, layer, k_TKH, v_TKH, num_tokens, slots_T):
    """Write keys and values into their slots; csrc/kernels.h has the order within a page."""
    call = jax.ffi.ffi_call(
        "slipway_write_kv", jax.ShapeDtypeStruct(kv.shape, kv.dtype), input_output_aliases={0: 0}
    )
    return call(kv, jnp.int32(layer), k_TKH, v_TKH, num_tokens, slots_T)


def paged_attention(q_TNH, kv, layer, step, page_table_BM, sinks_N, *, scale, window, soft_cap):
    """Compute attention to the cache, as described in ``PagedCache.read``."""
    call = jax.ffi.ffi_call("slipway_attention", jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype))
    sinks = () if sinks_N is None else (sinks_N.astype(jnp.float32),)
    rows = step.positions_T, step.starts_B, step.counts_B, page_table_BM
    static = {
        "scale": np.float32(scale),
        "window": int(window or 0),
        "soft_cap": np.float32(soft_cap or 0),
    }
    return call(q_TNH, kv, jnp.int32(layer), *rows, *sinks, **static)


def _arrays(leaf: Any) -> tuple[jax.Array, ...]:
    return leaf.arrays if isinstance(leaf, IndexedArray) else (leaf,)


def _index(leaf: Any) -> jax.Array:
    return jnp.int32(leaf.index) if isinstance(leaf, IndexedArray) else jnp.int32(0)


def _refuses_gated(x_TD, gate, up, num_tokens, gate_bias, up_bias, dtype) -> str:
    """Return why no kernel computes this gated linear layer, "" if one does."""
    del num_tokens, dtype
    return _refuses_matrices(x_TD, [gate, up], [gate_bias, up_bias])


def _refuses_linears(x_TD, weights, num_tokens, biases, dtype) -> str:
    """Return why no kernel computes these linear layers, "" if one does."""
    del num_tokens, dtype
    return _refuses_matrices(x_TD, weights, biases)


def _bodies() -> dict[str, Body]:
    return {
        "embed": Body(embed, lambda ids_T, table_VD, num_tokens: _refuses_table(table_VD)),
        "linear": Body(linears, _refuses_linears),
        "gated_linear": Body(gated_linear, _refuses_gated),
        "route": Body(route, lambda logits_TE, *_, **__: refuses_dtype(logits_TE.dtype)),
        "experts": Body(
            experts,
            lambda *args, **static: "" if _has_addresses(*args, **static) else "stacked experts",
            is_only=_has_addresses,
        ),
        "rms_norm": Body(rms_norm, lambda x_TD, weight, num_tokens, eps: refuses(x_TD, weight)),
        "rotate": Body(
            rotate, lambda x_TNH, weight, angles, num_tokens, eps: refuses(x_TNH, weight)
        ),
        "write_kv": Body(write_kv, lambda kv, layer, k_TKH, *_: _refuses_cache(kv, k_TKH.dtype)),
        "paged_attention": Body(
            paged_attention, lambda q_TNH, kv, *_, **__: _refuses_cache(kv, q_TNH.dtype)
        ),
        "sample": Body(sample, lambda logits_BV, *_: refuses(logits_BV)),
        "log_normalizer": Body(log_normalizer, lambda logits_BV, num_rows: refuses(logits_BV)),
        "zeros": Body(zeros, lambda shape, dtype: refuses_dtype(jnp.float32)),
    }


def _layer_form(declaration: Any, mesh: Mesh, dtype: Any) -> Any:
    """Return the declaration with separate layers, and separate experts if a kernel reads them."""
    declaration = tree.separate(declaration)
    bodies = [
        node.body for node in jax.tree.leaves(declaration, is_leaf=_is_experts) if _is_experts(node)
    ]
    if not bodies or any(_refuses_experts(body, mesh, dtype) for body in bodies):
        return declaration
    return tree.separate(declaration, axis="experts")


def _is_experts(node: Any) -> bool:
    return isinstance(node, tree.Stack) and node.axis == "experts"


def _refuses_experts(body: Any, mesh: Mesh, dtype: Any) -> str:
    """Return why no kernel computes experts with these matrices on a mesh, "" if one does."""
    if body.matrices.lie_transposed:
        return refuses_dtype(dtype)
    params = [leaf for leaf in jax.tree.leaves(body, is_leaf=tree.is_param)]
    if any(len(param.shape) != len(param.stacks) + 2 for param in params):
        return "biases of experts"
    # Scales are read one by one.
    rows = [param for param in params if param.init != "scale"]
    itemsizes = [param.held_as(dtype).itemsize for param in rows]
    widths = [param.shape[-1] // parts(param.shard_axes[-1], mesh) for param in rows]
    if any(width * itemsize % 4 for width, itemsize in zip(widths, itemsizes)):
        return "rows of no whole 32-bit units"
    return refuses_dtype(dtype)


def _compiler_options() -> dict[str, str | bool]:
    """Return XLA's options without fusion emitters, until JAX 0.11, from which on XLA refuses them.

    docs/log.md: without them the step compiles in two thirds of the time and runs as fast. A lower
    LLVM level would cost 20% of a step.
    """
    return {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


BACKEND = Backend(
    platform="cpu",
    lowers_for=("cpu",),
    bodies=_bodies(),
    label=lambda: f"c++ {isa()}",
    # docs/adr/003: on a CPU each layer has arrays of its own; elsewhere they are stacked and
    # scanned.
    layer_form=_layer_form,
    compiler_options=_compiler_options(),
    memory_fraction=0.25,
    uses_host_memory=True,
    # docs/log.md has the gain of several decode steps in a call, by size of model and number of
    # rows.
    decode_steps=8,
)
