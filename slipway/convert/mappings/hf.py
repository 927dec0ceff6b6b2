"""Mappings of trees with Hugging Face's own names and layouts.

Decoders that Slipway declares are compared with config.json; for any other model each tensor is
mapped to itself. Not here: comparison of the names with the architecture (conversion.py,
hf_classes.py).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from slipway.checkpoint.files import INERT_TENSORS
from slipway.checkpoint.shards import Spec
from slipway.convert.mappings.flax import FAMILIES, FIELDS, decoder_layer
from slipway.convert.rules import Rule, TreeMapping, rules, within

_ROOTS = ("", "params.", "params.params.")
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def _decoder(model_type: str) -> TreeMapping:
    biases, normalized, config = FAMILIES[model_type]
    outside = (
        (
            "model.embed_tokens.weight",
            "model.embed_tokens.weight",
            "vocab+pad embed -> vocab embed",
        ),
        ("model.norm.weight", "model.norm.weight", "embed -> embed"),
        ("lm_head.weight?", "lm_head.weight", "vocab+pad embed -> vocab embed"),
    )
    layer = decoder_layer(biases, normalized, "", kernel="weight", scale="weight")
    return TreeMapping(
        name=f"{model_type} in Hugging Face's layout",
        rules=rules(outside + within("model.layers.{layers}.", "model.layers.{layers}.", layer)),
        fields=FIELDS,
        config={"model_type": model_type, "hidden_act": "silu", **config},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=_ROOTS,
        ignored=(*INERT_TENSORS, "step", "opt_state.*"),
        tied=_TIED,
    )


DECODERS = tuple(_decoder(model_type) for model_type in FAMILIES)


def is_declared(config: Mapping[str, Any]) -> bool:
    """Return whether config.json is of one of ``DECODERS``; its architectures may be left out."""
    return any(
        config.get("model_type") == mapping.config["model_type"]
        and config.get("architectures") in (None, mapping.config["architectures"])
        for mapping in DECODERS
    )


class DeclaredNames:
    """Names that tensors of a config.json's declared decoder may have.

    Tensors without weights are included.
    """

    def __init__(self, config: Mapping[str, Any]):
        found = [
            mapping
            for mapping in DECODERS
            if mapping.config["model_type"] == config.get("model_type")
        ]
        self._sides = [theirs for mapping in found for _, _, theirs in mapping.sides()]
        self._ignored = [glob for mapping in found for glob in mapping.ignored]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        is_tensor = any(side.match(name, {}) is not None for side in self._sides)
        return is_tensor or any(fnmatchcase(name, glob) for glob in self._ignored)


def identity(specs: Mapping[str, Spec], note: str) -> TreeMapping:
    """Return one rule for each tensor under the root that all share.

    Scalars beside that root have none.
    """
    arrays = [name for name, spec in specs.items() if spec.shape] or list(specs)
    root = next(root for root in reversed(_ROOTS) if all(name.startswith(root) for name in arrays))
    keys = {
        name.removeprefix(root): " ".join(f"axis{i}" for i in range(len(spec.shape)))
        for name, spec in specs.items()
        if name.startswith(root)
    }
    return TreeMapping(
        name="hf",
        rules=tuple(
            Rule(key, key, f"{axes} -> {axes}", optional=True) for key, axes in keys.items()
        ),
        roots=(root,),
        tied={head: table for head, table in _TIED.items() if {head, table} <= keys.keys()},
        note=note,
    )
