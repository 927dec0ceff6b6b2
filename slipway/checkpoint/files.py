"""Validated Hugging Face directories: configuration, and the file and byte range of every tensor.

Tensors are views of read-only file mappings: opening reads one header per file, whatever the size
of the model. Pickles are never opened. Format: https://huggingface.co/docs/safetensors (8 bytes of
header length, JSON header, data).

Not here: downloads (hub.py), comparison with a model's declaration (tensor_reader.py), written
files (shards.py).
"""

import dataclasses
import json
import math
import mmap
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from slipway.checkpoint import copying
from slipway.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Buffers of older models that follow from config.json; index and shards may disagree on them.
INERT_TENSORS = (
    "*rotary_emb.inv_freq",
    "*rotary_emb.cos_cached",
    "*rotary_emb.sin_cached",
    "*.masked_bias",
)
MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit
_HUGE_PAGE_BYTES = 1 << 21
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


# Place of a part of a tensor along its leading dimensions: indices, then perhaps a range of rows.
# Its numbers lie next to each other in the file.
Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Place of one tensor: bytes ``start`` to ``stop``, counted from the beginning of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    def part(self, name: str, index: Index) -> "Tensor":
        """Return the part of the tensor at ``index``, under another name."""
        shape, start, stop = self.shape, self.start, self.stop
        for at in index:
            row = (stop - start) // shape[0]
            first, last = (at, at + 1) if isinstance(at, int) else (at.start, at.stop)
            start, stop = start + first * row, start + last * row
            shape = shape[1:] if isinstance(at, int) else (last - first, *shape[1:])
        return dataclasses.replace(self, name=name, shape=shape, start=start, stop=stop)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors and configuration of a validated directory.

    Views that were handed out keep their file mapped; nothing needs closing.
    """

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    _maps: dict[Path, mmap.mmap] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def array(self, name: str) -> np.ndarray:
        """Return the tensor as a read-only view of its file, with any alignment."""
        tensor = self.tensors[name]
        return np.ndarray(
            tensor.shape, DTYPES[tensor.dtype], buffer=self._map(tensor.file), offset=tensor.start
        )

    def copy(self, name: str, target: np.ndarray, limit: int | None = None) -> int:
        """Read the tensor into ``target``, a contiguous array of its size.

        No pages of the file become resident. With ``limit``, return the number of items above it,
        as ``copying.stream`` does; without it, return 0. Raises OSError if the file has become
        shorter.
        """
        tensor = self.tensors[name]
        with tensor.file.open("rb", buffering=0) as file:
            if limit is None:
                copying.read(file.fileno(), tensor.start, target)
                return 0
            return copying.read_counted(
                file.fileno(),
                tensor.start,
                target.nbytes,
                itemsize=target.itemsize,
                limit=limit,
                target=target,
            )

    def count_above(self, name: str, limit: int) -> int:
        """Count the items of the tensor above ``limit``, as ``copying.count_above`` does."""
        tensor = self.tensors[name]
        with tensor.file.open("rb", buffering=0) as file:
            size, itemsize = tensor.stop - tensor.start, DTYPES[tensor.dtype].itemsize
            return copying.read_counted(
                file.fileno(), tensor.start, size, itemsize=itemsize, limit=limit
            )

    def drop(self, name: str) -> None:
        """Give the resident pages of the tensor back to the system.

        A view that is used again reads them anew. The range is extended to whole huge pages:
        touching the edge of a tensor can map that much of its neighbours.
        """
        tensor = self.tensors[name]
        first = tensor.start // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        # May lie beyond the end of the file, where madvise stops.
        last = -(-tensor.stop // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        if first < last:
            self._map(tensor.file).madvise(mmap.MADV_DONTNEED, first, last - first)

    def with_parts(self, parts: Mapping[str, Mapping[str, Index]]) -> Self:
        """Return the checkpoint with tensors replaced by their parts.

        ``parts``: for the name of a tensor, the name and the index of each of its parts.
        """
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in parts}
        for name, indices in parts.items():
            tensor = self.tensors[name]
            tensors |= {part: tensor.part(part, index) for part, index in indices.items()}
        return dataclasses.replace(self, tensors=tensors)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as f:
                # setdefault: two threads that arrive here at once use the same mapping.
                self._maps.setdefault(file, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[file]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a directory and validate its configuration and the place of every tensor.

    Raises CheckpointError, listing every problem found.
    """
    problems: list[str] = []
    config, generation_config = _configuration(directory, problems)
    tensors = _tensors(directory, problems)
    if problems:
        raise CheckpointError(directory, problems)
    return Checkpoint(directory, config, generation_config, tensors=tensors)


def open_tensors(directory: Path) -> Checkpoint:
    """Open only the tensors of a directory, which may have no config.json.

    Raises CheckpointError, listing every problem found.
    """
    problems: list[str] = []
    tensors = _tensors(directory, problems)
    if problems:
        raise CheckpointError(directory, problems)
    return Checkpoint(directory, {}, {}, tensors=tensors)


def open_file(path: Path) -> Checkpoint:
    """Open the tensors of one .safetensors file.

    Raises CheckpointError, listing every problem found.
    """
    problems: list[str] = []
    tensors = _header(path, problems) or {}
    if problems:
        raise CheckpointError(path, problems)
    return Checkpoint(path, {}, {}, tensors=tensors)


def open_without_weights(directory: Path) -> Checkpoint:
    """Open only the configuration of a directory, for a model with weights from another source.

    Raises CheckpointError, listing every problem found.
    """
    problems: list[str] = []
    config, generation_config = _configuration(directory, problems)
    if problems:
        raise CheckpointError(directory, problems)
    return Checkpoint(directory, config, generation_config, tensors={})


def _configuration(directory: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of config.json and, where it exists, of generation_config.json."""
    if not directory.is_dir():
        raise CheckpointError(
            directory, ["not a directory" if directory.exists() else "no such directory"]
        )
    refuse_adapter(directory)
    config = _json_object(directory / "config.json", problems)
    generation = directory / "generation_config.json"
    return config, _json_object(generation, problems) if generation.exists() else {}


def _json_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{path.name}: missing")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: not readable as JSON: {error}")
    else:
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name}: got {type(value).__name__}, expected a JSON object")
    return {}


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError where ``directory`` holds a PEFT adapter and no model of its own."""
    has_weights = (directory / SINGLE).exists() or (directory / INDEX).exists()
    if has_weights or not (directory / ADAPTER).is_file():
        return
    config = _json_object(directory / ADAPTER, [])
    base = config.get("base_model_name_or_path") or "BASE_MODEL"
    kind = config.get("peft_type") or "PEFT"
    problem = (
        f"a {kind} adapter of the model {base}, not a model; merge it into a directory of that "
        f"model: slipway convert {base} OUT --merge-lora {directory}"
    )
    raise CheckpointError(directory, [problem])


def _tensors(directory: Path, problems: list[str]) -> dict[str, Tensor]:
    refuse_adapter(directory)
    if (directory / SINGLE).exists():  # before the index, as transformers does
        return _header(directory / SINGLE, problems) or {}
    if (directory / INDEX).exists():
        return _sharded(directory, problems)
    problems.append(_absence(directory))
    return {}


def _absence(directory: Path) -> str:
    """Return the reason for which there are no weights to read."""
    expected = f"neither {SINGLE} nor {INDEX}"
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        return (
            f"{expected}; {', '.join(others)} cannot be used without an index "
            f"(a single file must be named {SINGLE})"
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        return f"{expected}, only pickles, which are never loaded: {', '.join(pickles)}"
    return expected


def _sharded(directory: Path, problems: list[str]) -> dict[str, Tensor]:
    """Return the tensors of every shard that the index names; index and shards must agree."""
    weight_map = _json_object(directory / INDEX, problems).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        problems.append(f"{INDEX}: weight_map must map tensor names to file names")
        return {}
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            problems.append(
                f"{INDEX}: file name {shard!r} refused, expected *.safetensors in this directory"
            )
            continue
        held = _header(directory / shard, problems)
        if held is None:
            continue
        named = {
            name
            for name, file in weight_map.items()
            if file == shard and (name in held or not _is_inert(name))
        }
        problems += [
            f"{INDEX}: places {name} in {shard}, which does not hold it"
            for name in sorted(named - {*held})
        ]
        for name in sorted({*held} - named):
            if _is_inert(name):
                continue
            other = weight_map.get(name)
            place = "does not name" if other is None else f"places in {other}"
            problems.append(f"{shard}: holds {name}, which the index {place}")
        tensors |= held
    return tensors


def _is_inert(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in INERT_TENSORS)


def _header(path: Path, problems: list[str]) -> dict[str, Tensor] | None:
    """Return the tensors of one file; None if its header cannot be read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                problems.append(
                    f"{path.name}: claims a header of {length} bytes, "
                    f"expected at most {MAX_HEADER_BYTES} "
                    f"within the file's {size} (truncated, or not safetensors)"
                )
                return None
            entries = json.loads(f.read(length), object_pairs_hook=_unique)
    except FileNotFoundError:
        problems.append(f"{path.name}: missing, though the index names it")
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name}: header not readable as JSON: {error}")
        return None
    if not isinstance(entries, dict):
        problems.append(f"{path.name}: header is {type(entries).__name__}, expected a JSON object")
        return None
    entries.pop("__metadata__", None)
    tensors, data = {}, 8 + length
    for name, entry in entries.items():
        if fault := _fault(entry, size - data):
            problems.append(f"{path.name}: {name}: {fault}")
        else:
            start, stop = entry["data_offsets"]
            tensors[name] = Tensor(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                file=path,
                start=data + start,
                stop=data + stop,
            )
    # Only without faults: a faulty entry would be reported again as a hole.
    if len(tensors) == len(entries):
        problems += _gaps(path, tensors, data, size=size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return entries


def _fault(entry: Any, data_bytes: int) -> str:
    """Return what is wrong with one header entry; empty if it is valid.

    ``data_bytes``: the size of the data behind the header.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}"
    if not _counts(shape):
        return f"shape {shape!r}, expected non-negative integers"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {offsets!r}, expected [start, stop]"
    if offsets[1] > data_bytes:
        return f"ends at byte {offsets[1]} of {data_bytes} (truncated file?)"
    held, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPES[dtype].itemsize
    return (
        f"{held} bytes, but {dtype} of shape {tuple(shape)} takes {needed}"
        if held != needed
        else ""
    )


def _counts(value: Any) -> bool:
    # type(): a bool is an int, but not a size.
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _gaps(path: Path, tensors: Mapping[str, Tensor], data: int, size: int) -> list[str]:
    """Return overlaps, holes and trailing bytes of a file.

    Each byte behind the header must belong to exactly one tensor.
    """
    problems, end, before = [], data, "the header"
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start < end:
            problems.append(
                f"{path.name}: {tensor.name} overlaps {before} by {end - tensor.start} bytes"
            )
        elif tensor.start > end:
            problems.append(
                f"{path.name}: a hole of {tensor.start - end} bytes "
                f"between {before} and {tensor.name}"
            )
        if tensor.stop >= end:
            end, before = tensor.stop, tensor.name
    if end < size:
        problems.append(f"{path.name}: {size - end} trailing bytes")
    return problems
