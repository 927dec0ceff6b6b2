"""Trees whose names and layouts are Hugging Face's own. Decides that decoders we know are held against config.json, and
that of any other model each tensor is itself.
"""

from collections.abc import Mapping

from slipway.checkpoint.shards import Spec
from slipway.convert.mappings.flax import FAMILIES, FIELDS, decoder_layer
from slipway.convert.rules import Rule, TreeMapping, rules, within

_ROOTS = ("", "params.", "params.params.")
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def _decoder(model_type: str) -> TreeMapping:
    biases, normalized, config = FAMILIES[model_type]
    outside = (
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "vocab+pad embed -> vocab embed"),
        ("model.norm.weight", "model.norm.weight", "embed -> embed"),
        ("lm_head.weight?", "lm_head.weight", "vocab+pad embed -> vocab embed"),
    )
    layer = decoder_layer(biases, normalized, "", "weight", "weight")
    return TreeMapping(
        name=f"{model_type} in Hugging Face's layout",
        rules=rules(outside + within("model.layers.{layers}.", "model.layers.{layers}.", layer)),
        fields=FIELDS,
        config={"model_type": model_type, "hidden_act": "silu", **config},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=_ROOTS,
        ignored=("*.rotary_emb.inv_freq", "step", "opt_state.*"),
        tied=_TIED,
    )


DECODERS = tuple(_decoder(model_type) for model_type in FAMILIES)


def identity(specs: Mapping[str, Spec]) -> TreeMapping:
    """One rule for each tensor, under whatever root all of them lie."""
    root = next(root for root in reversed(_ROOTS) if all(name.startswith(root) for name in specs))
    keys = {name.removeprefix(root): " ".join(f"axis{i}" for i in range(len(s.shape))) for name, s in specs.items()}
    return TreeMapping(
        name="hf",
        rules=tuple(Rule(key, key, f"{axes} -> {axes}", optional=True) for key, axes in keys.items()),
        roots=(root,),
        tied=_TIED if "model.embed_tokens.weight" in keys else {},
        required=("architectures",),
    )
