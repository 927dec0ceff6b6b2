"""Stack axes of arrays, which count the layers of a stack of nnx.vmap or nn.scan.

A layer's class determines the shape of one layer's array; where that leaves several axes, metadata
or the user decides. Not here: the search for layers (nnx_walk.py, linen_walk.py).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from slipway.convert.layers import Layer

Axes = tuple[int, ...]
_METADATA = ("out_sharding", "sharding_names", "sharding")  # of NNX variables, newest first


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Stack axes of each layer's arrays by (path, attribute), and the path level of each stack."""

    axes: Mapping[tuple[tuple[str, ...], str], Axes]
    depths: Mapping[tuple[str, ...], int]
    problems: list[str]

    def of(self, layer: Layer, attribute: str) -> Axes:
        """Return the array's stack axes, outermost first."""
        return self.axes.get((layer.path, attribute), ())


def find(
    layers: Sequence[Layer],
    told: Mapping[str, int | Sequence[int]],
    seen: Mapping[tuple[tuple[str, ...], str], Axes] | None = None,
) -> Stacks:
    """Return the stack axes of all layers.

    ``told``: prefixes of attribute paths, and the axes that the user has given for the arrays
    below. ``seen``: the axes over which the module was seen to scan.
    """
    axes: dict[tuple[tuple[str, ...], str], Axes] = {}
    problems: list[str] = []
    used: set[str] = set()
    for layer in layers:
        if not layer.stacked:
            continue
        for attribute in layer.variables:
            key, path = (layer.path, attribute), f"{layer.dotted}.{attribute}"
            prefix = max(
                (p for p in told if path == p or path.startswith(f"{p}.")), key=len, default=None
            )
            fitting = _fitting(layer, attribute)
            if prefix is not None:
                used.add(prefix)
                given = told[prefix]
                chosen = (given,) if isinstance(given, int) else tuple(given)
                rank = layer.variables[attribute].ndim
                chosen = tuple(axis % rank for axis in chosen if -rank <= axis < rank)
                if chosen not in [p for axes_ in fitting for p in itertools.permutations(axes_)]:
                    shape = tuple(layer.variables[attribute].shape)
                    problems.append(
                        f"stack_axes[{prefix!r}]={given!r}: {path} of shape {shape} cannot be "
                        f"stacked on it; one layer of its class has the shape "
                        f"{layer.shapes.get(attribute, 'of no array')}"
                    )
                    continue
                axes[key] = chosen
            elif seen and key in seen and seen[key] in fitting:
                axes[key] = seen[key]
            else:
                fitting = _by_metadata(layer, attribute, fitting)
                if len(fitting) == 1 and layer.stacked == 1:
                    axes[key] = fitting[0]
                else:
                    problems.append(_question(layer, attribute, fitting))
    problems += [
        f"stack_axes: {name} is no stacked layer or array" for name in sorted(told.keys() - used)
    ]
    depths = {layer.path: _depth(layer, layers) for layer in layers}
    return Stacks(axes, depths, problems + _unequal(layers, axes, depths))


def _fitting(layer: Layer, attribute: str) -> list[Axes]:
    """Return the axes without which the array has the shape of one layer's array.

    For a user-defined class these are the first axes.
    """
    shape, one = tuple(layer.variables[attribute].shape), layer.shapes.get(attribute)
    if one is None:
        return [tuple(range(layer.stacked))]
    return [
        axes
        for axes in itertools.combinations(range(len(shape)), layer.stacked)
        if tuple(size for axis, size in enumerate(shape) if axis not in axes) == tuple(one)
    ]


def _by_metadata(layer: Layer, attribute: str, fitting: list[Axes]) -> list[Axes]:
    """Return the axes of ``fitting`` that the array's partition names call layers."""
    variable = layer.variables[attribute]
    metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
    names: Any = next((n for field in _METADATA if (n := metadata.get(field)) is not None), None)
    names = getattr(names, "spec", names)
    if not isinstance(names, Iterable) or isinstance(names, str):
        return fitting
    names = tuple(names)
    likely = {"layer", "layers", "stack", "stacked", "scan", *layer.path}
    named = [
        axes
        for axes in fitting
        if all(axis < len(names) and names[axis] in likely for axis in axes)
    ]
    return named or fitting


def _question(layer: Layer, attribute: str, fitting: list[Axes]) -> str:
    shape, path = tuple(layer.variables[attribute].shape), f"{layer.dotted}.{attribute}"
    one = layer.shapes.get(attribute)
    if not fitting:
        return (
            f"{path}: shape {shape} is no stack of arrays of shape {one}, "
            f"the shape of one {layer.kind}"
        )
    choice = " or ".join(str(axes[0] if len(axes) == 1 else axes) for axes in fitting)
    example = fitting[0][0] if layer.stacked == 1 else fitting[0]
    what = "the axis that counts the layers (nnx.vmap's out_axes for it)"
    if layer.stacked > 1:
        what = "the axes that count the layers, the outermost stack's first"
    return (
        f"{path}: an array of shape {shape} may be stacked on axis {choice}; give {what} in "
        f"stack_axes={{{layer.path[0]!r}: {example!r}}}, "
        f"or only for this array, {{{path!r}: {example!r}}}"
    )


def _depth(layer: Layer, layers: Sequence[Layer]) -> int:
    """Return the number of path levels outside the stack.

    It is the smallest number below which every layer is stacked.
    """
    if layer.stacked:
        for depth in range(1, len(layer.path) + 1):
            beside = [other for other in layers if other.path[:depth] == layer.path[:depth]]
            if all(other.stacked == layer.stacked for other in beside):
                return depth
    return len(layer.path)


def _unequal(
    layers: Sequence[Layer], axes: Mapping, depths: Mapping[tuple[str, ...], int]
) -> list[str]:
    """Return problems of stacks with arrays that count different numbers of layers."""
    counts: dict[tuple[str, ...], dict[Axes, str]] = {}
    for layer in layers:
        for attribute, variable in layer.variables.items():
            if (layer.path, attribute) in axes:
                count = tuple(variable.shape[axis] for axis in axes[layer.path, attribute])
                stack = layer.path[: depths[layer.path]]
                counts.setdefault(stack, {}).setdefault(count, f"{layer.dotted}.{attribute}")
    return [
        f"{'.'.join(stack)}: a stack of unequal arrays: "
        f"{', '.join(f'{name} has {count} layers' for count, name in held.items())}; "
        "give their axes in stack_axes="
        for stack, held in counts.items()
        if len(held) > 1
    ]
