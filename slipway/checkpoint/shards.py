"""Layout of written safetensors files, and their atomic replacement.

Every file is written under a temporary name, flushed to the disk and renamed: a reader sees the
file of the old checkpoint or of the new one. Data starts on a page, and so does every tensor as far
as sizes allow it; the others start on 64 bytes. So the files can be used without a copy, and
written without the page cache.

Not here: reading (files.py), the writer of conversions, which continues after an interruption
(slipway/convert/writer.py).
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slipway.checkpoint.files import DTYPES, SINGLE
from slipway.errors import CheckpointError

PAGE = 4096  # bytes: the unit of writes past the page cache
_ALIGNMENT = 64
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Dtype and shape of one tensor in a file's header."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file.

    Raises CheckpointError for a dtype that the format does not have.
    """
    with writer(
        path, {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    ) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


def plan_shards(specs: Mapping[str, Spec], shard_size_bytes: int) -> dict[str, list[str]]:
    """Return file names and the tensors of each, filled in order.

    A tensor larger than a shard has a file of its own.
    """
    shards: list[list[str]] = [[]]
    room = shard_size_bytes
    for name, spec in specs.items():
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = shard_size_bytes
        shards[-1].append(name)
        room -= spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


@contextlib.contextmanager
def writer(path: Path, specs: Mapping[str, Spec]) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Return a function that writes each tensor in its place, in any order.

    The file appears when the context ends.
    """
    head, places = header(path, specs)
    with aside(path) as f:
        f.write(head)

        def put(name: str, tensor: np.ndarray) -> None:
            assert (tensor.dtype, tensor.shape) == (specs[name].dtype, specs[name].shape), (
                f"{name} is not as planned"
            )
            f.seek(places.pop(name))
            f.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))

        yield put
        assert not places, f"never written: {', '.join(places)}"


def header(path: Path, specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes in front of the data, and the offset in the file of each tensor."""
    unknown = [name for name, spec in specs.items() if spec.dtype not in _NAMES]
    if unknown:
        raise CheckpointError(
            path, [f"{name}: no safetensors dtype is {specs[name].dtype}" for name in unknown]
        )
    # Whole multiples of each alignment first, so that none of them is shifted; of the rest the
    # widest dtypes first.
    order = sorted(
        specs,
        key=lambda name: (
            specs[name].nbytes % PAGE != 0,
            specs[name].nbytes % _ALIGNMENT != 0,
            -specs[name].dtype.itemsize,
        ),
    )
    # transformers refuses a file without this entry.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in order:
        spec = specs[name]
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (offsets[name], end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: data + offset for name, offset in offsets.items()
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole or absent."""
    with aside(path) as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Any]:
    """Open a temporary file that replaces ``path`` once it is whole and on the disk.

    It is removed if anything fails.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
