"""Decides what an address at ``gs://`` or ``s3://`` means, and how what lies there is listed, read and copied.

All of it through tensorstore, with the credentials that it finds. Knows no formats but a safetensors file's length.

Nothing is written to such addresses: what a conversion promises (nothing bears its name before it is whole and on the
disk) rests on rename and fsync, which they do not have.
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

_log = logging.getLogger(__name__)
_DRIVERS = {"gs": "gcs", "s3": "s3"}
_RETRIES = 6  # of a request, after 1, 2, 4, ... seconds: a minute in all; tensorstore's own 32 are a quarter of an hour
_PIECE_BYTES, _PIECES = 1 << 26, 4  # what is fetched in one request, and how many at a time


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """A file or a folder of a bucket, with those methods of pathlib.Path that finding a checkpoint takes.

    ``held``: what the bucket was found to hold, as paths from here on; the empty one is a file of this very name.
    """

    scheme: str
    bucket: str
    key: str
    held: frozenset[str]

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def kvstore(self) -> dict[str, Any]:
        """tensorstore's name for what lies below a folder."""
        return _spec(self.scheme, self.bucket, f"{self.key}/" if self.key else "")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "RemotePath":
        below = frozenset(
            key[len(name) + 1 :] for key in self.held if key == name or key.startswith(f"{name}/")
        )
        return dataclasses.replace(self, key=f"{self.key}/{name}".lstrip("/"), held=below)

    def iterdir(self) -> Iterator["RemotePath"]:
        """What lies directly below."""
        children: dict[str, set[str]] = {}
        for key in self.held - {""}:
            name, _, rest = key.partition("/")
            children.setdefault(name, set()).add(rest)
        for name, below in children.items():
            yield dataclasses.replace(
                self, key=f"{self.key}/{name}".lstrip("/"), held=frozenset(below)
            )

    def is_file(self) -> bool:
        """Whether an object has this very name."""
        return "" in self.held

    def is_dir(self) -> bool:
        """Whether objects lie below."""
        return bool(self.held - {""})

    def exists(self) -> bool:
        """Whether it is either."""
        return bool(self.held)


def is_address(location: object) -> bool:
    """Whether it names a place that is no path, as text or as a path into which somebody made it."""
    return "://" in str(location) or str(location).partition("/")[0] in {
        f"{scheme}:" for scheme in _DRIVERS
    }


def find(address: str) -> RemotePath:
    """What lies at an address, every name below it listed.

    Raises CheckpointError where nothing does, where it cannot be listed, and for an address of another kind.
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
    """Copy the files of an HF directory, of its top level and no pickles; nothing else of the folder.

    Files get a time that changes with the object, so that `--resume` knows them again. Raises CheckpointError.
    """
    files = [path for path in folder.iterdir() if path.is_file() and _is_wanted(path.name)]
    _log.info("%s: %d files are copied to %s", folder, len(files), directory)
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
    """The generations of some files, which change when they are written again."""
    ts = tensorstore(str(folder))
    with refused(str(folder), "cannot be read"):
        store = ts.KvStore.open(folder.kvstore, context=context(ts)).result()
        reads = [
            store.read(name, byte_range=slice(0, 1)) for name in names if (folder / name).is_file()
        ]
        return f"{folder}:{[read.result().stamp.generation for read in reads]}"


def context(ts: Any) -> Any:
    """What stores opened together share: tensorstore's connections, and how often a request is tried again."""
    return ts.Context(
        {f"{driver}_request_retries": {"max_retries": _RETRIES} for driver in _DRIVERS.values()}
    )


def tensorstore(location: str) -> Any:
    """The library, or the CheckpointError that says how to install it."""
    try:
        import tensorstore as library  # an extra: only those who have Orbax checkpoints need it
    except ModuleNotFoundError as error:
        needed = "Orbax checkpoints, gs:// and s3:// need tensorstore: pip install slipway[orbax]"
        raise CheckpointError(location, [needed]) from error
    return library


@contextlib.contextmanager
def refused(location: str, what: str) -> Iterator[None]:
    """tensorstore's errors, and the disk's, as one CheckpointError."""
    try:
        yield
    except CheckpointError:  # a ValueError too, but it says already what it is
        raise
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            location, [f"{what}: {str(error).strip().partition(chr(10))[0][:200]}"]
        ) from error


def _spec(scheme: str, bucket: str, path: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": path}
    if scheme == "s3":
        # A variable of AWS's own libraries that tensorstore does not read.
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint.rstrip("/")
        if os.environ.get(
            "AWS_ACCESS_KEY_ID"
        ):  # first by default, too, but with complaints that ~/.aws is not there
            spec["aws_credentials"] = {"type": "environment"}
    return spec


def _is_object(ts: Any, place: RemotePath) -> bool:
    """Whether an object has this very name.

    By reading it: where listing is not allowed, GCS's list is empty for tensorstore, but a read tells why.
    """
    with refused(str(place), "cannot be read"):
        store = ts.KvStore.open(_spec(place.scheme, place.bucket, ""), context=context(ts)).result()
        return (
            store.read(place.key or "_METADATA", byte_range=slice(0, 1)).result().state == "value"
        )


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in ALLOW_PATTERNS)


def _size(store: Any, name: str, head: bytes) -> int:
    """Where a safetensors file's last tensor ends: tensorstore tells no sizes. The reader checks the rest."""
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
    """A safetensors file from its beginning, the next pieces already asked for."""
    stop = _size(store, name, head)
    asked: collections.deque[Any] = collections.deque()
    for start in range(0, stop, _PIECE_BYTES):
        asked.append(store.read(name, byte_range=slice(start, min(stop, start + _PIECE_BYTES))))
        if len(asked) == _PIECES:
            yield asked.popleft().result().value
    for read in asked:
        yield read.result().value
