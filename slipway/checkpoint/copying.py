"""Fast copies and scans of arrays and files.

The compiled csrc/copy.cc does them or, where it was not built, NumPy.

Not here: the loader of the compiled library (slipway/native.py), copies that also convert or scale
(slipway/convert/transfer.py).
"""

import ctypes
import errno
import mmap
import os
import sys
from typing import Any

import numpy as np

from slipway.native import library as load_library

PIECE_BYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>
_LIBC: Any = ctypes.CDLL(None).sync_file_range if sys.platform == "linux" else None


def copy_bits(target: np.ndarray, source: np.ndarray) -> None:
    """Copy ``source`` to ``target`` bit for bit.

    Both are views of one shape and item size, with any strides. The compiled copy releases the
    interpreter lock.
    """
    assert target.shape == source.shape and target.itemsize == source.itemsize
    library = load_library()
    if library is None or target.itemsize > 8:
        target[...] = source.view(target.dtype)
        return
    ndim = target.ndim
    longs = ctypes.c_int64 * ndim
    arrays = ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(source.ctypes.data)
    sizes = longs(*target.shape), longs(*target.strides), longs(*source.strides)
    library.slipway_copy(*arrays, ctypes.c_int64(ndim), *sizes, ctypes.c_int64(target.itemsize))


def stream(target: np.ndarray, source: np.ndarray, limit: int | None = None) -> int:
    """Copy ``source`` to ``target`` past the CPU cache.

    Both are contiguous and of equal size in bytes. Meant for targets that are not read again soon.
    With ``limit``, return the number of source items above it, as ``count_above`` counts them,
    found in the same pass; without it, return 0.
    """
    assert (
        target.nbytes == source.nbytes and target.flags.c_contiguous and source.flags.c_contiguous
    )
    library = load_library()
    if library is None or (limit is not None and source.itemsize not in (2, 4, 8)):
        target.reshape(-1).view(np.uint8)[...] = source.reshape(-1).view(np.uint8)
        return 0 if limit is None else count_above(source.reshape(-1), limit)
    pointers = ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(source.ctypes.data)
    if limit is None:
        library.slipway_stream(*pointers, ctypes.c_int64(target.nbytes))
        return 0
    library.slipway_stream_counted.restype = ctypes.c_int64
    sizes = ctypes.c_int64(source.size), ctypes.c_int64(source.itemsize), ctypes.c_uint64(limit)
    return library.slipway_stream_counted(*pointers, *sizes)


def read_counted(
    file: int,
    offset: int,
    size_bytes: int,
    itemsize: int,
    limit: int,
    target: np.ndarray | None = None,
) -> int:
    """Count the items of a range of an open file above ``limit``, as ``count_above`` counts them.

    The items are left in ``target`` if one is given. No page of the file becomes resident in this
    process. Raises OSError where the file is shorter than the range.
    """
    library = load_library()
    if library is not None and itemsize in (2, 4, 8) and sys.platform in ("linux", "darwin"):
        library.slipway_read_counted.restype = ctypes.c_int64
        numbers = ctypes.c_int64(size_bytes), ctypes.c_int64(itemsize), ctypes.c_uint64(limit)
        pointer = ctypes.c_void_p(None if target is None else target.ctypes.data)
        count = library.slipway_read_counted(
            ctypes.c_int(file), ctypes.c_int64(offset), pointer, *numbers
        )
        if count < 0:
            raise OSError(errno.EIO, "the file is shorter than its header says")
        return count
    count, own = 0, np.empty(min(size_bytes, PIECE_BYTES), np.uint8)
    for start in range(0, size_bytes, PIECE_BYTES):
        size = min(PIECE_BYTES, size_bytes - start)
        piece = (
            own[:size]
            if target is None
            else target.reshape(-1).view(np.uint8)[start : start + size]
        )
        read(file, offset + start, piece)
        count += count_above(piece.view(f"u{itemsize}"), limit)
    return count


def read(file: int, offset: int, target: np.ndarray) -> None:
    """Fill a contiguous array from an open file, beginning at byte ``offset``.

    Raises OSError where the file is shorter.
    """
    left = memoryview(target.reshape(-1).view(np.uint8).data)
    while left:
        count = os.preadv(file, [left], offset)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than its header says")
        left, offset = left[count:], offset + count


def count_above(values: np.ndarray, limit: int) -> int:
    """Count items of a contiguous array above ``limit``.

    They are compared as unsigned integers without their highest bit. For floats that bit is the
    sign: with the bits of a magnitude as ``limit``, this counts larger magnitudes, infinities and
    NaN.
    """
    library = load_library()
    if library is not None and values.itemsize in (2, 4, 8):
        pointer = ctypes.c_void_p(values.ctypes.data)
        sizes = ctypes.c_int64(values.size), ctypes.c_int64(values.itemsize)
        library.slipway_count_above.restype = ctypes.c_int64
        return library.slipway_count_above(pointer, *sizes, ctypes.c_uint64(limit))
    bits = np.dtype(f"u{values.itemsize}").type
    return int(
        np.count_nonzero((values.reshape(-1).view(bits) & bits(np.iinfo(bits).max >> 1)) > limit)
    )


def on_a_page(size_bytes: int) -> np.ndarray:
    """Allocate bytes that begin on a page boundary, as writing past the page cache requires."""
    return np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)


def start_writeback(file: int, offset: int, size_bytes: int) -> None:
    """Let the kernel begin to write a range of a file to the disk.

    The flush at the end then has little left to write. Does nothing except on Linux.
    """
    if _LIBC is not None:
        byte_range = ctypes.c_int64(offset), ctypes.c_int64(size_bytes)
        _LIBC(ctypes.c_int(file), *byte_range, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def is_compiled() -> bool:
    """Return whether the compiled library is in use."""
    return load_library() is not None
