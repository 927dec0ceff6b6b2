"""Parts of a checkpoint's tensors: rows of a fused projection, or one of several stacked matrices.

A key names a part in brackets. ``attn.qkv[0:64].weight`` stands for the rows 0 to 63 of
``attn.qkv.weight``, and ``experts[3].down_proj`` for the fourth matrix of ``experts.down_proj``.

Not here: the families that have fused tensors (slipway/models), tensors in the layout of another
library (slipway/convert).
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from slipway.checkpoint.files import Checkpoint, Index
from slipway.errors import CheckpointError

_PART = re.compile(r"\[(\d+)(?::(\d+))?\]")


def whole(key: str) -> str:
    """Return the name of the tensor of which ``key`` names a part, or ``key`` itself."""
    return _PART.sub("", key)


def index(key: str) -> Index:
    """Return the place of the part that ``key`` names in its tensor; empty for the whole tensor."""
    found = _PART.findall(key)
    return tuple(slice(int(start), int(stop)) if stop else int(start) for start, stop in found)


def by_tensor(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys of the parts of each tensor, in the order in which the tensor has them."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(whole(key), []).append(key)
    return {tensor: sorted(parts, key=_first) for tensor, parts in found.items()}


def split(checkpoint: Checkpoint, keys: Iterable[str]) -> Checkpoint:
    """Return the checkpoint with every tensor that ``keys`` name in parts replaced by its parts.

    Raises CheckpointError, listing each tensor that has more or fewer rows than its parts.
    """
    taken = {
        tensor: parts
        for tensor, parts in by_tensor(keys).items()
        if parts != [tensor] and tensor in checkpoint.tensors
    }
    if not taken:
        return checkpoint
    if problems := list(_misfits(checkpoint, taken)):
        raise CheckpointError(checkpoint.directory, problems)
    return checkpoint.with_parts(
        {tensor: {part: index(part) for part in parts} for tensor, parts in taken.items()}
    )


def shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a tensor from the shapes of its parts, by their keys."""
    indices = [index(key) for key in shapes]
    ends = [[at.stop if isinstance(at, slice) else at + 1 for at in each] for each in indices]
    last = next(iter(shapes.values()))
    rows = sum(isinstance(at, slice) for at in indices[0])
    return (*map(max, zip(*ends)), *last[rows:])


def joined(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the tensor of which ``tensors`` are the parts, by their keys; inverse of ``split``."""
    first = next(iter(tensors))
    if first == whole(first):
        return tensors[first]
    out = np.empty(shape({key: x.shape for key, x in tensors.items()}), tensors[first].dtype)
    for key, x in tensors.items():
        out[index(key)] = x
    return out


def _misfits(checkpoint: Checkpoint, taken: dict[str, list[str]]) -> Iterator[str]:
    for tensor, parts in taken.items():
        last = index(parts[-1])[0]
        declared = last.stop if isinstance(last, slice) else last + 1
        shape = checkpoint.tensors[tensor].shape
        if not shape or shape[0] != declared:
            yield f"{tensor}: shape {shape} in the file, {declared} rows declared"


def _first(key: str) -> tuple[int, ...]:
    return tuple(at.start if isinstance(at, slice) else at for at in index(key))
