"""Layouts of arrays as axis strings, and the rearrangement from one layout to another.

An axis string names the axes of an array in einops notation: in ``"(heads head_dim) embed"``, the
rows of a matrix run over heads, and within a head over its dimensions. Two strings over the same
axes determine a split, a permutation and a merge; swapping the strings gives the inverse. There is
no free reshape, so an error that keeps the size cannot stay hidden.

Not here: axes of traced arrays (slipway/convert/axes.py).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parsed axis string: one tuple of axis names per dimension of the array."""

    groups: tuple[tuple[str, ...], ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis in memory order, with groups taken apart."""
        return tuple(axis for group in self.groups for axis in group)

    @property
    def text(self) -> str:
        """Axis string of this layout."""
        texts = (" ".join(group) for group in self.groups)
        return " ".join(t if len(g) == 1 else f"({t})" for t, g in zip(texts, self.groups))

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of an array of this layout; an empty group has size 1."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def split(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape with every group taken apart into its axes."""
        return tuple(sizes[axis] for axis in self.axes)


@functools.cache
def parse(axes: str) -> Layout:
    """Read an axis string.

    Raises ValueError for unmatched parentheses, an axis that occurs twice, or an invalid name.
    """
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", axes)
    groups = tuple(tuple(token.strip("()").split()) for token in tokens)
    layout = Layout(groups)
    if "(" in tokens or ")" in tokens:
        raise ValueError(f"axis string {axes!r}: unmatched parenthesis")
    if len(set(layout.axes)) != len(layout.axes):
        raise ValueError(f"axis string {axes!r}: an axis occurs twice")
    if bad := [axis for axis in layout.axes if not axis.isidentifier()]:
        raise ValueError(f"axis string {axes!r}: {bad[0]!r} is not a name")
    return layout


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """Conversion of arrays from one layout to another at given sizes.

    It is a reshape, a transpose and a reshape.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, x):
        """Rearrange a NumPy or JAX array; of a NumPy array, return a view where possible."""
        return self.atoms(x).reshape(self.shape)

    def atoms(self, x):
        """Return ``x`` with every group taken apart, axes in the target's order.

        The result is always a view of a C-ordered array.
        """
        return x.reshape(self.split).transpose(self.order)


@functools.cache
def _order(source: str, target: str) -> tuple[int, ...]:
    theirs, ours = parse(source).axes, parse(target).axes
    if sorted(theirs) != sorted(ours):
        raise ValueError(f"{source!r} and {target!r} do not name the same axes")
    return tuple(theirs.index(axis) for axis in ours)


def rearrange(source: str, target: str, sizes: Sizes) -> Rearrange:
    """Return the conversion from ``source`` to ``target``; swap the two for the inverse.

    Raises ValueError if they do not name the same axes.
    """
    return Rearrange(parse(source).split(sizes), _order(source, target), parse(target).shape(sizes))


def solve_sizes(axes: str, shape: tuple[int, ...], known: Sizes) -> dict[str, int]:
    """Return ``known`` with all axis sizes that follow from an array of ``shape``.

    A size follows if it is the only unknown one in its group. Raises ValueError if a group does not
    divide, or the number of dimensions differs.
    """
    layout, sizes = parse(axes), dict(known)
    if len(layout.groups) != len(shape):
        dimensions = f"{len(layout.groups)} dimensions, the array {len(shape)}"
        raise ValueError(f"{axes!r} has {dimensions}: {shape}")
    for group, size in zip(layout.groups, shape):
        unknown = [axis for axis in group if axis not in sizes]
        held = math.prod(sizes[axis] for axis in group if axis in sizes)
        if (held and size % held) or (not unknown and size != held):
            raise ValueError(_mismatch(axes, group, size, sizes=sizes))
        if len(unknown) == 1 and held:
            sizes[unknown[0]] = size // held
    return sizes


def infer_sizes(axes: str, shape: tuple[int, ...], known: Sizes) -> dict[str, int]:
    """Return the size of every axis of an array of ``shape``; one axis per group may be unknown.

    Raises ValueError if a group does not divide, has two unknown axes, or the number of dimensions
    differs.
    """
    sizes = solve_sizes(axes, shape, known)
    for group, size in zip(parse(axes).groups, shape):
        if not sizes.keys() >= set(group):
            raise ValueError(_mismatch(axes, group, size, sizes=sizes))
    return sizes


def _mismatch(axes: str, group: tuple[str, ...], size: int, sizes: Sizes) -> str:
    named = ", ".join(f"{axis} {sizes.get(axis, '?')}" for axis in group)
    return f"{axes!r}: ({' '.join(group)}) cannot have size {size} with {named}"
