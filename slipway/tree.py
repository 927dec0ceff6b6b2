"""Declares each tensor once and derives shape, layout, HF key and sharding axes from it; knows no mesh and no files.

A model is a tree of frozen dataclasses. As a declaration its leaves are Params; loaded, the same tree holds arrays.
Attribute names are HF key parts; a Stack adds an index to the key and an axis to the array. Everything else about a
tensor (the file's shape, the transpose, which rows a device reads, how to write it back) is computed from its Param.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from slipway import layout

Tensor = Any  # a field of a module: a Param as declared, an array once loaded, a Pick while a fold runs


@dataclass_transform(frozen_default=True)
def module(cls: type) -> type:
    """Make ``cls`` a frozen dataclass and a pytree; fields marked ``static()`` are part of its structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static(**kwargs) -> Any:
    """A dataclass field that is configuration, not data."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Param:
    """One tensor before it holds numbers.

    ``axes`` is its layout on the device and ``hf`` in the checkpoint, both over the names in ``sizes`` (elements);
    ``stacks`` are axes that Stacks put in front: the checkpoint holds one tensor per index.
    ``repeats`` and ``pads`` say how a mesh made an axis larger than the checkpoint's: each index held n times in a
    row, or zeros appended up to n. ``alias`` is a second HF key that may hold the same numbers (tied embeddings).
    """

    axes: str
    sizes: Mapping[str, int]
    hf: str = ""
    init: str = "normal"  # of dummy weights: "normal" | "ones" | "zeros" | "bits" | "scale"
    alias: str = ""
    dtype: str = ""  # of the array and of the checkpoint's tensors; by default the engine's, made from any float
    stacks: tuple[tuple[str, int], ...] = ()
    repeats: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pads: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape on the device."""
        grown = {axis: self.pads.get(axis, size * self.repeats.get(axis, 1)) for axis, size in self.sizes.items()}
        return (*(n for _, n in self.stacks), *layout.parse(self.axes).shape(grown))

    def held_as(self, dtype: Any) -> np.dtype:
        """The array's dtype where floats are ``dtype``."""
        return np.dtype(self.dtype or dtype)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """For each dimension the axis along which it may be split: the outermost of its group."""
        return (*(axis for axis, _ in self.stacks), *(group[0] for group in layout.parse(self.axes).groups))

    @property
    def hf_layout(self) -> str:
        """The checkpoint's axis string."""
        return self.hf or self.axes

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of the checkpoint's tensors."""
        return layout.parse(self.hf_layout).shape(self.sizes)

    def read(self, hf: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """The block at ``index`` (one slice per unstacked dimension) of the array that the HF tensor ``hf`` becomes.

        Touches only the rows it needs; a view of ``hf`` where the layouts allow it.
        """
        atoms = layout.rearrange(self.hf_layout, self.axes, self.sizes).atoms(hf)
        shape, dim = [], 0
        for group, part, full in zip(layout.parse(self.axes).groups, index, self.shape[len(self.stacks) :]):
            start, stop, _ = part.indices(full)
            inner = int(np.prod([self.sizes[axis] for axis in group[1:]], dtype=int))
            assert start % inner == 0 and stop % inner == 0, "a mesh splits a group along its outermost axis only"
            atoms = self._rows(atoms, dim, group[0], start // inner, stop // inner)
            shape.append(stop - start)
            dim += len(group)
        return atoms.reshape(shape)

    def _rows(self, atoms: np.ndarray, dim: int, axis: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the grown ``axis``, taken from the checkpoint's."""
        if (n := self.repeats.get(axis, 1)) > 1:
            return np.take(atoms, np.arange(start, stop) // n, axis=dim)
        held = atoms[(slice(None),) * dim + (slice(start, min(stop, self.sizes[axis])),)]
        missing = (stop - start) - held.shape[dim]
        if not missing:
            return held
        return np.pad(held, [(0, missing if d == dim else 0) for d in range(held.ndim)])

    def write(self, x: np.ndarray) -> np.ndarray:
        """The HF tensor of the whole, unstacked array ``x``: the inverse of ``read``."""
        groups = layout.parse(self.axes).groups
        for dim, group in enumerate(groups):
            n, inner = self.repeats.get(group[0], 1), int(np.prod([self.sizes[axis] for axis in group[1:]], dtype=int))
            rows = x.reshape(*x.shape[:dim], -1, inner, *x.shape[dim + 1 :])
            rows = rows[(slice(None),) * dim + (slice(0, self.sizes[group[0]] * n, n),)]
            x = rows.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])
        return layout.rearrange(self.axes, self.hf_layout, self.sizes)(x)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Stack:
    """``n`` equal bodies in one: every leaf of ``body`` has a leading axis. HF indices run from ``first``."""

    body: Any
    n: int
    first: int = 0
    axis: str = "layers"

    def fold(self, step: Callable, carry: Any) -> Any:
        """``carry = step(layer, index, carry)`` for each in turn, compiled once: a scan."""
        indices = jnp.arange(self.first, self.first + self.n)
        return jax.lax.scan(lambda c, layer: (step(layer[0], layer[1], c), None), carry, (self.body, indices))[0]

    def tree_flatten_with_keys(self):
        """Children with their key, and what is static (called by JAX)."""
        return [(jax.tree_util.DictKey(range(self.first, self.first + self.n)), self.body)], self._aux()

    def tree_flatten(self):
        """Children, and what is static (called by JAX)."""
        return [self.body], self._aux()

    @classmethod
    def tree_unflatten(cls, aux, children):
        """The inverse of tree_flatten (called by JAX)."""
        return cls(children[0], *aux)

    def _aux(self):
        return self.n, self.first, self.axis


@module
class Pick:
    """One of several equally shaped arrays, by a traced index; a leaf that an op resolves where it is read."""

    arrays: tuple[jax.Array, ...]
    index: jax.Array


def call(f: Callable, leaf: Any) -> Any:
    """``f(leaf)``; where ``leaf`` holds Picks, of what they pick: a branch per array, so that none is ever copied."""
    picks = [node for node in jax.tree.leaves(leaf, is_leaf=_is_pick) if _is_pick(node)]
    if not picks:
        return f(leaf)

    def branch(i: int) -> Callable:
        return lambda: f(jax.tree.map(lambda node: node.arrays[i] if _is_pick(node) else node, leaf, is_leaf=_is_pick))

    return jax.lax.switch(picks[0].index, [branch(i) for i in range(len(picks[0].arrays))])


def value(leaf: Any) -> Any:
    """The array itself; of a Pick a copy, so for small leaves only."""
    return call(lambda array: array, leaf)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Separate:
    """The same bodies with arrays of their own: a layer can be mapped from its file, and nothing is stacked."""

    bodies: tuple[Any, ...]
    first: int = 0

    def fold(self, step: Callable, carry: Any) -> Any:
        """``carry = step(layer, index, carry)`` for each in turn, compiled once: a loop over Picks.

        docs/adr/003: a fifth of the unrolled form's compile time at the same speed.
        """
        if len(self.bodies) == 1:
            return step(self.bodies[0], self.first, carry)

        def turn(i, carry):
            layer = jax.tree.map(lambda *arrays: Pick(arrays, i), *self.bodies)
            return step(layer, i + self.first, carry)

        return jax.lax.fori_loop(0, len(self.bodies), turn, carry)

    def tree_flatten_with_keys(self):
        """Children with their key, and what is static (called by JAX)."""
        return [(jax.tree_util.DictKey(i), body) for i, body in enumerate(self.bodies, self.first)], self.first

    def tree_flatten(self):
        """Children, and what is static (called by JAX)."""
        return list(self.bodies), self.first

    @classmethod
    def tree_unflatten(cls, first, children):
        """The inverse of tree_flatten (called by JAX)."""
        return cls(tuple(children), first)


@jax.tree_util.register_pytree_with_keys_class
class Unrolled(Separate):
    """The same, one after the other in the program: for what wants to know which layer it is while it is traced."""

    def fold(self, step: Callable, carry: Any) -> Any:
        """``carry = step(layer, index, carry)`` for each in turn; ``index`` is a number."""
        for index, body in enumerate(self.bodies, self.first):
            carry = step(body, index, carry)
        return carry


@jax.tree_util.register_pytree_with_keys_class
class Chain(tuple):
    """Unlike stacks in a row (full attention, then sliding; dense, then MoE) that share one HF prefix."""

    def fold(self, step: Callable, carry: Any) -> Any:
        """``carry = step(layer, index, carry)`` through every part."""
        for part in self:
            carry = part.fold(step, carry)
        return carry

    def tree_flatten_with_keys(self):
        """Children under a key that adds nothing to the HF key, and what is static (called by JAX)."""
        return [(jax.tree_util.DictKey(None), part) for part in self], None

    def tree_flatten(self):
        """Children, and what is static (called by JAX)."""
        return list(self), None

    @classmethod
    def tree_unflatten(cls, _, children):
        """The inverse of tree_flatten (called by JAX)."""
        return cls(children)


def _is_pick(node: Any) -> bool:
    return isinstance(node, Pick)


def is_param(node: Any) -> bool:
    """Whether ``node`` is a leaf of a declaration."""
    return isinstance(node, Param)


def map_params(f: Callable, declaration: Any, *rest: Any) -> Any:
    """``jax.tree.map`` over the Params of a declaration."""
    return jax.tree.map(f, declaration, *rest, is_leaf=is_param)


def stack(body: Any, n: int, first: int = 0, axis: str = "layers") -> Stack:
    """Declare ``n`` equal bodies whose HF indices run from ``first``."""
    return Stack(map_params(lambda p: dataclasses.replace(p, stacks=((axis, n), *p.stacks)), body), n, first, axis)


def runs(values: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Each run of equal values as (value, first index, length): how unlike layers become a Chain of Stacks."""
    first = 0
    for value, group in itertools.groupby(values):
        n = len(list(group))
        yield value, first, n
        first += n


def separate(declaration: Any, axis: str = "layers", form: type[Separate] = Separate) -> Any:
    """The declaration with every Stack along ``axis`` taken apart, into ``form``; the HF keys stay the same."""

    def apart(node):
        if not (isinstance(node, Stack) and node.axis == axis):
            return node
        body = map_params(
            lambda p: dataclasses.replace(p, stacks=tuple(s for s in p.stacks if s[0] != axis)), node.body
        )
        return form((body,) * node.n, node.first)

    return jax.tree.map(apart, declaration, is_leaf=lambda n: is_param(n) or (isinstance(n, Stack) and n.axis == axis))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A Param and the HF keys of the tensors it is made of, by index into its stacked axes (``()`` if none)."""

    param: Param
    keys: Mapping[tuple[int, ...], str]

    def names(self) -> Iterator[str]:
        """Every key under which a checkpoint may hold it, the alias included."""
        yield from self.keys.values()
        if self.param.alias:
            yield self.param.alias


def leaves(declaration: Any) -> Iterator[Leaf]:
    """Every leaf of a declaration, in the order of ``jax.tree.leaves``."""
    for path, param in jax.tree_util.tree_flatten_with_path(declaration, is_leaf=is_param)[0]:
        names = [entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else entry.key for entry in path]
        ranges = [name for name in names if isinstance(name, range)]
        keys = {}
        for index in itertools.product(*(range(len(r)) for r in ranges)):
            at = iter([r[i] for r, i in zip(ranges, index)])
            parts = (next(at) if isinstance(name, range) else name for name in names if name is not None)
            keys[index] = ".".join(map(str, parts))
        yield Leaf(param, keys)
