"""Checkpoints as named arrays that are opened one at a time.

Names are dotted paths in which list indices are numbers, without the ``.value`` that NNX wraps
around leaves. Not here: detection of formats (formats.py), conversion of an array (rules.py).
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slipway.checkpoint import files
from slipway.checkpoint.shards import Spec
from slipway.errors import CheckpointError

WRAPPERS = ("value", "raw_value")  # keys under which NNX may hold a leaf


class Source(Protocol):
    """A checkpoint that is open; no values have been read."""

    @property
    def path(self) -> Path | None:
        """Path on this machine; None for remote sources and sources in memory."""

    @property
    def location(self) -> str:
        """Location for errors and reports."""

    @property
    def stamp(self) -> str:
        """Text that changes when the source is rewritten.

        It complements the times of the files at ``path``.
        """

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor."""

    @property
    def mapped(self) -> bool:
        """Whether ``open`` gives views of files, which take no memory of their own."""

    def open(self, name: str) -> contextlib.AbstractContextManager[np.ndarray]:
        """Open one tensor, C-contiguous and read-only, for the duration of a context.

        Leaving the context frees its memory. Threads may open different tensors at a time. Raises
        CheckpointError where the file does not hold it.
        """

    def drop(self, name: str) -> None:
        """Give back memory that reading an open tensor has made resident.

        The tensor stays valid.
        """


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """Tensors of an HF directory, or of one safetensors file."""

    checkpoint: files.Checkpoint
    address: str = ""  # of the original, if this is a copy

    mapped = True
    stamp = ""

    @property
    def path(self) -> Path:
        """Path of the directory or file."""
        return self.checkpoint.directory

    @property
    def location(self) -> str:
        """Address if there is one, else the path."""
        return self.address or str(self.path)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor."""
        return {
            name: Spec(files.DTYPES[t.dtype], t.shape)
            for name, t in self.checkpoint.tensors.items()
        }

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """Yield a view of the file; its pages are given back afterwards."""
        try:
            yield self.checkpoint.array(name)
        finally:
            self.checkpoint.drop(name)

    def drop(self, name: str) -> None:
        """Unmap the pages that were read so far."""
        self.checkpoint.drop(name)


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """A pytree of NumPy or JAX arrays.

    It has nested mappings, sequences and NNX states, or is a flat mapping of dotted names.
    """

    arrays: Mapping[str, Any]

    mapped = True
    path = None
    location = "the tree"
    stamp = ""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every array, without random-number state."""
        return {
            name: Spec(np.dtype(x.dtype), tuple(x.shape))
            for name, x in self.arrays.items()
            if not is_random_state(x)
        }

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """Yield the array itself if it is a NumPy array, else a copy on the host."""
        yield np.ascontiguousarray(np.asarray(self.arrays[name])).reshape(
            np.shape(self.arrays[name])
        )

    def drop(self, name: str) -> None:
        """Do nothing: the caller owns the arrays."""


@dataclasses.dataclass(frozen=True)
class JoinedSource:
    """Several sources with parts of one tree, which is at ``path``."""

    path: Path
    parts: Mapping[str, Source]  # by name of the tensor

    stamp = ""

    @staticmethod
    def of(path: Path, sources: Iterable[Source]) -> "JoinedSource":
        """Join sources. Raises CheckpointError for a tensor that two of them hold."""
        parts: dict[str, Source] = {}
        for source in sources:
            if twice := sorted(parts.keys() & source.specs.keys()):
                where = f"in {parts[twice[0]].location} and in {source.location}"
                raise CheckpointError(path, [f"{name}: {where}" for name in twice])
            parts |= dict.fromkeys(source.specs, source)
        return JoinedSource(path, parts)

    @property
    def location(self) -> str:
        """Path of the tree."""
        return str(self.path)

    @property
    def mapped(self) -> bool:
        """Whether all parts are views of files."""
        return all(source.mapped for source in self.parts.values())

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor."""
        specs = {id(source): source.specs for source in self.parts.values()}
        return {name: specs[id(source)][name] for name, source in self.parts.items()}

    def open(self, name: str) -> contextlib.AbstractContextManager[np.ndarray]:
        """Open the tensor in the part that holds it."""
        return self.parts[name].open(name)

    def drop(self, name: str) -> None:
        """Give back memory that reading has made resident."""
        self.parts[name].drop(name)


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of nested mappings, sequences and NNX states under dotted names.

    Nones are left out. Raises CheckpointError if two leaves have the same dotted name.
    """
    leaves: dict[tuple[str, ...], Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                walk(child, (*path, str(key)))
        elif isinstance(node, list | tuple):
            for i, child in enumerate(node):
                walk(child, (*path, str(i)))
        elif node is not None:
            leaves[path] = node

    walk(tree, ())
    return {name: leaves[path] for path, name in dotted_names(leaves).items()}


def is_random_state(leaf: Any) -> bool:
    """Return whether a leaf is a PRNG key, or a variable in which NNX keeps keys and their counts.

    Types are recognized by name: a conversion starts without importing JAX.
    """
    is_key = str(getattr(leaf, "dtype", "")).startswith("key<")  # such as key<fry>
    return is_key or any(kind.__name__ == "RngState" for kind in type(leaf).__mro__)


def dotted_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the dotted name of every leaf of a tree, given the paths of all of them.

    NNX wraps each leaf in a mapping with the only key ``value`` (or ``raw_value``). Such wrappers
    are removed if most leaves below the top have one: a tree may hold an NNX state beside plain
    leaves. In any other tree, ``value`` is a name like any other.

    Raises CheckpointError if two paths have the same name.
    """
    paths = list(paths)
    children: dict[tuple[str, ...], set[str]] = {}
    for path in paths:
        for end in range(len(path)):
            children.setdefault(path[:end], set()).add(path[end])
    inner = [path for path in paths if len(path) > 1 and path[0] != "opt_state"]
    wrapped = {p for p in paths if len(p) > 1 and p[-1] in WRAPPERS and len(children[p[:-1]]) == 1}
    is_state = 2 * len(wrapped.intersection(inner)) > len(inner)
    names = {path: _joined(path[:-1] if is_state and path in wrapped else path) for path in paths}
    held: dict[str, list[str]] = {}
    for path, name in names.items():
        held.setdefault(name, []).append("/".join(path))
    problems = [
        f"{name}: {' and '.join(same)} have this name; rename one of them"
        for name, same in held.items()
        if len(same) > 1
    ]
    if problems:
        raise CheckpointError("the tree", problems)
    return names


def _joined(path: tuple[str, ...]) -> str:
    return ".".join(key.replace("/", ".") for key in path)


def fingerprint(source: Source) -> str:
    """Return a hash of the source's specs, its stamp, and sizes and times of its files.

    It is equal if the source is unchanged.
    """
    specs = sorted((n, str(s.dtype), s.shape) for n, s in source.specs.items())
    digest = hashlib.sha256(repr((specs, source.stamp)).encode())
    if source.path is not None:
        paths = (
            [source.path]
            if source.path.is_file()
            else sorted(p for p in source.path.rglob("*") if p.is_file())
        )
        for file in paths:
            stat = file.stat()
            digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return digest.hexdigest()
