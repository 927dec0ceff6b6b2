"""Orbax checkpoints, read and written through tensorstore, without Orbax.

Here are the place of a tree below a directory and the names of its leaves. Format:
https://orbax.readthedocs.io (``_METADATA`` and one zarr array for each leaf, in OCDBT or in
folders). Not here: buckets (remote.py), rules between names (mappings/).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint import shards
from slipway.checkpoint.shards import Spec
from slipway.convert import remote
from slipway.convert.remote import RemotePath, refused
from slipway.convert.source import dotted_names
from slipway.convert.writer import ASIDE, JOURNAL, Facts, Pieces, journal
from slipway.errors import CheckpointError

METADATA = "_METADATA"
# Folders in which Orbax's managers put a tree.
_ITEMS = ("default", "items", "state", "params", "model")
_STEP = re.compile(r"(?:.*[_-])?(\d+)")
_NO_ARRAYS = ("Dict", "List", "Tuple", "NamedTuple", "None", "string")
_ARRAY_FILES = ("zarr.json", ".zarray")
_CHUNK_BYTES = 1 << 26  # of one written chunk, which is encoded at a time
Place = Path | RemotePath


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the store: its key, and the object that tensorstore has opened."""

    key: str
    spec: Spec
    store: Any


@dataclasses.dataclass(frozen=True)
class OrbaxSource:
    """A tree in an Orbax checkpoint."""

    path: Path | None
    location: str
    leaves: Mapping[str, Leaf]
    stamp: str = ""

    mapped = False

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every leaf."""
        return {name: leaf.spec for name, leaf in self.leaves.items()}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """Yield the whole leaf, read into memory."""
        leaf = self.leaves[name]
        with refused(self.location, f"{name}: cannot be read"):
            array = leaf.store.read(order="C").result()
        yield np.asarray(array, leaf.spec.dtype)

    def drop(self, name: str) -> None:
        """Do nothing: a leaf is in memory until it is closed."""


def open_orbax(place: Place) -> OrbaxSource:
    """Open the tree in a directory, or in a folder of a bucket.

    Of a directory of steps, the newest complete one is opened. Raises CheckpointError for anything
    else, and for leaves with missing data.
    """
    ts, base = remote.tensorstore(str(place)), _find_tree(place)
    if isinstance(base, Path):
        leaves = _open_leaves(ts, str(place), {"driver": "file", "path": f"{base.absolute()}/"})
        return OrbaxSource(base, str(place), leaves)
    leaves = _open_leaves(ts, str(place), base.kvstore)
    return OrbaxSource(
        None, str(place), leaves, stamp=remote.stamp(base, (METADATA, "manifest.ocdbt"))
    )


def _open_leaves(ts: Any, location: str, root: dict[str, Any]) -> dict[str, Leaf]:
    """Open every array below ``root``.

    Raises CheckpointError, listing the arrays that cannot be opened or are incomplete.
    """
    context = remote.context(ts)
    with refused(location, "the store cannot be read"):
        files = ts.KvStore.open(root, context=context).result()
        text = files.read(METADATA).result().value or b"{}"
        is_ocdbt = bool(files.read("manifest.ocdbt").result().value)
        kvstore = {"driver": "ocdbt", "base": root} if is_ocdbt else root
        keys = [
            key.decode()
            for key in ts.KvStore.open(kvstore, context=context).result().list().result()
        ]
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise CheckpointError(location, [f"{METADATA}: not readable as JSON: {error}"]) from error
    names, held = dict(_named(metadata, keys)), frozenset(keys)
    opening = {
        name: ts.open(
            {
                "driver": "zarr3" if f"{key}/zarr.json" in held else "zarr",
                "kvstore": _below(kvstore, key),
            },
            open=True,
            context=context,
        )
        for name, key in names.items()
    }
    leaves, problems = {}, []
    counts = _chunk_counts(keys)
    for name, future in opening.items():
        try:
            with refused(location, f"{name}: cannot be opened"):
                array = future.result()
        except CheckpointError as error:
            problems += error.problems
            continue
        leaves[name] = Leaf(
            names[name], Spec(np.dtype(array.dtype.numpy_dtype), tuple(array.shape)), array
        )
        if metadata.get("store_array_data_equal_to_fill_value"):
            grid = array.chunk_layout.write_chunk.shape
            chunks = math.prod(
                -(-size // max(1, chunk)) for size, chunk in zip(array.shape, grid or ())
            )
            if (held_chunks := counts.get(names[name], 0)) < chunks:
                problems.append(
                    f"{name}: {chunks - held_chunks} of its {chunks} chunks are missing"
                )
    if not names:
        problems.append("no arrays found: neither _METADATA nor zarr arrays")
    if problems:
        raise CheckpointError(location, problems)
    return leaves


def is_orbax(path: Place) -> bool:
    """Return whether a directory looks like an Orbax checkpoint, or like steps of one."""
    try:
        _find_tree(path)
    except _SeveralItems:  # open_orbax lists them
        return True
    except CheckpointError:
        return False
    return True


class OrbaxWriter:
    """Writer of a tree in the form of Orbax's PyTree handler: zarr3 in OCDBT, uncompressed.

    Compressing bf16 weights with zstd saves about a fifth of the size and takes several times as
    long. ``item`` is the folder of the tree below ``directory`` (MaxText's ``0/items``),
    ``constants`` are integers that are leaves too, ``empties`` empty dictionaries.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, Spec],
        identity: str,
        resume: bool,
        item: str = "",
        constants: Mapping[str, int] | None = None,
        empties: tuple[str, ...] = (),
    ):
        self._ts = remote.tensorstore(str(directory))
        self._directory = directory
        self._aside = directory / ASIDE
        self._specs = specs
        self._tree = self._aside / item
        self._identity = identity
        self._lock = threading.Lock()
        self._constants = dict(constants or {})
        self._empties = empties
        self._done = journal(self._aside, identity) if resume else {}
        if not self._done and self._aside.exists():
            shutil.rmtree(self._aside)
        self._tree.mkdir(parents=True, exist_ok=True)
        self._kvstore = {"driver": "ocdbt", "base": f"file://{self._tree.absolute()}/"}

    def write(self, name: str, pieces: Pieces) -> None:
        """Write one leaf, assembled in memory."""
        spec = self._specs[name]
        whole: np.ndarray | None = None
        for first, piece in pieces:
            if piece.size == math.prod(spec.shape):  # assembled already
                whole = piece
                continue
            if whole is None:
                whole = np.empty(math.prod(spec.shape), spec.dtype)
            whole[first : first + piece.size] = piece
        self._put(
            name, np.empty(spec.shape, spec.dtype) if whole is None else whole.reshape(spec.shape)
        )

    def done(self) -> Mapping[str, Facts]:
        """Return the leaves that an earlier run completed, with the facts that it recorded."""
        return dict(self._done)

    def mark(self, name: str, facts: Facts) -> None:
        """Record a leaf as written; tensorstore has made it durable."""
        with self._lock:
            self._done[name] = facts
            shards.write_json(
                self._aside / JOURNAL, {"identity": self._identity, "done": self._done}
            )

    def finish(self) -> None:
        """Write the metadata and move the tree into place."""
        for name, number in self._constants.items():
            self._put(name, np.asarray(number))
        scalars = {name: "scalar" for name in self._constants}
        kinds = (
            dict.fromkeys(self._specs, "np.ndarray")
            | scalars
            | dict.fromkeys(self._empties, "Dict")
        )
        tree = {
            str(tuple(name.split("."))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],
                "value_metadata": {"value_type": kind, "skip_deserialize": kind == "Dict"},
            }
            for name, kind in kinds.items()
        }
        facts = {"use_ocdbt": True, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
        (self._tree / METADATA).write_text(
            json.dumps({"tree_metadata": tree, **facts, "custom_metadata": None})
        )
        top = self._tree.parent if self._tree != self._aside else self._tree
        handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
        handlers: Any = {self._tree.name: handler} if self._tree != self._aside else handler
        (top / "_CHECKPOINT_METADATA").write_text(
            json.dumps({"item_handlers": handlers, "custom_metadata": {}})
        )
        (self._aside / JOURNAL).unlink(missing_ok=True)
        for path in sorted(self._aside.iterdir()):
            os.replace(path, self._directory / path.name)
        shutil.rmtree(self._aside)

    def abandon(self) -> None:
        """Remove everything that was written."""
        shutil.rmtree(self._aside)

    def _put(self, name: str, array: np.ndarray) -> None:
        rows = (
            max(1, _CHUNK_BYTES // max(1, array.nbytes // max(1, array.shape[0])))
            if array.ndim
            else 1
        )
        chunk = [min(rows, array.shape[0]), *array.shape[1:]] if array.ndim else []
        metadata = {
            "shape": list(array.shape),
            "data_type": array.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [max(1, size) for size in chunk]},
            },
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": _below(self._kvstore, name),
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
        }
        store = self._ts.open(spec, create=True, delete_existing=True).result()
        if not array.ndim:
            store.write(array).result()
        # One chunk at a time is encoded.
        for start in range(0, array.shape[0] if array.ndim else 0, rows):
            part = array[start : start + rows]
            store[start : start + len(part)].write(
                part, can_reference_source_data_indefinitely=True
            ).result()


class _SeveralItems(CheckpointError):
    """Several items of a step may be the model."""


def _find_tree(path: Place) -> Place:
    """Return the directory with the tree itself.

    It is ``path``, a folder of it, or a folder of its newest step.
    """
    if _is_tree(path):
        return path
    held = [path / item for item in _ITEMS if _is_tree(path / item)]
    if held:
        return held[0]
    if items := _items(path):
        return items
    steps = {}
    for folder in path.iterdir() if path.is_dir() else ():
        found = _STEP.fullmatch(folder.name)
        if found and folder.is_dir():
            steps[int(found[1])] = folder
    committed = {
        n: f
        for n, f in steps.items()
        if any((f / m).exists() for m in ("_CHECKPOINT_METADATA", "commit_success.txt"))
    }
    for _, folder in sorted((committed or steps).items(), reverse=True):
        return _find_tree(folder)
    raise CheckpointError(
        path, ["no Orbax checkpoint: no _METADATA, no zarr arrays, no step directories"]
    )


def _items(path: Place) -> Place | None:
    """Return the only tree below a step's directory, whatever its name, without optimizer state.

    Raises _SeveralItems, listing the items, where several remain: one of them must be given by its
    path.
    """
    folders = [
        folder
        for folder in (path.iterdir() if path.is_dir() else ())
        if not _STEP.fullmatch(folder.name)
    ]
    held = [f for f in folders if not f.name.startswith(("opt", "rng")) and _is_tree(f)]
    if len(held) > 1:
        names = ", ".join(sorted(folder.name for folder in held))
        raise _SeveralItems(
            path, [f"several items: {names}; give the path of the one that holds the model"]
        )
    return held[0] if held else None


def _is_tree(path: Place) -> bool:
    if not path.is_dir():
        return False
    if (path / METADATA).is_file() or (path / "manifest.ocdbt").is_file():
        return True
    return any((folder / file).is_file() for folder in path.iterdir() for file in _ARRAY_FILES)


def _named(metadata: Mapping[str, Any], keys: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the dotted name of every array and its key in the store."""
    paths: dict[tuple[str, ...], str] = {}
    tree = metadata.get("tree_metadata")
    for key in keys if tree is None else ():
        folder, _, file = key.rpartition("/")
        if file in _ARRAY_FILES:
            paths[tuple(folder.split("."))] = folder
    for entry in (tree or {}).values():
        value = entry["value_metadata"]
        if value["value_type"] not in _NO_ARRAYS and not value.get("skip_deserialize"):
            path = tuple(str(part["key"]) for part in entry["key_metadata"])
            paths[path] = ".".join(path)
    for path, name in dotted_names(paths).items():
        yield name, paths[path]


def _chunk_counts(keys: list[str]) -> dict[str, int]:
    """Return the number of chunks that the store holds of every array."""
    counts: dict[str, int] = {}
    for key in keys:
        folder, _, rest = key.partition("/")
        if rest and rest not in (*_ARRAY_FILES, ".zattrs", ".zgroup"):
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def _below(kvstore: dict[str, Any], key: str) -> dict[str, Any]:
    return {**kvstore, "path": f"{kvstore.get('path', '')}{key}/"}
