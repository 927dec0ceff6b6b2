"""Execution of `slipway.export`: a Flax module written in torch's layout, layer by layer.

Facts that do not follow from the layers must be given by the user, or follow from an example.
Everything that cannot be interpreted is refused, in one error. Not here: the torch form of each
layer (layers.py), the questions to the user (questions.py).
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen, nnx

from slipway.convert import differences, linen_walk, nnx_walk, stacks
from slipway.convert.conversion import ConvertConfig, Dtype, convert
from slipway.convert.export_report import Exported, Report, save
from slipway.convert.flattening import (
    Orders,
    described,
    dimensions,
    reordered,
    told_orders,
    traced_orders,
)
from slipway.convert.layers import Layer, Row, axes_of, role_of
from slipway.convert.lora import Adapter
from slipway.convert.nnx_walk import Found, Own
from slipway.convert.questions import open_questions
from slipway.convert.rules import TreeMapping, rules
from slipway.convert.source import MemorySource
from slipway.convert.stacks import Stacks
from slipway.convert.tracing import Trace, trace_nnx
from slipway.errors import CheckpointError, InvalidConfig

Flatten = Mapping[str, Sequence[int] | None]
NO_EXAMPLE = (
    "reshapes are known only from the layers' sizes and given options; "
    "example= follows each of them"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Facts about a module that the user has given, as in ``export``."""

    flatten: Flatten = dataclasses.field(default_factory=dict)
    unflatten: Flatten = dataclasses.field(default_factory=dict)
    stack_axes: Mapping[str, int | Sequence[int]] = dataclasses.field(default_factory=dict)
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: Own = dataclasses.field(default_factory=dict)
    extra: Sequence[Row] = ()


@dataclasses.dataclass(frozen=True)
class Derived:
    """Mapping of a module with its arrays, LoRA changes and report.

    ``arrays`` are by attribute path, ``adapter`` by key.
    """

    mapping: TreeMapping
    arrays: Mapping[str, Any]
    adapter: Adapter
    report: Report


def export(
    module: nnx.Module | linen.Module,
    config: Mapping[str, Any],
    out_dir: str | Path,
    *,
    variables: Mapping[str, Any] | None = None,
    example: Any = None,
    flatten: Flatten | None = None,
    unflatten: Flatten | None = None,
    stack_axes: Mapping[str, int | Sequence[int]] | None = None,
    renames: Mapping[str, str] | None = None,
    layers: Own | None = None,
    extra: Sequence[Row] = (),
    dtype: Dtype | None = None,
    shard_size: str = "5GB",
) -> Exported:
    """Write ``module`` as safetensors in torch's layout into a new directory, with a config.json.

    ``variables``: a Linen module's collections, as its ``init`` returns them; Linen also needs an
    example. ``example``: an input of the module, a tuple of its arguments or a mapping of its
    keyword arguments. The module runs on it, and every flatten, reshape and scan follows from the
    run. ``flatten``: for each layer with inputs (or norm with features) that are a flattened
    feature map, the map's (height, width, channels); None where there is none. ``unflatten``: the
    same for layers with outputs that are reshaped to a map. ``stack_axes``: prefixes of attribute
    paths, and the axis or axes on which the arrays below are stacked. ``renames``: prefixes of
    attribute paths and their new text, "" for all. ``layers``: for user-defined classes, rows of
    (attribute, name, pattern), or the class of Flax with the same rows. ``extra``: such rows, with
    whole paths, for variables outside of layers.

    Return the tensors that were written. Their ``.report``, which is also in OUT/report.txt, lists
    the defaults of Flax that the twin needs. The example's inputs and outputs are written beside it
    as .npy files. Raises CheckpointError, listing everything that cannot be interpreted, and
    InvalidConfig for an option that does not fit.
    """
    options = Options(
        flatten=flatten or {},
        unflatten=unflatten or {},
        stack_axes=stack_axes or {},
        renames=renames or {},
        layers=layers or {},
        extra=extra,
    )
    derived = derive(module, options, *_read(module, variables, options, example=example))
    converting = ConvertConfig(dtype=dtype, shard_size=shard_size)
    source = MemorySource(derived.arrays)
    deltas = derived.adapter.deltas()
    _, written = convert(
        source, Path(out_dir), converting, given=config, candidates=[derived.mapping], deltas=deltas
    )
    save(derived.report, Path(out_dir))
    return Exported(written, derived.report)


def derive(
    module: Any, options: Options, trace: Trace | None = None, found: Found | None = None
) -> Derived:
    """Return the mapping that ``export`` uses. Raises as ``export`` does.

    ``found``: the layers of a Linen module.
    """
    writer = _Writer(
        nnx_walk.walk(module, options.layers) if found is None else found, options, trace
    )
    writer.write()
    mapping = TreeMapping(
        name=type(module).__name__,
        rules=rules(writer.rows),
        sizes=writer.sizes,
        hf_constants=writer.constants,
    )
    return Derived(
        mapping, writer.arrays, Adapter(writer.pairs, 1.0), report=_report(mapping.name, writer)
    )


def _read(
    module: Any, variables: Any, options: Options, example: Any
) -> tuple[Trace | None, Found | None]:
    """Run a module on an example, if there is one.

    This run also finds the layers of a Linen module.
    """
    if isinstance(module, linen.Module):
        found, trace = linen_walk.walk(module, variables, options.layers, example=example)
        return trace, found
    if variables is not None:
        raise InvalidConfig(
            "variables", type(variables).__name__, "None: only a Linen module is apart from them"
        )
    return trace_nnx(module, example) if example is not None else None, None


def _report(name: str, writer: "_Writer") -> Report:
    """Return the report of the export."""
    trace = writer.trace
    found = differences.of_layers(
        [each for each in writer.found.layers if each.dotted not in writer.unreached]
    )
    if trace is None:
        return Report(name, writer.followed, found, unchecked=[differences.NOT_TRACED, NO_EXAMPLE])
    unchecked = [f"{path}: not used by the example" for path in writer.unreached]
    found += differences.of_operations(trace.jaxpr)
    return Report(
        name,
        writer.followed,
        found,
        unchecked=unchecked,
        inputs=trace.inputs,
        outputs=trace.outputs,
    )


class _Writer:
    """Conversion of layers to rules and arrays; it collects problems."""

    def __init__(self, found: Found, options: Options, trace: Trace | None):
        self.found = found
        self.options = options
        self.trace = trace
        self.rows: list[Row] = []
        self.sizes: dict[str, int] = {}
        self.constants: dict[str, int] = {}
        self.arrays: dict[str, Any] = {}
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.followed: list[str] = []  # lines of the report
        self.unreached: list[str] = []
        self._problems = list(found.problems)
        self._renamed_by: set[str] = set()
        self._stacks = self._find_stacks()

    def write(self) -> None:
        """Collect rules and arrays.

        Raises CheckpointError, listing everything that cannot be interpreted.
        """
        orders = {layer.path: self._orders(layer) for layer in self.found.layers}
        for layer in self.found.layers:
            self._write(layer, orders[layer.path])
        for name, a, b in self.found.lora:
            self._adapt(name, a, b, orders=orders)
        self._write_extra()
        options, layers = self.options, self.found.layers
        reached = [layer.dotted for layer in layers if self._axes(layer) is not None]
        self._problems += open_questions(
            layers, options.flatten, options.unflatten, followed=reached
        )
        if self.trace:
            self.unreached = [each.dotted for each in layers if each.dotted not in reached]
        for field, told in (("flatten", options.flatten), ("unflatten", options.unflatten)):
            for unknown in told.keys() - {layer.dotted for layer in layers}:
                self._problems.append(f"{field}: {unknown} is no layer")
        for unused in options.renames.keys() - self._renamed_by - {""}:
            self._problems.append(f"renames: {unused} is no prefix of an attribute's path")
        if self._problems:
            raise CheckpointError("the module", list(dict.fromkeys(self._problems)))

    def _find_stacks(self) -> Stacks:
        seen = {}
        for layer in self.found.layers if self.trace else ():
            for attribute, variable in layer.variables.items():
                seen[layer.path, attribute] = self.trace.scanned(variable) if self.trace else ()
        found = stacks.find(self.found.layers, self.options.stack_axes, seen)
        self._problems += found.problems
        return found

    def _axes(self, layer: Layer) -> dict[str, Any] | None:
        """Return the traced axes of a layer's arrays, without those of its stack.

        None where the example has not used the layer.
        """
        made = {}
        for attribute, variable in layer.variables.items():
            axes = self.trace.of(variable) if self.trace else None
            if axes is None:
                return None
            gone = self._stacks.of(layer, attribute)
            made[attribute] = [axis for i, axis in enumerate(axes) if i not in gone]
        return made

    def _orders(self, layer: Layer) -> Orders:
        """Return the orders of the layer's dimensions that are flattened maps.

        Orders that the user gives take precedence over traced ones.
        """
        told = told_orders(layer, self.options.flatten, self.options.unflatten)
        orders: Orders = {}
        axes = self._axes(layer)
        if axes is not None and all(
            len(axes[a]) == len(axes_of(pattern)) for a, _, pattern in layer.rows
        ):
            orders, reasons = traced_orders(layer, axes)
            fields = {"into": "flatten", "features": "flatten", "out": "unflatten"}
            for attribute, _, pattern in layer.rows:
                for dim, names in enumerate(dimensions(pattern)):
                    field = fields.get(role_of(names[0]), "")
                    if layer.dotted in (getattr(self.options, field) if field else ()):
                        orders.pop((attribute, dim), None)
                        reasons = [r for r in reasons if not r.startswith(f"{attribute}.{dim}: ")]
            for reason in reasons:
                self._problems.append(self._unclear(layer, reason))
        orders |= told
        if orders and layer.kind == "GroupNorm" and layer.facts.get("num_groups") != 1:
            self._problems.append(
                f"{layer.dotted}: GroupNorm of a flattened map: its groups hold other features "
                "in torch's order; normalize before the flatten, or use LayerNorm"
            )
        self.followed += described(layer, orders)
        return orders

    def _unclear(self, layer: Layer, reason: str) -> str:
        at, _, why = reason.partition(": ")
        attribute, _, dim = at.partition(".")
        pattern = next(p for a, _, p in layer.rows if a == attribute)
        field = "unflatten" if role_of(dimensions(pattern)[int(dim)][0]) == "out" else "flatten"
        path = layer.dotted
        return (
            f"{path}: {attribute}: {why}; give {field}={{{path!r}: (height, width, channels)}} "
            f"if the twin flattens such a map with channels first, "
            f"or {field}={{{path!r}: None}} if it keeps the order"
        )

    def _write(self, layer: Layer, orders: Orders) -> None:
        """Add the rules of one layer.

        A stack's index comes after the outermost attribute that is stacked.
        """
        if layer.stacked and any((layer.path, a) not in self._stacks.axes for a in layer.variables):
            return
        prefix = self._prefix(layer.path, layer.name, layer)
        for attribute, suffix, pattern in layer.rows:
            key = ".".join((*layer.path, attribute))
            own = {dim: order for (a, dim), order in orders.items() if a == attribute}
            stack = self._stacks.of(layer, attribute)
            array = layer.variables[attribute][...]
            for dim, order in own.items():
                if order.index is not None:
                    kept = [i for i in range(array.ndim) if i not in stack]
                    axis = axes_of(pattern).index(dimensions(pattern)[dim][0])
                    array = np.take(np.asarray(array), order.index, kept[axis])
            pattern, sizes = reordered(pattern, own, len(self.sizes))
            self.sizes |= sizes
            self.arrays[key] = array
            self.rows.append((key, f"{prefix}.{suffix}".lstrip("."), _stacked(pattern, stack)))
        if layer.kind == "BatchNorm":
            for key in self._keys(layer, f"{prefix}.num_batches_tracked".lstrip(".")):
                self.constants[key] = 0

    def _write_extra(self) -> None:
        """Add the rules that the user has given for variables of no layer.

        Refuse variables without one.
        """
        bare = dict(self.found.bare)
        for row in self.options.extra:
            jax = row[0].removesuffix("?")
            template = re.compile(re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(jax)))
            matched = [name for name in bare if template.fullmatch(name)]
            pattern = row[2]
            if matched == [jax] and self.trace and (axes := self.trace.of(bare[jax])) is not None:
                layer = Layer(
                    (jax,),
                    (jax,),
                    "variable",
                    rows=(("", row[1], pattern),),
                    variables={},
                    shapes={},
                    facts={},
                )
                if len(axes) == len(axes_of(pattern)):
                    orders, reasons = traced_orders(layer, {"": axes})
                    self._problems += [
                        f"{jax}: {reason.partition(': ')[2]}; write it as a layer"
                        for reason in reasons
                    ]
                    self.followed += described(layer, orders)
                    pattern, sizes = reordered(
                        pattern, {dim: o for (_, dim), o in orders.items()}, len(self.sizes)
                    )
                    self.sizes |= sizes
            for name in matched:
                self.arrays[name] = bare.pop(name)[...]
            parts = tuple(row[1].split("."))
            self.rows.append((row[0], self._prefix(parts, parts, None), pattern))
        self._problems += [
            f"{name}: a variable of no known layer; "
            "name its rule in extra=, or its class in layers="
            for name in sorted(bare)
        ]

    def _keys(self, layer: Layer, template: str) -> Iterator[str]:
        """Yield ``template`` for every index of the layer's stack."""
        attribute = layer.rows[0][0]
        shape = layer.variables[attribute].shape
        counts = [shape[axis] for axis in self._stacks.of(layer, attribute)]
        for index in itertools.product(*map(range, counts)):
            yield template.format(**{f"stack{i}": n for i, n in enumerate(index)})

    def _adapt(
        self, name: tuple[str, ...], a: Any, b: Any, orders: Mapping[tuple[str, ...], Orders]
    ) -> None:
        """Add B^T A^T, torch's layout of x A B, to the Linear of that name."""
        wanted = tuple(filter(None, name))
        layer = next(
            (each for each in self.found.layers if tuple(filter(None, each.name)) == wanted), None
        )
        if layer is None or layer.kind != "Linear":
            self._problems.append(f"{'.'.join(name)}: LoRA on something other than a Linear")
            return
        if layer.stacked and any(
            self._stacks.of(layer, each) != tuple(range(layer.stacked)) for each in layer.variables
        ):
            self._problems.append(
                f"{layer.dotted}: LoRA in a stack on another axis than the first; merge it first"
            )
            return
        template = f"{self._prefix(layer.path, layer.name, layer)}.weight"
        first, second = np.asarray(a[...]), np.asarray(b[...])
        own = orders[layer.path]
        counts = first.shape[: layer.stacked]
        for index, key in zip(itertools.product(*map(range, counts)), self._keys(layer, template)):
            into, out = first[index].T, second[index].T
            if ("kernel", 1) in own:
                into = into[:, own["kernel", 1].places()]
            if ("kernel", 0) in own:
                out = out[own["kernel", 0].places()]
            self.pairs[key] = into, out

    def _prefix(self, path: Sequence[str], name: Sequence[str], layer: Layer | None) -> str:
        """Return the name in torch, with placeholders for the stack's indices.

        Its longest known prefix is renamed.
        """
        levels = list(zip(path, name))
        if layer is not None and layer.stacked:
            depth = self._stacks.depths[layer.path]
            levels[depth:depth] = [(f"{{stack{i}}}",) * 2 for i in range(layer.stacked)]
        for old in sorted(self.options.renames, key=len, reverse=True):
            parts = old.split(".") if old else []
            for end in range(len(levels), -1, -1):
                names = [n for _, n in levels[:end] if n]
                if parts in ([p for p, _ in levels[:end]], names):
                    self._renamed_by.add(old)
                    kept = [self.options.renames[old].strip("."), *(n for _, n in levels[end:])]
                    return ".".join(filter(None, kept))
        return ".".join(filter(None, (n for _, n in levels)))


def _stacked(pattern: str, axes: Sequence[int]) -> str:
    """Return a pattern with axes for a stack: at ``axes`` of the array, in front in torch."""
    ours, _, theirs = pattern.partition("->")
    groups = re.findall(r"\([^)]*\)|\S+", ours)
    names = [f"stack{i}" for i in range(len(axes))]
    for axis, name in sorted(zip(axes, names)):
        groups.insert(axis, name)
    return f"{' '.join(groups)} -> {' '.join([*names, theirs.strip()])}"
