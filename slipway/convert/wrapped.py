"""Sources that read tensors without the names of wrappers that training code puts around a model.

Not here: the list of wrappers (slipway/checkpoint/names.py).
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
    """A source that reads tensors under other names."""

    source: Source
    held: Mapping[str, str]  # new name -> name in the source

    @property
    def path(self) -> Path | None:
        """Path of the source on this machine, if any."""
        return self.source.path

    @property
    def location(self) -> str:
        """Location of the source, for errors and reports."""
        return self.source.location

    @property
    def stamp(self) -> str:
        """Stamp of the source."""
        return self.source.stamp

    @property
    def mapped(self) -> bool:
        """Whether the source gives views of files."""
        return self.source.mapped

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor, by new name."""
        specs = self.source.specs
        return {new: specs[old] for new, old in self.held.items()}

    def open(self, name: str) -> contextlib.AbstractContextManager[np.ndarray]:
        """Open the tensor with this new name."""
        return self.source.open(self.held[name])

    def drop(self, name: str) -> None:
        """Give back memory that reading has made resident."""
        self.source.drop(self.held[name])

    @property
    def note(self) -> str:
        """Description of the renaming, by an example."""
        new, old = next((new, old) for new, old in self.held.items() if new != old)
        return f"names: without the wrappers of training code: {old} is {new}"


def declared(source: Source, wanted: Container[str]) -> RenamedSource | None:
    """Return the source under the ``wanted`` names, without wrappers.

    None if it has these names already, or other ones. Raises CheckpointError for tensors of an
    adapter that is not merged, and for two names of one tensor.
    """
    own = source.specs.keys()
    if all(name in wanted for name in own):
        return None
    found = names.plain(own, wanted)
    return _renamed(source, found) if all(name in wanted for name in found.values()) else None


def bare(source: Source) -> RenamedSource | None:
    """Return the source under its names without any wrapper.

    None where no name has a wrapper, or two names become the same.
    """
    return _renamed(source, {name: names.bare(name) for name in source.specs})


def _renamed(source: Source, found: Mapping[str, str]) -> RenamedSource | None:
    held = {new: old for old, new in found.items()}
    return (
        RenamedSource(source, held)
        if len(held) == len(found) and held.keys() != found.keys()
        else None
    )
