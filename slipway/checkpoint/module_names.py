"""Names of a model's parameters in memory of transformers 5, where its checkpoints have others.

A module holds the experts of a layer as two stacked tensors, ``experts.gate_up_proj`` and
``experts.down_proj``, and some families have other names of layers in their checkpoints.

Not here: names below wrappers (names.py), parts of a checkpoint's own tensors (parts.py).
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from slipway import tree
from slipway.checkpoint.files import Index

_EXPERT = re.compile(
    r"(?P<layer>.*\.experts)\.(?P<number>\d+)\.(?P<name>gate|up|down)_proj\.weight"
)


def renamed(declaration: Any, names: Collection[str]) -> dict[str, str]:
    """Return, for those of ``names`` that a module has, the HF key of the same tensor."""
    paths = {
        leaf.paths[at]: key
        for leaf in tree.leaves(declaration)
        for at, key in leaf.keys.items()
        if leaf.paths[at] != key
    }
    return {name: paths[name] for name in names if name in paths}


@dataclasses.dataclass
class StackedExperts:
    """One tensor of all experts of a layer: its shape, and the HF key and place of each part."""

    shape: tuple[int, ...]
    places: dict[str, Index]


def stacked(declaration: Any, names: Collection[str]) -> dict[str, StackedExperts]:
    """Return those of ``names`` that are stacked experts, as the declaration expects them."""
    found: dict[str, StackedExperts] = {}
    for leaf in tree.leaves(declaration):
        for at, path in leaf.paths.items():
            expert = _EXPERT.fullmatch(path)
            if expert is None:
                continue
            number, name = int(expert["number"]), expert["name"]
            rows, columns = leaf.param.hf_shape
            whole = f"{expert['layer']}.{'down' if name == 'down' else 'gate_up'}_proj"
            if whole not in names:
                continue
            halves = {"gate": (slice(0, rows),), "up": (slice(rows, 2 * rows),), "down": ()}
            held = found.setdefault(whole, StackedExperts((), {}))
            held.places[leaf.keys[at]] = (number, *halves[name])
            count = max(number + 1, *held.shape[:1], 0)
            held.shape = (count, rows if name == "down" else 2 * rows, columns)
    return found
