"""Decides how a checkpoint on disk becomes named arrays that can be opened one at a time. Knows formats, no models.

Names are dotted paths: list indices are numbers, and what a format wraps around a leaf (``.value`` of NNX) is gone.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slipway.checkpoint import files
from slipway.checkpoint.shards import Spec


class Source(Protocol):
    """A checkpoint that has been opened but not read."""

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine; None elsewhere and in memory."""

    @property
    def location(self) -> str:
        """Where it was found, for errors and reports."""

    @property
    def stamp(self) -> str:
        """What changes when it is written anew, beside the times of the files at ``path``."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor's dtype and shape."""

    @property
    def mapped(self) -> bool:
        """Whether ``open`` gives views of files, which take no memory of their own."""

    def open(self, name: str) -> contextlib.AbstractContextManager[np.ndarray]:
        """One tensor, C-contiguous, read-only, valid inside the context; leaving it frees what it took.

        Threads may open different tensors at a time. Raises CheckpointError where the file does not hold it.
        """

    def drop(self, name: str) -> None:
        """Give back what reading an open tensor has made resident; it stays valid."""


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """safetensors: an HF directory, or one file."""

    checkpoint: files.Checkpoint
    address: str = ""  # of what it is a copy

    mapped = True
    stamp = ""

    @property
    def path(self) -> Path:
        """The directory or file."""
        return self.checkpoint.directory

    @property
    def location(self) -> str:
        """The address, or the path."""
        return self.address or str(self.path)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every tensor's dtype and shape."""
        return {name: Spec(files.DTYPES[t.dtype], t.shape) for name, t in self.checkpoint.tensors.items()}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """A view of the file, whose pages are given back afterwards."""
        try:
            yield self.checkpoint.array(name)
        finally:
            self.checkpoint.drop(name)

    def drop(self, name: str) -> None:
        """Unmap the pages read so far."""
        self.checkpoint.drop(name)


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """A pytree of NumPy or JAX arrays: nested mappings, sequences and NNX states, or a flat mapping of dotted names."""

    arrays: Mapping[str, Any]

    mapped = True
    path = None
    location = "the tree"
    stamp = ""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Every array's dtype and shape."""
        return {name: Spec(np.dtype(x.dtype), tuple(x.shape)) for name, x in self.arrays.items()}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """The array itself where it is a NumPy array, else a copy on the host."""
        yield np.ascontiguousarray(np.asarray(self.arrays[name])).reshape(np.shape(self.arrays[name]))

    def drop(self, name: str) -> None:
        """Nothing: the arrays are the caller's."""


def flatten(tree: Any) -> dict[str, Any]:
    """Dotted names and leaves of nested mappings, sequences and NNX states; Nones and ``.value`` are gone."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                walk(child, (*path, str(key)))
        elif isinstance(node, list | tuple):
            for i, child in enumerate(node):
                walk(child, (*path, str(i)))
        elif node is not None:
            flat[dotted(path)] = node

    walk(tree, ())
    return flat


def dotted(path: tuple[str, ...]) -> str:
    """The name of a leaf at ``path``, without the ``value`` or ``raw_value`` in which NNX wraps it."""
    keys = path[:-1] if len(path) > 1 and path[-1] in ("value", "raw_value") else path
    return ".".join(key.replace("/", ".") for key in keys)


def fingerprint(source: Source) -> str:
    """A hash of what the source says it holds and of its stamp, its files' sizes and times: equal if unchanged."""
    specs = sorted((n, str(s.dtype), s.shape) for n, s in source.specs.items())
    digest = hashlib.sha256(repr((specs, source.stamp)).encode())
    if source.path is not None:
        paths = [source.path] if source.path.is_file() else sorted(p for p in source.path.rglob("*") if p.is_file())
        for file in paths:
            stat = file.stat()
            digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
