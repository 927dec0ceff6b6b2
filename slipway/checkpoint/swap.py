"""Decides how the arrays of a running model take new values: everything is checked first, then leaf by leaf or all at
once. Knows declarations, tensors and meshes; no engine, and not where the new values come from.
"""

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
from slipway.checkpoint import reshard, tensor_reader
from slipway.checkpoint.copying import count_above, stream
from slipway.checkpoint.files import DTYPES, Checkpoint, Tensor
from slipway.errors import CheckpointError, WeightsLost
from slipway.mesh import shardings
from slipway.ops import backend

Mode = Literal["inplace", "atomic"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Values(Protocol):
    """New values for every leaf of a declaration."""

    def check(self, weights: "Weights", mode: Mode = "inplace") -> None:
        """Compare everything that must be known before an array changes. Raises CheckpointError, listing all.

        Where all arrays are made beside the old ones, numbers may be looked at while they are copied.
        """

    def array(
        self, weights: "Weights", at: int, memory: dict[tensor_reader.Bounds, np.ndarray], faults: list[str] | None
    ) -> jax.Array:
        """The leaf ``at``, whole, on the weights' mesh; owned by them alone.

        ``memory``: blocks that may be written to; if the old array is a view of them, it may be the result. Empty: it
        gets the new array's, where there are such. ``faults`` as ``load_leaf`` has it.
        """


class Weights:
    """The arrays of a declaration on a mesh, in the order of ``jax.tree.leaves``, and which version they are.

    ``arrays`` is what a step reads, and theirs alone: who replaces them makes sure that none is running, and who keeps
    one sees it change. ``whole``: whether all are of one version. ``config``: config.json's fields, ``overrides`` among
    them; ``ignored``: globs of tensors that a checkpoint may hold besides.
    """

    def __init__(
        self, declaration: Any, mesh: Mesh, dtype: Any, arrays: Any,
        config: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None,
        ignored: Sequence[str] = (),
    ):  # fmt: skip
        self.declaration, self.mesh, self.dtype = declaration, mesh, np.dtype(dtype)
        self.config, self.overrides, self.ignored = dict(config or {}), dict(overrides or {}), tuple(ignored)
        self.leaves = list(tree.leaves(declaration))
        self.shardings: list[NamedSharding] = jax.tree.leaves(shardings(declaration, mesh))
        self.arrays: list[jax.Array] = jax.tree.leaves(arrays)
        self.version, self.whole = "0", True
        self._memory = self._no_memory()  # of arrays on a CPU, if ours
        self._spare = self._no_memory()  # the same of the arrays before, for the next that are made beside
        self._before: list[jax.Array] = []  # those arrays, if each is a view of its block

    def replace(self, values: Values, version: str, mode: Mode = "inplace") -> None:
        """Give every array its new value; ``values.check`` has passed.

        ``inplace``: leaf by leaf; on a CPU into the memory of the old one, elsewhere the old one goes when the new one
        is there, so that the most that is held is all weights and the largest leaf. ``atomic``: all new arrays are made
        beside the old ones, which serve on if anything fails; on a CPU the memory of the old ones is kept for the next
        such exchange, until one in place.

        Raises WeightsLost if a leaf failed in place; what the values raise, or CheckpointError, if all is as it was.
        """
        before = [(array.shape, array.dtype, array.sharding) for array in self.arrays]
        if mode == "atomic":
            self._all_at_once(values)
        else:
            self._leaf_by_leaf(values)
        after = [(array.shape, array.dtype, array.sharding) for array in self.arrays]
        assert before == after, "a compiled step takes nothing else"
        self.version, self.whole = version, True

    def delete(self) -> None:
        """Free the device's memory."""
        for array in self.arrays:
            if not array.is_deleted():
                array.delete()
        self._memory = self._no_memory()
        self._forget_spare()

    def to_host(self) -> list[np.ndarray]:
        """Copies of all arrays in the host's memory."""
        return [np.array(array) for array in self.arrays]

    def from_host(self, arrays: Sequence[np.ndarray]) -> None:
        """Put back what ``to_host`` gave."""
        for at, array in enumerate(arrays):
            self.arrays[at] = jax.device_put(array, self.shardings[at], may_alias=False)

    @property
    def on_cpu(self) -> bool:
        """Whether a device's memory is the host's."""
        return backend.of(self.mesh.devices.flat[0].platform).uses_host_memory

    def refilled(self, at: int, memory: dict[tensor_reader.Bounds, np.ndarray]) -> jax.Array:
        """The leaf ``at`` after blocks were written to: on one device the same array, if it is a view of them.

        Of an array on several devices JAX keeps what it has gathered for the host: that needs a new one.
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
        self._before, self._spare = [], self._no_memory()

    def _no_memory(self) -> list[dict[tensor_reader.Bounds, np.ndarray]]:
        return [{} for _ in self.arrays]

    def _all_at_once(self, values: Values) -> None:
        memory = self._spare if self.on_cpu else self._no_memory()
        faults: list[str] = []
        try:
            with self._pool() as pool:
                new = list(pool.map(
                    lambda at: values.array(self, at, memory[at] if self.on_cpu else {}, faults),
                    range(len(self.arrays)),
                ))  # fmt: skip
            if faults:
                values.check(self)  # says which numbers
                raise CheckpointError("the arrays", [f"{key}: values are not finite" for key in faults])
        except BaseException:  # after an interruption, too, some of it is new and some is not
            self._forget_spare()
            raise
        old, self.arrays = self.arrays, new
        if self.on_cpu:
            self._memory, self._spare = memory, self._memory
        self._before = old if self.on_cpu and self.mesh.size == 1 and all(self._spare) else []
        for array in old if not self._before else ():
            array.delete()

    def _leaf_by_leaf(self, values: Values) -> None:
        def exchange(at: int) -> None:
            old, new = self.arrays[at], values.array(self, at, self._memory[at] if self.on_cpu else {}, None)
            if new is not old:
                self.arrays[at] = new
                old.delete()

        self._forget_spare()
        try:
            self.whole = False
            with self._pool() as pool:
                for _ in pool.map(exchange, range(len(self.arrays))):
                    pass
        except BaseException as error:  # an interruption, too, leaves a mix
            raise WeightsLost(f"an update failed half-way ({error})") from error

    def _pool(self) -> ThreadPoolExecutor:
        """On a CPU all cores copy; elsewhere one leaf at a time bounds what is held twice."""
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1) if self.on_cpu else 1)


class FromTensors:
    """Values from the tensors of a checkpoint (files or an ``ArrayCheckpoint``), under their HF keys."""

    def __init__(self, tensors: Checkpoint):
        self._tensors = tensors

    def check(self, weights: Weights, mode: Mode = "inplace") -> None:
        """Every key, shape, dtype and value, but values that are looked at while they are copied."""
        later = mode == "atomic" and not self._on_devices(*self._tensors.tensors)
        tensor_reader.check(
            weights.declaration, self._tensors, weights.dtype, weights.ignored, _unseen if later else self._overflow
        )

    def array(
        self, weights: Weights, at: int, memory: dict[tensor_reader.Bounds, np.ndarray], faults: list[str] | None
    ) -> jax.Array:
        """On the host's way, unless the tensors are on devices."""
        leaf, sharding = weights.leaves[at], weights.shardings[at]
        dtype = leaf.param.held_as(weights.dtype)
        if not self._on_devices(*leaf.keys.values()):
            if memory:
                tensor_reader.refill(leaf, self._tensors, memory, faults)
                return weights.refilled(at, memory)
            return tensor_reader.load_leaf(leaf, self._tensors, sharding, dtype, memory, faults)
        memory.clear()
        assert isinstance(self._tensors, ArrayCheckpoint)
        arrays = [jnp.asarray(self._tensors.held(key)) for key in leaf.keys.values()]
        array = reshard.owned(reshard.stacked(reshard.Recipe(leaf.param), dtype)(*arrays), sharding)
        for key in leaf.keys.values():
            self._tensors.drop(key)
        return array

    def _on_devices(self, *keys: str) -> bool:
        return isinstance(self._tensors, ArrayCheckpoint) and self._tensors.on_devices(keys)

    def _overflow(self, key: str, tensors: Checkpoint, dtype: np.dtype) -> str:
        if not isinstance(tensors, ArrayCheckpoint) or not tensors.on_devices([key]):
            return tensor_reader.overflow(key, tensors, dtype)
        count = tensors.not_finite(key, dtype)
        return f"{key}: {count} values are not finite as {dtype}" if count else ""


class FromTree:
    """Values from arrays of the same declaration, in the order of its leaves, on whatever mesh they lie.

    They may be those of one device, or of a mesh on which KV heads are repeated and the vocabulary is padded.
    """

    def __init__(self, arrays: Sequence[Any]):
        self._arrays = list(arrays)

    def check(self, weights: Weights, mode: Mode = "inplace") -> None:
        """Every shape and value."""
        problems = []
        if len(self._arrays) != len(weights.leaves):
            problems = [f"{len(self._arrays)} arrays, {len(weights.leaves)} declared"]
        for leaf, array in zip(weights.leaves, self._arrays):
            key, param = next(leaf.names()), leaf.param
            if reshard.grown(param, tuple(array.shape)) is None:
                problems.append(f"{key}: shape {tuple(array.shape)}, {param.shape} declared")
            elif not jnp.issubdtype(array.dtype, jnp.floating) and np.dtype(array.dtype) != param.held_as(
                weights.dtype
            ):
                problems.append(f"{key}: dtype {array.dtype}, {param.held_as(weights.dtype)} declared")
            elif count := reshard.not_finite(array, param.held_as(weights.dtype)):
                problems.append(f"{key}: {count} values are not finite as {param.held_as(weights.dtype)}")
        if problems:
            raise CheckpointError("the tree", problems)

    def array(
        self, weights: Weights, at: int, memory: dict[tensor_reader.Bounds, np.ndarray], faults: list[str] | None
    ) -> jax.Array:
        """From device to device."""
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


class ArrayCheckpoint(Checkpoint):
    """Arrays under HF keys, shown as a checkpoint's tensors: NumPy's, and JAX's on any devices."""

    _arrays: Mapping[str, Any]

    def __init__(self, arrays: Mapping[str, Any], what: str = "the arrays"):
        unknown = [f"{name}: dtype {x.dtype}, not a safetensors one" for name, x in arrays.items() if _name(x) is None]
        if unknown:
            raise CheckpointError(what, unknown)
        tensors = {name: Tensor(name, _name(x) or "", tuple(x.shape), Path(what), 0, 0) for name, x in arrays.items()}
        super().__init__(Path(what), {}, {}, tensors)
        object.__setattr__(self, "_arrays", arrays)

    def held(self, name: str) -> np.ndarray | jax.Array:
        """The array; of what one CPU device holds, a view of its memory."""
        return on_host(self._arrays[name])

    def array(self, name: str) -> np.ndarray:
        """The array on the host: a copy of one that lies on other devices."""
        return np.asarray(self.held(name))

    def not_finite(self, name: str, dtype: np.dtype) -> int:
        """How many numbers of an array on devices ``dtype`` cannot hold as finite ones."""
        return reshard.not_finite(self.held(name), dtype)

    def copy(self, name: str, target: np.ndarray, limit: int | None = None) -> int:
        """The array's numbers in ``target``, a contiguous array of its size; ``limit`` as ``stream`` has it."""
        return stream(target, np.ascontiguousarray(self.array(name)), limit)

    def count_above(self, name: str, limit: int) -> int:
        """As Checkpoint's."""
        return count_above(np.ascontiguousarray(self.array(name)).reshape(-1), limit)

    def drop(self, name: str) -> None:
        """Nothing: the arrays are the caller's."""

    def on_devices(self, names: Iterable[str]) -> bool:
        """Whether the host cannot read these where they are."""
        return all(isinstance(on_host(self._arrays[name]), jax.Array) for name in names)


def on_host(array: Any) -> Any:
    """A view of what a CPU device holds by itself; anything else as it is."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    devices = list(array.devices())
    return np.asarray(array) if len(devices) == 1 and backend.of(devices[0].platform).uses_host_memory else array


def _name(array: Any) -> str | None:
    return _NAMES.get(np.dtype(array.dtype))


def _unseen(*_: Any) -> str:
    return ""
