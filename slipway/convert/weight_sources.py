"""Sources of new weights for a running model.

A source is a directory, named arrays, the model's own tree or a foreign one, which the mappings of
`slipway convert` convert. Not here: the exchange of the arrays (slipway/checkpoint/swap.py).
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slipway import models
from slipway.checkpoint import (
    files,
    hub,
    module_names,
    names,
    parts,
    quantize,
    reshard,
    tensor_reader,
)
from slipway.checkpoint.copying import count_above
from slipway.checkpoint.files import Checkpoint
from slipway.checkpoint.shards import Spec
from slipway.checkpoint.swap import (
    ArrayCheckpoint,
    FromTensors,
    FromTree,
    Values,
    Weights,
    described,
    on_host,
)
from slipway.convert import executor, transfer
from slipway.convert.conversion import Conversion, ConvertConfig, prepare
from slipway.convert.moves import Move
from slipway.convert.source import MemorySource, flatten
from slipway.errors import CheckpointError, InvalidRequest
from slipway.tree import is_param

SOURCES = (
    "a directory, a hub id, (HF name, array) pairs, or a tree of arrays: "
    "of this model, or one that a mapping names"
)


def values(source: Any, weights: Weights, mapping: str | None = None) -> Values:
    """Return new values for ``weights`` from a source of any known kind.

    ``mapping``: of a foreign tree, as in `slipway convert`; by default the mapping that fits.
    Raises InvalidRequest for an object that is no source, CheckpointError for weights that do not
    fit the model, listing every problem.
    """
    if isinstance(source, str | Path):
        if mapping is not None:
            raise InvalidRequest(
                "mapping",
                mapping,
                "none for a directory, which must be in HF's form; `slipway convert` makes that",
            )
        tensors = names.declared(
            _directory(str(source), weights), tensor_reader.names(weights.declaration)
        )
        return FromTensors(weights.packed(tensors))
    if isinstance(source, Weights):
        source = jax.tree.unflatten(_structure(source), source.arrays)
    if mapping is None and _has_structure(source, weights):
        return FromTree(jax.tree.leaves(source))
    arrays = _named(source)
    keys = tensor_reader.names(weights.declaration)
    declared = {parts.whole(key) for key in keys}
    if mapping in (None, "hf"):
        stacks = module_names.stacked(weights.declaration, arrays)
        renamed = module_names.renamed(weights.declaration, arrays)
        found = names.plain(arrays, {*declared, *stacks, *renamed})
        arrays = {renamed.get(found[name], found[name]): array for name, array in arrays.items()}
        if stacks or any(name in declared for name in arrays):
            held = parts.split(_unstacked(ArrayCheckpoint.of(arrays), stacks), keys)
            return FromTensors(weights.packed(held))
    converted = ConvertedCheckpoint.of_tree(arrays, weights, mapping)
    return FromTensors(weights.packed(converted))


@dataclasses.dataclass(frozen=True)
class ConvertedCheckpoint(ArrayCheckpoint):
    """A tree under its own names, presented as the HF tensors that a conversion of it would write.

    For arrays on devices, one program computes all tensors that depend on the same arrays: a
    scanned stack is transformed once, not layer by layer. ``arrays`` describes the tensors.
    """

    conversion: Conversion
    source: MemorySource
    computed: dict[str, jax.Array] = dataclasses.field(default_factory=dict, init=False)
    counts: dict[tuple[str, np.dtype], jax.Array] = dataclasses.field(
        default_factory=dict, init=False
    )
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False)

    @classmethod
    def of_tree(
        cls, tree: Mapping[str, Any], weights: Weights, mapping: str | None
    ) -> "ConvertedCheckpoint":
        """Plan the conversion of a tree (dotted name -> array) for ``weights``.

        Raises CheckpointError, listing every problem of the conversion.
        """
        what = "the tree"
        source = MemorySource(tree)
        given = {name: value for name, value in weights.config.items() if name != quantize.FIELD}
        conversion = prepare(source, ConvertConfig(mapping=mapping), given)
        problems = list(conversion.problems) or list(_unlike(conversion, source))
        if problems:
            raise CheckpointError(what, problems)
        targets = conversion.plan.targets
        arrays = {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in targets.items()}
        return cls(
            directory=Path(what),
            config={},
            generation_config={},
            tensors=described(arrays, what),
            arrays=arrays,
            conversion=conversion,
            source=source,
        )

    def held(self, name: str) -> np.ndarray | jax.Array:
        """Return the tensor, computed now or together with others by one program."""
        moves, spec = self.conversion.plan.moves[name], self.conversion.plan.targets[name]
        if not self.on_devices([name]):
            return transfer.assembled(moves, self._on_host(moves), spec)
        with self._lock:
            if name not in self.computed:
                self.computed.update(self.convert_together(name, lambda array: array))
            return self.computed[name]

    def copy(self, name: str, target: np.ndarray, limit: int | None = None) -> int:
        """Assemble the tensor in ``target``; ``limit`` as in ``stream``."""
        if self.on_devices([name]):
            return super().copy(name, target, limit)
        moves = self.conversion.plan.moves[name]
        transfer.assembled(
            moves, self._on_host(moves), self.conversion.plan.targets[name], memory=target
        )
        return 0 if limit is None else count_above(target.reshape(-1), limit)

    def not_finite(self, name: str, dtype: np.dtype) -> int:
        """Return how many numbers of the tensor are not finite as ``dtype``.

        One program counts for all tensors that depend on the same arrays; no tensor is kept.
        """
        with self._lock:
            if (name, dtype) not in self.counts:
                counts = self.convert_together(
                    name, lambda array: reshard.count_not_finite(array, dtype)
                )
                self.counts.update({(each, dtype): count for each, count in counts.items()})
            return int(self.counts.pop((name, dtype)))

    def drop(self, name: str) -> None:
        """Free the tensor that was computed on devices."""
        self.computed.pop(name, None)

    def on_devices(self, names: Iterable[str]) -> bool:
        """Return whether these tensors depend on arrays that the host cannot read in place."""
        sources = {move.source.name for name in names for move in self.conversion.plan.moves[name]}
        return all(isinstance(on_host(self.source.arrays[name]), jax.Array) for name in sources)

    def _on_host(self, moves: Sequence[Move]) -> dict[str, np.ndarray]:
        return {
            move.source.name: np.asarray(self.source.arrays[move.source.name]) for move in moves
        }

    def convert_together(
        self, name: str, then: Callable[[jax.Array], jax.Array]
    ) -> dict[str, jax.Array]:
        """Apply ``then`` to the tensor and to all from the same arrays, by one program."""
        plan = self.conversion.plan
        sources, targets = next(job for job in plan.jobs() if name in job[1])

        @jax.jit
        def program(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                each: then(_joined(plan.moves[each], arrays, plan.targets[each]))
                for each in targets
            }

        return program({source: self.source.arrays[source] for source in sources})


def _joined(moves: Sequence[Move], arrays: Mapping[str, jax.Array], spec: Spec) -> jax.Array:
    """Assemble a tensor as ``transfer.assembled`` does, inside a compiled function."""
    whole: jax.Array | None = None
    for move in moves:
        view = move.source.view(arrays[move.source.name], move.order)
        if move.factor != 1.0:
            view = view.astype(jnp.float32) * jnp.float32(move.factor)
        view = jnp.broadcast_to(view, transfer.share_shape(move)).astype(spec.dtype)
        if len(moves) == 1 and move.target.is_whole:
            return view.reshape(spec.shape)
        if whole is None:
            whole = jnp.zeros(spec.shape, spec.dtype)
        split = whole.reshape(move.target.split)
        whole = split.at[move.target.take].set(view)
    assert whole is not None
    return whole.reshape(spec.shape)


def _unlike(conversion: Conversion, source: MemorySource) -> Iterable[str]:
    """Yield a problem for copies of the same numbers in the source that differ."""
    yield from (
        p
        for name, pair in conversion.options.tied.items()
        if (p := executor.untied(name, pair, source))
    )
    for moves in conversion.plan.moves.values():
        for move in moves:
            if move.copies:
                with source.open(move.source.name) as array:
                    yield from executor.unequal_copies(move, array)


def _directory(location: str, weights: Weights) -> Checkpoint:
    """Open an HF directory of the same model.

    Without a config.json only the tensors are compared.
    """
    directory = hub.resolve(location)
    if not (directory / "config.json").exists():
        return files.open_tensors(directory)
    checkpoint = files.open_checkpoint(directory)
    theirs = models.declare(_plain(checkpoint.config | weights.overrides)).config
    ours = models.declare(_plain(weights.config)).config
    if type(theirs) is not type(ours):
        raise CheckpointError(
            directory, [f"config.json: {type(theirs).__name__}, expected {type(ours).__name__}"]
        )
    fields = [field.name for field in dataclasses.fields(ours)]
    pairs = {field: (getattr(theirs, field), getattr(ours, field)) for field in fields}
    if problems := [
        f"config.json: {f}: got {a!r}, expected {b!r}" for f, (a, b) in pairs.items() if a != b
    ]:
        raise CheckpointError(directory, problems)
    return checkpoint


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without the packing of its tensors and without removed fields."""
    return {
        field: value
        for field, value in config.items()
        if field != quantize.FIELD and value is not None
    }


def _unstacked(
    tensors: ArrayCheckpoint, stacks: Mapping[str, module_names.StackedExperts]
) -> ArrayCheckpoint:
    """Return the tensors with stacked experts taken apart.

    Raises CheckpointError, listing each stack that has another shape than the model's.
    """
    if problems := [
        f"{name}: shape {tensors.tensors[name].shape}, {stack.shape} declared"
        for name, stack in stacks.items()
        if tensors.tensors[name].shape != stack.shape
    ]:
        raise CheckpointError("the arrays", problems)
    return tensors.with_parts({name: stack.places for name, stack in stacks.items()})


def _structure(weights: Weights) -> Any:
    return jax.tree.structure(weights.declaration, is_leaf=is_param)


def _has_structure(source: Any, weights: Weights) -> bool:
    try:
        return jax.tree.structure(source) == _structure(weights)
    except ValueError:  # an iterator of pairs, or another object that is no pytree
        return False


def _named(source: Any) -> dict[str, Any]:
    """Return arrays by dotted name. Raises InvalidRequest or CheckpointError for other objects."""
    if isinstance(source, Mapping):
        arrays = flatten(source)
    elif _is_nnx(source):
        from flax import nnx  # an optional dependency, installed where such a module exists

        arrays = flatten(nnx.to_pure_dict(nnx.state(source)))
    elif isinstance(source, Iterable):
        pairs = list(source)
        if not all(
            isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in pairs
        ):
            raise InvalidRequest("source", source, SOURCES)
        arrays = dict(pairs)
        if len(arrays) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError("the arrays", [f"{name}: given more than once" for name in twice])
    else:
        raise InvalidRequest("source", source, SOURCES)
    if unlike := sorted(
        name for name, array in arrays.items() if not isinstance(array, np.ndarray | jax.Array)
    ):
        kinds = [
            f"{name}: {type(arrays[name]).__name__}, expected a NumPy or JAX array"
            for name in unlike
        ]
        raise CheckpointError("the arrays", kinds)
    if not arrays:
        raise InvalidRequest("source", source, SOURCES)
    return arrays


def _is_nnx(source: Any) -> bool:
    return any(base.__module__.startswith("flax.nnx") for base in type(source).__mro__)
