"""Trees whose names and layouts are Hugging Face's own: every tensor is itself. Decides nothing but the axis names."""

from collections.abc import Mapping
from typing import Any

from slipway.checkpoint.shards import Spec
from slipway.convert.rules import Rule, TreeMapping

_ROOTS = ("params.params.", "params.", "")


def identity(specs: Mapping[str, Spec], given: Mapping[str, Any]) -> TreeMapping:
    """One rule for each tensor, under whatever root all of them lie."""
    root = next(root for root in _ROOTS if all(name.startswith(root) for name in specs))
    rules = []
    for name, spec in specs.items():
        axes = " ".join(f"axis{i}" for i in range(len(spec.shape)))
        key = name.removeprefix(root)
        rules.append(Rule(key, key, f"{axes} -> {axes}", optional=True))
    tied = (
        {"lm_head.weight": "model.embed_tokens.weight"} if "lm_head.weight" in given or _is_decoder(specs, root) else {}
    )
    return TreeMapping(name="hf", rules=tuple(rules), roots=(root,), tied=tied, required=("architectures",))


def _is_decoder(specs: Mapping[str, Spec], root: str) -> bool:
    return f"{root}model.embed_tokens.weight" in specs
