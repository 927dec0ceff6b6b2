"""Writer of converted safetensors directories: written aside, flushed, and renamed when complete.

Everything is written below ``OUT/.slipway-convert`` first; ``finish`` moves it into place,
``abandon`` removes it. After a kill no file in OUT has the name of a checkpoint's file, and the
journal lists the tensors that are whole.

Not here: Orbax and .npz output (orbax.py, archives.py), the layout of a safetensors file
(slipway/checkpoint/shards.py).
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slipway.checkpoint import shards
from slipway.checkpoint.copying import start_writeback
from slipway.checkpoint.files import INDEX
from slipway.checkpoint.shards import PAGE, Spec
from slipway.convert.remote import is_address
from slipway.errors import InvalidConfig

ASIDE = ".slipway-convert"
JOURNAL = "journal.json"
JOURNAL_EVERY_S = 5.0

Facts = Mapping[str, Any]  # of values that JSON can hold
Pieces = Iterator[tuple[int, np.ndarray]]


class Writer(Protocol):
    """Output of a conversion. Threads may write different tensors at a time."""

    def write(self, name: str, pieces: Pieces) -> None:
        """Write one tensor from pieces (first element, numbers) in C order."""

    def done(self) -> Mapping[str, Facts]:
        """Return the tensors that an earlier run completed, with their recorded facts."""

    def mark(self, name: str, facts: Facts) -> None:
        """Record a tensor as written, so that a later run may leave it out."""

    def finish(self) -> None:
        """Put the complete output into place."""

    def abandon(self) -> None:
        """Remove everything that was written."""


class SafetensorsWriter:
    """Writer of the weights of an HF directory: preallocated shards, filled in any order.

    ``identity`` names the conversion: the journal of another conversion is not resumed.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, Spec],
        shard_size_bytes: int,
        identity: str,
        resume: bool,
    ):
        self._directory = directory
        self._aside = directory / ASIDE
        self._specs = specs
        self._shards = shards.plan_shards(specs, shard_size_bytes)
        self._identity = identity
        self._lock = threading.Lock()
        self._flushed_at = time.monotonic()
        self._done = journal(self._aside, identity) if resume else {}
        self._writing = threading.Lock()
        self._places: dict[str, tuple[str, int]] = {}  # name -> shard, first byte
        self._open_files()

    def write(self, name: str, pieces: Pieces) -> None:
        """Write one tensor into its shard.

        Whole pages bypass the page cache where the file system allows it; the rest does not.
        """
        shard, start = self._places[name]
        itemsize = self._specs[name].dtype.itemsize
        for first, piece in pieces:
            array, offset = piece.reshape(-1).view(np.uint8), start + first * itemsize
            if not offset % PAGE and not array.ctypes.data % PAGE:
                array, offset = self._write_pages(shard, array, offset)
            if array.size:
                file = self._files[shard]
                # One at a time: two threads that write to one file spin on its lock.
                with self._writing:
                    _write(file, array, offset)
                    start_writeback(file, offset, array.size)

    def _write_pages(self, shard: str, array: np.ndarray, offset: int) -> tuple[np.ndarray, int]:
        """Write the whole pages without the page cache, if possible.

        Return the rest and its offset.
        """
        size = array.size - array.size % PAGE
        if not size or shard not in self._direct:
            return array, offset
        try:
            _write(self._direct[shard], array[:size], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return array, offset  # this file system requires a larger alignment
        return array[size:], offset + size

    def done(self) -> Mapping[str, Facts]:
        """Return the tensors that an earlier run completed, with their recorded facts."""
        return dict(self._done)

    def mark(self, name: str, facts: Facts) -> None:
        """Record a tensor as written; the records become durable every few seconds."""
        with self._lock:
            self._done[name] = facts
            if time.monotonic() - self._flushed_at > JOURNAL_EVERY_S:
                self._flush()
                self._flushed_at = time.monotonic()

    def finish(self) -> None:
        """Flush and rename all shards and the files beside them, and write the index."""
        self._flush()
        for file in self._files.values():
            os.fsync(file)
        self._close()
        for path in sorted(self._aside.iterdir()):  # weights and what was put beside them
            if path.name != JOURNAL:
                place = self._directory / path.name
                if place.is_dir():  # a folder of templates, from a run that was killed here
                    shutil.rmtree(place)
                os.replace(path, place)
        if len(self._shards) > 1:
            weight_map = {name: shard for shard, names in self._shards.items() for name in names}
            total_size = sum(spec.nbytes for spec in self._specs.values())
            shards.write_json(
                self._directory / INDEX,
                {"metadata": {"total_size": total_size}, "weight_map": weight_map},
            )
        shutil.rmtree(self._aside)

    def abandon(self) -> None:
        """Remove everything that was written."""
        self._close()
        shutil.rmtree(self._aside)

    def _open_files(self) -> None:
        if not self._done and self._aside.exists():
            shutil.rmtree(self._aside)
        self._aside.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, int] = {}
        # The same files, opened past the page cache where the file system allows it.
        self._direct: dict[str, int] = {}
        for shard, names in self._shards.items():
            moved = self._directory / shard
            is_moved = moved.exists() and not (self._aside / shard).exists()
            if is_moved and self._done.keys() >= set(names):
                continue  # the earlier run was killed between two renames
            header, places = shards.header(
                self._directory / shard, {name: self._specs[name] for name in names}
            )
            file = os.open(self._aside / shard, os.O_RDWR | os.O_CREAT, 0o644)
            self._files[shard] = file
            size = len(header) + sum(self._specs[name].nbytes for name in names)
            # Sparse: writing into extents that were allocated ahead took ten times as long.
            os.ftruncate(file, size)
            os.pwrite(file, header, 0)
            self._places |= {name: (shard, place) for name, place in places.items()}
            with contextlib.suppress(OSError, AttributeError):
                self._direct[shard] = os.open(self._aside / shard, os.O_WRONLY | os.O_DIRECT)

    def _close(self) -> None:
        for file in (*self._files.values(), *self._direct.values()):
            os.close(file)

    def _flush(self) -> None:
        noted = dict(self._done)
        for file in self._files.values():
            os.fdatasync(file)
        shards.write_json(self._aside / JOURNAL, {"identity": self._identity, "done": noted})


def _write(file: int, array: np.ndarray, offset: int) -> None:
    data = memoryview(array.data)
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def journal(aside: Path, identity: str) -> dict[str, Facts]:
    """Return the entries of a journal, if it is of the same conversion; otherwise none."""
    try:
        journal: dict[str, Any] = json.loads((aside / JOURNAL).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return journal["done"] if journal.get("identity") == identity else {}


@contextlib.contextmanager
def new_directory(directory: Path, resume: bool) -> Iterator[None]:
    """Make ``directory`` for the output.

    Remove it if the context fails and it did not exist before.
    """
    if is_address(directory):
        raise InvalidConfig(
            "out_dir",
            str(directory),
            "a local directory: gs:// and s3:// have no rename and no fsync",
        )
    existed = directory.exists()
    # A conversion to resume may have put some of its files into place already.
    is_begun = resume and (directory / ASIDE).is_dir()
    if existed and not is_begun and not _is_empty(directory):
        raise InvalidConfig("out_dir", str(directory), "a new or an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:  # after an interruption, too, nothing stays
        if not existed:
            shutil.rmtree(directory)
        raise


def _is_empty(directory: Path) -> bool:
    """Return whether a directory holds nothing but an unfinished conversion."""
    return directory.is_dir() and all(path.name == ASIDE for path in directory.iterdir())
