"""Decides how a tree of arrays becomes an HF directory, the inverse of load; knows no models and no mesh.

Every file is written aside, flushed to the disk and renamed: a reader sees the old checkpoint's file or the new one's.
Data starts on 64 bytes, and so does every tensor whose size allows it: such files can be used without a copy.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slipway import tree
from slipway.checkpoint.files import DTYPES, INDEX, SINGLE
from slipway.errors import CheckpointError

_ALIGNMENT = 64
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a file's header says of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def save(
    declaration: Any,
    arrays: Any,
    config: Mapping[str, Any],
    directory: Path,
    shard_size_bytes: int = 5_000_000_000,
) -> None:
    """Write ``config.json`` and the weights of ``arrays``, the tree that ``load`` makes of ``declaration``.

    One tensor is in host memory at a time. A checkpoint that was in ``directory`` is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    specs = {
        key: Spec(np.dtype(array.dtype), leaf.param.hf_shape)
        for leaf, array in zip(tree.leaves(declaration), jax.tree.leaves(arrays))
        for key in leaf.keys.values()
    }
    shards = plan_shards(specs, shard_size_bytes)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    with contextlib.ExitStack() as stack:  # all at once: a stacked leaf has tensors in every shard
        writers = {
            file: stack.enter_context(_writer(directory / file, {key: specs[key] for key in keys}))
            for file, keys in shards.items()
        }
        for key, tensor in hf_tensors(declaration, arrays):
            writers[weight_map[key]](key, tensor)
    write_json(directory / "config.json", config)
    if len(shards) > 1:
        total_size = sum(spec.nbytes for spec in specs.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    stale = {directory / SINGLE, directory / INDEX, *directory.glob("model-*-of-*.safetensors")}
    kept = {directory / file for file in shards} | ({directory / INDEX} if len(shards) > 1 else set())
    for path in stale - kept:
        path.unlink(missing_ok=True)


def hf_tensors(declaration: Any, arrays: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every HF key and its tensor, one at a time; a view of the array where the layouts allow it.

    ``arrays`` may hold JAX or NumPy arrays; each of their shards must be addressable from this process.
    """
    for leaf, array in zip(tree.leaves(declaration), jax.tree.leaves(arrays), strict=True):
        for at, key in leaf.keys.items():
            yield key, leaf.param.write(np.asarray(array[at] if at else array))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file.

    Raises CheckpointError for a dtype that the format does not have.
    """
    with _writer(path, {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


def plan_shards(specs: Mapping[str, Spec], shard_size_bytes: int) -> dict[str, list[str]]:
    """The names of the files and of their tensors, filled in order; a larger tensor has a file of its own."""
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
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


@contextlib.contextmanager
def _writer(path: Path, specs: Mapping[str, Spec]) -> Iterator[Callable[[str, np.ndarray], None]]:
    """A function that puts each tensor in its place, in any order; the file appears when the context ends."""
    head, places = header(path, specs)
    with _aside(path) as f:
        f.write(head)

        def put(name: str, tensor: np.ndarray) -> None:
            assert (tensor.dtype, tensor.shape) == (specs[name].dtype, specs[name].shape), f"{name} is not as planned"
            f.seek(places.pop(name))
            f.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))

        yield put
        assert not places, f"never written: {', '.join(places)}"


def header(path: Path, specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """The bytes in front of the data, and where in the file each tensor starts."""
    unknown = [name for name, spec in specs.items() if spec.dtype not in _NAMES]
    if unknown:
        raise CheckpointError(path, [f"{name}: no safetensors dtype is {specs[name].dtype}" for name in unknown])
    # Whole multiples of the alignment first, so that none of them is shifted; of the rest the widest dtypes first.
    order = sorted(specs, key=lambda name: (specs[name].nbytes % _ALIGNMENT != 0, -specs[name].dtype.itemsize))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offsets, end = {}, 0
    for name in order:
        spec = specs[name]
        offsets[name], end = end, end + spec.nbytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (offsets[name], end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + offset for name, offset in offsets.items()}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole or absent."""
    with _aside(path) as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Any]:
    """A file that takes ``path``'s place once it is whole and on the disk; removed if anything fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
