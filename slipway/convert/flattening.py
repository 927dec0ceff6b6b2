"""Effect of flattened feature maps, and of maps made from vectors, on the rows of adjacent layers.

Flax's maps are (height, width, channels), torch's (channels, height, width). Orders that a user
gives (``flatten``, ``unflatten``) take precedence over traced ones (dataflow.py). Not here:
questions to the user (questions.py).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from slipway.convert.axes import Axis, Unclear, index_order, leaves, size_of, torch_order
from slipway.convert.layers import Layer, axes_of, role_of
from slipway.errors import InvalidConfig

Told = Mapping[str, Sequence[int] | None]
_TOKEN = re.compile(r"[()]|[^\s()]+")


@dataclasses.dataclass(frozen=True)
class Order:
    """Composition of one dimension of a torch tensor of its axes in JAX.

    ``sizes``: for each axis the sizes of its factors. ``order``: the factors' positions in torch's
    order. If ``index`` is given, the only axis has no such factors, and entry i of ``index`` is the
    place in JAX of torch's entry i.
    """

    sizes: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    index: np.ndarray | None = None

    def places(self) -> np.ndarray:
        """Return the place in JAX of each of torch's entries."""
        if self.index is not None:
            return self.index
        flat = [size for axis in self.sizes for size in axis]
        return np.arange(math.prod(flat)).reshape(flat).transpose(self.order).reshape(-1)


Orders = dict[tuple[str, int], Order]  # by attribute and dimension of the torch tensor


def dimensions(pattern: str) -> list[list[str]]:
    """Return the axes of each dimension of a pattern's torch side."""
    made: list[list[str]] = []
    inside = False
    for token in _TOKEN.findall(pattern.partition("->")[2]):
        if token in "()":
            inside = token == "("
            made += [[]] if inside else []
        elif inside:
            made[-1].append(token)
        else:
            made.append([token])
    return made


def told_orders(layer: Layer, flatten: Told, unflatten: Told) -> Orders:
    """Return the orders that a user has given for a layer.

    Raises InvalidConfig for one that does not fit.
    """
    made: Orders = {}
    for field, told, roles in (
        ("flatten", flatten, ("into", "features")),
        ("unflatten", unflatten, ("out",)),
    ):
        shape = told.get(layer.dotted)
        if shape is None:
            continue
        if not any(layer.sizes(role) for role in roles):
            raise InvalidConfig(
                f"{field}[{layer.dotted!r}]",
                tuple(shape),
                f"nothing: {layer.kind} has no such axis",
            )
        for attribute, _, pattern in layer.rows:
            for dim, axes in enumerate(dimensions(pattern)):
                in_role = all(role_of(axis) in roles for axis in axes)
                if not in_role or attribute not in layer.shapes:
                    continue
                sizes = [layer.shapes[attribute][axes_of(pattern).index(axis)] for axis in axes]
                made[attribute, dim] = _told_order(layer, field, tuple(shape), sizes=sizes)
    return made


def _told_order(layer: Layer, field: str, shape: tuple[int, ...], sizes: Sequence[int]) -> Order:
    """Return the order of a map of ``shape``, channels last, in axes of ``sizes``."""
    rest, factors = list(shape), []
    for size in sizes:
        taken: list[int] = []
        while rest and math.prod(taken) < size:
            taken.append(rest.pop(0))
        factors.append(tuple(taken))
    if rest or any(math.prod(taken) != size for taken, size in zip(factors, sizes)):
        what = "outputs" if field == "unflatten" else "inputs"
        held = sizes[0] if len(sizes) == 1 else tuple(sizes)
        raise InvalidConfig(
            f"{field}[{layer.dotted!r}]",
            shape,
            f"(..., channels) with a product equal to the {what} of the layer, {held}",
        )
    return Order(tuple(factors), (len(shape) - 1, *range(len(shape) - 1)))


def traced_orders(layer: Layer, axes: Mapping[str, Sequence[Axis]]) -> tuple[Orders, list[str]]:
    """Return the orders that follow from traced axes of the layer's arrays.

    The second result has the reasons for orders that do not follow. ``axes``: by attribute, without
    axes of stacks.
    """
    made: Orders = {}
    reasons: list[str] = []
    for attribute, _, pattern in layer.rows:
        held = dict(zip(axes_of(pattern), axes[attribute]))
        for dim, names in enumerate(dimensions(pattern)):
            atoms = [leaf for name in names for leaf in leaves(held[name])]
            try:
                index = index_order(atoms)
                if index is None:
                    continue
                if len(atoms) > 1:
                    factors = tuple(
                        tuple(leaf.size for leaf in leaves(held[name])) for name in names
                    )
                    made[attribute, dim] = Order(factors, tuple(torch_order(atoms) or ()))
                else:
                    made[attribute, dim] = Order(((size_of(held[names[0]]),),), (0,), index)
            except Unclear as error:
                reasons.append(f"{attribute}.{dim}: {error}")
    return made, list(dict.fromkeys(reasons))


def reordered(pattern: str, orders: Mapping[int, Order], first: int) -> tuple[str, dict[str, int]]:
    """Return a pattern with torch dimensions in the given orders.

    The second result has the sizes of its additional axes. ``first``: the number of the first
    additional axis. Orders by index are left out: permute the array for them.
    """
    ours = pattern.partition("->")[0]
    sizes: dict[str, int] = {}
    dims = dimensions(pattern)
    for dim, order in orders.items():
        if order.index is not None:
            continue
        parts: list[str] = []
        for axis, factors in zip(dims[dim], order.sizes):
            names = [f"flat{first + len(sizes) + i}" for i in range(len(factors))]
            sizes |= dict(zip(names, factors))
            group = names[0] if len(names) == 1 else f"({' '.join(names)})"
            ours = re.sub(rf"(?<![\w-]){axis}(?!\w)", group, ours)
            parts += names
        dims[dim] = [parts[i] for i in order.order]
    if not sizes:
        return pattern, {}
    torch = [axes[0] if len(axes) == 1 else f"({' '.join(axes)})" for axes in dims]
    return f"{ours.strip()} -> {' '.join(torch)}", sizes


def described(layer: Layer, orders: Orders) -> Iterable[str]:
    """Yield one line for each order of a layer's main array, for the report."""
    seen = set()
    for (attribute, dim), order in orders.items():
        pattern = next(p for a, _, p in layer.rows if a == attribute)
        role = role_of(dimensions(pattern)[dim][0]) or "axis"
        if role in seen:
            continue
        seen.add(role)
        names = {"into": "inputs", "out": "outputs", "features": "features"}
        what = names.get(role, dimensions(pattern)[dim][0])
        if order.index is not None:
            yield (
                f"{layer.dotted}: {what} hold a concatenation with a flattened map; "
                "channels first in torch"
            )
        else:
            flat = [size for axis in order.sizes for size in axis]
            torch = " x ".join(str(flat[i]) for i in order.order)
            flax = " x ".join(map(str, flat))
            yield f"{layer.dotted}: {what} are a map {flax} in Flax, {torch} in torch"
