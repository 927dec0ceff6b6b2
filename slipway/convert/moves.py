"""Moves of numbers between two tensors, with their axes taken apart.

Not here: which moves a conversion consists of (plan.py), the copy of one (transfer.py).
"""

import dataclasses
import math
from typing import Any

from slipway.convert.rules import Rule


@dataclasses.dataclass(frozen=True)
class End:
    """One tensor's share in a move: its axes taken apart, and the range of each that takes part."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    split: tuple[int, ...]
    take: tuple[slice, ...]
    data_size: int  # elements that are not padding

    @property
    def filled(self) -> int:
        """Number of elements in the share."""
        return math.prod(
            len(range(*part.indices(size))) for part, size in zip(self.take, self.split)
        )

    @property
    def is_whole(self) -> bool:
        """Whether the share is the whole tensor."""
        return all(
            len(range(*part.indices(size))) == size for part, size in zip(self.take, self.split)
        )

    def view(self, array: Any, order: tuple[str, ...]) -> Any:
        """Return the share as a view of ``array``, axes in ``order``; a missing axis has size 1."""
        taken: Any = (*self.take, ...)  # the ellipsis makes a view, even of a scalar
        atoms = array.reshape(self.split)[taken]
        kept = [axis for axis in order if axis in self.axes]
        dropped = [axis for axis in self.axes if axis not in order]
        first: Any = (*(0,) * len(dropped), ...)
        atoms = atoms.transpose([self.axes.index(axis) for axis in (*dropped, *kept)])[first]
        spread: Any = (*(slice(None) if axis in self.axes else None for axis in order), ...)
        return atoms[spread]


@dataclasses.dataclass(frozen=True)
class Move:
    """Numbers to copy from ``source`` to ``target``, multiplied by ``factor``."""

    rule: Rule
    source: End
    target: End
    factor: float

    @property
    def order(self) -> tuple[str, ...]:
        """Axes in the order in which the target holds them."""
        return self.target.axes

    @property
    def copies(self) -> tuple[str, ...]:
        """Axes along which the source repeats the same numbers."""
        return tuple(axis for axis in self.source.axes if axis not in self.target.axes)
