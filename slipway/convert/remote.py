"""Addresses at ``gs://`` and ``s3://``: their contents listed, read and copied through tensorstore.

tensorstore finds the credentials. Nothing is written to such addresses: a conversion guarantees
that no file has its name before it is whole and on the disk, which needs rename and fsync, and
buckets have neither. Not here: formats (formats.py, orbax.py), except the length of a safetensors
file.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slipway.checkpoint.files import MAX_HEADER_BYTES
from slipway.checkpoint.hub import ALLOW_PATTERNS
from slipway.errors import CheckpointError

logger = logging.getLogger(__name__)
_DRIVERS = {"gs": "gcs", "s3": "s3"}
# Of a request, after 1, 2, 4, ... seconds: a minute in all; tensorstore's default of 32 takes a
# quarter of an hour.
_RETRIES = 6
PIECE_BYTES, _PIECES = 1 << 26, 4  # of one request, and number of requests at a time


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """A file or a folder of a bucket.

    It has the methods of pathlib.Path that finding a checkpoint needs. ``held``: contents of the
    bucket, as paths from here on; the empty path is a file of exactly this name.
    """

    scheme: str
    bucket: str
    key: str
    held: frozenset[str]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.key.rpartition("/")[2]

    @property
    def kvstore(self) -> dict[str, Any]:
        """Specification for tensorstore of the contents of a folder."""
        return store_spec(self.scheme, self.bucket, f"{self.key}/" if self.key else "")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "RemotePath":
        below = frozenset(
            key[len(name) + 1 :] for key in self.held if key == name or key.startswith(f"{name}/")
        )
        return dataclasses.replace(self, key=f"{self.key}/{name}".lstrip("/"), held=below)

    def iterdir(self) -> Iterator["RemotePath"]:
        """Return the files and folders directly below."""
        children: dict[str, set[str]] = {}
        for key in self.held - {""}:
            name, _, rest = key.partition("/")
            children.setdefault(name, set()).add(rest)
        for name, below in children.items():
            yield dataclasses.replace(
                self, key=f"{self.key}/{name}".lstrip("/"), held=frozenset(below)
            )

    def is_file(self) -> bool:
        """Return whether an object has exactly this name."""
        return "" in self.held

    def is_dir(self) -> bool:
        """Return whether there are objects below."""
        return bool(self.held - {""})

    def exists(self) -> bool:
        """Return whether this is a file or a folder."""
        return bool(self.held)


def is_address(location: object) -> bool:
    """Return whether ``location`` is an address, as text or made into a Path."""
    return "://" in str(location) or str(location).partition("/")[0] in {
        f"{scheme}:" for scheme in _DRIVERS
    }


def find(address: str) -> RemotePath:
    """Return the file or folder at an address, with every name below it listed.

    Raises CheckpointError if there is none, if it cannot be listed, and for an address of another
    kind.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in _DRIVERS or not bucket:
        expected = "a local path, gs://bucket/path or s3://bucket/path"
        raise CheckpointError(address, [f"an address that is not read; expected {expected}"])
    place = RemotePath(scheme, bucket, key.strip("/"), held=frozenset())
    ts = tensorstore(address)
    with refused(address, "cannot be listed"):
        store = ts.KvStore.open(place.kvstore, context=context(ts)).result()
        held = {
            name for found in store.list().result() if not (name := found.decode()).endswith("/")
        } - {""}
    if not held and _is_object(ts, place):
        held = {""}
    if not held:
        raise CheckpointError(
            address, ["nothing lies there: no such bucket or path, or no permission to list it"]
        )
    return dataclasses.replace(place, held=frozenset(held))


def copy_safetensors(folder: RemotePath, directory: Path) -> None:
    """Copy the files of an HF directory: of its top level, without pickles and other files.

    Files get a time that changes with the object, so that `--resume` recognizes them. Raises
    CheckpointError.
    """
    files = [path for path in folder.iterdir() if path.is_file() and _is_wanted(path.name)]
    logger.info("%s: %d files are copied to %s", folder, len(files), directory)
    ts = tensorstore(str(folder))
    store = ts.KvStore.open(folder.kvstore, context=context(ts)).result()
    for file in files:
        with refused(str(file), "cannot be copied"), (directory / file.name).open("wb") as out:
            is_large = file.name.endswith(".safetensors")
            head = store.read(file.name, byte_range=slice(0, 8) if is_large else None).result()
            for piece in _pieces(store, file.name, head.value) if is_large else (head.value,):
                out.write(piece)
        time = zlib.crc32(head.stamp.generation) >> 1  # before 2038, where some file systems end
        os.utime(directory / file.name, (time, time))


def stamp(folder: RemotePath, names: Sequence[str]) -> str:
    """Return the generations of some files, which change when they are written again."""
    ts = tensorstore(str(folder))
    with refused(str(folder), "cannot be read"):
        store = ts.KvStore.open(folder.kvstore, context=context(ts)).result()
        reads = [
            store.read(name, byte_range=slice(0, 1)) for name in names if (folder / name).is_file()
        ]
        return f"{folder}:{[read.result().stamp.generation for read in reads]}"


def context(ts: Any) -> Any:
    """Return the context that stores share: connections, and the number of retries."""
    return ts.Context(
        {f"{driver}_request_retries": {"max_retries": _RETRIES} for driver in _DRIVERS.values()}
    )


def tensorstore(location: str) -> Any:
    """Return the library. Raises CheckpointError with the way to install it."""
    try:
        import tensorstore as library  # an optional dependency, for Orbax and buckets
    except ModuleNotFoundError as error:
        needed = "Orbax checkpoints, gs:// and s3:// need tensorstore: pip install slipway[orbax]"
        raise CheckpointError(location, [needed]) from error
    return library


@contextlib.contextmanager
def refused(location: str, what: str) -> Iterator[None]:
    """Convert errors of tensorstore and of the disk to one CheckpointError."""
    try:
        yield
    except CheckpointError:  # also a ValueError, but it has its message already
        raise
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            location, [f"{what}: {str(error).strip().partition(chr(10))[0][:200]}"]
        ) from error


def store_spec(scheme: str, bucket: str, path: str) -> dict[str, Any]:
    """Return tensorstore's specification of a bucket, with endpoint and credentials."""
    spec: dict[str, Any] = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": path}
    if scheme == "s3":
        # A variable of AWS's own libraries that tensorstore does not read.
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint.rstrip("/")
        # Also the first choice by default, but then with warnings that ~/.aws does not exist.
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def _is_object(ts: Any, place: RemotePath) -> bool:
    """Return whether an object has exactly this name.

    It is read for that: where listing is not allowed, tensorstore gets an empty list from GCS, but
    a read states the reason.
    """
    with refused(str(place), "cannot be read"):
        store = ts.KvStore.open(
            store_spec(place.scheme, place.bucket, ""), context=context(ts)
        ).result()
        return (
            store.read(place.key or "_METADATA", byte_range=slice(0, 1)).result().state == "value"
        )


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in ALLOW_PATTERNS)


def _size(store: Any, name: str, head: bytes) -> int:
    """Return the end of a safetensors file's last tensor: tensorstore does not return sizes.

    The reader checks the rest of the header.
    """
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"claims a header of {length} bytes (not safetensors)")
    header = store.read(name, byte_range=slice(8, 8 + length)).result().value
    try:
        tensors = [entry for key, entry in json.loads(header).items() if key != "__metadata__"]
        return 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the header is not safetensors' ({error})") from error


def _pieces(store: Any, name: str, head: bytes) -> Iterator[bytes]:
    """Yield a safetensors file from its beginning, with the next pieces already requested."""
    stop = _size(store, name, head)
    asked: collections.deque[Any] = collections.deque()
    for start in range(0, stop, PIECE_BYTES):
        asked.append(store.read(name, byte_range=slice(start, min(stop, start + PIECE_BYTES))))
        if len(asked) == _PIECES:
            yield asked.popleft().result().value
    for read in asked:
        yield read.result().value
