"""Copies between strided views: checked, scaled and rounded, in pieces that fit the CPU cache.

Not here: the plan of the copies (plan.py), files (writer.py), copies bit for bit
(slipway/checkpoint/copying.py).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from slipway.checkpoint.copying import copy_bits, count_above
from slipway.checkpoint.shards import PAGE, Spec
from slipway.convert.moves import Move

PIECE_ELEMENTS = 1 << 20


def pieces(
    move: Move, source: np.ndarray, dtype: np.dtype, memory: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first element, numbers) of one piece of the target after another, in C order.

    ``move`` must fill its target whole. A piece is valid until the next is requested. ``memory``:
    bytes for the pieces, used if large enough; new memory would be faulted in page by page for
    every tensor.
    """
    view = broadcast(move, source)
    outer = next((dim for dim, size in enumerate(view.shape) if size > 1), 0)
    rows = view.shape[outer] if view.ndim else 1
    row_size = view.size // rows if rows else 0
    step = max(1, PIECE_ELEMENTS // max(1, row_size))
    rows_of_pages = PAGE // math.gcd(PAGE, row_size * dtype.itemsize)  # fill whole pages
    step -= step % rows_of_pages if step > rows_of_pages else 0
    size = min(step, rows) * row_size
    fits = memory is not None and memory.nbytes >= size * dtype.itemsize
    buffer = (
        memory[: size * dtype.itemsize].view(dtype)
        if memory is not None and fits
        else np.empty(size, dtype)
    )
    for start in range(0, rows if view.size else 0, step):
        part = view[(slice(None),) * outer + (slice(start, start + step),)] if view.ndim else view
        piece = buffer[: part.size]
        fill(piece.reshape(part.shape), part, move.factor)
        yield start * row_size, piece


def broadcast(move: Move, source: np.ndarray) -> np.ndarray:
    """Return the source's share of a target, with axes in the target's order.

    An axis that the source lacks is repeated without a copy.
    """
    view, shape = move.source.view(source, move.order), share_shape(move)
    return np.broadcast_to(view, shape) if view.shape != shape else view


def share_shape(move: Move) -> tuple[int, ...]:
    """Return the shape of the part of the target that a move fills, one dimension for each axis."""
    return tuple(
        len(range(*part.indices(size))) for part, size in zip(move.target.take, move.target.split)
    )


def assembled(
    moves: Sequence[Move],
    arrays: Mapping[str, np.ndarray],
    spec: Spec,
    memory: np.ndarray | None = None,
) -> np.ndarray:
    """Assemble a target from its sources, in ``memory`` if given; unfilled elements are zero."""
    if memory is None:
        whole = np.zeros(spec.shape, spec.dtype)
    else:
        whole = memory.reshape(-1).view(spec.dtype).reshape(spec.shape)
        if not moves[0].target.is_whole:
            whole[...] = 0
    for move in moves:
        fill(
            move.target.view(whole, move.order),
            broadcast(move, arrays[move.source.name]),
            move.factor,
        )
    return whole


def fill(target: np.ndarray, source: np.ndarray, factor: float) -> None:
    """Compute ``target = source * factor`` for views of equal shape.

    Each number is rounded once, to the nearest.
    """
    if factor == 1.0 and source.dtype == target.dtype:
        copy_bits(target, source)
    elif factor == 1.0:
        contiguous = np.empty(source.shape, source.dtype)
        copy_bits(contiguous, source)
        with np.errstate(over="ignore", invalid="ignore"):  # the result is checked later
            target[...] = contiguous.astype(target.dtype)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = (source.astype(np.float32) * np.float32(factor)).astype(target.dtype)


def not_finite(values: np.ndarray) -> int:
    """Count the infinite and NaN values of a contiguous array; 0 for dtypes other than floats."""
    if not is_float(values.dtype) or not values.size:
        return 0
    flat, limit = values.reshape(-1), _largest(values.dtype)
    return sum(
        count_above(flat[i : i + PIECE_ELEMENTS], limit)
        for i in range(0, flat.size, PIECE_ELEMENTS)
    )


def max_ulp(one: np.ndarray, two: np.ndarray) -> int:
    """Return the largest distance of two arrays of one float dtype, in representable numbers."""
    a, b = (_ordered(np.ascontiguousarray(x)) for x in (one, two))
    return int(np.abs(a - b).max()) if a.size else 0


def is_float(dtype: np.dtype) -> bool:
    """Return whether the dtype is a floating-point one, including those of ml_dtypes."""
    return dtype.kind == "f" or dtype in _EXTENDED


_EXTENDED = {
    np.dtype(t) for t in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
}


@functools.cache
def _largest(dtype: np.dtype) -> int:
    return int(np.asarray(ml_dtypes.finfo(dtype).max).astype(dtype).view(f"u{dtype.itemsize}"))


def _ordered(values: np.ndarray) -> np.ndarray:
    """Return integers that have the order of the floats, and are spaced by one."""
    bits = values.view(f"i{values.itemsize}").astype(np.int64)
    return np.where(bits < 0, np.int64(-(1 << (8 * values.itemsize - 1))) - bits, bits)
