"""Decides what a Flax NNX layer's arrays become in torch's layout, read off the layer's class and attributes.

Knows one layer at a time: neither its name nor what stands before it. Rows are (attribute, torch's name, pattern) as in
rules.py; an attribute that ends in ``?`` may be None.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

Row = tuple[str, str, str]
Rows = Callable[[Any], Sequence[Row]]


class NotLinear(ValueError):
    """A layer of a known class whose configuration has no counterpart in torch."""


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """Layer class -> its rows; the first class that a layer is an instance of counts, a user's own ones first."""

    rows: Mapping[type, Rows]

    def find(self, layer: Any) -> Rows | None:
        """How the layer's arrays are written; None if no class of the table is its."""
        return next((rows for kind, rows in self.rows.items() if isinstance(layer, kind)), None)

    def extended(self, own: Mapping[type, Sequence[Row]]) -> "LayerTable":
        """The table with a user's classes in front, each with rows that are always the same."""
        return LayerTable(
            {**{kind: functools.partial(_always, tuple(rows)) for kind, rows in own.items()}, **self.rows}
        )


def _always(rows: Sequence[Row], _: Any) -> Sequence[Row]:
    return rows


def _linear(_: Any) -> list[Row]:
    return [("kernel", "weight", "into out -> out into"), ("bias?", "bias", "out -> out")]


def _linear_general(layer: nnx.LinearGeneral) -> list[Row]:
    """All input axes in a row, all output axes in a row: one matrix."""
    if layer.batch_axis:
        raise NotLinear(f"batch_axis {dict(layer.batch_axis)}: a matrix for each index has no torch Linear")
    into = " ".join(f"into{i}" for i in range(len(layer.in_features)))
    out = " ".join(f"out{i}" for i in range(len(layer.out_features)))
    return [("kernel", "weight", f"{into} {out} -> ({out}) ({into})"), ("bias?", "bias", f"{out} -> ({out})")]


def _einsum(layer: nnx.Einsum) -> list[Row]:
    """Axes that the kernel shares with the input are summed over, the others are outputs."""
    inputs, _, output = layer.einsum_str.replace(" ", "").partition("->")
    x, _, kernel = inputs.partition(",")
    into = [axis for axis in x if axis in kernel and axis not in output]
    out = [axis for axis in output if axis in kernel and axis not in x]
    if not into or sorted(into + out) != sorted(kernel):
        raise NotLinear(f"einsum {layer.einsum_str!r}: not a linear map of the input's axes alone")
    if layer.bias is not None and len(layer.bias.shape) != len(out):
        raise NotLinear(
            f"einsum {layer.einsum_str!r}: bias of shape {layer.bias.shape}, expected the output axes {out}"
        )
    matrix = f"{' '.join(kernel)} -> ({' '.join(out)}) ({' '.join(into)})"
    return [("kernel", "weight", matrix), ("bias?", "bias", f"{' '.join(out)} -> ({' '.join(out)})")]


def _spatial(layer: Any) -> list[str]:
    size = layer.kernel_size if isinstance(layer.kernel_size, Sequence) else (layer.kernel_size,)
    return ["depth", "height", "width"][-len(size) :] if len(size) <= 3 else [f"axis{i}" for i in range(len(size))]


def _conv(layer: nnx.Conv) -> list[Row]:
    """HWIO -> OIHW; with groups, into is each group's share, 1 for a depthwise convolution."""
    space = " ".join(_spatial(layer))
    return [("kernel", "weight", f"{space} into out -> out into {space}"), ("bias?", "bias", "out -> out")]


def _conv_transpose(layer: nnx.ConvTranspose) -> list[Row]:
    """torch's kernel is that of the convolution whose gradient it is: turned round, unless Flax was told the same."""
    space = _spatial(layer)
    if layer.transpose_kernel:
        pattern = f"{' '.join(space)} out into -> into out {' '.join(space)}"
    else:
        pattern = f"{' '.join(f'-{axis}' for axis in space)} into out -> into out {' '.join(space)}"
    return [("kernel", "weight", pattern), ("bias?", "bias", "out -> out")]


def _embed(_: Any) -> list[Row]:
    return [("embedding", "weight", "vocab embed -> vocab embed")]


def _norm(_: Any) -> list[Row]:
    return [("scale?", "weight", "features -> features"), ("bias?", "bias", "features -> features")]


def _batch_norm(layer: nnx.BatchNorm) -> list[Row]:
    running = [("mean", "running_mean", "features -> features"), ("var", "running_var", "features -> features")]
    return [*_norm(layer), *running]


TABLE = LayerTable(
    {
        nnx.Linear: _linear,
        nnx.LinearGeneral: _linear_general,
        nnx.Einsum: _einsum,
        nnx.Conv: _conv,
        nnx.ConvTranspose: _conv_transpose,
        nnx.Embed: _embed,
        nnx.BatchNorm: _batch_norm,
        nnx.LayerNorm: _norm,
        nnx.RMSNorm: _norm,
        nnx.GroupNorm: _norm,
        nnx.InstanceNorm: _norm,
    }
)
# Attributes that bear another name in torch's and Hugging Face's models.
ATTRIBUTES: Mapping[type, Mapping[str, str]] = {
    nnx.MultiHeadAttention: {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "out": "out_proj",
        "query_ln": "q_norm",
        "key_ln": "k_norm",
    },
}
# Variables that are no weights.
STATE = (nnx.RngState, nnx.Cache, nnx.Intermediate)
