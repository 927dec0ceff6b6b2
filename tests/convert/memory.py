"""Conversions between trees in memory, for tests: a writer that keeps arrays, and a round trip."""

from collections.abc import Mapping

import numpy as np

from slipway.checkpoint.shards import Spec
from slipway.convert.executor import Options, Written, execute
from slipway.convert.plan import Direction, Plan, inverse, resolve
from slipway.convert.rules import TreeMapping
from slipway.convert.source import MemorySource
from slipway.convert.writer import Pieces


class MemoryWriter:
    """Writer that keeps the arrays, and whether it was abandoned."""

    def __init__(self, specs: Mapping[str, Spec]):
        self.arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
        self.filled = {name: 0 for name in specs}
        self.abandoned = False

    def write(self, name: str, pieces: Pieces) -> None:
        for first, piece in pieces:
            assert first == self.filled[name], "pieces come in order and without a gap"
            self.arrays[name].reshape(-1)[first : first + piece.size] = piece
            self.filled[name] += piece.size

    def done(self) -> Mapping[str, Mapping]:
        return {}

    def mark(self, name: str, facts: Mapping) -> None:
        assert self.filled[name] == self.arrays[name].size

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        self.abandoned = True


def specs_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Spec]:
    return {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}


def planned(
    mapping: TreeMapping, direction: Direction, arrays: Mapping[str, np.ndarray], **known: int
) -> Plan:
    return resolve(mapping, direction, specs_of(arrays), known)


def moved(
    plan: Plan, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[Written]]:
    """Return the plan's targets, each in the dtype of its source."""
    assert plan.fits, (plan.unmatched, plan.problems)
    writer = MemoryWriter(plan.targets)
    options = Options({name: spec.dtype for name, spec in plan.targets.items()}, workers=1)
    return writer.arrays, execute(plan, MemorySource(arrays), writer, options)


def forth_and_back(
    mapping: TreeMapping, arrays: Mapping[str, np.ndarray], **known: int
) -> dict[str, np.ndarray]:
    """Convert a JAX tree to HF tensors and back.

    Return the tree, and the HF tensors.
    """
    plan = planned(mapping, "to_hf", arrays, **known)
    tensors, _ = moved(plan, arrays)
    back, _ = moved(inverse(plan, specs_of(tensors)), tensors)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
        assert back[name].tobytes() == array.tobytes(), name
    return tensors
