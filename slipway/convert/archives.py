"""Arrays in NumPy's .npz, Flax's msgpack and HDF5 (Keras) files, and the writer of .npz files.

An array that is contiguous and uncompressed in the file is read as a view of it; pickles are
refused. Not here: the choice of a reader (formats.py), Orbax (orbax.py).
"""

import contextlib
import dataclasses
import math
import mmap
import os
import shutil
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slipway.checkpoint.shards import Spec
from slipway.convert.source import dotted_names
from slipway.convert.writer import ASIDE, Facts, Pieces
from slipway.errors import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)
NPZ = "params.npz"
_CHUNKED = "__msgpack_chunked_array__"
# Values of leaves in old trees of Orbax and of Flax that have their arrays in other files.
_ELSEWHERE = ("PLACEHOLDER://", "//GDAPlaceholder:", "//MPAArrayPlaceholder:")
KeyPath = tuple[str, ...]  # the keys that lead to an array


@dataclasses.dataclass(frozen=True)
class Region:
    """Place of one array in a file.

    It has one piece, or several that follow each other in C order.
    """

    spec: Spec
    starts: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()  # in bytes; empty: cannot be mapped, ``load`` names it
    load: str = ""


@dataclasses.dataclass(frozen=True)
class ArchiveSource:
    """Arrays in one file."""

    path: Path
    regions: Mapping[str, Region]
    buffer: mmap.mmap
    read: Any = None  # name in the file -> array, for arrays that cannot be mapped
    elsewhere: tuple[str, ...] = ()  # leaves that the file names and that are in other files

    mapped = True
    stamp = ""

    @property
    def location(self) -> str:
        """Path of the file."""
        return str(self.path)

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every array."""
        return {name: region.spec for name, region in self.regions.items()}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[np.ndarray]:
        """Yield a view of the file where the array is contiguous, else a copy."""
        region = self.regions[name]
        try:
            if len(region.starts) == 1:
                yield np.ndarray(
                    region.spec.shape,
                    region.spec.dtype,
                    buffer=self.buffer,
                    offset=region.starts[0],
                )
            elif region.starts:
                parts = [
                    np.frombuffer(self.buffer, np.uint8, count=size, offset=start)
                    for start, size in zip(region.starts, region.sizes)
                ]
                yield np.concatenate(parts).view(region.spec.dtype).reshape(region.spec.shape)
            else:
                yield self._loaded(name, region)
        finally:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Unmap the pages of the array that were read so far."""
        for start, size in zip(self.regions[name].starts, self.regions[name].sizes):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            if size:
                self.buffer.madvise(mmap.MADV_DONTNEED, first, start + size - first)

    def _loaded(self, name: str, region: Region) -> np.ndarray:
        try:
            array = self.read(region.load)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(self.path, [f"{name}: cannot be read: {error}"]) from error
        return np.ascontiguousarray(array).view(region.spec.dtype).reshape(region.spec.shape)


def open_npz(path: Path) -> ArchiveSource:
    """Open an .npz file.

    Both ``a/b`` and ``a.b`` are dotted names. Voids of 2 bytes are read as bfloat16, which NumPy
    writes so. Raises CheckpointError, listing every member that cannot be read.
    """
    regions: dict[KeyPath, Region] = {}
    problems: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                try:
                    regions[tuple(name.split("/"))] = _npy(
                        archive, info, file, file_size=path.stat().st_size
                    )
                except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
                    problems.append(f"{name.replace('/', '.')}: {error}")
    except zipfile.BadZipFile as error:
        problems.append(f"not a zip file, or a truncated one: {error}")
    if problems:
        raise CheckpointError(path, problems)
    return ArchiveSource(
        path,
        _named(regions),
        _map(path),
        read=lambda member: np.load(path, allow_pickle=False)[member],
    )


def _named(regions: Mapping[KeyPath, Region]) -> dict[str, Region]:
    """Return the arrays under their dotted names."""
    return {name: regions[path] for path, name in dotted_names(regions).items()}


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Any, file_size: int) -> Region:
    """Return the place of one member's array.

    Raises ValueError for other content than an array of numbers.
    """
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        reader = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = reader(member)
        header_size = member.tell()
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded")
    spec = Spec(BF16 if dtype.kind == "V" and dtype.itemsize == 2 else dtype, shape)
    if spec.dtype.kind == "V" and spec.dtype != BF16:
        raise ValueError(f"dtype {dtype}, expected numbers")
    if info.compress_type != zipfile.ZIP_STORED or (fortran and len(shape) > 1):
        return Region(spec, load=info.filename.removesuffix(".npy"))
    file.seek(info.header_offset + 26)
    name_size, extra_size = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name_size + extra_size + header_size
    if info.file_size - header_size != spec.nbytes or start + spec.nbytes > file_size:
        raise ValueError(
            f"{info.file_size - header_size} bytes, but {dtype} of shape {shape} takes "
            f"{spec.nbytes}"
        )
    return Region(spec, (start,), (spec.nbytes,))


def open_msgpack(path: Path) -> ArchiveSource:
    """Open a msgpack file of Flax, or a stream of EasyLM.

    Flax writes the file by ``flax.serialization.to_bytes`` or ``msgpack_serialize``. In Flax's
    files, lists have string keys. EasyLM writes a stream of pairs: the keys that lead to an array,
    and its bytes as from ``to_bytes``. Format:
    https://github.com/msgpack/msgpack/blob/master/spec.md; Flax's extension 1 is an array as
    (shape, dtype, bytes), 3 a NumPy scalar, and arrays above 1 GB are mappings of pieces. Raises
    CheckpointError.
    """
    buffer = _map(path)
    regions: dict[KeyPath, Region] = {}
    try:
        kind, size, start = _head(buffer, 0)
        if (kind, size) == ("array", 2) and _head(buffer, start)[0] in ("array", "str"):
            end = 0
            while end < len(buffer):
                end = _walk_pair(buffer, end, regions)
        else:
            end = _walk(buffer, 0, (), regions=regions)
        if end != len(buffer):
            raise ValueError(f"{len(buffer) - end} bytes behind the tree")
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise CheckpointError(path, [f"not Flax msgpack, or truncated: {error}"]) from error
    named = _named(regions)
    elsewhere = tuple(name for name, region in named.items() if region.load.startswith(_ELSEWHERE))
    held = {name: region for name, region in named.items() if name not in elsewhere}
    return ArchiveSource(
        path,
        held,
        buffer,
        read=lambda number: np.asarray(int(number)),  # a Python integer
        elsewhere=elsewhere,
    )


_SIZED = {  # first byte: kind, struct of the size
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"), 0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"), 0xD9: ("str", ">B"), 0xDA: ("str", ">H"),
    0xDB: ("str", ">I"), 0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}  # fmt: skip
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b",
    0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip


def _head(buffer: Any, at: int) -> tuple[str, Any, int]:
    """Return kind and size (or value) of the item at ``at``, and the offset of its content.

    For an extension that is the offset of its type byte.
    """
    byte = buffer[at]
    if byte in _SIZED:
        kind, code = _SIZED[byte]
        return kind, struct.unpack_from(code, buffer, at + 1)[0], at + 1 + struct.calcsize(code)
    if byte in _NUMBERS:
        code = _NUMBERS[byte]
        return "value", struct.unpack_from(code, buffer, at + 1)[0], at + 1 + struct.calcsize(code)
    if byte <= 0x7F or byte >= 0xE0:
        return "value", byte if byte <= 0x7F else byte - 256, at + 1
    if byte <= 0x8F:
        return "map", byte & 15, at + 1
    if byte <= 0x9F:
        return "array", byte & 15, at + 1
    if byte <= 0xBF:
        return "str", byte & 31, at + 1
    if 0xD4 <= byte <= 0xD8:
        return "ext", 1 << (byte - 0xD4), at + 1
    return "value", {0xC2: False, 0xC3: True}.get(byte), at + 1


def _walk(buffer: Any, at: int, path: KeyPath, regions: dict[KeyPath, Region]) -> int:
    """Record the arrays of the item at ``at``; return the offset of the next item."""
    kind, size, start = _head(buffer, at)
    if kind == "map":
        held: dict[KeyPath, Region] = {}
        keys = []
        for _ in range(size):
            key, start = _string(buffer, start)
            keys.append(key)
            start = _walk(buffer, start, (key,) if _CHUNKED in keys else (*path, key), regions=held)
        regions.update({path: _joined(held)} if _CHUNKED in keys else held)
        return start
    if kind == "ext":
        if start + 1 + size > len(buffer):
            raise ValueError("an array extends beyond the end of the file")
        if buffer[start] in (1, 3):
            regions[path] = _array(buffer, start + 1)
        return start + 1 + size
    if kind == "array":
        for i in range(size):
            start = _walk(buffer, start, (*path, str(i)), regions=regions)
        return start
    if kind == "str" and (text := bytes(buffer[start : start + size]).decode()).startswith(
        _ELSEWHERE
    ):
        regions[path] = Region(Spec(np.dtype(np.void), ()), load=text)
    if kind == "value" and isinstance(size, int) and not isinstance(size, bool):
        regions[path] = Region(Spec(np.dtype(np.int64), ()), load=str(size))
    return start if kind == "value" else start + size


def _walk_pair(buffer: Any, at: int, regions: dict[KeyPath, Region]) -> int:
    """Record the array of one pair of a stream; return the offset of the next pair."""
    kind, size, start = _head(buffer, at)
    if (kind, size) != ("array", 2):
        raise ValueError(f"no pair of keys and bytes at byte {at}")
    kind, size, first = _head(buffer, start)
    if kind == "array":
        keys = []
        for _ in range(size):
            key, first = _string(buffer, first)
            keys.append(key)
    else:
        key, first = _string(buffer, start)
        keys = key.split("/")
    kind, size, start = _head(buffer, first)
    if kind != "bin" or tuple(keys) in regions:
        raise ValueError(
            f"{'.'.join(keys)}: {'named twice' if kind == 'bin' else 'no bytes'} at byte {first}"
        )
    if _walk(buffer, start, tuple(keys), regions=regions) != start + size:
        raise ValueError(f"{'.'.join(keys)}: more than one array at byte {start}")
    return start + size


def _string(buffer: Any, at: int) -> tuple[str, int]:
    kind, size, start = _head(buffer, at)
    if kind not in ("str", "bin"):
        raise ValueError(f"a key of kind {kind} at byte {at}")
    return bytes(buffer[start : start + size]).decode(), start + size


def _array(buffer: Any, at: int) -> Region:
    _, count, at = _head(buffer, at)
    _, ndim, at = _head(buffer, at)
    if count != 3:
        raise ValueError(f"an array of {count} parts at byte {at}")
    shape = []
    for _ in range(ndim):
        _, size, at = _head(buffer, at)
        shape.append(size)
    name, at = _string(buffer, at)
    _, size, start = _head(buffer, at)
    spec = Spec(np.dtype(name), tuple(shape))
    if size != spec.nbytes:
        raise ValueError(f"{size} bytes, but {name} of shape {tuple(shape)} takes {spec.nbytes}")
    return Region(spec, (start,), (size,))


def _joined(held: Mapping[KeyPath, Region]) -> Region:
    """Return the region of an array that Flax has written in pieces.

    Its ``shape`` and ``chunks`` are each keyed by number.
    """
    shape = tuple(
        int(held[name].load) for name in sorted((n for n in held if n[0] == "shape"), key=_number)
    )
    chunks = [held[name] for name in sorted((n for n in held if n[0] == "chunks"), key=_number)]
    spec = Spec(chunks[0].spec.dtype, shape)
    sizes = tuple(chunk.sizes[0] for chunk in chunks)
    if sum(sizes) != spec.nbytes:
        raise ValueError(
            f"{sum(sizes)} bytes in {len(chunks)} pieces, but shape {shape} takes {spec.nbytes}"
        )
    return Region(spec, tuple(chunk.starts[0] for chunk in chunks), sizes)


def _number(path: KeyPath) -> int:
    return int(path[-1])


def open_h5(path: Path) -> ArchiveSource:
    """Open an HDF5 file, such as Keras's ``.weights.h5``: every dataset of numbers under its path.

    Raises CheckpointError for another file, or without h5py.
    """
    try:
        import h5py  # an optional dependency, for these files only
    except ModuleNotFoundError as error:
        raise CheckpointError(path, ["HDF5 files need h5py: pip install slipway[keras]"]) from error
    regions: dict[KeyPath, Region] = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.dtype.kind in "fiu":
            spec, offset = Spec(node.dtype, node.shape), node.id.get_offset()
            key = tuple(name.split("/"))
            is_plain = offset is not None and node.dtype.byteorder in "=|<"
            regions[key] = (
                Region(spec, (offset,), (spec.nbytes,)) if is_plain else Region(spec, load=name)
            )

    def load(name: str) -> np.ndarray:
        with h5py.File(path, "r") as file:
            return file[name][()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(note)
    except OSError as error:
        raise CheckpointError(path, [f"not HDF5, or truncated: {error}"]) from error
    return ArchiveSource(path, _named(regions), _map(path), read=load)


class NpzWriter:
    """Writer of ``params.npz``: uncompressed members, one after another.

    An incomplete archive cannot be resumed.
    """

    def __init__(self, directory: Path, specs: Mapping[str, Spec]):
        self._directory = directory
        self._aside = directory / ASIDE
        self._specs = specs
        if self._aside.exists():
            shutil.rmtree(self._aside)
        self._aside.mkdir(parents=True)
        self._archive = zipfile.ZipFile(self._aside / NPZ, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._lock = threading.Lock()

    def write(self, name: str, pieces: Pieces) -> None:
        """Write one member."""
        spec = self._specs[name]
        with self._lock, self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            description = np.lib.format.dtype_to_descr(
                np.dtype("V2") if spec.dtype == BF16 else spec.dtype
            )
            header = {"descr": description, "fortran_order": False, "shape": spec.shape}
            np.lib.format.write_array_header_1_0(member, header)
            for _, piece in pieces:
                member.write(piece.reshape(-1).view(np.uint8).data)

    def done(self) -> Mapping[str, Facts]:
        """Return no tensors: an incomplete archive cannot be resumed."""
        return {}

    def mark(self, name: str, facts: Facts) -> None:
        """Do nothing: there is no journal."""

    def finish(self) -> None:
        """Flush the archive and rename it."""
        self._archive.close()
        with (self._aside / NPZ).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._aside / NPZ, self._directory / NPZ)
        shutil.rmtree(self._aside)

    def abandon(self) -> None:
        """Remove everything that was written."""
        self._archive.close()
        shutil.rmtree(self._aside)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not math.prod([path.stat().st_size]):
            raise CheckpointError(path, ["an empty file"])
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
