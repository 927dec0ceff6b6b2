"""Mappings of MaxText's trees, scanned or not: Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE.

A scanned tree stacks its layers along axis 1. Llama and Mistral store queries divided by
sqrt(head_dim). With MaxText's ``rope_type: llama3.1`` their rotary embedding rotates adjacent
pairs, where Hugging Face rotates the two halves of a head: the axis ``half`` is before ``two`` here
and after it there. With MaxText's default rotary embedding (llama2, llama3, mistral) it also
rotates halves. Names and shapes are the same, so config.json decides, or the user does. Compared
with checkpoints and logits that MaxText wrote (tests/data/maxtext). Not here: MaxText models under
vLLM (slipway/adapters/maxtext.py).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from slipway.convert.mappings.flax import EXPERT_FIELDS, FIELDS
from slipway.convert.rules import TreeMapping, rules, within

Rotation = Literal["interleaved", "halves"]
ROTATED = ("llama", "mistral")  # model_types with a rotary embedding in both forms in MaxText
ROTATIONS: tuple[Rotation, ...] = ("interleaved", "halves")
_ROTATION_OF: Mapping[str, Rotation] = {
    "default": "halves",
    "linear": "halves",
    "dynamic": "halves",
    "llama3": "interleaved",
}
_OUTSIDE = (
    ("token_embedder.embedding", "model.embed_tokens.weight", "vocab+pad embed -> vocab embed"),
    ("decoder.decoder_norm.scale", "model.norm.weight", "embed -> embed"),
    ("decoder.logits_dense.kernel?", "lm_head.weight", "embed vocab+pad -> vocab embed"),
)
_COMMON = (
    (
        "pre_self_attention_layer_norm.scale",
        "input_layernorm.weight",
        "embed layers -> layers embed",
    ),
    (
        "post_self_attention_layer_norm.scale",
        "post_attention_layernorm.weight",
        "embed layers -> layers embed",
    ),
    (
        "self_attention.value.kernel",
        "self_attn.v_proj.weight",
        "embed layers kv_heads head_dim -> layers (kv_heads head_dim) embed",
    ),
    (
        "self_attention.out.kernel",
        "self_attn.o_proj.weight",
        "heads layers head_dim embed -> layers embed (heads head_dim)",
    ),
)
_QUERY = (
    "self_attention.query.kernel",
    "self_attn.q_proj.weight",
    "embed layers heads head_dim -> layers (heads head_dim) embed",
)
_KEY = (
    "self_attention.key.kernel",
    "self_attn.k_proj.weight",
    "embed layers kv_heads head_dim -> layers (kv_heads head_dim) embed",
)
_DIVIDED = "* head_dim ** 0.5"  # of queries, except normalized ones and those of Qwen2
_NORMALIZED = (
    _QUERY,
    _KEY,
    (
        "self_attention.query_norm.scale",
        "self_attn.q_norm.weight",
        "head_dim layers -> layers head_dim",
    ),
    (
        "self_attention.key_norm.scale",
        "self_attn.k_norm.weight",
        "head_dim layers -> layers head_dim",
    ),
)
_BIASED = (
    _QUERY,
    _KEY,
    (
        "self_attention.query.bias",
        "self_attn.q_proj.bias",
        "heads layers head_dim -> layers (heads head_dim)",
    ),
    (
        "self_attention.key.bias",
        "self_attn.k_proj.bias",
        "kv_heads layers head_dim -> layers (kv_heads head_dim)",
    ),
    (
        "self_attention.value.bias",
        "self_attn.v_proj.bias",
        "kv_heads layers head_dim -> layers (kv_heads head_dim)",
    ),
)
_HALVES = ((*_QUERY, _DIVIDED), _KEY)
_INTERLEAVED = (
    (
        "self_attention.query.kernel",
        "self_attn.q_proj.weight",
        "embed layers heads (half two) -> layers (heads two half) embed",
        _DIVIDED,
    ),
    (
        "self_attention.key.kernel",
        "self_attn.k_proj.weight",
        "embed layers kv_heads (half two) -> layers (kv_heads two half) embed",
    ),
)
_MLP = (
    ("mlp.wi_0.kernel", "mlp.gate_proj.weight", "embed layers mlp -> layers mlp embed"),
    ("mlp.wi_1.kernel", "mlp.up_proj.weight", "embed layers mlp -> layers mlp embed"),
    ("mlp.wo.kernel", "mlp.down_proj.weight", "mlp layers embed -> layers embed mlp"),
)
_INTO_EXPERT = "experts layers embed moe_mlp -> layers experts moe_mlp embed"
_EXPERTS = (
    ("moe_block.gate.kernel", "mlp.gate.weight", "embed layers experts -> layers experts embed"),
    ("moe_block.wi_0", "mlp.experts.{experts}.gate_proj.weight", _INTO_EXPERT),
    ("moe_block.wi_1", "mlp.experts.{experts}.up_proj.weight", _INTO_EXPERT),
    (
        "moe_block.wo",
        "mlp.experts.{experts}.down_proj.weight",
        "experts layers moe_mlp embed -> layers experts embed moe_mlp",
    ),
)


def _family(
    name: str, layer: tuple, sizes: dict, fields: dict, config: dict
) -> tuple[TreeMapping, TreeMapping]:
    """Return the mapping of a family's scanned trees and that of its unscanned ones."""
    scanned = TreeMapping(
        name=f"maxtext {name}, scanned",
        rules=rules(_OUTSIDE + within("decoder.layers.", "model.layers.{layers}.", layer)),
        sizes=sizes,
        fields=fields,
        config={"hidden_act": "silu", **config},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=("params.params.", "params.", "", "base.", "model.", "params.base.", "params.model."),
        ignored=("step", "opt_state.*", "*.rngs.*", "rngs.*", "aqt.*", "*.aqt.*"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        jax_constants={"step": 0, "opt_state": {}},
    )
    unscanned = dataclasses.replace(
        scanned,
        name=f"maxtext {name}, not scanned",
        rules=rules(_OUTSIDE + within("decoder.layers_{layers}.", "model.layers.{layers}.", layer)),
    )
    return scanned, unscanned


def _rotated(name: str, config: dict) -> dict[Rotation, tuple[TreeMapping, TreeMapping]]:
    """Return a family's mappings for both rotary embeddings."""
    return {
        "halves": _family(
            f"{name} (halves)", _COMMON + _HALVES + _MLP, {}, fields=FIELDS, config=config
        ),
        "interleaved": _family(
            f"{name} (interleaved)",
            _COMMON + _INTERLEAVED + _MLP,
            {"two": 2},
            fields=FIELDS,
            config=config,
        ),
    }


_EITHER = (
    _rotated(
        "llama",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    _rotated("mistral", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
)
_QWEN = (
    *_family(
        "qwen2",
        _COMMON + _BIASED + _MLP,
        {},
        fields=FIELDS,
        config={"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    ),
    *_family(
        "qwen3",
        _COMMON + _NORMALIZED + _MLP,
        {},
        fields=FIELDS,
        config={
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
        },
    ),
    *_family(
        "qwen3_moe",
        _COMMON + _NORMALIZED + _EXPERTS,
        {},
        fields=EXPERT_FIELDS,
        config={
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
        },
    ),
)
BY_ROTATION: Mapping[Rotation, tuple[TreeMapping, ...]] = {
    rotation: tuple(mapping for family in _EITHER for mapping in family[rotation])
    for rotation in ROTATIONS
}
MAPPINGS = (*BY_ROTATION["halves"], *BY_ROTATION["interleaved"], *_QWEN)


def rope_type(config: Mapping[str, Any]) -> str:
    """Return config.json's type of rotary embedding.

    ``rope_scaling`` takes precedence over ``rope_parameters``.
    """
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if isinstance(rope, Mapping) and rope:
            return str(rope.get("rope_type") or rope.get("type") or "default")
    return "default"


def rotation(config: Mapping[str, Any]) -> Rotation | None:
    """Return the rotation of MaxText's Llama and Mistral for this config.json.

    None if it does not follow. MaxText has three types: default, llama3.1 and yarn. yarn rotates
    pairs or halves, depending on its ``rope_interleave``.
    """
    return _ROTATION_OF.get(rope_type(config))


def chosen(found: Iterable[TreeMapping], config: Mapping[str, Any]) -> list[TreeMapping]:
    """Return ``found`` without the rotary embedding that config.json rules out.

    The notes of the remaining mappings state the reason.
    """
    kind, decided = rope_type(config), rotation(config)
    other: Rotation = "interleaved" if decided == "halves" else "halves"
    dropped = BY_ROTATION[other] if decided else BY_ROTATION["interleaved"]
    note = f"rotary embedding: {decided}, as in MaxText for config.json's rope_type {kind!r}; "
    note += f"--mapping maxtext-{other} takes the other one"
    undecided = (
        f"config.json: rope_type: {kind!r} does not determine which rotary embedding "
        "MaxText's tree has; give --mapping maxtext-interleaved (neighbouring pairs) "
        "or --mapping maxtext-halves"
    )
    rotated = (*BY_ROTATION["halves"], *BY_ROTATION["interleaved"])
    return [
        dataclasses.replace(
            mapping, note=note if decided else "", undecided="" if decided else undecided
        )
        if mapping in rotated
        else mapping
        for mapping in found
        if mapping not in dropped
    ]


def given(asked: Rotation) -> tuple[TreeMapping, ...]:
    """Return the mappings of the rotary embedding that the user names."""
    note = f"rotary embedding: {asked}, as --mapping maxtext-{asked} says"
    return tuple(dataclasses.replace(mapping, note=note) for mapping in BY_ROTATION[asked])
