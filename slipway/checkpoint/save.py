"""Export of a tree of arrays to an HF directory, the inverse of tensor_reader.py.

Not here: the layout of the files (shards.py), other libraries' trees (slipway/convert).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slipway import tree
from slipway.checkpoint import parts
from slipway.checkpoint.files import INDEX, SINGLE
from slipway.checkpoint.shards import Spec, plan_shards, write_json, writer


def save(
    declaration: Any,
    arrays: Any,
    config: Mapping[str, Any],
    directory: Path,
    shard_size_bytes: int = 5_000_000_000,
) -> None:
    """Write ``config.json`` and the weights of a declaration.

    ``arrays`` is the tree that ``load`` makes of ``declaration``. One tensor is in host memory at a
    time. A checkpoint that was in ``directory`` is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    specs = {
        name: Spec(np.dtype(each[0].array.dtype), parts.shape({p.key: p.shape for p in each}))
        for name, each in _tensors(declaration, arrays).items()
    }
    shards = plan_shards(specs, shard_size_bytes)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    with contextlib.ExitStack() as stack:  # all at once: a stacked leaf has tensors in every shard
        writers = {
            file: stack.enter_context(writer(directory / file, {key: specs[key] for key in keys}))
            for file, keys in shards.items()
        }
        for key, tensor in hf_tensors(declaration, arrays):
            writers[weight_map[key]](key, tensor)
    write_json(directory / "config.json", config)
    if len(shards) > 1:
        total_size = sum(spec.nbytes for spec in specs.values())
        write_json(
            directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        )
    stale = {directory / SINGLE, directory / INDEX, *directory.glob("model-*-of-*.safetensors")}
    kept = {directory / file for file in shards} | (
        {directory / INDEX} if len(shards) > 1 else set()
    )
    for path in stale - kept:
        path.unlink(missing_ok=True)


def hf_tensors(declaration: Any, arrays: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every HF key and its tensor, one at a time.

    A tensor is a view of the array where the layouts allow it; the parts of a fused tensor are
    joined. ``arrays`` may hold JAX or NumPy arrays; each shard of them must be addressable from
    this process.
    """
    for name, each in _tensors(declaration, arrays).items():
        yield name, parts.joined({part.key: part.tensor() for part in each})


@dataclasses.dataclass(frozen=True)
class _Part:
    """Declared tensor, or declared part of one, in an array."""

    key: str
    param: tree.Param
    array: Any
    at: tuple[int, ...]  # index into the stacked axes of the array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part in the checkpoint."""
        return self.param.hf_shape

    def tensor(self) -> np.ndarray:
        """Return the part as the checkpoint holds it."""
        return self.param.write(np.asarray(self.array[self.at] if self.at else self.array))


def _tensors(declaration: Any, arrays: Any) -> dict[str, list[_Part]]:
    """Return the parts of every tensor of a checkpoint, by its name."""
    pairs = zip(tree.leaves(declaration), jax.tree.leaves(arrays), strict=True)
    held = {
        key: _Part(key, leaf.param, array=array, at=at)
        for leaf, array in pairs
        for at, key in leaf.keys.items()
    }
    return {name: [held[key] for key in keys] for name, keys in parts.by_tensor(held).items()}
