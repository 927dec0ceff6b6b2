"""Mesh of devices: the mesh axis of each logical axis, fitting of declarations, and collectives.

Not here: the tensors of a declaration (tree.py), the layers that call the collectives (nn/).

One replica is a (data, model) grid of devices. The engine's step runs under ``shard_map``: every
device sees its local arrays, and a layer calls the two collectives that it needs itself (``psum``
after a linear layer with a split input axis, ``all_gather`` of the logits).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slipway import tree
from slipway.errors import InvalidConfig

DATA, TENSOR = "data", "model"
# Logical axis -> mesh axis that splits it. All other logical axes are whole on every device.
MESH_AXES = {"vocab": TENSOR, "heads": TENSOR, "kv_heads": TENSOR, "mlp": TENSOR, "pages": DATA}


def make_mesh(data: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of ``data`` rows of ``tensor`` devices; each row holds the weights once.

    ``devices``: those to use, by default all. Raises InvalidConfig if there are too few.
    """
    devices = jax.devices() if devices is None else devices
    if data * tensor > len(devices):
        got = f"{data} x {tensor}"
        raise InvalidConfig(
            "data_parallel_size x tensor_parallel_size", got, f"at most {len(devices)} devices"
        )
    return Mesh(np.array(devices[: data * tensor]).reshape(data, tensor), (DATA, TENSOR))


def partition(param: tree.Param) -> PartitionSpec:
    """Return the PartitionSpec of a declared tensor."""
    return spec(param.shard_axes)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Return the PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else MESH_AXES.get(axis) for axis in axes))


def shardings(declaration: Any, mesh: Mesh) -> Any:
    """Return the tree of NamedShardings of a declaration."""
    return tree.map_params(lambda p: NamedSharding(mesh, partition(p)), declaration)


def fit(declaration: Any, mesh: Mesh) -> Any:
    """Return the declaration with axes that the mesh can split.

    KV heads are repeated if they are fewer than the devices; the vocabulary is padded with rows of
    zeros. Raises InvalidConfig if the mesh does not divide another axis.
    """
    n = mesh.shape[TENSOR]

    def one(param: tree.Param) -> tree.Param:
        repeats, pads = dict(param.repeats), dict(param.pads)
        for axis in param.shard_axes:
            if MESH_AXES.get(axis) != TENSOR or param.sizes[axis] % n == 0:
                continue
            size = param.sizes[axis]
            if axis == "vocab":
                pads[axis] = -(-size // n) * n
            elif axis == "kv_heads" and n % size == 0:
                repeats[axis] = n // size
            else:
                raise InvalidConfig(
                    "tensor_parallel_size", n, f"a divisor of the model's {size} {axis}"
                )
        return dataclasses.replace(param, repeats=repeats, pads=pads)

    return tree.map_params(one, declaration)


def splits(axis: str) -> bool:
    """Whether ``axis`` is split over several devices; only while a step is traced."""
    return MESH_AXES.get(axis) is not None and jax.lax.axis_size(MESH_AXES[axis]) > 1


def psum(x, axis: str):
    """Sum partial results over the devices that ``axis`` is split over, if it is split."""
    return jax.lax.psum(x, MESH_AXES[axis]) if splits(axis) else x


def all_gather(x, axis: str):
    """Join the last dimension, which is split along ``axis``, on every device."""
    return (
        jax.lax.all_gather(x, MESH_AXES[axis], axis=x.ndim - 1, tiled=True) if splits(axis) else x
    )


def all_rows(array):
    """Join the first dimension, which is split over copies of the weights, on every device."""
    return (
        jax.lax.all_gather(array, DATA, axis=0, tiled=True)
        if jax.lax.axis_size(DATA) > 1
        else array
    )


def local_offset(axis: str, local_size: int):
    """Return the global index at which this device's part of ``axis`` starts."""
    return 0 if MESH_AXES.get(axis) is None else jax.lax.axis_index(MESH_AXES[axis]) * local_size
