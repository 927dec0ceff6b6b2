"""HF names of a family's tensors, where its checkpoints do not use those of Llama.

Not here: reading of a part of a tensor (checkpoint/parts.py).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from slipway import tree


@dataclasses.dataclass(frozen=True)
class Naming:
    """Names of one family.

    ``renames``: for a part of a declared name, the part that stands in its place in the checkpoint;
    ``{}`` stands for an index. ``fused``: for the name of a layer in the checkpoint, the declared
    layers that are its rows, one after the other.
    """

    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def apply(self, declaration: Any) -> Any:
        """Return the declaration with the names of this family."""
        rows: dict[str, int] = {}

        def count(key: str, param: tree.Param) -> str:
            rows[key] = param.hf_shape[0] if param.hf_shape else 0
            return key

        def rename(key: str, param: tree.Param) -> str:
            for theirs, ours in self.fused.items():
                for layer in ours:
                    if (name := _replaced(key, layer, "{0}")) == key:
                        continue
                    before = ours[: ours.index(layer)]
                    start = sum(rows[_replaced(key, layer, other)] for other in before)
                    part = f"{theirs}[{start}:{start + rows[key]}]"
                    return self._renamed(name.replace("{0}", part))
            return self._renamed(key)

        return tree.renamed(tree.renamed(declaration, count), rename)

    def _renamed(self, key: str) -> str:
        for ours, theirs in self.renames.items():
            key = _replaced(key, ours, theirs)
        return key


def _replaced(key: str, ours: str, theirs: str) -> str:
    """Return ``key`` with the parts ``ours`` of its path replaced."""
    return re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", lambda _: theirs, key)
