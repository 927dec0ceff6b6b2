"""Conversion of arrays on devices to the arrays of a declaration, without the host.

It is done by compiled programs. The sources are HF tensors on devices, or the arrays of another
mesh. Not here: tensors in files (tensor_reader.py), the exchange of a running model's arrays
(swap.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from slipway import layout, tree


def owned(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the array on the devices of ``sharding``, sharing no memory with its owner.

    The owner may delete or donate the original. ``device_put`` does not copy an array that is on
    the right device already, with ``may_alias=False`` or without, and jit returns inputs that it
    need not compute. So the array is copied first where it shares a device.
    """
    shared = array.devices() & sharding.device_set
    return jax.device_put(jnp.copy(array) if shared else array, sharding)


class Recipe:
    """A Param as a hashable key of the caches of compiled functions."""

    def __init__(self, param: tree.Param):
        self.param = param
        self._text = repr(param)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


@functools.lru_cache(maxsize=1024)
def stacked(recipe: Recipe, dtype: np.dtype) -> Callable[..., jax.Array]:
    """Return a program that makes one leaf of HF tensors on devices.

    It is one program for any number of stacked layers.
    """
    param = recipe.param
    plain = layout.parse(param.axes).shape(param.sizes)

    def build(*tensors: jax.Array) -> jax.Array:
        way = layout.rearrange(param.hf_layout, param.axes, param.sizes)
        parts = [_grow(param, way(x).reshape(plain).astype(dtype)) for x in tensors]
        return jnp.stack(parts).reshape(param.shape) if param.stacks else parts[0]

    return jax.jit(build)


@functools.lru_cache(maxsize=1024)
def relaid(recipe: Recipe, dtype: np.dtype) -> Callable[..., jax.Array]:
    """Return a program that converts a leaf in the form of any mesh to the form of this mesh."""
    param = recipe.param

    def build(x: jax.Array) -> jax.Array:
        plain = grown(param, x.shape)
        assert plain is not None, "checked before"
        stacked = len(param.stacks)
        for dim, (group, (size, held)) in enumerate(
            zip(layout.parse(param.axes).groups, plain), stacked
        ):
            n = 1 if group[0] == "vocab" else held // size
            rows = x.reshape(*x.shape[:dim], held, -1, *x.shape[dim + 1 :])
            rows = jax.lax.slice_in_dim(rows, 0, size * n, stride=n, axis=dim)
            x = rows.reshape(*rows.shape[:dim], -1, *rows.shape[dim + 2 :])
        return jnp.broadcast_to(_grow(param, x.astype(dtype), stacked), param.shape)

    return jax.jit(build)


def grown(param: tree.Param, shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Return the outer axis's size of each unstacked dimension, in the checkpoint and in the array.

    None if an array of ``shape`` is no form of the parameter.
    """
    stacked = tuple(n for _, n in param.stacks)
    groups = layout.parse(param.axes).groups
    if shape[: len(stacked)] != stacked or len(shape) != len(stacked) + len(groups):
        return None
    found = []
    for group, rows in zip(groups, shape[len(stacked) :]):
        size, inner = param.sizes[group[0]], layout.parse(" ".join(group[1:])).shape(param.sizes)
        held, rest = divmod(rows, int(np.prod(inner, dtype=int)))
        padded = group[0] == "vocab"
        if (
            rest
            or held < size
            or (held > size and not padded and (group[0] != "kv_heads" or held % size))
        ):
            return None
        found.append((size, held))
    return found


def _grow(param: tree.Param, x: jax.Array, stacked: int = 0) -> jax.Array:
    """Repeat and pad the axes that the mesh repeats and pads."""
    for dim, group in enumerate(layout.parse(param.axes).groups, stacked):
        outer = group[0]
        n, padded = param.repeats.get(outer, 1), param.pads.get(outer, param.sizes[outer])
        rows = x.reshape(*x.shape[:dim], param.sizes[outer], -1, *x.shape[dim + 1 :])
        rows = jnp.repeat(rows, n, axis=dim) if n > 1 else rows
        if padded > param.sizes[outer]:
            rows = jnp.pad(
                rows,
                [(0, padded - param.sizes[outer] if d == dim else 0) for d in range(rows.ndim)],
            )
        x = rows.reshape(*rows.shape[:dim], -1, *rows.shape[dim + 2 :])
    return x


def not_finite(array: Any, dtype: np.dtype) -> int:
    """Return the number of values that ``dtype`` cannot hold as finite numbers."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return 0
    return int(_count_not_finite(dtype)(array))


@functools.cache
def _count_not_finite(dtype: np.dtype) -> Callable[..., jax.Array]:
    return jax.jit(lambda x: count_not_finite(x, dtype))


def count_not_finite(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Compute ``not_finite`` of an array of floats inside a compiled function."""
    return jnp.sum(~jnp.isfinite(x.astype(dtype)))
