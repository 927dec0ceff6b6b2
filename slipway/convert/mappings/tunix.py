"""Mappings of tunix's trees: Llama, Qwen2, Qwen3 and Qwen3-MoE.

Projections keep heads and head_dim as axes, biases are flat, experts are stacked along the first
axis. Rotary embeddings rotate halves of a head, as Hugging Face's do. Compared with trees and
logits of tunix 0.1.7 (tests/data/tunix). Not here: Gemma (gemma.py).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slipway.convert.mappings.flax import EXPERT_FIELDS, FAMILIES, FIELDS, MLP_KERNELS
from slipway.convert.rules import TreeMapping, rules, within

_OUTSIDE = (
    ("embedder.input_embedding", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
    ("final_norm.w", "model.norm.weight", "embed -> embed"),
    ("lm_head.w?", "lm_head.weight", "embed vocab -> vocab embed"),
)
_ATTENTION = (
    ("input_layernorm.w", "input_layernorm.weight", "embed -> embed"),
    ("post_attention_layernorm.w", "post_attention_layernorm.weight", "embed -> embed"),
    ("attn.q_proj.w", "self_attn.q_proj.weight", "embed heads head_dim -> (heads head_dim) embed"),
    (
        "attn.k_proj.w",
        "self_attn.k_proj.weight",
        "embed kv_heads head_dim -> (kv_heads head_dim) embed",
    ),
    (
        "attn.v_proj.w",
        "self_attn.v_proj.weight",
        "embed kv_heads head_dim -> (kv_heads head_dim) embed",
    ),
    ("attn.o_proj.w", "self_attn.o_proj.weight", "heads head_dim embed -> embed (heads head_dim)"),
)
_NORMALIZED = (
    ("attn.q_norm.w", "self_attn.q_norm.weight", "head_dim -> head_dim"),
    ("attn.k_norm.w", "self_attn.k_norm.weight", "head_dim -> head_dim"),
)
_BIASED = (
    ("attn.q_bias", "self_attn.q_proj.bias", "(heads head_dim) -> (heads head_dim)"),
    ("attn.k_bias", "self_attn.k_proj.bias", "(kv_heads head_dim) -> (kv_heads head_dim)"),
    ("attn.v_bias", "self_attn.v_proj.bias", "(kv_heads head_dim) -> (kv_heads head_dim)"),
)
_INTO_EXPERT = "experts embed moe_mlp -> experts moe_mlp embed"
_EXPERTS = (
    ("mlp.router.kernel", "mlp.gate.weight", "embed experts -> experts embed"),
    ("mlp.gate_proj", "mlp.experts.{experts}.gate_proj.weight", _INTO_EXPERT),
    ("mlp.up_proj", "mlp.experts.{experts}.up_proj.weight", _INTO_EXPERT),
    (
        "mlp.down_proj",
        "mlp.experts.{experts}.down_proj.weight",
        "experts moe_mlp embed -> experts embed moe_mlp",
    ),
)
_THETA = 1_000_000  # of tunix's Llama and Qwen3: their attention passes no rope_theta on (0.1.7)
_FIXED_THETA = ("llama", "qwen3", "qwen3_moe")


def _family(
    model_type: str, layer: tuple, fields: Mapping[str, str], config: Mapping[str, object]
) -> TreeMapping:
    return TreeMapping(
        name=f"tunix {model_type}",
        rules=rules(
            _OUTSIDE + within("layers.{layers}.", "model.layers.{layers}.", _ATTENTION + layer)
        ),
        fields=fields,
        config={"model_type": model_type, "hidden_act": "silu", **config},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=("", "params.", "model."),
        ignored=("step", "*opt_state*"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


MAPPINGS = (
    _family("qwen3", _NORMALIZED + MLP_KERNELS, FIELDS, config=FAMILIES["qwen3"][2]),
    _family("qwen2", _BIASED + MLP_KERNELS, FIELDS, config=FAMILIES["qwen2"][2]),
    _family("llama", MLP_KERNELS, FIELDS, config=FAMILIES["llama"][2]),
    _family(
        "qwen3_moe",
        _NORMALIZED + _EXPERTS,
        EXPERT_FIELDS,
        config={
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
)


def noted(found: Iterable[TreeMapping], config: Mapping[str, Any]) -> list[TreeMapping]:
    """Return ``found``, with notes where tunix rotates differently from config.json."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaled = f"tunix 0.1.7 scales no rotary embedding; config.json's rope_type {kind!r} is kept"
    turned = (
        f"tunix 0.1.7 rotates with theta {_THETA:,}, whatever its ModelConfig states; "
        f"config.json's {theta} is kept"
    )

    def note(model_type: object) -> str:
        notes = [scaled] if kind != "default" else []
        return "; ".join(
            [*notes, turned]
            if model_type in _FIXED_THETA and theta not in (None, _THETA)
            else notes
        )

    return [
        dataclasses.replace(mapping, note=note(mapping.config["model_type"]))
        if mapping in MAPPINGS
        else mapping
        for mapping in found
    ]
