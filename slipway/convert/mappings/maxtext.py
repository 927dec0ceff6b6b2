"""MaxText's trees, scanned or not: Llama, Qwen3 and Qwen3-MoE. Decides names and axes only.

A scanned tree stacks its layers along axis 1. The Llama family stores queries divided by sqrt(head_dim) and rotates
neighbouring pairs, where Hugging Face rotates the two halves of a head: the axis ``half`` lies before ``two`` here and
behind it there. Read off checkpoints that MaxText wrote (tests/data/maxtext).
"""

import dataclasses

from slipway.convert.mappings.flax import FIELDS
from slipway.convert.rules import TreeMapping, rules, within

_OUTSIDE = (
    ("token_embedder.embedding", "model.embed_tokens.weight", "vocab+pad embed -> vocab embed"),
    ("decoder.decoder_norm.scale", "model.norm.weight", "embed -> embed"),
    ("decoder.logits_dense.kernel?", "lm_head.weight", "embed vocab+pad -> vocab embed"),
)
_COMMON = (
    ("pre_self_attention_layer_norm.scale", "input_layernorm.weight", "embed layers -> layers embed"),
    ("post_self_attention_layer_norm.scale", "post_attention_layernorm.weight", "embed layers -> layers embed"),
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
_NORMALIZED = (
    (
        "self_attention.query.kernel",
        "self_attn.q_proj.weight",
        "embed layers heads head_dim -> layers (heads head_dim) embed",
    ),
    (
        "self_attention.key.kernel",
        "self_attn.k_proj.weight",
        "embed layers kv_heads head_dim -> layers (kv_heads head_dim) embed",
    ),
    ("self_attention.query_norm.scale", "self_attn.q_norm.weight", "head_dim layers -> layers head_dim"),
    ("self_attention.key_norm.scale", "self_attn.k_norm.weight", "head_dim layers -> layers head_dim"),
)
_ROTATED_IN_PAIRS = (
    (
        "self_attention.query.kernel",
        "self_attn.q_proj.weight",
        "embed layers heads (half two) -> layers (heads two half) embed",
        "* head_dim ** 0.5",
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


def _family(name: str, layer: tuple, sizes: dict, fields: dict, config: dict) -> tuple[TreeMapping, TreeMapping]:
    """The mapping of a family's scanned trees and of its unscanned ones."""
    scanned = TreeMapping(
        name=f"maxtext {name}, scanned",
        rules=rules(_OUTSIDE + within("decoder.layers.", "model.layers.{layers}.", layer)),
        sizes=sizes,
        fields=fields,
        config={"hidden_act": "silu", "attention_bias": False, **config},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=("params.params.", "params.", ""),
        ignored=("step", "opt_state.*"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        jax_constants={"step": 0, "opt_state": {}},
    )
    unscanned = dataclasses.replace(
        scanned,
        name=f"maxtext {name}, not scanned",
        rules=rules(_OUTSIDE + within("decoder.layers_{layers}.", "model.layers.{layers}.", layer)),
    )
    return scanned, unscanned


MAPPINGS = (
    *_family(
        "llama",
        _COMMON + _ROTATED_IN_PAIRS + _MLP,
        {"two": 2},
        FIELDS,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False},
    ),
    *_family(
        "qwen3",
        _COMMON + _NORMALIZED + _MLP,
        {},
        FIELDS,
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    ),
    *_family(
        "qwen3_moe",
        _COMMON + _NORMALIZED + _EXPERTS,
        {},
        {axis: field for axis, field in FIELDS.items() if axis != "mlp"}
        | {"experts": "num_experts", "moe_mlp": "moe_intermediate_size"},
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1},
    ),
)
