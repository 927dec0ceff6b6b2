"""Decides what a caller's new weights are: a directory, named arrays, a tree of ours or a foreign one, whose rules are
those of `slipway convert`. Knows no engine.
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
from slipway.checkpoint import files, hub, names, quantize, reshard, tensor_reader
from slipway.checkpoint.copying import count_above
from slipway.checkpoint.files import Checkpoint
from slipway.checkpoint.shards import Spec
from slipway.checkpoint.swap import ArrayCheckpoint, FromTensors, FromTree, Values, Weights, on_host
from slipway.convert import executor, transfer
from slipway.convert.conversion import Conversion, ConvertConfig, prepare
from slipway.convert.plan import Move
from slipway.convert.source import MemorySource, flatten
from slipway.errors import CheckpointError, InvalidRequest
from slipway.tree import is_param

SOURCES = "a directory, a hub id, (HF name, array) pairs, or a tree of arrays: this model's or one that a mapping names"


def values(source: Any, weights: Weights, mapping: str | None = None) -> Values:
    """New values for ``weights`` from any source that is known.

    ``mapping``: of a foreign tree, as `slipway convert` takes it; by default the one that fits. Raises InvalidRequest
    for what is no source, CheckpointError for what does not fit the model, listing all of it.
    """
    if isinstance(source, str | Path):
        if mapping is not None:
            raise InvalidRequest("mapping", mapping, "none for a directory: `slipway convert` brings it into HF's form")
        tensors = names.unwrapped(_directory(str(source), weights), tensor_reader.names(weights.declaration))
        return FromTensors(_packed(tensors, weights))
    if isinstance(source, Weights):
        source = jax.tree.unflatten(_structure(source), source.arrays)
    if mapping is None and _has_structure(source, weights):
        return FromTree(jax.tree.leaves(source))
    arrays = _named(source)
    if mapping in (None, "hf"):
        found = names.plain(arrays, tensor_reader.names(weights.declaration))
        arrays = {found[name]: array for name, array in arrays.items()}
    if mapping in (None, "hf") and any(name in tensor_reader.names(weights.declaration) for name in arrays):
        return FromTensors(_packed(ArrayCheckpoint(arrays), weights))
    return FromTensors(_packed(ConvertedCheckpoint(arrays, weights, mapping), weights))


class ConvertedCheckpoint(ArrayCheckpoint):
    """A tree under names of its own, shown as the HF tensors that a conversion of it would write.

    Of arrays on devices, all tensors that depend on the same ones are made by one program: a scanned stack is
    transformed once, not layer by layer.
    """

    _conversion: Conversion
    _source: MemorySource
    _made: dict[str, jax.Array]
    _counts: dict[tuple[str, np.dtype], jax.Array]
    _lock: threading.Lock

    def __init__(self, arrays: Mapping[str, Any], weights: Weights, mapping: str | None):
        source = MemorySource(arrays)
        given = {name: value for name, value in weights.config.items() if name != quantize.FIELD}
        conversion = prepare(source, ConvertConfig(mapping=mapping), given)
        problems = list(conversion.problems) or list(_unlike(conversion, source))
        if problems:
            raise CheckpointError("the tree", problems)
        targets = conversion.plan.targets
        super().__init__({name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in targets.items()}, "the tree")
        for field, value in (
            ("_conversion", conversion), ("_source", source), ("_made", {}), ("_counts", {}),
            ("_lock", threading.Lock()),
        ):  # fmt: skip
            object.__setattr__(self, field, value)

    def held(self, name: str) -> np.ndarray | jax.Array:
        """The tensor, made now, or with those that a program made together."""
        moves, spec = self._conversion.plan.moves[name], self._conversion.plan.targets[name]
        if not self.on_devices([name]):
            return transfer.assembled(moves, self._on_host(moves), spec)
        with self._lock:
            if name not in self._made:
                self._made |= self.convert_together(name, lambda array: array)
            return self._made[name]

    def copy(self, name: str, target: np.ndarray, limit: int | None = None) -> int:
        """The tensor, put together in ``target``."""
        if self.on_devices([name]):
            return super().copy(name, target, limit)
        moves = self._conversion.plan.moves[name]
        transfer.assembled(moves, self._on_host(moves), self._conversion.plan.targets[name], target)
        return 0 if limit is None else count_above(target.reshape(-1), limit)

    def not_finite(self, name: str, dtype: np.dtype) -> int:
        """As ArrayCheckpoint's; of what one program makes all is counted at once, and none of it kept."""
        with self._lock:
            if (name, dtype) not in self._counts:
                counts = self.convert_together(name, lambda array: reshard.count_not_finite(array, dtype))
                self._counts |= {(each, dtype): count for each, count in counts.items()}
            return int(self._counts.pop((name, dtype)))

    def drop(self, name: str) -> None:
        """Let go of what was made on devices."""
        self._made.pop(name, None)

    def on_devices(self, names: Iterable[str]) -> bool:
        """Whether these are made of arrays that the host cannot read where they are."""
        sources = {move.source.name for name in names for move in self._conversion.plan.moves[name]}
        return all(isinstance(on_host(self._source.arrays[name]), jax.Array) for name in sources)

    def _on_host(self, moves: Sequence[Move]) -> dict[str, np.ndarray]:
        return {move.source.name: np.asarray(self._source.arrays[move.source.name]) for move in moves}

    def convert_together(self, name: str, then: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
        """``then`` of this tensor, and of all that depend on the same arrays, by one program."""
        plan = self._conversion.plan
        sources, targets = next(job for job in plan.jobs() if name in job[1])
        program = jax.jit(
            lambda arrays: {each: then(_joined(plan.moves[each], arrays, plan.targets[each])) for each in targets}
        )
        return program({source: self._source.arrays[source] for source in sources})


def _joined(moves: Sequence[Move], arrays: Mapping[str, jax.Array], spec: Spec) -> jax.Array:
    """``transfer.assembled``, traced."""
    whole: jax.Array | None = None
    for move in moves:
        view = move.source.view(arrays[move.source.name], move.order)
        if move.factor != 1.0:
            view = view.astype(jnp.float32) * jnp.float32(move.factor)
        view = jnp.broadcast_to(view, transfer.share_shape(move)).astype(spec.dtype)
        if len(moves) == 1 and move.target.is_whole:
            return view.reshape(spec.shape)
        split = jnp.zeros(move.target.split, spec.dtype) if whole is None else whole.reshape(move.target.split)
        whole = split.at[move.target.take].set(view)
    assert whole is not None
    return whole.reshape(spec.shape)


def _unlike(conversion: Conversion, source: MemorySource) -> Iterable[str]:
    """Copies of the same numbers in the source that differ."""
    yield from (p for name, pair in conversion.options.tied.items() if (p := executor.untied(name, pair, source)))
    for moves in conversion.plan.moves.values():
        for move in moves:
            if move.copies:
                with source.open(move.source.name) as array:
                    yield from executor.unequal_copies(move, array)


def _directory(location: str, weights: Weights) -> Checkpoint:
    """An HF directory of the same model; one without a config.json is taken at its tensors' word."""
    directory = hub.resolve(location)
    if not (directory / "config.json").exists():
        return files.open_tensors(directory)
    checkpoint = files.open_checkpoint(directory)
    theirs = models.declare(_plain(checkpoint.config | weights.overrides)).config
    ours = models.declare(_plain(weights.config)).config
    if type(theirs) is not type(ours):
        raise CheckpointError(directory, [f"config.json: {type(theirs).__name__}, expected {type(ours).__name__}"])
    fields = [field.name for field in dataclasses.fields(ours)]
    pairs = {field: (getattr(theirs, field), getattr(ours, field)) for field in fields}
    if problems := [f"config.json: {f}: got {a!r}, expected {b!r}" for f, (a, b) in pairs.items() if a != b]:
        raise CheckpointError(directory, problems)
    return checkpoint


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without how its tensors are packed, and without what was removed from it."""
    return {field: value for field, value in config.items() if field != quantize.FIELD and value is not None}


def _packed(tensors: Checkpoint, weights: Weights) -> Checkpoint:
    """The tensors as the declaration wants them: packed where it is, though they are floats."""
    wanted = tensor_reader.wanted(weights.declaration)
    if any(name.endswith(quantize.PACKED) for name in wanted):
        return quantize.packed_view(tensors, wanted)
    return tensors


def _structure(weights: Weights) -> Any:
    return jax.tree.structure(weights.declaration, is_leaf=is_param)


def _has_structure(source: Any, weights: Weights) -> bool:
    try:
        return jax.tree.structure(source) == _structure(weights)
    except ValueError:  # an iterator of pairs, or something that JAX knows no structure of
        return False


def _named(source: Any) -> dict[str, Any]:
    """Dotted names and arrays."""
    if isinstance(source, Mapping):
        arrays = flatten(source)
    elif _is_nnx(source):
        from flax import nnx  # only for those who have such a module

        arrays = flatten(nnx.to_pure_dict(nnx.state(source)))
    elif isinstance(source, Iterable):
        pairs = list(source)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise InvalidRequest("source", source, SOURCES)
        arrays = dict(pairs)
        if len(arrays) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError("the arrays", [f"{name}: given more than once" for name in twice])
    else:
        raise InvalidRequest("source", source, SOURCES)
    if unlike := sorted(name for name, array in arrays.items() if not isinstance(array, np.ndarray | jax.Array)):
        kinds = [f"{name}: {type(arrays[name]).__name__}, expected a NumPy or JAX array" for name in unlike]
        raise CheckpointError("the arrays", kinds)
    if not arrays:
        raise InvalidRequest("source", source, SOURCES)
    return arrays


def _is_nnx(source: Any) -> bool:
    return any(base.__module__.startswith("flax.nnx") for base in type(source).__mro__)
