"""`slipway.export`: decides the rules of any Flax NNX module by walking its layers, which it knows by their table only.

What cannot be known is asked for: which Linear follows a flatten, and names that are not the attributes' own. What is
not understood is refused, all of it at once.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from slipway.convert.conversion import ConvertConfig, Dtype, convert
from slipway.convert.layers import ATTRIBUTES, STATE, TABLE, LayerTable, NotLinear, Row
from slipway.convert.lora import Adapter
from slipway.convert.rules import TreeMapping, rules
from slipway.convert.run import Written
from slipway.convert.source import MemorySource
from slipway.errors import CheckpointError, InvalidConfig

Flatten = Mapping[str, Sequence[int] | None]


@dataclasses.dataclass(frozen=True)
class Derived:
    """What a walk has found: the mapping, the arrays under their attribute paths, and what LoRA adds to which key."""

    mapping: TreeMapping
    arrays: Mapping[str, Any]
    adapter: Adapter


def export(
    module: nnx.Module,
    config: Mapping[str, Any],
    out_dir: str | Path,
    *,
    flatten: Flatten | None = None,
    renames: Mapping[str, str] | None = None,
    layers: Mapping[type, Sequence[Row]] | None = None,
    extra: Sequence[Row] = (),
    dtype: Dtype | None = None,
    shard_size: str = "5GB",
) -> list[Written]:
    """Write ``module`` as safetensors in torch's layout, with ``config`` as config.json, into a new directory.

    ``flatten``: for each Linear behind a flatten the feature map's (height, width, channels), or None where a Linear
    that looks so follows none. ``renames``: prefixes of the attributes' paths and what they become, "" for all.
    ``layers``: rows of (attribute, name, pattern) for classes of your own. ``extra``: such rows, with whole paths, for
    variables that no layer holds.

    Raises CheckpointError, listing all that is not understood, and InvalidConfig for a flatten that does not fit.
    """
    derived = derive(module, flatten or {}, renames or {}, layers or {}, extra)
    options = ConvertConfig(dtype=dtype, shard_size=shard_size)
    source = MemorySource(derived.arrays)
    deltas = derived.adapter.deltas()
    _, written = convert(source, Path(out_dir), options, config, [derived.mapping], deltas=deltas)
    return written


def derive(
    module: nnx.Module,
    flatten: Flatten,
    renames: Mapping[str, str],
    layers: Mapping[type, Sequence[Row]],
    extra: Sequence[Row],
) -> Derived:
    """The mapping that ``export`` uses. Raises as it does."""
    walk = _Walk(TABLE.extended(layers), flatten, renames)
    walk.visit(module, (), ())
    walk.finish(extra)
    return Derived(
        TreeMapping(name=type(module).__name__, rules=rules(walk.rows), sizes=walk.sizes, hf_constants=walk.constants),
        walk.arrays,
        Adapter(walk.pairs, 1.0),
    )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer: where it lies, its name in torch, its rows and how many axes its stack has put in front."""

    path: tuple[str, ...]
    name: tuple[str, ...]
    layer: Any
    rows: Sequence[Row]
    stacked: int


class _Walk:
    """Visits a module's layers and collects rules, arrays and problems."""

    def __init__(self, table: LayerTable, flatten: Flatten, renames: Mapping[str, str]):
        self.table, self.flatten, self.renames = table, dict(flatten), renames
        self.rows: list[Row] = []
        self.sizes: dict[str, int] = {}
        self.constants: dict[str, int] = {}
        self.arrays: dict[str, Any] = {}
        self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._layers: list[_Layer] = []
        self._adapters: list[tuple[tuple[str, ...], Any, Any]] = []  # torch's name, A, B
        self._problems: list[str] = []

    def visit(self, node: Any, path: tuple[str, ...], name: tuple[str, ...]) -> None:
        """Note the layers at and below ``node``."""
        if isinstance(node, nnx.LoRA):
            self._adapters.append((name, node.lora_a, node.lora_b))
            if node.base_module is not None:
                self.visit(node.base_module, (*path, "base_module"), name)
            elif not isinstance(self._layers[-1].layer if self._layers else None, nnx.LoRALinear):
                self._problems.append(f"{'.'.join(path)}: LoRA without a layer that it adapts")
            return
        rows = self.table.find(node)
        if rows is not None:
            self._note(node, path, name, rows)
            if isinstance(node, nnx.LoRALinear):
                self.visit(node.lora, (*path, "lora"), name)
            return
        names = next((names for kind, names in ATTRIBUTES.items() if isinstance(node, kind)), {})
        for key, child in _children(node):
            if isinstance(child, nnx.Variable):
                if not isinstance(child, STATE):
                    self.arrays[".".join((*path, key))] = child[...]
            else:
                self.visit(child, (*path, key), (*name, names.get(key, key)))

    def finish(self, extra: Sequence[Row]) -> None:
        """Turn what was noted into rules. Raises CheckpointError for whatever is not understood."""
        bare = set(self.arrays)
        for layer in self._layers:
            self._write(layer)
        for name, a, b in self._adapters:
            self._adapt(name, a, b)
        self.rows += [(row[0], self._renamed(row[1]), row[2]) for row in extra]
        bare -= {row[0].removesuffix("?") for row in extra}
        self._problems += [
            f"{name}: a variable of no known layer; name its rule in extra=, or its class in layers="
            for name in sorted(bare)
        ]
        for unknown in self.flatten.keys() - {".".join(layer.path) for layer in self._layers}:
            self._problems.append(f"flatten: {unknown} is no layer")
        if self._problems:
            raise CheckpointError("the module", self._problems)

    def _note(self, node: Any, path: tuple[str, ...], name: tuple[str, ...], rows: Any) -> None:
        try:
            found = list(rows(node))
        except NotLinear as error:
            self._problems.append(f"{'.'.join(path)}: {type(node).__name__}: {error}")
            return
        held = {row[0]: vars(node).get(row[0].removesuffix("?")) for row in found}
        found = [row for row in found if held[row[0]] is not None]
        stacked = {len(held[row[0]].shape) - len(row[2].partition("->")[0].split()) for row in found}
        if len(stacked) > 1 or min(stacked, default=0) < 0:
            self._problems.append(f"{'.'.join(path)}: {type(node).__name__}: arrays of unexpected rank")
            return
        self._layers.append(_Layer(path, name, node, found, max(stacked, default=0)))

    def _write(self, layer: _Layer) -> None:
        """The rules of one layer; a stack's index stands behind the outermost attribute that is stacked."""
        path, at = ".".join(layer.path), self._stack_depth(layer)
        axes = [f"stack{i}" for i in range(layer.stacked)]
        names = [*layer.name[:at], *(f"{{{axis}}}" for axis in axes), *layer.name[at:]]
        prefix = self._renamed(".".join(names))
        leading = "".join(f"{axis} " for axis in axes)
        for attribute, suffix, pattern in self._flattened(layer, path):
            attribute = attribute.removesuffix("?")
            key = ".".join(filter(None, (path, attribute)))
            self.arrays[key] = vars(layer.layer)[attribute][...]
            ours, _, theirs = pattern.partition("->")
            self.rows.append((key, f"{prefix}.{suffix}", f"{leading}{ours.strip()} -> {leading}{theirs.strip()}"))
        if isinstance(layer.layer, nnx.BatchNorm):
            for key in self._keys(layer, f"{prefix}.num_batches_tracked"):
                self.constants[key] = 0

    def _stack_depth(self, layer: _Layer) -> int:
        """How many of the layer's path names lie outside the stack: the fewest under which every layer is stacked."""
        if not layer.stacked:
            return len(layer.path)
        for depth in range(1, len(layer.path) + 1):
            beside = [other for other in self._layers if other.path[:depth] == layer.path[:depth]]
            if all(other.stacked == layer.stacked for other in beside):
                return depth
        return len(layer.path)

    def _keys(self, layer: _Layer, template: str) -> Iterator[str]:
        """``template`` at every index of the layer's stack."""
        first = vars(layer.layer)[layer.rows[0][0].removesuffix("?")].shape[: layer.stacked]
        for index in itertools.product(*map(range, first)):
            yield template.format(**{f"stack{i}": n for i, n in enumerate(index)})

    def _flattened(self, layer: _Layer, path: str) -> Sequence[Row]:
        """The layer's rows; a Linear's kernel behind a flatten has rows (h, w, c), torch's columns (c, h, w)."""
        if path not in self.flatten:
            self._suspect(layer, path)
            return layer.rows
        shape = self.flatten[path]
        if shape is None:
            return layer.rows
        if not isinstance(layer.layer, nnx.Linear) or int(np.prod(shape)) != layer.layer.in_features:
            expected = (
                f"(..., channels) whose product is the inputs of a Linear, {vars(layer.layer).get('in_features')}"
            )
            raise InvalidConfig(f"flatten[{path!r}]", tuple(shape), expected)
        axes = [f"flat{len(self.sizes) + i}" for i in range(len(shape))]
        self.sizes |= dict(zip(axes, shape))
        pattern = f"({' '.join(axes)}) out -> out ({' '.join([axes[-1], *axes[:-1]])})"
        return [("kernel", "weight", pattern), *layer.rows[1:]]

    def _suspect(self, layer: _Layer, path: str) -> None:
        """Ask for the flatten of a Linear whose inputs are several of a convolution's outputs, and no layer's."""
        if not isinstance(layer.layer, nnx.Linear):
            return
        channels = {o.layer.out_features for o in self._layers if isinstance(o.layer, nnx.Conv | nnx.ConvTranspose)}
        features = channels | {o.layer.out_features for o in self._layers if isinstance(o.layer, nnx.Linear)}
        inputs = layer.layer.in_features
        if inputs not in features and any(inputs % c == 0 for c in channels):
            self._problems.append(
                f"{path}: its {inputs} inputs look like a flattened feature map; say which in flatten={{{path!r}: "
                f"(height, width, channels)}}, or flatten={{{path!r}: None}} if they are none"
            )

    def _adapt(self, name: tuple[str, ...], a: Any, b: Any) -> None:
        """Add B^T A^T, torch's layout of x A B, to the Linear of that name."""
        layer = next((layer for layer in self._layers if layer.name == name), None)
        if layer is None or not isinstance(layer.layer, nnx.Linear):
            self._problems.append(f"{'.'.join(name)}: LoRA on something other than a Linear")
            return
        at = self._stack_depth(layer)
        axes = [f"{{stack{i}}}" for i in range(layer.stacked)]
        template = f"{self._renamed('.'.join([*name[:at], *axes, *name[at:]]))}.weight"
        pairs = np.asarray(a[...]), np.asarray(b[...])
        for index, key in zip(
            itertools.product(*map(range, pairs[0].shape[: layer.stacked])), self._keys(layer, template)
        ):
            self.pairs[key] = pairs[0][index].T, pairs[1][index].T

    def _renamed(self, name: str) -> str:
        """``name`` with its longest prefix that ``renames`` holds replaced."""
        for old in sorted(self.renames, key=len, reverse=True):
            rest = name.removeprefix(old).removeprefix(".") if old else name
            if not old or name == old or name.startswith(f"{old}."):
                return ".".join(filter(None, (self.renames[old].strip("."), rest)))
        return name


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """The modules, containers and variables right below ``node``, with their keys."""
    if isinstance(node, Mapping):
        items = [(str(key), child) for key, child in node.items()]
    elif isinstance(node, list | tuple | nnx.List):
        items = [(str(i), child) for i, child in enumerate(node)]
    elif isinstance(node, nnx.Module):
        items = [(key, child) for key, child in vars(node).items() if not key.startswith("_")]
    else:
        items = []
    for key, child in items:
        if isinstance(child, nnx.Module | nnx.Variable | Mapping | list | tuple):
            yield key, child
