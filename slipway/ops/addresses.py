"""Matrices of experts that a program gets by their addresses in host memory.

A CPU maps each expert from its own place in the checkpoint. As inputs of a program, the thousands
of arrays of a model would cost more time than the computation, and a stack of them a copy of the
file. So the program gets a table of addresses for each kind of matrix of a layer. The owner of the
arrays keeps them alive while a program runs.

Not here: the op that reads the tables (cpu.py).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway.tree import Separate, Stack, Tensor, module, static


@module
class Addresses:
    """Table uint32 [E, 2] of the addresses of E arrays, the lower half of each first.

    ``shape`` and ``dtype`` are those of each array on one device.
    """

    table: Tensor
    shape: tuple[int, ...] = static()
    dtype: str = static()


def by_address(weights: Any, mesh: Mesh) -> Any:
    """Return a tree of arrays as programs get it: separate experts are replaced by their addresses.

    ``weights``: arrays, or ShapeDtypeStructs with shardings.
    """

    def is_experts(node: Any) -> bool:
        return isinstance(node, Separate) and node.axis == "experts"

    def one(node: Any) -> Any:
        if not is_experts(node):
            return node
        body = jax.tree.map(lambda *arrays: _addresses(arrays, mesh), *node.bodies)
        return Stack(body, node.n, node.first, axis=node.axis)

    return jax.tree.map(one, weights, is_leaf=is_experts)


def _addresses(arrays: Sequence[Any], mesh: Mesh) -> Addresses:
    """Return the addresses of arrays, each in the memory of the device that computes with it."""
    parts = {axis: mesh.shape[axis] for axis in (meshes.EXPERT, meshes.TENSOR)}
    num_local = len(arrays) // parts[meshes.EXPERT]
    sharding = NamedSharding(mesh, P(meshes.EXPERT, meshes.TENSOR))
    shape = (len(arrays), 2 * parts[meshes.TENSOR])
    first = arrays[0]
    local = first.sharding.shard_shape(first.shape)
    if isinstance(first, jax.ShapeDtypeStruct):
        table: Any = jax.ShapeDtypeStruct(shape, np.uint32, sharding=sharding)
        return Addresses(table, local, np.dtype(first.dtype).name)
    pointers = [
        {shard.device: shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        for array in arrays
    ]
    tables = []
    for device in sharding.addressable_devices_indices_map(shape):
        group = int(np.argwhere(mesh.devices == device)[0][1])
        held = pointers[group * num_local : (group + 1) * num_local]
        addresses = np.array([each[device] for each in held], np.uint64)
        tables.append(jax.device_put(addresses.view(np.uint32).reshape(num_local, 2), device))
    table = jax.make_array_from_single_device_arrays(shape, sharding, tables)
    return Addresses(table, local, np.dtype(first.dtype).name)
