"""Axes of traced arrays as products of atoms; they show which axes a flatten has merged.

An axis is a tuple of atoms, the slowest first; None is an axis along which an array is constant.
Two arrays in one elementwise operation have the same atoms. A convolution determines which atoms
are space and which are channels. Not here: the effect of each operation on axes (dataflow.py).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class Unclear(ValueError):
    """An axis with an order in torch that does not follow from the traced operations."""


class Atom:
    """A factor of an axis.

    It may turn out to be equal to another one, a product of smaller ones, or a concatenation of
    parts.
    """

    def __init__(self, size: int, kind: str = "", index: int = -1, births: Iterable[str] = ()):
        self.size = size
        self.kind = kind  # "space", "channel" or "" for neither
        self.index = index  # of a space atom among its map's
        self.births = set(births)
        self.same: Atom | None = None
        self.factors: list[Atom] = []
        self.parts: list[Axis] = []
        self.origin: Atom | None = None  # the atom of which it is a factor
        self.lost = ""  # the operation after which its order is unknown
        self.is_tokens = False  # space that was merged into one axis, beside channels
        self.is_scanned = False
        self.is_used = False

    def find(self) -> "Atom":
        """Return the atom that stands for all those it is equal to."""
        atom = self
        while atom.same is not None:
            atom = atom.same
        return atom

    def derived(self, size: int) -> "Atom":
        """Return an atom of another size along the same direction: of a slice, a pool, a pad."""
        atom = Atom(size, self.kind, self.index, births=self.births)
        atom.is_tokens = self.is_tokens
        return atom


Axis = tuple[Atom, ...] | None


def fresh(size: int, birth: str = "") -> Axis:
    """Return a new axis."""
    return (Atom(size, births=[birth] if birth else ()),) if size != 1 else ()


def leaves(axis: Axis) -> list[Atom]:
    """Return the atoms of an axis that are not products."""
    made: list[Atom] = []
    for atom in axis or ():
        atom = atom.find()
        made += leaves(tuple(atom.factors)) if atom.factors else [atom]
    return made


def everything(axis: Axis) -> Iterator[Atom]:
    """Yield the leaves of an axis and those of their parts."""
    for leaf in leaves(axis):
        yield leaf
        for part in leaf.parts:
            yield from everything(part)


def size_of(axis: Axis) -> int:
    """Return the product of the atoms' sizes."""
    return math.prod(atom.size for atom in leaves(axis))


def split(atom: Atom, size: int) -> list[Atom]:
    """Make ``atom`` a product with a last factor of ``size``; return the two factors."""
    factors = [
        Atom(n, atom.kind, atom.index, births=atom.births) for n in (atom.size // size, size)
    ]
    for factor in factors:
        factor.origin = atom
        factor.lost = "a reshape of a concatenation" if atom.parts else atom.lost
        factor.is_tokens = atom.is_tokens
        factor.is_scanned = atom.is_scanned
        factor.is_used = atom.is_used
    for leaf in everything((atom,)) if atom.parts else ():
        leaf.lost = "a reshape of a concatenation"
    atom.parts = []
    atom.factors = factors
    return factors


def unify(one: Axis, other: Axis) -> Axis:
    """Record that two axes are the same, and return it."""
    if one is None or other is None:
        return other if one is None else one
    a, b = leaves(one), leaves(other)
    while a and b:
        x, y = a.pop(), b.pop()
        if x is y:
            continue
        if x.size == y.size:
            _merge(x, y)
        elif x.size % y.size == 0:
            a += split(x, y.size)
            b.append(y)
        elif y.size % x.size == 0:
            b += split(y, x.size)
            a.append(x)
        else:
            lose((x, y, *a, *b), "a reshape that keeps no axis")
            break
    return one


def _merge(x: Atom, y: Atom) -> None:
    if y.parts and not x.parts:
        x, y = y, x
    if x.parts and y.parts:
        if [size_of(part) for part in x.parts] == [size_of(part) for part in y.parts]:
            for one, other in zip(x.parts, y.parts):
                unify(one, other)
        else:
            x.lost = "a sum of unlike concatenations"
    if x.kind and y.kind and (x.kind, x.index) != (y.kind, y.index):
        x.lost = "a sum over space and channels"
    if not x.kind and y.kind:
        mark((x,), y.kind, y.index)
    x.births |= y.births
    x.lost = x.lost or y.lost
    x.is_tokens |= y.is_tokens
    x.is_scanned |= y.is_scanned
    x.is_used |= y.is_used
    x.origin = x.origin or y.origin
    y.same = x


def mark(axis: Axis, kind: str, index: int = -1, birth: str = "") -> None:
    """Set the kind of an axis where it is not known yet."""
    for leaf in everything(axis):
        if birth:
            leaf.births.add(birth)
        if not leaf.kind:
            leaf.kind = kind
            leaf.index = index


def lose(axis: Axis, why: str) -> None:
    """Record the operation after which the order of an axis is unknown."""
    for leaf in everything(axis):
        leaf.lost = leaf.lost or why


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis] | None:
    """Return the axes of a reshape to ``shape``; None if they do not follow."""
    stack: list[Atom] = []
    if size := math.prod(shape):
        for axis in axes:
            stack += leaves(axis)
    if math.prod(atom.size for atom in stack) != size:
        return None
    made: list[Axis] = []
    for dim in reversed(shape):
        need = dim
        atoms: list[Atom] = []
        while need > 1:
            atom = stack.pop()
            if need % atom.size == 0:
                atoms.insert(0, atom)
                need //= atom.size
            elif atom.size % need == 0:
                stack += split(atom, need)
            else:
                return None
        made.insert(0, tuple(atoms))
    held = [leaves(axis) for axis in made]
    if any(found and all(leaf.kind != "space" for leaf in found) for found in held[1:]):
        for found in held:
            if len(found) > 1 and all(leaf.kind == "space" for leaf in found):
                for leaf in found:
                    leaf.is_tokens = True
    return made


def torch_order(atoms: Sequence[Atom]) -> list[int] | None:
    """Return the positions of a merged axis's atoms in torch's order, None for their own order.

    In torch, the channels of a feature map come before its space. Raises Unclear.
    """
    lost = next((atom.lost for atom in atoms if atom.lost), "")
    if lost:
        raise Unclear(f"its axis cannot be followed through {lost}")
    kinds = "".join({"space": "S", "channel": "C"}.get(atom.kind, "U") for atom in atoms)
    untyped = [atom for atom in atoms if not atom.kind]
    if len(atoms) < 2 or set(kinds) in ({"S"}, {"C"}):
        return None
    if not set(kinds) & {"S", "C"}:
        if sum("input" in atom.births for atom in atoms) > 2:
            sizes = tuple(atom.size for atom in atoms)
            raise Unclear(
                f"it takes axes of the module's input, {sizes}; their order in the twin is unknown"
            )
        return None
    if any(atom.births - {"input"} for atom in untyped) or kinds.lstrip("U") != kinds.replace(
        "U", ""
    ):
        raise Unclear(f"it takes {_described(atoms)}, of which not all are a feature map's")
    at, rest = len(untyped), kinds.lstrip("U")
    spaces = [atom.index for atom in atoms if atom.kind == "space"]
    if ("CS" in rest and "SC" in rest) or spaces != sorted(spaces) or not _complete(atoms):
        raise Unclear(f"it takes {_described(atoms)}, which is no whole feature map in its order")
    if "SC" not in rest:
        return None
    # True for a vector that was reshaped to a map.
    one_origin = all(
        atom.origin and _root(atom) is _root(atoms[0]) and "conv" not in atom.births
        for atom in atoms
    )
    tokenwise = any("linear" in atom.births for atom in atoms if atom.kind == "channel")
    if not one_origin and (tokenwise or any(atom.is_tokens for atom in atoms)):
        raise Unclear(
            f"it takes {_described(atoms)}; torch may hold them as (tokens, "
            f"channels) or the other way round"
        )
    space = rest.index("C")
    return [*range(at), *range(at + space, len(atoms)), *range(at, at + space)]


def _root(atom: Atom) -> Atom:
    """Return the original atom of which ``atom`` is a factor."""
    while atom.origin is not None:
        atom = atom.origin
    return atom


def _complete(atoms: Sequence[Atom]) -> bool:
    """Return whether factors of space are together, all of them, in their order.

    The factors of one whole axis may be a map.
    """
    ids = [id(atom) for atom in atoms]
    for atom in atoms:
        at = atom.origin
        while at is not None and at.kind == "space":
            wanted = [id(leaf) for leaf in leaves((at,))]
            if wanted[0] not in ids or ids[ids.index(wanted[0]) :][: len(wanted)] != wanted:
                return False
            at = at.origin
    return True


def _described(atoms: Sequence[Atom]) -> str:
    return " x ".join(
        f"{atom.size} ({atom.kind or 'of a kind that no convolution shows'})" for atom in atoms
    )


def index_order(axis: Sequence[Atom]) -> np.ndarray | None:
    """Return, for each position in torch, that in JAX, for an axis with concatenations.

    None if all positions are equal. Raises Unclear.
    """
    atoms = list(axis)
    if len(atoms) == 1 and atoms[0].parts:
        made: list[np.ndarray] = []
        at = 0
        for part in atoms[0].parts:
            size, order = size_of(part), index_order(leaves(part))
            made.append(at + (np.arange(size) if order is None else order))
            at += size
        index = np.concatenate(made)
    else:
        positions = torch_order(atoms)
        if positions is None:
            return None
        sizes = [atom.size for atom in atoms]
        index = np.arange(math.prod(sizes)).reshape(sizes).transpose(positions).reshape(-1)
    return None if np.array_equal(index, np.arange(index.size)) else index
