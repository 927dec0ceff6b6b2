"""Mappings of decoders in Flax, NNX or Linen, with module names of Hugging Face.

Kernels are (in, out), norms have a scale. Llama, Qwen2 and Qwen3, with or without ``model.`` in
front; layers one by one, or stacked along the first axis as by ``nn.scan`` and ``nnx.scan``. Not
here: Gemma (gemma.py).
"""

from slipway.convert.rules import TreeMapping, rules, within

_Row = tuple[str, str, str]
FIELDS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
}
EXPERT_FIELDS = {axis: field for axis, field in FIELDS.items() if axis != "mlp"} | {
    "experts": "num_experts",
    "moe_mlp": "moe_intermediate_size",
}
# For trees in which only the feed-forward layer is made of Flax's Linear.
MLP_KERNELS = (
    ("mlp.gate_proj.kernel", "mlp.gate_proj.weight", "embed mlp -> mlp embed"),
    ("mlp.up_proj.kernel", "mlp.up_proj.weight", "embed mlp -> mlp embed"),
    ("mlp.down_proj.kernel", "mlp.down_proj.weight", "mlp embed -> embed mlp"),
)
_LINEAR = {  # module: out, in
    "self_attn.q_proj": ("(heads head_dim)", "embed"),
    "self_attn.k_proj": ("(kv_heads head_dim)", "embed"),
    "self_attn.v_proj": ("(kv_heads head_dim)", "embed"),
    "self_attn.o_proj": ("embed", "(heads head_dim)"),
    "mlp.gate_proj": ("mlp", "embed"),
    "mlp.up_proj": ("mlp", "embed"),
    "mlp.down_proj": ("embed", "mlp"),
}
# model_type: projections with a bias, whether query and key heads are normalized, config.json
# fields
FAMILIES: dict[str, tuple[tuple[str, ...], bool, dict[str, object]]] = {
    "qwen3": ((), True, {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False}),
    "qwen2": (("q", "k", "v"), False, {"architectures": ["Qwen2ForCausalLM"]}),
    "llama": (
        (),
        False,
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    ),
}


def decoder_layer(
    biases: tuple[str, ...], normalized: bool, stacked: str, kernel: str, scale: str
) -> list[_Row]:
    """Return the rules of one layer, or of all if ``stacked`` is ``"layers "``.

    ``kernel`` and ``scale`` are names of leaves.
    """
    rows = []
    for module, (out, into) in _LINEAR.items():
        ours = f"{out} {into}" if kernel == "weight" else f"{into} {out}"
        rows.append(
            (f"{module}.{kernel}", f"{module}.weight", f"{stacked}{ours} -> {stacked}{out} {into}")
        )
    for name in biases:
        out = _LINEAR[f"self_attn.{name}_proj"][0]
        module = f"self_attn.{name}_proj"
        rows.append((f"{module}.bias", f"{module}.bias", f"{stacked}{out} -> {stacked}{out}"))
    norms = {"input_layernorm": "embed", "post_attention_layernorm": "embed"}
    if normalized:
        norms |= {"self_attn.q_norm": "head_dim", "self_attn.k_norm": "head_dim"}
    for module, axis in norms.items():
        rows.append(
            (f"{module}.{scale}", f"{module}.weight", f"{stacked}{axis} -> {stacked}{axis}")
        )
    return rows


def _mapping(model_type: str, inside: str, is_scanned: bool, scale: str = "scale") -> TreeMapping:
    """Return the mapping of one naming.

    ``inside`` is ``"model."`` where the tree has such a level, ``scale`` the leaf of norms: Flax's,
    or ``"weight"`` in the Flax classes of transformers 4.
    """
    biases, normalized, config = FAMILIES[model_type]
    layers = f"{inside}layers." if is_scanned else f"{inside}layers.{{layers}}."
    outside = (
        (
            f"{inside}embed_tokens.embedding",
            "model.embed_tokens.weight",
            "vocab+pad embed -> vocab embed",
        ),
        (f"{inside}norm.{scale}", "model.norm.weight", "embed -> embed"),
        ("lm_head.kernel?", "lm_head.weight", "embed vocab+pad -> vocab embed"),
    )
    layer = decoder_layer(
        biases, normalized, "layers " if is_scanned else "", kernel="kernel", scale=scale
    )
    return TreeMapping(
        name=f"{model_type} in Flax, {inside}layers {'stacked' if is_scanned else 'one by one'}"
        + ("" if scale == "scale" else f", norms' {scale}"),
        rules=rules(outside + within(layers, "model.layers.{layers}.", layer)),
        fields=FIELDS,
        config={"model_type": model_type, "hidden_act": "silu", **config},
        required=("rms_norm_eps", "rope_theta", "max_position_embeddings"),
        roots=("", "params.", "params.params."),
        ignored=("step", "*opt_state*", "*.rngs.*", "rngs.*"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


MAPPINGS = tuple(
    _mapping(model_type, inside, is_scanned, scale=scale)
    for scale in ("scale", "weight")
    for model_type in FAMILIES
    for inside in ("", "model.")
    for is_scanned in (False, True)
)
