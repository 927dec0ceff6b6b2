"""Replacement of the arrays of a running model, leaf by leaf or all at once.

Everything is checked first.

Not here: the sources of new values (slipway/convert/weight_sources.py), the moment of the exchange
(slipway/engine/updates.py).
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from slipway import tree
from slipway.checkpoint import quantize, reshard, tensor_reader
from slipway.checkpoint.copying import count_above, stream
from slipway.checkpoint.files import DTYPES, Checkpoint, Index, Tensor
from slipway.errors import CheckpointError, WeightsLost
from slipway.mesh import shardings
from slipway.ops import backend

Mode = Literal["inplace", "atomic"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Values(Protocol):
    """New values for every leaf of a declaration."""

    def check(self, weights: "Weights", mode: Mode = "inplace") -> None:
        """Check everything that must hold before an array changes.

        Raises CheckpointError, listing every problem.

        In the atomic mode, which makes all arrays beside the old ones, numbers may be checked while
        they are copied.
        """

    def array(
        self,
        weights: "Weights",
        at: int,
        memory: dict[tensor_reader.Bounds, np.ndarray],
        faults: list[str] | None,
    ) -> jax.Array:
        """Return the leaf ``at``, whole, on the mesh of ``weights``, which own it exclusively.

        ``memory``: blocks that may be overwritten; if the old array is a view of them, the result
        may be that array. An empty ``memory`` receives the blocks of the new array, if it has any.
        ``faults`` as in ``load_leaf``.
        """


class Weights:
    """Arrays of a declaration on a mesh, in the order of ``jax.tree.leaves``, with a version.

    A step reads ``arrays``, which belong to this object exclusively. A caller that replaces them
    ensures that no step is running; references to them see the change. ``whole``: whether all
    arrays are of one version. ``config``: the fields of config.json, including ``overrides``.
    ``ignored``: globs of further tensors that a checkpoint may hold.
    """

    def __init__(
        self,
        declaration: Any,
        mesh: Mesh,
        dtype: Any,
        arrays: Any,
        config: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
        ignored: Sequence[str] = (),
    ):
        self.declaration = declaration
        self.mesh = mesh
        self.dtype = np.dtype(dtype)
        self.config = dict(config or {})
        self.overrides = dict(overrides or {})
        self.ignored = tuple(ignored)
        self.leaves = list(tree.leaves(declaration))
        self.shardings: list[NamedSharding] = jax.tree.leaves(shardings(declaration, mesh))
        self.arrays: list[jax.Array] = jax.tree.leaves(arrays)
        self.version = "0"
        self.whole = True
        # Counts the changes of arrays.
        self.changes = 0
        # Blocks under the current arrays on a CPU, where this object allocated them.
        self._memory = self._no_memory()
        # Blocks under the arrays before, for the next arrays that are made beside the current ones.
        self._spare = self._no_memory()
        # The arrays before, if each is a view of its block.
        self._before: list[jax.Array] = []

    def replace(self, values: Values, version: str, mode: Mode = "inplace") -> None:
        """Give every array its new value, after ``values.check`` has passed.

        ``inplace``: leaf by leaf. On a CPU the new value takes the memory of the old array;
        elsewhere the old array is freed when the new one exists, so that the peak is all weights
        and the largest leaf. ``atomic``: all new arrays are made beside the old ones, which stay in
        use if anything fails. On a CPU the memory of the old ones is kept for the next atomic
        exchange, until one in place.

        Raises WeightsLost if a leaf failed in place. Any other error (of the values, or
        CheckpointError) means that nothing has changed.
        """
        self.changes += 1
        before = [(array.shape, array.dtype, array.sharding) for array in self.arrays]
        if mode == "atomic":
            self._all_at_once(values)
        else:
            self._leaf_by_leaf(values)
        after = [(array.shape, array.dtype, array.sharding) for array in self.arrays]
        assert before == after, "a compiled step takes nothing else"
        self.version = version
        self.whole = True

    def delete(self) -> None:
        """Free the memory of the device."""
        for array in self.arrays:
            if not array.is_deleted():
                array.delete()
        self._memory = self._no_memory()
        self._forget_spare()

    def to_host(self) -> list[np.ndarray]:
        """Return copies of all arrays in host memory."""
        return [np.array(array) for array in self.arrays]

    def from_host(self, arrays: Sequence[np.ndarray]) -> None:
        """Put back the arrays that ``to_host`` returned."""
        self.changes += 1
        for at, array in enumerate(arrays):
            self.arrays[at] = jax.device_put(array, self.shardings[at], may_alias=False)

    def packed(self, tensors: Checkpoint) -> Checkpoint:
        """Return the tensors, with floats packed where the declaration is packed."""
        wanted = tensor_reader.wanted(self.declaration)
        if any(name.endswith(quantize.PACKED) for name in wanted):
            return quantize.packed_view(tensors, wanted)
        return tensors

    @property
    def on_cpu(self) -> bool:
        """Whether the memory of a device is host memory."""
        return backend.of(self.mesh.devices.flat[0].platform).uses_host_memory

    def refilled(self, at: int, memory: dict[tensor_reader.Bounds, np.ndarray]) -> jax.Array:
        """Return the leaf ``at`` after its blocks were written.

        On one device it is the same array, if that is a view of the blocks. For an array on several
        devices JAX keeps a copy that it has gathered for the host, so a new array is needed.
        """
        shape, sharding = self.arrays[at].shape, self.shardings[at]
        if len(sharding.device_set) == 1:
            for arrays, blocks in ((self.arrays, self._memory), (self._before, self._spare)):
                if arrays and memory is blocks[at]:
                    return arrays[at]
        return tensor_reader.place(shape, sharding, memory)

    def _forget_spare(self) -> None:
        for array in self._before:
            array.delete()
        self._before = []
        self._spare = self._no_memory()

    def _no_memory(self) -> list[dict[tensor_reader.Bounds, np.ndarray]]:
        return [{} for _ in self.arrays]

    def _all_at_once(self, values: Values) -> None:
        memory = self._spare if self.on_cpu else self._no_memory()
        faults: list[str] = []

        def make(at: int) -> jax.Array:
            return values.array(self, at, memory[at] if self.on_cpu else {}, faults=faults)

        try:
            with self._pool() as pool:
                new = list(pool.map(make, range(len(self.arrays))))
            if faults:
                values.check(self)  # raises an error that names the numbers
                raise CheckpointError(
                    "the arrays", [f"{key}: values are not finite" for key in faults]
                )
        except BaseException:  # after an interruption, too, the spare memory is a mix of values
            self._forget_spare()
            raise
        old = self.arrays
        self.arrays = new
        if self.on_cpu:
            self._spare = self._memory
            self._memory = memory
        self._before = old if self.on_cpu and self.mesh.size == 1 and all(self._spare) else []
        for array in old if not self._before else ():
            array.delete()

    def _leaf_by_leaf(self, values: Values) -> None:
        def exchange(at: int) -> None:
            old = self.arrays[at]
            memory = self._memory[at] if self.on_cpu else {}
            new = values.array(self, at, memory, faults=None)
            if new is not old:
                self.arrays[at] = new
                old.delete()

        self._forget_spare()
        try:
            self.whole = False
            with self._pool() as pool:
                for _ in pool.map(exchange, range(len(self.arrays))):
                    pass
        except BaseException as error:  # an interruption, too, leaves a mix of versions
            raise WeightsLost(f"an update failed half-way ({error})") from error

    def _pool(self) -> ThreadPoolExecutor:
        """Return a pool of threads: on a CPU all cores copy.

        Elsewhere there is one thread, which bounds the memory that is held twice.
        """
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1) if self.on_cpu else 1)


class FromTensors:
    """Values from the tensors of a checkpoint (files or an ``ArrayCheckpoint``), by HF key."""

    def __init__(self, tensors: Checkpoint):
        self.tensors = tensors

    def check(self, weights: Weights, mode: Mode = "inplace") -> None:
        """Check every key, shape, dtype and value.

        Values that are checked while they are copied are left out.
        """
        later = mode == "atomic" and not self._on_devices(*self.tensors.tensors)
        tensor_reader.check(
            weights.declaration,
            self.tensors,
            weights.dtype,
            ignore=weights.ignored,
            overflow_of=_unseen if later else self._overflow,
        )

    def array(
        self,
        weights: Weights,
        at: int,
        memory: dict[tensor_reader.Bounds, np.ndarray],
        faults: list[str] | None,
    ) -> jax.Array:
        """Return the new leaf, through host memory unless the tensors are on devices."""
        leaf, sharding = weights.leaves[at], weights.shardings[at]
        dtype = leaf.param.held_as(weights.dtype)
        if not self._on_devices(*leaf.keys.values()):
            if memory:
                tensor_reader.refill(leaf, self.tensors, memory, faults=faults)
                return weights.refilled(at, memory)
            return tensor_reader.load_leaf(
                leaf, self.tensors, sharding, dtype=dtype, memory=memory, faults=faults
            )
        memory.clear()
        assert isinstance(self.tensors, ArrayCheckpoint)
        arrays = [jnp.asarray(self.tensors.held(key)) for key in leaf.keys.values()]
        array = reshard.owned(reshard.stacked(reshard.Recipe(leaf.param), dtype)(*arrays), sharding)
        for key in leaf.keys.values():
            self.tensors.drop(key)
        return array

    def _on_devices(self, *keys: str) -> bool:
        return isinstance(self.tensors, ArrayCheckpoint) and self.tensors.on_devices(keys)

    def _overflow(self, key: str, tensors: Checkpoint, dtype: np.dtype) -> str:
        if not isinstance(tensors, ArrayCheckpoint) or not tensors.on_devices([key]):
            return tensor_reader.overflow(key, tensors, dtype)
        count = tensors.not_finite(key, dtype)
        return f"{key}: {count} values are not finite as {dtype}" if count else ""


class FromTree:
    """Values from arrays of the same declaration, in the order of its leaves, on any mesh.

    They may be on one device, or on a mesh that repeats KV heads and pads the vocabulary.
    """

    def __init__(self, arrays: Sequence[Any]):
        self._arrays = list(arrays)

    def check(self, weights: Weights, mode: Mode = "inplace") -> None:
        """Check every shape, dtype and value."""
        problems = []
        if len(self._arrays) != len(weights.leaves):
            problems = [f"{len(self._arrays)} arrays, {len(weights.leaves)} declared"]
        for leaf, array in zip(weights.leaves, self._arrays):
            key, param = next(leaf.names()), leaf.param
            if reshard.grown(param, tuple(array.shape)) is None:
                problems.append(f"{key}: shape {tuple(array.shape)}, {param.shape} declared")
            elif not jnp.issubdtype(array.dtype, jnp.floating) and np.dtype(
                array.dtype
            ) != param.held_as(weights.dtype):
                problems.append(
                    f"{key}: dtype {array.dtype}, {param.held_as(weights.dtype)} declared"
                )
            elif count := reshard.not_finite(array, param.held_as(weights.dtype)):
                problems.append(
                    f"{key}: {count} values are not finite as {param.held_as(weights.dtype)}"
                )
        if problems:
            raise CheckpointError("the tree", problems)

    def array(
        self,
        weights: Weights,
        at: int,
        memory: dict[tensor_reader.Bounds, np.ndarray],
        faults: list[str] | None,
    ) -> jax.Array:
        """Return the new leaf, copied from device to device."""
        param, x = weights.leaves[at].param, on_host(self._arrays[at])
        dtype = param.held_as(weights.dtype)
        if memory and isinstance(x, np.ndarray) and x.shape == param.shape and x.dtype == dtype:
            for bounds, block in memory.items():
                stream(block, np.ascontiguousarray(x[tuple(slice(*bound) for bound in bounds)]))
            return weights.refilled(at, memory)
        memory.clear()
        if tuple(x.shape) != param.shape or x.dtype != dtype:
            x = reshard.relaid(reshard.Recipe(param), dtype)(x)
        return reshard.owned(jnp.asarray(x), weights.shardings[at])


@dataclasses.dataclass(frozen=True)
class ArrayCheckpoint(Checkpoint):
    """NumPy or JAX arrays on any devices, presented as the tensors of a checkpoint.

    Their names are HF keys.
    """

    arrays: Mapping[str, Any]

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "ArrayCheckpoint":
        """Return the checkpoint of named arrays.

        Raises CheckpointError for a dtype that safetensors does not have.
        """
        what = "the arrays"
        return cls(Path(what), {}, {}, tensors=described(arrays, what), arrays=arrays)

    def held(self, name: str) -> np.ndarray | jax.Array:
        """Return the array; of an array on one CPU device, a view of its memory."""
        array = self.arrays[name]
        return on_host(array.whole)[array.index] if isinstance(array, _Part) else on_host(array)

    def array(self, name: str) -> np.ndarray:
        """Return the array on the host: a copy if it is on other devices."""
        return np.asarray(self.held(name))

    def with_parts(self, parts: Mapping[str, Mapping[str, Index]]) -> "ArrayCheckpoint":
        """Return the checkpoint with arrays replaced by their parts.

        A part is a view of an array on the host; of an array on devices it is copied when it is
        read.
        """
        arrays = {name: array for name, array in self.arrays.items() if name not in parts}
        for name, indices in parts.items():
            arrays |= {part: _Part(self.arrays[name], index) for part, index in indices.items()}
        tensors = super().with_parts(parts).tensors
        return dataclasses.replace(self, arrays=arrays, tensors=tensors)

    def not_finite(self, name: str, dtype: np.dtype) -> int:
        """Return how many numbers of an array on devices are not finite as ``dtype``."""
        return reshard.not_finite(self.held(name), dtype)

    def copy(self, name: str, target: np.ndarray, limit: int | None = None) -> int:
        """Copy the array to ``target``, contiguous and of its size; ``limit`` as in ``stream``."""
        return stream(target, np.ascontiguousarray(self.array(name)), limit)

    def count_above(self, name: str, limit: int) -> int:
        """Count the items of the array above ``limit``, as ``copying.count_above`` does."""
        return count_above(np.ascontiguousarray(self.array(name)).reshape(-1), limit)

    def drop(self, name: str) -> None:
        """Do nothing: the caller owns the arrays."""

    def on_devices(self, names: Iterable[str]) -> bool:
        """Return whether the host cannot read all of these in place."""
        arrays = (self.arrays[name] for name in names)
        wholes = (array.whole if isinstance(array, _Part) else array for array in arrays)
        return all(isinstance(on_host(whole), jax.Array) for whole in wholes)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Part of an array that is not taken out of it yet."""

    whole: Any
    index: Index


def described(arrays: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Return tensors of a checkpoint that describe arrays, which need only have dtype and shape.

    Raises CheckpointError, naming ``what``, for dtypes that safetensors does not have.
    """
    unknown = [
        f"{name}: dtype {x.dtype}, not a safetensors one"
        for name, x in arrays.items()
        if _name(x) is None
    ]
    if unknown:
        raise CheckpointError(what, unknown)
    return {
        name: Tensor(
            name=name,
            dtype=_name(x) or "",
            shape=tuple(x.shape),
            file=Path(what),
            start=0,
            stop=0,
        )
        for name, x in arrays.items()
    }


def on_host(array: Any) -> Any:
    """Return a view of an array on a single CPU device; any other JAX array as it is."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    devices = list(array.devices())
    return (
        np.asarray(array)
        if len(devices) == 1 and backend.of(devices[0].platform).uses_host_memory
        else array
    )


def _name(array: Any) -> str | None:
    return _NAMES.get(np.dtype(array.dtype))


def _unseen(*_: Any) -> str:
    return ""
