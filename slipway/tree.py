"""Declarations of a model's tensors, each made once.

Shapes, layouts, HF keys and sharding axes are derived from them. A model is a tree of frozen
dataclasses. As a declaration its leaves are Params; loaded, the same tree holds arrays. Attribute
names are parts of HF keys; a Stack adds an index to the key and an axis to the array. Everything
else about a tensor (its shape in the file, the transpose, the rows that a device reads, how to
write it back) is computed from its Param.

Not here: meshes (mesh.py), files (checkpoint/), axis strings (layout.py).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from slipway import layout

# a field of a module: a Param as declared, an array when loaded, an IndexedArray while a fold runs
Tensor = Any


@dataclass_transform(frozen_default=True)
def module(cls: type) -> type:
    """Make ``cls`` a frozen dataclass and a pytree, with ``static()`` fields in its structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static(**kwargs) -> Any:
    """Declare a dataclass field that is configuration, not data."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Param:
    """Declaration of one tensor.

    ``axes`` is its layout on the device and ``hf`` its layout in the checkpoint, both over the
    names in ``sizes`` (in elements). ``stacks`` are axes that Stacks put in front: the checkpoint
    holds one tensor per index. ``repeats`` and ``pads`` tell how a mesh made an axis larger than in
    the checkpoint: each index is repeated n times in a row, or zeros are appended up to a size of
    n. ``alias`` is a second HF key that may hold the same numbers (tied embeddings). ``key`` is the
    HF key, if that is not the path of attributes; it has ``{}`` for each index in the path, and
    brackets if the Param is a part of a tensor (checkpoint/parts.py).
    """

    axes: str
    sizes: Mapping[str, int]
    hf: str = ""
    init: str = "normal"  # "normal" | "ones" | "zeros" | "bits" | "scale", for dummy weights
    alias: str = ""
    key: str = ""
    # of the array and of the checkpoint's tensors; by default the engine's, made from any float
    dtype: str = ""
    stacks: tuple[tuple[str, int], ...] = ()
    repeats: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pads: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array on the device."""
        repeated = {axis: size * self.repeats.get(axis, 1) for axis, size in self.sizes.items()}
        grown = repeated | {axis: size for axis, size in self.pads.items() if axis in repeated}
        return (*(n for _, n in self.stacks), *layout.parse(self.axes).shape(grown))

    def held_as(self, dtype: Any) -> np.dtype:
        """Return the array's dtype in an engine that holds floats as ``dtype``."""
        return np.dtype(self.dtype or dtype)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """Axis along which each dimension may be split: the outermost of its group."""
        return (
            *(axis for axis, _ in self.stacks),
            *(group[0] for group in layout.parse(self.axes).groups),
        )

    @property
    def hf_layout(self) -> str:
        """Axis string of the checkpoint's tensor."""
        return self.hf or self.axes

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of each of the checkpoint's tensors."""
        return layout.parse(self.hf_layout).shape(self.sizes)

    def read(self, hf: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """Return the block at ``index`` of the array that is made from the HF tensor ``hf``.

        ``index`` has one slice per unstacked dimension. Only the needed rows are read. The result
        is a view of ``hf`` if the layouts allow it.
        """
        atoms = layout.rearrange(self.hf_layout, self.axes, self.sizes).atoms(hf)
        shape, dim = [], 0
        groups = layout.parse(self.axes).groups
        for group, part, full in zip(groups, index, self.shape[len(self.stacks) :]):
            start, stop, _ = part.indices(full)
            inner = int(np.prod([self.sizes[axis] for axis in group[1:]], dtype=int))
            is_whole = start % inner == 0 and stop % inner == 0
            assert is_whole, "a mesh splits a group along its outermost axis only"
            atoms = self._rows(atoms, dim, group[0], start=start // inner, stop=stop // inner)
            shape.append(stop - start)
            dim += len(group)
        return atoms.reshape(shape)

    def _rows(self, atoms: np.ndarray, dim: int, axis: str, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop`` of the grown ``axis``, taken from the checkpoint's."""
        if (n := self.repeats.get(axis, 1)) > 1:
            return np.take(atoms, np.arange(start, stop) // n, axis=dim)
        held = atoms[(slice(None),) * dim + (slice(start, min(stop, self.sizes[axis])),)]
        missing = (stop - start) - held.shape[dim]
        if not missing:
            return held
        return np.pad(held, [(0, missing if d == dim else 0) for d in range(held.ndim)])

    def write(self, x: np.ndarray) -> np.ndarray:
        """Return the HF tensor of the whole, unstacked array ``x``: the inverse of ``read``."""
        groups = layout.parse(self.axes).groups
        for dim, group in enumerate(groups):
            n = self.repeats.get(group[0], 1)
            inner = int(np.prod([self.sizes[axis] for axis in group[1:]], dtype=int))
            rows = x.reshape(*x.shape[:dim], -1, inner, *x.shape[dim + 1 :])
            rows = rows[(slice(None),) * dim + (slice(0, self.sizes[group[0]] * n, n),)]
            x = rows.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])
        return layout.rearrange(self.axes, self.hf_layout, self.sizes)(x)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Stack:
    """``n`` equal bodies in one: each leaf of ``body`` has a leading axis.

    HF indices start at ``first``.
    """

    body: Any
    n: int
    first: int = 0
    axis: str = "layers"

    @property
    def one(self) -> Any:
        """Body with the static fields that all bodies have."""
        return self.body

    def fold(self, step: Callable, carry: Any) -> Any:
        """Apply ``carry = step(layer, index, carry)`` to each in turn, compiled once as a scan.

        Experts are not sliced by the scan, which would copy those of a whole layer: their leaves
        are StackedArrays.
        """
        leaves, structure = jax.tree.flatten(self.body, is_leaf=_is_experts)
        sliced = [None if _is_experts(leaf) else leaf for leaf in leaves]

        def turn(carry, layer):
            held, number = layer

            def stacked(array):
                return StackedArray(array, number)

            found = [
                jax.tree.map(stacked, whole) if _is_experts(whole) else part
                for whole, part in zip(leaves, held)
            ]
            body = jax.tree.unflatten(structure, found)
            return step(body, number + self.first, carry), None

        return jax.lax.scan(turn, carry, (sliced, jnp.arange(self.n)))[0]

    def tree_flatten_with_keys(self):
        """Return the children with their keys, and the static data (called by JAX)."""
        key = jax.tree_util.DictKey(range(self.first, self.first + self.n))
        return [(key, self.body)], self._aux()

    def tree_flatten(self):
        """Return the children and the static data (called by JAX)."""
        return [self.body], self._aux()

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Make a node from the results of tree_flatten (called by JAX)."""
        return cls(children[0], *aux)

    def _aux(self):
        return self.n, self.first, self.axis


@module
class IndexedArray:
    """One of several arrays of equal shape, chosen by a traced index.

    It stands for a leaf; an op resolves it where it reads the array.
    """

    arrays: tuple[jax.Array, ...]
    index: jax.Array


@module
class StackedArray:
    """Row ``index`` of an array that holds the arrays of several layers.

    It stands for a leaf; an op that can, reads the row where it lies.
    """

    array: jax.Array
    index: jax.Array


def call(f: Callable, leaf: Any) -> Any:
    """Return ``f(leaf)``, with each IndexedArray in ``leaf`` replaced by the array that it picks.

    Each array has a branch of its own, so that no array is copied. A StackedArray is replaced by a
    copy of its row.
    """

    def row(node: Any) -> Any:
        if not isinstance(node, StackedArray):
            return node
        return jax.lax.dynamic_index_in_dim(node.array, node.index, keepdims=False)

    leaf = jax.tree.map(row, leaf, is_leaf=lambda node: isinstance(node, StackedArray))
    indexed = [node for node in jax.tree.leaves(leaf, is_leaf=_is_indexed) if _is_indexed(node)]
    if not indexed:
        return f(leaf)

    def branch(i: int) -> Callable:
        def resolved(node: Any) -> Any:
            return node.arrays[i] if _is_indexed(node) else node

        return lambda: f(jax.tree.map(resolved, leaf, is_leaf=_is_indexed))

    return jax.lax.switch(indexed[0].index, [branch(i) for i in range(len(indexed[0].arrays))])


def value(leaf: Any) -> Any:
    """Return the array; for an IndexedArray this is a copy, so use it for small leaves only."""
    return call(lambda array: array, leaf)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Separate:
    """Equal bodies, each with its own arrays.

    A layer can be mapped into memory from its file, because nothing is stacked.
    """

    bodies: tuple[Any, ...]
    first: int = 0
    axis: str = "layers"

    @property
    def n(self) -> int:
        """Number of bodies."""
        return len(self.bodies)

    @property
    def one(self) -> Any:
        """Body with the static fields that all bodies have."""
        return self.bodies[0]

    def fold(self, step: Callable, carry: Any) -> Any:
        """Apply ``carry = step(layer, index, carry)`` to each in turn, compiled once as a loop.

        The loop takes a fifth of the unrolled form's compile time at the same speed (docs/adr/003).
        """
        if len(self.bodies) == 1:
            return step(self.bodies[0], self.first, carry)

        def turn(i, carry):
            layer = jax.tree.map(lambda *arrays: IndexedArray(arrays, i), *self.bodies)
            return step(layer, i + self.first, carry)

        return jax.lax.fori_loop(0, len(self.bodies), turn, init_val=carry)

    def tree_flatten_with_keys(self):
        """Return the children with their keys, and the static data (called by JAX)."""
        keys = (jax.tree_util.DictKey(i) for i in itertools.count(self.first))
        return list(zip(keys, self.bodies)), (self.first, self.axis)

    def tree_flatten(self):
        """Return the children and the static data (called by JAX)."""
        return list(self.bodies), (self.first, self.axis)

    @classmethod
    def tree_unflatten(cls, aux, children):
        """Make a node from the results of tree_flatten (called by JAX)."""
        return cls(tuple(children), *aux)


@jax.tree_util.register_pytree_with_keys_class
class Unrolled(Separate):
    """Equal bodies that are traced one after the other, each with its index as a number."""

    def fold(self, step: Callable, carry: Any) -> Any:
        """Apply ``carry = step(layer, index, carry)`` to each in turn; ``index`` is a number."""
        for index, body in enumerate(self.bodies, self.first):
            carry = step(body, index, carry)
        return carry


@jax.tree_util.register_pytree_with_keys_class
class Chain(tuple):
    """Different stacks in a row below one HF prefix, such as dense layers before MoE layers."""

    def fold(self, step: Callable, carry: Any) -> Any:
        """Apply ``carry = step(layer, index, carry)`` to each layer of each part in turn."""
        for part in self:
            carry = part.fold(step, carry)
        return carry

    def tree_flatten_with_keys(self):
        """Return the children under keys that add nothing to the HF key (called by JAX)."""
        return [(jax.tree_util.DictKey(None), part) for part in self], None

    def tree_flatten(self):
        """Return the children and the static data (called by JAX)."""
        return list(self), None

    @classmethod
    def tree_unflatten(cls, _, children):
        """Make a node from the results of tree_flatten (called by JAX)."""
        return cls(children)


def _is_experts(node: Any) -> bool:
    return isinstance(node, Stack) and node.axis == "experts"


def _is_indexed(node: Any) -> bool:
    return isinstance(node, IndexedArray)


def is_param(node: Any) -> bool:
    """Return whether ``node`` is a leaf of a declaration."""
    return isinstance(node, Param)


def map_params(f: Callable, declaration: Any, *rest: Any) -> Any:
    """Apply ``jax.tree.map`` to the Params of a declaration."""
    return jax.tree.map(f, declaration, *rest, is_leaf=is_param)


def stack(body: Any, n: int, first: int = 0, axis: str = "layers") -> Stack:
    """Declare ``n`` equal bodies with HF indices that start at ``first``."""
    return Stack(
        map_params(lambda p: dataclasses.replace(p, stacks=((axis, n), *p.stacks)), body),
        n,
        first,
        axis=axis,
    )


def runs(values: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Yield each run of equal values as (value, first index, length).

    This turns a list of different layers into a Chain of Stacks.
    """
    first = 0
    for value, group in itertools.groupby(values):
        n = len(list(group))
        yield value, first, n
        first += n


def separate(declaration: Any, axis: str = "layers", form: type[Separate] = Separate) -> Any:
    """Return the declaration with each Stack along ``axis`` replaced by a ``form``.

    The HF keys stay the same.
    """

    def apart(node):
        if not (isinstance(node, Stack) and node.axis == axis):
            return node
        body = map_params(
            lambda p: dataclasses.replace(p, stacks=tuple(s for s in p.stacks if s[0] != axis)),
            node.body,
        )
        return form((body,) * node.n, node.first, axis)

    return jax.tree.map(
        apart,
        declaration,
        is_leaf=lambda n: is_param(n) or (isinstance(n, Stack) and n.axis == axis),
    )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Param with the HF keys of its tensors, and the paths of attributes that lead to them.

    Both are found by the index into the stacked axes, ``()`` if there are none.
    """

    param: Param
    keys: Mapping[tuple[int, ...], str]
    paths: Mapping[tuple[int, ...], str]

    def names(self) -> Iterator[str]:
        """Yield each key under which a checkpoint may hold the tensor, including the alias."""
        yield from self.keys.values()
        if self.param.alias:
            yield self.param.alias


def leaves(declaration: Any) -> Iterator[Leaf]:
    """Yield the leaves of a declaration in the order of ``jax.tree.leaves``."""
    for path, param in jax.tree_util.tree_flatten_with_path(declaration, is_leaf=is_param)[0]:
        numbers = [entry for entry in map(_name, path) if isinstance(entry, int | range)]
        ranges = [number for number in numbers if isinstance(number, range)]
        template = _template(path)
        keys, paths = {}, {}
        for index in itertools.product(*(range(len(r)) for r in ranges)):
            at = iter([r[i] for r, i in zip(ranges, index)])
            found = [next(at) if isinstance(n, range) else n for n in numbers]
            paths[index] = template.format(*found)
            keys[index] = param.key.format(*found) if param.key else paths[index]
        yield Leaf(param, keys, paths)


def renamed(declaration: Any, rename: Callable[[str, Param], str]) -> Any:
    """Return the declaration with other HF keys.

    ``rename(key, param)`` returns the new key of a Param; keys have ``{}`` for each index.
    """

    def one(path: Any, param: Param) -> Param:
        return dataclasses.replace(param, key=rename(param.key or _template(path), param))

    return jax.tree_util.tree_map_with_path(one, declaration, is_leaf=is_param)


def _template(path: Any) -> str:
    """Return the HF key of a path of attributes, with ``{}`` for each index."""
    names = [name for name in map(_name, path) if name is not None]
    return ".".join("{}" if isinstance(name, int | range) else name for name in names)


def _name(entry: Any) -> Any:
    """Return an entry of a tree's path: the name of an attribute, or the key of a child."""
    return entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else entry.key
