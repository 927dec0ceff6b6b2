"""Mesh of devices: the mesh axis of each logical axis, fitting of declarations, and collectives.

Not here: the tensors of a declaration (tree.py), the layers that call the collectives (nn/).

One replica is a (data, expert, model) grid of devices. The engine's step runs under ``shard_map``:
every device sees its local arrays, and a layer calls the two collectives that it needs itself
(``psum`` after a linear layer with a split input axis, ``all_gather`` of the logits).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slipway import tree
from slipway.errors import InvalidConfig

DATA, EXPERT, TENSOR = "data", "expert", "model"
# Logical axis -> mesh axes that split it. All other logical axes are whole on every device. The
# devices of the expert axis hold different experts, and different parts of all other matrices.
MESH_AXES = {
    "vocab": (EXPERT, TENSOR),
    "heads": (EXPERT, TENSOR),
    "kv_heads": (EXPERT, TENSOR),
    "mlp": (EXPERT, TENSOR),
    "experts": (EXPERT,),
    "expert_mlp": (TENSOR,),
    "pages": (DATA,),
}


def make_mesh(
    data: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, expert: int = 1
) -> Mesh:
    """Return a mesh of ``data`` copies of the weights, on ``tensor`` devices each.

    These are ``expert`` groups, which hold different experts. ``devices``: those to use, by default
    all. Raises InvalidConfig if there are too few, or if they do not form such groups.
    """
    devices = jax.devices() if devices is None else devices
    if data * tensor > len(devices):
        got = f"{data} x {tensor}"
        raise InvalidConfig(
            "data_parallel_size x tensor_parallel_size", got, f"at most {len(devices)} devices"
        )
    if tensor % expert:
        expected = f"a divisor of tensor_parallel_size ({tensor})"
        raise InvalidConfig("expert_parallel_size", expert, expected)
    grid = np.array(devices[: data * tensor]).reshape(data, expert, tensor // expert)
    return Mesh(grid, (DATA, EXPERT, TENSOR))


def parts(axis: str, mesh: Mesh) -> int:
    """Return the number of parts into which the mesh splits a logical axis."""
    return math.prod(mesh.shape[name] for name in _held(axis, mesh.axis_names))


def partition(param: tree.Param, mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of a declared tensor."""
    return spec(param.shard_axes, mesh)


def spec(axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of an array with these logical axes."""
    names = mesh.axis_names
    return PartitionSpec(*(None if axis is None else _held(axis, names) or None for axis in axes))


def _held(axis: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the mesh axes among ``names`` that split a logical axis."""
    return tuple(name for name in MESH_AXES.get(axis, ()) if name in names)


def shardings(declaration: Any, mesh: Mesh) -> Any:
    """Return the tree of NamedShardings of a declaration."""
    return tree.map_params(lambda p: NamedSharding(mesh, partition(p, mesh)), declaration)


def fit(declaration: Any, mesh: Mesh) -> Any:
    """Return the declaration with axes that the mesh can split.

    KV heads are repeated if they are fewer than the devices; the vocabulary is padded with rows of
    zeros. Raises InvalidConfig if the mesh does not divide another axis.
    """

    def one(param: tree.Param) -> tree.Param:
        repeats, pads = dict(param.repeats), dict(param.pads)
        sizes = {**param.sizes, **dict(param.stacks)}
        for axis in param.shard_axes:
            size, n = sizes[axis], parts(axis, mesh)
            if size % n == 0:
                continue
            if axis == "vocab":
                pads[axis] = -(-size // n) * n
            elif axis == "kv_heads" and n % size == 0:
                repeats[axis] = n // size
            else:
                raise InvalidConfig(
                    _OPTIONS[MESH_AXES[axis]], n, f"a divisor of the model's {size} {axis}"
                )
        return dataclasses.replace(param, repeats=repeats, pads=pads)

    return tree.map_params(one, declaration)


# Options that set the number of parts of a logical axis, by its mesh axes.
_OPTIONS = {
    (EXPERT, TENSOR): "tensor_parallel_size",
    (EXPERT,): "expert_parallel_size",
    (TENSOR,): "tensor_parallel_size / expert_parallel_size",
}


def split_over(axis: str) -> tuple[str, ...]:
    """Return the mesh axes of several devices that split ``axis``, while a step is traced."""
    held = _held(axis, jax.sharding.get_abstract_mesh().axis_names)
    return tuple(name for name in held if jax.lax.axis_size(name) > 1)


def splits(axis: str) -> bool:
    """Whether ``axis`` is split over several devices; only while a step is traced."""
    return bool(split_over(axis))


def parts_here(axis: str) -> int:
    """Return the number of parts into which ``axis`` is split; only while a step is traced."""
    return math.prod(jax.lax.axis_size(name) for name in split_over(axis))


def psum(x, axis: str):
    """Sum partial results over the devices that ``axis`` is split over, if it is split."""
    return jax.lax.psum(x, split_over(axis)) if splits(axis) else x


def all_gather(x, axis: str):
    """Join the last dimension, which is split along ``axis``, on every device."""
    names = split_over(axis)
    return jax.lax.all_gather(x, names, axis=x.ndim - 1, tiled=True) if names else x


def all_rows(array):
    """Join the first dimension, which is split over copies of the weights, on every device."""
    return (
        jax.lax.all_gather(array, DATA, axis=0, tiled=True)
        if jax.lax.axis_size(DATA) > 1
        else array
    )


def local_offset(axis: str, local_size: int):
    """Return the global index at which this device's part of ``axis`` starts."""
    names = split_over(axis)
    return jax.lax.axis_index(names) * local_size if names else 0
