"""Packed view of a float checkpoint: the tensors that are rounded, their scales, and the rounding.

``packed_view`` returns an object that takes the place of a checkpoint: a tensor that a declaration
wants packed and the files hold as floats is rounded when it is first read. `slipway quantize`
writes the tensors of that view. The layout of the files is "pack-quantized" of compressed-tensors
(https://github.com/vllm-project/compressed-tensors), which vLLM and SGLang read.

Not here: `slipway quantize` itself (slipway/convert/quantize_directory.py), packed weights as an
operand (slipway/ops/quantized.py).
"""

import ctypes
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from slipway.checkpoint.copying import count_above, stream
from slipway.checkpoint.files import DTYPES, Checkpoint, Tensor
from slipway.errors import UnsupportedModel
from slipway.native import library

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # appended to the name of the weight
FIELD = "quantization_config"
BF16 = np.dtype(ml_dtypes.bfloat16)
# Values to which the largest number of a group of 4 bits may be mapped.
CANDIDATES = [sign * (6.5 + 0.3 * i) for i in range(8) for sign in (-1, 1)]
_ROWS_BYTES = 1 << 22  # of floats, rounded at a time


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Number format of the packed weights of projections.

    ``bits``: of one weight. ``group``: number of neighbours along the input that share a scale; 0
    for the whole row.
    """

    bits: int
    group: int


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme that config.json states for its projections; None if they are floats.

    Raises UnsupportedModel for another method, or for an option that changes the meaning of the
    numbers.
    """
    held = config.get(FIELD)
    if held is None:
        return None
    groups = held.get("config_groups") or {}
    group: dict[str, Any] = next(iter(groups.values()), {})
    weights: dict[str, Any] = group.get("weights") or {}
    size: Any = 0 if weights.get("strategy") == "channel" else weights.get("group_size")
    checks: dict[str, tuple[Any, list[Any]]] = {
        "quant_method": (held.get("quant_method"), ["compressed-tensors"]),
        "format": (held.get("format"), ["pack-quantized"]),
        "config_groups": (len(groups), [1]),
        "targets": (group.get("targets"), [["Linear"]]),
        "input_activations": (group.get("input_activations"), [None]),
        "num_bits": (weights.get("num_bits"), [4, 8]),
        "type": (weights.get("type"), ["int"]),
        "symmetric": (weights.get("symmetric"), [True]),
        "actorder": (weights.get("actorder"), [None]),
        "strategy": (weights.get("strategy"), ["group", "channel"]),
        "group_size": (size, [0] if weights.get("strategy") == "channel" else [32, 64, 128]),
        "ignore": (held.get("ignore", []), [[], ["lm_head"]]),
    }
    for field, (got, expected) in checks.items():
        if got not in expected:
            raise UnsupportedModel(
                f"config.json: {FIELD}: {field}", got, " | ".join(map(str, expected))
            )
    return Scheme(weights["num_bits"], size)


def config_of(scheme: Scheme) -> dict[str, Any]:
    """Return the ``quantization_config`` of a scheme, the inverse of ``read_scheme``."""
    group = (
        {"strategy": "group", "group_size": scheme.group}
        if scheme.group
        else {"strategy": "channel"}
    )
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False, **group}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group_0},
        "ignore": ["lm_head"],
    }


def packed_view(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Return the checkpoint with those float tensors packed that ``wanted`` has packed.

    ``wanted``: name -> shape. A tensor of a shape that fits neither form stays as it is: the check
    of all tensors reports it.
    """
    tensors = dict(checkpoint.tensors)
    views: dict[str, tuple[_Pair, int]] = {}
    for name, shape in wanted.items():
        source = checkpoint.tensors.get(name.removesuffix(PACKED))
        if (
            not name.endswith(PACKED)
            or name in tensors
            or source is None
            or not _is_float_matrix(source)
        ):
            continue  # the check of all tensors reports it, as missing or of another shape
        scales = source.name + SCALE
        bits, groups = 32 * shape[1] // source.shape[1], wanted[scales][1]
        if (
            shape != (source.shape[0], source.shape[1] * bits // 32)
            or bits not in (4, 8)
            or scales in tensors
        ):
            continue
        dtype = source.dtype if source.dtype == "BF16" else "F32"
        pair = _Pair(
            checkpoint,
            source.name,
            Scheme(bits, source.shape[1] // groups),
            scale_dtype=DTYPES[dtype],
        )
        del tensors[source.name]
        tensors[name] = dataclasses.replace(source, name=name, dtype="I32", shape=shape)
        tensors[scales] = dataclasses.replace(
            source, name=scales, dtype=dtype, shape=(source.shape[0], groups)
        )
        views |= {name: (pair, 0), scales: (pair, 1)}
    return PackedView(
        checkpoint.directory,
        checkpoint.config,
        checkpoint.generation_config,
        tensors=tensors,
        base=checkpoint,
        views=views,
    )


def _is_float_matrix(tensor: Tensor) -> bool:
    return (
        tensor.dtype in ("BF16", "F16", "F32") and len(tensor.shape) == 2 and 0 not in tensor.shape
    )


@dataclasses.dataclass(frozen=True)
class PackedView(Checkpoint):
    """A checkpoint in which some tensors are computed when they are first read, and then kept."""

    base: Checkpoint
    views: Mapping[str, tuple["_Pair", int]]

    def array(self, name: str) -> np.ndarray:
        """Return the tensor: a view of its file, or the array computed from one."""
        if name not in self.views:
            return self.base.array(name)
        pair, which = self.views[name]
        return pair.made()[which]

    def copy(self, name: str, target: np.ndarray, limit: int | None = None) -> int:
        """Copy the tensor to ``target``; ``limit`` and result as in ``Checkpoint.copy``."""
        if name in self.views:
            return stream(target, self.array(name), limit)
        return self.base.copy(name, target, limit)

    def count_above(self, name: str, limit: int) -> int:
        """Count the items of the tensor above ``limit``, as ``copying.count_above`` does."""
        return (
            count_above(self.array(name).reshape(-1), limit)
            if name in self.views
            else self.base.count_above(name, limit)
        )

    def drop(self, name: str) -> None:
        """Give back pages that the system can read again; computed arrays stay."""
        if name not in self.views:
            self.base.drop(name)


class _Pair:
    """Packed words and scales of one weight, computed once."""

    def __init__(self, checkpoint: Checkpoint, name: str, scheme: Scheme, scale_dtype: np.dtype):
        self._checkpoint = checkpoint
        self._name = name
        self._scheme = scheme
        self._dtype = scale_dtype
        self._lock = threading.Lock()
        self._made: tuple[np.ndarray, np.ndarray] | None = None

    def made(self) -> tuple[np.ndarray, np.ndarray]:
        """Return words and scales, computed at the first call."""
        with self._lock:
            if self._made is None:
                self._made = quantize(self._checkpoint.array(self._name), self._scheme, self._dtype)
                self._checkpoint.drop(self._name)
            return self._made


def quantize(
    weight: np.ndarray, scheme: Scheme, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return words int32 [out, in * bits / 32] and scales [out, in / group] of a weight [out, in].

    A number that is not finite makes its scale not finite. The words begin on a boundary of 64
    bytes.
    """
    out, size = weight.shape
    group = scheme.group or size
    words, scales = (
        _aligned((out, size * scheme.bits // 32)),
        np.empty((out, size // group), np.float32),
    )
    step = max(1, _ROWS_BYTES // (4 * size))
    for first in range(0, out, step):
        rows = slice(first, first + step)
        part = np.ascontiguousarray(weight[rows], np.float32)
        if library() is None:
            words[rows], scales[rows] = _quantized(
                part, scheme.bits, group, scale_dtype=scale_dtype
            )
        else:
            _compiled(
                part,
                scheme.bits,
                group,
                to_bf16=scale_dtype == BF16,
                words=words[rows],
                scales=scales[rows],
            )
    return words, scales.astype(scale_dtype)


def _compiled(
    part: np.ndarray, bits: int, group: int, to_bf16: bool, words: np.ndarray, scales: np.ndarray
) -> None:
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (part, words, scales)]
    numbers = [ctypes.c_int64(number) for number in (*part.shape, bits, group, to_bf16)]
    native: Any = library()
    native.slipway_quantize(pointers[0], *numbers, *pointers[1:])


def _quantized(
    x: np.ndarray, bits: int, group: int, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the rules of csrc/quantize.cc with NumPy."""
    least, most = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    x_RGI = x.reshape(x.shape[0], -1, group)
    with np.errstate(all="ignore"):
        at = np.abs(x_RGI).argmax(-1, keepdims=True)
        peak_RG1 = np.take_along_axis(x_RGI, at, -1) + (x_RGI * 0).sum(-1, keepdims=True)
        if bits == 8:
            scale_RG1 = _rounded(np.abs(peak_RG1) / np.float32(127), scale_dtype)
        else:
            scale_RG1 = np.where(
                np.isfinite(peak_RG1) & (peak_RG1 != 0),
                _fitted(x_RGI, peak_RG1, scale_dtype),
                peak_RG1,
            )
        q_RGI = np.clip(
            np.nan_to_num(np.rint(x_RGI * np.where(scale_RG1 == 0, 0, 1 / scale_RG1))), least, most
        )
    stored = (q_RGI - least).astype(np.uint32).reshape(x.shape[0], -1, 32 // bits)
    words = np.bitwise_or.reduce(stored << np.arange(0, 32, bits, dtype=np.uint32), axis=-1)
    return words.astype(np.uint32).view(np.int32), scale_RG1[..., 0]


def _fitted(x_RGI: np.ndarray, peak_RG1: np.ndarray, scale_dtype: np.dtype) -> np.ndarray:
    """Return the scale of each group of 4-bit numbers."""
    weight_RGI, best_RG1, least_RG1 = (
        np.sqrt(np.abs(x_RGI)),
        np.zeros_like(peak_RG1),
        np.full_like(peak_RG1, np.inf),
    )
    for end in CANDIDATES:
        q_RGI = np.clip(np.rint(x_RGI / (peak_RG1 / np.float32(end))), -8, 7)
        xq_RG1, qq_RG1 = ((weight_RGI * of * q_RGI).sum(-1, keepdims=True) for of in (x_RGI, q_RGI))
        scale_RG1 = _rounded(
            np.where(qq_RG1 > 0, xq_RG1 / qq_RG1, peak_RG1 / np.float32(end)), scale_dtype
        )
        q_RGI = np.clip(np.rint(x_RGI / scale_RG1), -8, 7)
        error_RG1 = (weight_RGI * (x_RGI - q_RGI * scale_RG1) ** 2).sum(-1, keepdims=True)
        better_RG1 = error_RG1 < least_RG1
        best_RG1 = np.where(better_RG1, scale_RG1, best_RG1)
        least_RG1 = np.where(better_RG1, error_RG1, least_RG1)
    return best_RG1


def _rounded(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return scale.astype(dtype).astype(np.float32)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return uninitialised int32 memory on a boundary that JAX accepts without a copy."""
    raw = np.empty(4 * shape[0] * shape[1] + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * shape[0] * shape[1]].view(np.int32).reshape(shape)
