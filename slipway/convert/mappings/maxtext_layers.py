"""Rows of MaxText's layers: JAX name, key in Hugging Face's layer, pattern.

The patterns are those of a scanned tree, which stacks its layers along axis 1; without scanning,
the names have the index instead. Not here: families of models, rotary embeddings (maxtext.py).
"""

Rows = tuple[tuple[str, ...], ...]

OUTSIDE: Rows = (
    ("token_embedder.embedding", "model.embed_tokens.weight", "vocab+pad embed -> vocab embed"),
    ("decoder.decoder_norm.scale", "model.norm.weight", "embed -> embed"),
    ("decoder.logits_dense.kernel?", "lm_head.weight", "embed vocab+pad -> vocab embed"),
)
_NORMS: Rows = (
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
)
_VALUE_OUT: Rows = (
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
COMMON = _NORMS + _VALUE_OUT
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
_DIVIDED = "* head_dim ** 0.5"  # of the queries of Llama, Mistral and Mixtral
NORMALIZED: Rows = (
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
BIASED: Rows = (
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
HALVES: Rows = ((*_QUERY, _DIVIDED), _KEY)
INTERLEAVED: Rows = (
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


def mlp(jax: str, hf: str, width: str = "mlp") -> Rows:
    """Return the rows of a feed-forward layer."""
    into = f"embed layers {width} -> layers {width} embed"
    return (
        (f"{jax}.wi_0.kernel", f"{hf}.gate_proj.weight", into),
        (f"{jax}.wi_1.kernel", f"{hf}.up_proj.weight", into),
        (
            f"{jax}.wo.kernel",
            f"{hf}.down_proj.weight",
            f"{width} layers embed -> layers embed {width}",
        ),
    )


def experts(jax: str, hf: str, gate: str, up: str, down: str) -> Rows:
    """Return the rows of a router and its experts; ``gate``, ``up``, ``down``: names in HF."""
    into = "experts layers embed moe_mlp -> layers experts moe_mlp embed"
    out = "experts layers moe_mlp embed -> layers experts embed moe_mlp"
    return (
        (f"{jax}.gate.kernel", f"{hf}.gate.weight", "embed layers experts -> layers experts embed"),
        (f"{jax}.wi_0", f"{hf}.experts.{{experts}}.{gate}.weight", into),
        (f"{jax}.wi_1", f"{hf}.experts.{{experts}}.{up}.weight", into),
        (f"{jax}.wo", f"{hf}.experts.{{experts}}.{down}.weight", out),
    )


# gpt-oss: Hugging Face holds the columns of gate and up alternately, MaxText in two arrays.
GPT_OSS_PARTS = {"gate_up": {"0": 1, "1": 1}}
GPT_OSS: Rows = (
    *_NORMS,
    *(
        (row[0].replace("self_attention.", "GptOssAttention."), *row[1:])
        for row in _VALUE_OUT + BIASED
    ),
    ("GptOssAttention.out.bias", "self_attn.o_proj.bias", "embed layers -> layers embed"),
    ("GptOssAttention.sinks", "self_attn.sinks", "heads layers -> layers heads"),
    ("GptOssMlp.gate.kernel", "mlp.router.weight", "embed layers experts -> layers experts embed"),
    ("GptOssMlp.gate.bias", "mlp.router.bias", "experts layers -> layers experts"),
    (
        "GptOssMlp.wi_{gate_up}",
        "mlp.experts.gate_up_proj",
        "gate_up experts layers embed moe_mlp -> layers experts embed (moe_mlp gate_up)",
    ),
    (
        "GptOssMlp.wi_{gate_up}_bias",
        "mlp.experts.gate_up_proj_bias",
        "gate_up experts layers moe_mlp -> layers experts (moe_mlp gate_up)",
    ),
    (
        "GptOssMlp.wo",
        "mlp.experts.down_proj",
        "experts layers moe_mlp embed -> layers experts moe_mlp embed",
    ),
    (
        "GptOssMlp.wo_bias",
        "mlp.experts.down_proj_bias",
        "experts layers embed -> layers experts embed",
    ),
)

# DeepSeek's attention over latents. Two sizes in one axis: of keys and values from the latent, of
# the latent and the rotated key, of the parts of a query.
LATENT_PARTS = {
    "kv_a": {"latent": "kv_rank", "rope": "rope_dim"},
    "kv_b": {"nope": "nope_dim", "value": "value_dim"},
    "qk": {"nope": "nope_dim", "rope": "rope_dim"},
}
_LATENT: Rows = (
    *_NORMS,
    (
        "self_attention.wkv_a.kernel",
        "self_attn.kv_a_proj_with_mqa.weight",
        "embed layers kv_a -> layers kv_a embed",
    ),
    (
        "self_attention.kv_norm.scale",
        "self_attn.kv_a_layernorm.weight",
        "kv_rank layers -> layers kv_rank",
    ),
    (
        "self_attention.wkv_b.kernel",
        "self_attn.kv_b_proj.weight",
        "kv_rank layers kv_heads kv_b -> layers (kv_heads kv_b) kv_rank",
    ),
    (
        "self_attention.out.kernel",
        "self_attn.o_proj.weight",
        "heads layers value_dim embed -> layers embed (heads value_dim)",
    ),
)
LATENT: Rows = (
    *_LATENT,
    (
        "self_attention.query.kernel",
        "self_attn.q_proj.weight",
        "embed layers heads qk -> layers (heads qk) embed",
    ),
)
LATENT_QUERIES: Rows = (
    *_LATENT,
    (
        "self_attention.wq_a.kernel",
        "self_attn.q_a_proj.weight",
        "embed layers q_rank -> layers q_rank embed",
    ),
    (
        "self_attention.q_norm.scale",
        "self_attn.q_a_layernorm.weight",
        "q_rank layers -> layers q_rank",
    ),
    (
        "self_attention.wq_b.kernel",
        "self_attn.q_b_proj.weight",
        "q_rank layers heads qk -> layers (heads qk) q_rank",
    ),
)
_BLOCK = "DeepSeekMoeBlock_0"
DEEPSEEK_EXPERTS: Rows = (
    *experts(f"{_BLOCK}.MoeBlock_0", "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    *mlp(f"{_BLOCK}.shared_experts", "mlp.shared_experts", width="(shared moe_mlp)"),
)


def router_bias(axes: str) -> tuple[str, str, str]:
    """Return the row of DeepSeek V3's router bias, with its pattern."""
    return (f"{_BLOCK}.MoeBlock_0.gate.bias", "mlp.gate.e_score_correction_bias", axes)


def stacked_by(axis: str, rows: Rows) -> Rows:
    """Return the rows with another name for the axis ``layers``."""
    return tuple((*row[:2], row[2].replace("layers", axis), *row[3:]) for row in rows)
