"""Form of one Flax layer's arrays in torch's layout, from the layer's class and attributes.

Rows are (attribute, torch's name, pattern) as in rules.py; an attribute that ends in ``?`` may be
None. In patterns, axes named ``into...`` are contracted with the layer's input, ``out...`` are its
output, ``features`` are both. Not here: the search for layers (nnx_walk.py, linen_walk.py),
adjacent reshapes (flattening.py, dataflow.py).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes

Row = tuple[str, str, str]
Shape = tuple[int, ...]
SPATIAL = ("depth", "height", "width")
FACTS = (
    "epsilon",
    "padding",
    "strides",
    "kernel_size",
    "kernel_dilation",
    "input_dilation",
    "feature_group_count",
    "transpose_kernel",
    "num_groups",
    "momentum",
    "axis",
    "use_bias",
    "use_scale",
)


class NotLinear(ValueError):
    """A layer of a known class with a configuration that has no counterpart in torch."""


@dataclasses.dataclass(frozen=True)
class Form:
    """Rows of a layer, and the shape of each array of one unstacked layer where it is known."""

    rows: tuple[Row, ...]
    shapes: Mapping[str, Shape]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer that was found in a module.

    ``name`` has one entry for each of ``path``, "" where torch has no such level. ``variables`` and
    ``shapes`` are by attribute. ``facts`` are relevant attributes of the layer other than its
    arrays.
    """

    path: tuple[str, ...]
    name: tuple[str, ...]
    kind: str
    rows: tuple[Row, ...]
    variables: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    facts: Mapping[str, Any]
    is_attention: bool = False

    @property
    def dotted(self) -> str:
        """Path as text."""
        return ".".join(self.path)

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution or its transpose."""
        return self.kind in ("Conv", "ConvTranspose", "ConvLocal")

    @property
    def is_norm(self) -> bool:
        """Whether the layer scales features without mixing them."""
        return not self.is_conv and all(len(axes_of(row[2])) <= 1 for row in self.rows)

    @property
    def stacked(self) -> int:
        """Number of axes that a stack has added to each array."""
        return max(
            (self.variables[a].ndim - len(axes_of(pattern)) for a, _, pattern in self.rows),
            default=0,
        )

    def sizes(self, role: str) -> Shape:
        """Return the sizes of the axes of ``role``: "into", "out" or "features"."""
        for attribute, _, pattern in self.rows:
            axes = [axis for axis in axes_of(pattern) if role_of(axis) == role]
            shape = self.shapes.get(attribute)
            if axes and shape is not None:
                return tuple(shape[axes_of(pattern).index(axis)] for axis in axes)
        return ()

    def total(self, role: str) -> int:
        """Return the number of inputs, outputs or features; 0 if the layer has none."""
        sizes = self.sizes(role)
        groups = self.facts.get("feature_group_count", 1) if role == "into" else 1
        return math.prod(sizes) * groups if sizes else 0


def facts_of(layer: Any) -> dict[str, Any]:
    """Return the relevant settings of a layer; each class has some of FACTS."""
    return {fact: getattr(layer, fact) for fact in FACTS if hasattr(layer, fact)}


def fitted(form: Form, held: Mapping[str, Any]) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Return the rows of a form for the arrays that a layer holds, and these arrays by attribute.

    ``held``: the layer's arrays by attribute. Raises NotLinear where an array is missing or has too
    few axes, or where the numbers of additional axes, beside those of the patterns, differ.
    """
    rows = tuple(
        (a.removesuffix("?"), name, pattern)
        for a, name, pattern in form.rows
        if a.removesuffix("?") in held
    )
    missing = {a for a, _, _ in form.rows if not a.endswith("?")} - {row[0] for row in rows}
    if missing:
        raise NotLinear(f"has no {', '.join(sorted(missing))}")
    variables = {attribute: held[attribute] for attribute, _, _ in rows}
    extra = {variables[a].ndim - len(axes_of(pattern)) for a, _, pattern in rows}
    if len(extra) > 1 or min(extra, default=0) < 0:
        shapes = ", ".join(f"{a} {tuple(x.shape)}" for a, x in variables.items())
        raise NotLinear(f"arrays of unexpected rank: {shapes}")
    return rows, variables


def axes_of(pattern: str) -> list[str]:
    """Return the axes of a pattern's JAX side."""
    return [
        word.lstrip("-")
        for word in pattern.partition("->")[0].replace("(", " ").replace(")", " ").split()
    ]


def role_of(axis: str) -> str:
    """Return "into", "out", "features" or "" for an axis of a pattern."""
    return next((role for role in ("into", "out", "features") if axis.startswith(role)), "")


def own_form(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> Form:
    """Return the form of a class that a user has described by rows; its axes may have any names."""
    return Form(tuple(rows), shapes)


# Forms that NNX and Linen share.


def linear(into: Sequence[int], out: Sequence[int]) -> Form:
    """Return the form of a matrix over several input and output axes."""
    if len(into) == len(out) == 1:
        rows = (("kernel", "weight", "into out -> out into"), ("bias?", "bias", "out -> out"))
    else:
        i, o = (
            " ".join(f"into{n}" for n in range(len(into))),
            " ".join(f"out{n}" for n in range(len(out))),
        )
        rows = (("kernel", "weight", f"{i} {o} -> ({o}) ({i})"), ("bias?", "bias", f"{o} -> ({o})"))
    return Form(rows, {"kernel": (*into, *out), "bias": tuple(out)})


def einsum(spec: str, kernel_shape: Shape, bias_shape: Shape | None) -> Form:
    """Return the form of an einsum.

    Axes that the kernel shares with the input are summed over, the others are outputs.
    """
    inputs, _, output = spec.replace(" ", "").partition("->")
    x, _, kernel = inputs.partition(",")
    into = [axis for axis in x if axis in kernel and axis not in output]
    out = [axis for axis in output if axis in kernel and axis not in x]
    if not into or sorted(into + out) != sorted(kernel):
        raise NotLinear(f"einsum {spec!r}: not a linear map of the input's axes alone")
    if bias_shape is not None and len(bias_shape) != len(out):
        raise NotLinear(
            f"einsum {spec!r}: bias of shape {bias_shape}, expected the output axes {out}"
        )
    i, o = (
        " ".join(f"{role}_{axis}" for axis in axes) for role, axes in (("into", into), ("out", out))
    )
    k = " ".join(f"{'into' if axis in into else 'out'}_{axis}" for axis in kernel)
    rows = (("kernel", "weight", f"{k} -> ({o}) ({i})"), ("bias?", "bias", f"{o} -> ({o})"))
    return Form(
        rows, {"kernel": tuple(kernel_shape)} | ({"bias": tuple(bias_shape)} if bias_shape else {})
    )


def conv(kernel_shape: Shape) -> Form:
    """Return the form of a convolution: HWIO -> OIHW.

    With groups, ``into`` is the share of each group.
    """
    space = " ".join(_spatial(len(kernel_shape) - 2))
    rows = (
        ("kernel", "weight", f"{space} into out -> out into {space}"),
        ("bias?", "bias", "out -> out"),
    )
    return Form(rows, {"kernel": tuple(kernel_shape), "bias": (kernel_shape[-1],)})


def conv_transpose(kernel_shape: Shape, transpose_kernel: bool) -> Form:
    """Return the form of a transposed convolution.

    The kernel is reversed for torch, unless Flax also reverses it.
    """
    space = _spatial(len(kernel_shape) - 2)
    ours = "out into" if transpose_kernel else "into out"
    turned = " ".join(space if transpose_kernel else [f"-{axis}" for axis in space])
    rows = (
        ("kernel", "weight", f"{turned} {ours} -> into out {' '.join(space)}"),
        ("bias?", "bias", "out -> out"),
    )
    return Form(
        rows,
        {"kernel": tuple(kernel_shape), "bias": (kernel_shape[-2 if transpose_kernel else -1],)},
    )


def embed(num_embeddings: int, features: int) -> Form:
    """Return the form of an embedding table."""
    rows = (("embedding", "weight", "vocab out -> vocab out"),)
    return Form(rows, {"embedding": (num_embeddings, features)})


def norm(features: int, running: bool = False) -> Form:
    """Return the form of a norm, with running statistics or without."""
    one = "features -> features"
    rows: tuple[Row, ...] = (("scale?", "weight", one), ("bias?", "bias", one))
    if running:
        rows += (("mean", "running_mean", one), ("var", "running_var", one))
    return Form(rows, {attribute.rstrip("?"): (features,) for attribute, _, _ in rows})


def _spatial(count: int) -> list[str]:
    return list(SPATIAL[-count:]) if count <= 3 else [f"axis{i}" for i in range(count)]


# NNX's layers.


def _linear_general(layer: nnx.LinearGeneral) -> Form:
    if layer.batch_axis:
        raise NotLinear(
            f"batch_axis {dict(layer.batch_axis)}: a matrix for each index has no torch Linear"
        )
    return linear(layer.in_features, layer.out_features)


def _layer_norm(layer: Any) -> Form:
    """Return the form of a norm over the last axis."""
    for field in ("feature_axes", "reduction_axes"):
        axes = getattr(layer, field, -1)
        if axes not in (-1, (-1,), [-1]):
            raise NotLinear(
                f"{field}={axes!r}: torch's norms have the last axis; name its rows in layers="
            )
    return norm(layer.num_features)


def _instance_norm(layer: nnx.InstanceNorm) -> Form:
    if layer.feature_axes not in (-1, (-1,), [-1]):
        raise NotLinear(f"feature_axes={layer.feature_axes!r}: torch's norms have the last axis")
    return norm(layer.num_features)


def _batch_norm(layer: nnx.BatchNorm) -> Form:
    if layer.axis != -1:
        raise NotLinear(
            f"axis={layer.axis!r}: expected -1; name its rows in layers= if they are right "
            f"as they are"
        )
    return norm(layer.num_features, running=True)


def _group_norm(layer: nnx.GroupNorm) -> Form:
    if layer.reduction_axes is not None:
        raise NotLinear(
            f"reduction_axes={layer.reduction_axes!r}: "
            f"torch's GroupNorm reduces all axes but the batch"
        )
    return norm(layer.num_groups * layer.group_size)


NNX_FORMS: Mapping[type, Callable[[Any], Form]] = {
    nnx.Linear: lambda layer: linear((layer.in_features,), (layer.out_features,)),
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: lambda layer: einsum(layer.einsum_str, layer.kernel_shape, layer.bias_shape),
    nnx.Conv: lambda layer: conv(layer.kernel_shape),
    nnx.ConvTranspose: lambda layer: conv_transpose(layer.kernel_shape, layer.transpose_kernel),
    nnx.Embed: lambda layer: embed(layer.num_embeddings, layer.features),
    nnx.BatchNorm: _batch_norm,
    nnx.LayerNorm: _layer_norm,
    nnx.RMSNorm: _layer_norm,
    nnx.GroupNorm: _group_norm,
    nnx.InstanceNorm: _instance_norm,
}


# Linen's layers; their sizes follow from the arrays.


def _dense_general(layer: linen.DenseGeneral, shapes: Mapping[str, Shape]) -> Form:
    if layer.batch_dims not in ((), []):
        raise NotLinear(
            f"batch_dims={layer.batch_dims!r}: a matrix for each index has no torch Linear"
        )
    outputs = 1 if isinstance(layer.features, int) else len(layer.features)
    kernel = shapes["kernel"]
    return linear(kernel[:-outputs], kernel[-outputs:])


def _linen_norm(running: bool = False) -> Callable[[Any, Mapping[str, Shape]], Form]:
    """Return a function that makes the form of a norm, with running statistics or without."""

    def form(layer: Any, shapes: Mapping[str, Shape]) -> Form:
        for field in ("axis", "feature_axes", "reduction_axes"):
            default = None if isinstance(layer, linen.GroupNorm) else -1
            axes = getattr(layer, field, default)
            if axes != default and axes not in ((-1,), [-1]):
                raise NotLinear(
                    f"{field}={axes!r}: torch's norms have the last axis; name its rows in layers="
                )
        if getattr(layer, "axis_name", None) is not None and not running:
            raise NotLinear(
                f"axis_name={layer.axis_name!r}: torch's norms reduce over one device's features"
            )
        return norm(next((shape[0] for shape in shapes.values()), 0), running)

    return form


LINEN_FORMS: Mapping[type, Callable[[Any, Mapping[str, Shape]], Form]] = {
    linen.Dense: lambda layer, shapes: linear(shapes["kernel"][:1], shapes["kernel"][1:]),
    linen.DenseGeneral: _dense_general,
    linen.Conv: lambda layer, shapes: conv(shapes["kernel"]),
    linen.ConvTranspose: lambda layer, shapes: conv_transpose(
        shapes["kernel"], layer.transpose_kernel
    ),
    linen.Embed: lambda layer, shapes: embed(layer.num_embeddings, layer.features),
    linen.BatchNorm: _linen_norm(running=True),
    linen.LayerNorm: _linen_norm(),
    linen.RMSNorm: _linen_norm(),
    linen.GroupNorm: _linen_norm(),
    linen.InstanceNorm: _linen_norm(),
}
# Modules that contain a layer and compute something else with its arrays.
REPARAMETRIZED = (nnx.WeightNorm, nnx.SpectralNorm)
# Attributes with another name in torch's and Hugging Face's models.
ATTENTION_NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "out_proj",
    "query_ln": "q_norm",
    "key_ln": "k_norm",
}
# Variables that are no weights.
STATE = (nnx.RngState, nnx.Cache, nnx.Intermediate)
# Functions that a layer may take, and the defaults with which it computes what its class states.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "conv_general_dilated_cls": (None,),
    "conv_general_dilated": (None, jax.lax.conv_general_dilated),
    "einsum_op": (jnp.einsum,),
    "promote_dtype": (dtypes.promote_dtype, linen_dtypes.promote_dtype),
}


def deviations(layer: Any, known: type) -> Iterator[str]:
    """Yield reasons for which a layer computes something other than its known class does."""
    kind = type(layer)
    package = "nnx" if issubclass(known, nnx.Module) else "linen"
    if kind.__call__ is not known.__call__:
        yield (
            f"{kind.__name__} computes in a __call__ of its own, "
            f"so its arrays may mean something else; give "
            f"layers={{{kind.__name__}: {package}.{known.__name__}}} "
            "if they mean the same, or its own rows"
        )
    for field, defaults in _DEFAULTS.items():
        if (given := getattr(layer, field, defaults[0])) not in defaults:
            yield (
                f"{field}={given!r} may compute something else; give layers={{{kind.__name__}: "
                f"{package}.{known.__name__}}} if it does not"
            )
    if getattr(layer, "mask", None) is not None:
        yield "mask: the kernel is multiplied by it; store the product as the kernel, and no mask"
