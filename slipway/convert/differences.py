"""Defaults of Flax that differ from torch's: settings that the twin of an exported module needs.

Layers are always examined; traced operations only where there is an example. No array is changed
here. Not here: the export itself (export.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core

from slipway.convert.layers import Layer

_TORCH_EPSILON = 1e-5
_GELU = 0.044715  # factor of the tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415)
NOT_TRACED = (
    "not examined without example=: activations and pools. jax.nn.gelu is the tanh approximation "
    "by default, torch's GELU is not (approximate='tanh'); pools with padding 'SAME' pad "
    "differently from torch's"
)


def of_layers(layers: Sequence[Layer]) -> list[str]:
    """Return one line for each difference in a layer's settings, with the layers that have it."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        for line in (*_norm(layer.kind, layer.facts), *_conv(layer)):
            found.setdefault(line, []).append(layer.dotted)
    return [f"{line}: {_some(paths)}" for line, paths in found.items()]


def of_operations(closed: core.ClosedJaxpr) -> list[str]:
    """Return one line for each difference among the operations that a run has traced."""
    lines: dict[str, None] = {}
    for eqn in _operations(closed.jaxpr):
        name = eqn.primitive.name
        if name == "mul" and any(_is_literal(v, _GELU) for v in eqn.invars):
            lines["gelu is the tanh approximation: in torch approximate='tanh'"] = None
        if name.startswith("reduce_window") and any(
            low != high for low, high in eqn.params["padding"]
        ):
            lines[f"a pool pads unevenly, {eqn.params['padding']}: in torch pad first"] = None
        elif name == "reduce_window_sum" and any(low for low, _ in eqn.params["padding"]):
            lines[
                (
                    "an average pool pads: nnx.avg_pool and torch count the padding unless told "
                    "otherwise"
                )
            ] = None
        is_plain = name == "conv_general_dilated" and set(eqn.params["lhs_dilation"]) == {1}
        if is_plain and any(low != high for low, high in eqn.params["padding"]):
            sides = ", ".join(
                f"{low} before and {high} behind" for low, high in eqn.params["padding"]
            )
            lines[f"a convolution pads unevenly (for each axis {sides}): in torch pad first"] = None
    return list(lines)


def _norm(kind: str, facts: Mapping[str, Any]) -> Iterator[str]:
    epsilon = facts.get("epsilon")
    if epsilon is None:  # a class that the user has defined
        return
    if kind == "RMSNorm":
        yield (
            f"epsilon is {epsilon:g}: torch.nn.RMSNorm's default is that of the dtype, "
            f"so give eps={epsilon:g}"
        )
    elif (
        kind in ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm")
        and epsilon != _TORCH_EPSILON
    ):
        yield (
            f"epsilon is {epsilon:g}, torch's default {_TORCH_EPSILON:g}: "
            f"give the twin eps={epsilon:g}"
        )
    if kind == "BatchNorm" and "momentum" in facts:
        momentum = facts["momentum"]
        yield (
            f"momentum {momentum:g} is the share that is kept: "
            f"torch's is {1 - momentum:g} (only for training)"
        )
    if kind == "InstanceNorm":
        yield "scale and bias are learned: torch's InstanceNorm needs affine=True"


def _conv(layer: Layer) -> Iterator[str]:
    if not layer.is_conv:
        return
    padding, facts = layer.facts.get("padding"), layer.facts
    kernel = next((shape[:-2] for name, shape in layer.shapes.items() if name == "kernel"), ())
    strides = _each(facts.get("strides"), len(kernel))
    dilation = _each(facts.get("kernel_dilation"), len(kernel))
    if any(n != 1 for n in _each(facts.get("input_dilation"), len(kernel))):
        yield "the input is dilated, which torch's convolutions cannot: insert the zeros first"
    if not isinstance(padding, str):
        if layer.kind == "ConvTranspose" and padding is not None:
            yield (
                f"padding {padding!r} is around the dilated input: "
                f"torch's is dilation * (kernel - 1) less Flax's"
            )
        return
    if layer.kind == "ConvTranspose" and padding in ("SAME", "CIRCULAR"):
        yield (
            f"padding {padding!r} of a transposed convolution: "
            f"torch needs padding= and output_padding=, or a crop"
        )
    elif padding == "SAME" and any(n != 1 for n in strides):
        yield (
            f"padding 'SAME' with strides {strides}: Flax pads by the input's size, "
            f"torch evenly; pad first in torch"
        )
    elif padding == "SAME" and any((size - 1) * d % 2 for size, d in zip(kernel, dilation)):
        yield (
            f"padding 'SAME' of a kernel {kernel} pads unevenly: in torch padding='same' does, "
            f"a number does not"
        )
    elif padding == "CIRCULAR":
        yield "padding 'CIRCULAR': in torch padding_mode='circular'"
    elif padding == "REFLECT":
        yield "padding 'REFLECT': in torch padding_mode='reflect'"
    elif padding == "CAUSAL":
        yield "padding 'CAUSAL': in torch pad on the left first"


def _each(value: Any, count: int) -> tuple[int, ...]:
    """Return one number for each axis."""
    if value is None:
        return (1,) * count
    return (value,) * count if isinstance(value, int) else tuple(value)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _operations(jaxpr: Any) -> Iterator[Any]:
    """Yield the operations of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, core.Jaxpr):
                    yield from _operations(inner)


def _is_literal(atom: Any, value: float) -> bool:
    """Return whether an operand is a constant number, up to the rounding of bfloat16."""
    held = getattr(atom, "val", None)
    return (
        held is not None
        and getattr(held, "ndim", 0) == 0
        and math.isclose(float(held), value, rel_tol=1e-2)
    )
