"""Mappings of Gemma in the naming of Flax's public examples.

These are examples/gemma (NNX), as in tunix, and the Linen trees that it reads. Both store ``scale``
of a norm as Hugging Face does: the factor is ``1 + scale``. Gemma 1 and 2, and tunix's Gemma 3 for
text; queries, keys and values are fused where heads and kv_heads are equal, keys and values
otherwise. Not here: other decoders of tunix (tunix.py).
"""

from slipway.convert.mappings.flax import FIELDS, MLP_KERNELS
from slipway.convert.rules import TreeMapping, rules, within

_PARTS = {"qkv": {"q": 1, "k": 1, "v": 1}, "kv": {"k": 1, "v": 1}, "gate_up": {"gate": 1, "up": 1}}
_KV = "kv kv_heads embed head_dim -> kv (kv_heads head_dim) embed"
_QKV = "qkv heads embed head_dim -> qkv (heads head_dim) embed"
_OUTSIDE = (
    ("embedder.input_embedding", "model.embed_tokens.weight", "vocab+pad embed -> vocab embed"),
    ("final_norm.scale", "model.norm.weight", "embed -> embed"),
)
_SEPARATE = (
    (
        "attn.q_einsum.w",
        "self_attn.q_proj.weight",
        "heads embed head_dim -> (heads head_dim) embed",
    ),
    ("attn.kv_einsum.w", "self_attn.{kv}_proj.weight", _KV),
)
_FUSED = (("attn.qkv_einsum.w", "self_attn.{qkv}_proj.weight", _QKV),)
_OUT = (
    (
        "attn.attn_vec_einsum.w",
        "self_attn.o_proj.weight",
        "heads head_dim embed -> embed (heads head_dim)",
    ),
)
_NORMS = {
    "gemma": (
        ("pre_attention_norm.scale", "input_layernorm.weight", "embed -> embed"),
        ("pre_ffw_norm.scale", "post_attention_layernorm.weight", "embed -> embed"),
    ),
    "gemma2": (
        ("pre_attention_norm.scale", "input_layernorm.weight", "embed -> embed"),
        ("{post_attention}.scale", "post_attention_layernorm.weight", "embed -> embed"),
        ("pre_ffw_norm.scale", "pre_feedforward_layernorm.weight", "embed -> embed"),
        ("post_ffw_norm.scale", "post_feedforward_layernorm.weight", "embed -> embed"),
    ),
}
_NORMS["gemma3_text"] = (
    *_NORMS["gemma2"],
    ("attn._query_norm.scale", "self_attn.q_norm.weight", "head_dim -> head_dim"),
    ("attn._key_norm.scale", "self_attn.k_norm.weight", "head_dim -> head_dim"),
)
_LINEN_MLP = (
    ("mlp.gating_einsum", "mlp.{gate_up}_proj.weight", "gate_up embed mlp -> gate_up mlp embed"),
    ("mlp.linear", "mlp.down_proj.weight", "mlp embed -> embed mlp"),
)
_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def _mapping(
    kind: str, model_type: str, layers: str, mlp: tuple, fused: bool, post_attention: str
) -> TreeMapping:
    rows = (*(_FUSED if fused else _SEPARATE), *_OUT, *_NORMS[model_type], *mlp)
    rows = tuple((row[0].replace("{post_attention}", post_attention), *row[1:]) for row in rows)
    return TreeMapping(
        name=f"{model_type} in {kind}{', qkv fused' if fused else ''}",
        rules=rules(_OUTSIDE + within(layers, "model.layers.{layers}.", rows)),
        fields={
            axis: field for axis, field in FIELDS.items() if not (fused and axis == "kv_heads")
        },
        parts=_PARTS,
        config={"model_type": model_type, "architectures": [_ARCHITECTURES[model_type]]},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=("", "params.", "params.transformer.", "transformer."),
        ignored=("step", "*opt_state*", "rngs.*"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


_EITHER = (True, False)  # equal heads are fused; a fused mapping does not fit unequal ones
NNX = tuple(
    _mapping(
        "NNX",
        model_type,
        "layers.{layers}.",
        mlp=MLP_KERNELS,
        fused=is_fused,
        post_attention="post_attention_norm" if model_type == "gemma3_text" else "post_attn_norm",
    )
    for model_type in _ARCHITECTURES
    for is_fused in _EITHER
)
LINEN = tuple(
    _mapping(
        "Linen",
        model_type,
        "layer_{layers}.",
        mlp=_LINEN_MLP,
        fused=is_fused,
        post_attention="post_attention_norm",
    )
    for model_type in ("gemma", "gemma2")
    for is_fused in _EITHER
)
