"""Sources whose names are Hugging Face's below the wrappers that training code puts around a model.

Not here: which wrappers there are (checkpoint/names.py).
"""

import contextlib
import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np

from slipway.checkpoint import names
from slipway.checkpoint.shards import Spec
from slipway.convert.source import Source


@dataclasses.dataclass(frozen=True)
class RenamedSource:
    """A source whose tensors are read under other names."""

    source: Source
    held: Mapping[str, str]  # new name -> the source's own

    @property
    def path(self) -> Path | None:
        """Where the source lies."""
        return self.source.path

    @property
    def location(self) -> str:
        """Where the source was found."""
        return self.source.location

    @property
    def stamp(self) -> str:
        """The source's own."""
        return self.source.stamp

    @property
    def mapped(self) -> bool:
        """Whether the source gives views of files."""
        return self.source.mapped

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor's dtype and shape, under its new name."""
        specs = self.source.specs
        return {new: specs[old] for new, old in self.held.items()}

    def open(self, name: str) -> contextlib.AbstractContextManager[np.ndarray]:
        """The tensor of this new name."""
        return self.source.open(self.held[name])

    def drop(self, name: str) -> None:
        """Give back what reading has made resident."""
        self.source.drop(self.held[name])

    @property
    def note(self) -> str:
        """Which names are read as which, by an example."""
        new, old = next((new, old) for new, old in self.held.items() if new != old)
        return f"names: without what training code puts around a model: {old} is {new}"


def declared(source: Source, wanted: Container[str]) -> RenamedSource | None:
    """Return the source under the ``wanted`` names below its wrappers; None if it has these already, or has others.

    Raises CheckpointError for tensors of an adapter that is not merged, and for two names of one tensor.
    """
    own = source.specs.keys()
    if all(name in wanted for name in own):
        return None
    found = names.plain(own, wanted)
    return _renamed(source, found) if all(name in wanted for name in found.values()) else None


def bare(source: Source) -> RenamedSource | None:
    """Return the source under its names without any wrapper; None where none has one, or two names become the same."""
    return _renamed(source, {name: names.bare(name) for name in source.specs})


def _renamed(source: Source, found: Mapping[str, str]) -> RenamedSource | None:
    held = {new: old for old, new in found.items()}
    return (
        RenamedSource(source, held)
        if len(held) == len(found) and held.keys() != found.keys()
        else None
    )
