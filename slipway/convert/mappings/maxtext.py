"""Mappings of MaxText's trees, scanned or not: Llama, Mistral, Qwen2, Qwen3 and their experts.

Families with experts: Mixtral, Qwen3-MoE, gpt-oss, DeepSeek V2 and V3. A scanned tree stacks its
layers along axis 1; gpt-oss stacks every second layer, DeepSeek its dense layers and those with
experts. Llama, Mistral and Mixtral store queries divided by sqrt(head_dim).

With MaxText's ``rope_type: llama3.1`` their rotary embedding rotates adjacent pairs, where Hugging
Face rotates the two halves of a head: the axis ``half`` is before ``two`` here and after it there.
With MaxText's default rotary embedding (llama2, llama3, mistral, mixtral) it also rotates halves.
Names and shapes are the same, so config.json decides, or the user does. Compared with checkpoints
and logits that MaxText wrote (tests/data/maxtext). Not here: rows of one layer
(maxtext_layers.py), MaxText models under vLLM (slipway/adapters/maxtext.py).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from slipway.convert.mappings import maxtext_layers as layers
from slipway.convert.mappings.flax import EXPERT_FIELDS, FIELDS
from slipway.convert.rules import TreeMapping, rules, within

Rotation = Literal["interleaved", "halves"]
# model_types with a rotary embedding in both forms in MaxText, with the same fields in config.json
ROTATED = ("llama", "mistral", "mixtral")
ROTATIONS: tuple[Rotation, ...] = ("interleaved", "halves")
_ROTATION_OF: Mapping[str, Rotation] = {
    "default": "halves",
    "linear": "halves",
    "dynamic": "halves",
    "llama3": "interleaved",
}
_ROOTS = ("params.params.", "params.", "", "base.", "model.", "params.base.", "params.model.")
_REQUIRED = ("rms_norm_eps", "rope_theta", "max_position_embeddings")
_MIXTRAL_FIELDS = {axis: field for axis, field in FIELDS.items() if axis != "mlp"} | {
    "experts": "num_local_experts",
    "moe_mlp": "intermediate_size",
}
_DEEPSEEK_FIELDS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "dense+moe": "num_hidden_layers",
    "dense": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "mlp": "intermediate_size",
    "moe_mlp": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared": "n_shared_experts",
}
_MLP = layers.mlp("mlp", "mlp")
_Pair = tuple[TreeMapping, TreeMapping]


def _pair(
    title: str,
    scanned: layers.Rows,
    unscanned: layers.Rows,
    config: Mapping[str, object],
    required: tuple[str, ...] = (),
    **facts: Any,
) -> _Pair:
    """Return the mapping of a family's scanned trees and that of its unscanned ones.

    ``required`` names fields of config.json beside those of every family; ``facts`` are other
    fields of the mappings.
    """
    first = TreeMapping(
        name=f"maxtext {title}, scanned",
        rules=rules(scanned),
        config={"hidden_act": "silu", **config},
        required=(*_REQUIRED, *required),
        **{"roots": _ROOTS, **facts},
        ignored=("step", "opt_state.*", "*.rngs.*", "rngs.*", "aqt.*", "*.aqt.*"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        jax_constants={"step": 0, "opt_state": {}},
    )
    name = f"maxtext {title}, not scanned"
    return first, dataclasses.replace(first, name=name, rules=rules(unscanned))


def _family(layer: layers.Rows, config: Mapping[str, object], title: str = "", **facts: Any):
    """Return the mappings of a family with layers that are all alike."""
    scanned = within("decoder.layers.", "model.layers.{layers}.", layer)
    unscanned = within("decoder.layers_{layers}.", "model.layers.{layers}.", layer)
    return _pair(
        title or str(config["model_type"]),
        layers.OUTSIDE + scanned,
        layers.OUTSIDE + unscanned,
        config=config,
        **facts,
    )


def _rotated(ffn: layers.Rows, config: dict, **facts: Any) -> dict[Rotation, _Pair]:
    """Return a family's mappings for both rotary embeddings."""
    name, facts = config["model_type"], {"config": config, "fields": FIELDS, **facts}
    return {
        "halves": _family(layers.COMMON + layers.HALVES + ffn, title=f"{name} (halves)", **facts),
        "interleaved": _family(
            layers.COMMON + layers.INTERLEAVED + ffn,
            title=f"{name} (interleaved)",
            sizes={"two": 2},
            **facts,
        ),
    }


_EITHER = (
    _rotated(
        _MLP,
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    _rotated(_MLP, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
    _rotated(
        layers.experts("MoeBlock_0", "block_sparse_moe", gate="w1", up="w3", down="w2"),
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        fields=_MIXTRAL_FIELDS,
        required=("num_experts_per_tok",),
    ),
)
_QWEN = (
    *_family(
        layers.COMMON + layers.BIASED + _MLP,
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        fields=FIELDS,
    ),
    *_family(
        layers.COMMON + layers.NORMALIZED + _MLP,
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
        },
        fields=FIELDS,
    ),
    *_family(
        layers.COMMON
        + layers.NORMALIZED
        + layers.experts("moe_block", "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,  # MaxText's softmax is over the chosen experts
        },
        fields=EXPERT_FIELDS,
        required=("num_experts_per_tok",),
    ),
)
# Every second layer of gpt-oss has a window, so that MaxText scans blocks of two layers.
_GPT_OSS = _pair(
    "gpt_oss",
    layers.OUTSIDE
    + within(
        "decoder.layers.layers_{cycle}.",
        "model.layers.{blocks cycle}.",
        layers.stacked_by("blocks", layers.GPT_OSS),
    ),
    layers.OUTSIDE + within("decoder.layers_{layers}.", "model.layers.{layers}.", layers.GPT_OSS),
    config={
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
    },
    required=("num_experts_per_tok", "sliding_window", "rope_type"),
    sizes={"cycle": 2},
    parts=layers.GPT_OSS_PARTS,
    fields=_MIXTRAL_FIELDS | {"blocks cycle": "num_hidden_layers"},
    note="rotary embedding: halves, as in MaxText's gpt-oss models (rope_interleave: false)",
)


class _RouterBias(NamedTuple):
    """Place of DeepSeek V3's router bias in a tree, and its pattern in a scanned one."""

    title: str
    place: str  # nothing: beside the router's kernel
    axes: str = "layers experts -> layers experts"


# MaxText 0.2.5 loads the bias from beside the kernel, its training saves it in nnx_aux, and its
# converter in a collection of Linen; earlier versions stacked it as they stacked weights.
_BIASES = (
    _RouterBias("", ""),
    _RouterBias(" (router bias in nnx_aux)", "nnx_aux.model."),
    _RouterBias(" (router bias in MoEBiasVar)", "params.MoEBiasVar."),
)
_OLD_BIAS = _RouterBias(" (router bias by expert)", "", "experts layers -> layers experts")


def _deepseek(
    config: Mapping[str, object], bias: _RouterBias | None, has_query_rank: bool
) -> _Pair:
    """Return the mappings of DeepSeek."""
    attention = layers.LATENT_QUERIES if has_query_rank else layers.LATENT
    dense, moe = attention + _MLP, attention + layers.DEEPSEEK_EXPERTS
    biases = (layers.router_bias(bias.axes),) if bias else ()

    def rows(moe_prefix: str, dense_prefix: str) -> layers.Rows:
        # First the layers with experts: an index of theirs is none of a dense layer.
        hf, root = "model.layers.{dense+moe}.", "params.params." if bias and bias.place else ""
        made = within(f"{root}{moe_prefix}", hf, layers.stacked_by("moe", moe))
        place = bias.place if bias else ""
        made += within(f"{place}{moe_prefix}", hf, layers.stacked_by("moe", biases))
        made += within(
            f"{root}{dense_prefix}", "model.layers.{dense}.", layers.stacked_by("dense", dense)
        )
        return made + within(root, "", layers.OUTSIDE)

    has_groups = ("n_group", "topk_group") if bias else ()
    return _pair(
        f"{config['model_type']}{'' if has_query_rank else ' without q_lora_rank'}"
        f"{bias.title if bias else ''}",
        rows("decoder.moe_layers.", "decoder.dense_layers."),
        rows("decoder.moe_layers_{moe}.", "decoder.dense_layers_{dense}."),
        config=config if has_query_rank else {**config, "q_lora_rank": None},
        required=("num_experts_per_tok", "routed_scaling_factor", *has_groups),
        fields=_DEEPSEEK_FIELDS,
        parts=layers.LATENT_PARTS,
        absent=("dense",),
        roots=("",) if bias and bias.place else _ROOTS,
    )


_V2 = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
}
_V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
_DEEPSEEK = tuple(
    mapping
    for has_query_rank in (True, False)
    for mapping in (
        *_deepseek(_V2, None, has_query_rank),
        *(m for bias in _BIASES for m in _deepseek(_V3, bias, has_query_rank)),
        _deepseek(_V3, _OLD_BIAS, has_query_rank)[0],  # not scanned, it is the first of _BIASES
    )
)
BY_ROTATION: Mapping[Rotation, tuple[TreeMapping, ...]] = {
    rotation: tuple(mapping for family in _EITHER for mapping in family[rotation])
    for rotation in ROTATIONS
}
MAPPINGS = (
    *BY_ROTATION["halves"],
    *BY_ROTATION["interleaved"],
    *_QWEN,
    *_GPT_OSS,
    *_DEEPSEEK,
)


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
    """Return the rotation of MaxText's Llama, Mistral and Mixtral for this config.json.

    None if it does not follow. MaxText has three types: default, llama3.1 and yarn. yarn rotates
    pairs or halves, depending on its ``rope_interleave``.
    """
    return _ROTATION_OF.get(rope_type(config))


def chosen(found: Iterable[TreeMapping], config: Mapping[str, Any]) -> list[TreeMapping]:
    """Return ``found`` without the rotary embedding that config.json rules out.

    The notes of the remaining mappings state the reason, and what config.json contains that
    MaxText's model does not compute.
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
    kept = [
        dataclasses.replace(
            mapping, note=note if decided else "", undecided="" if decided else undecided
        )
        if mapping in rotated
        else mapping
        for mapping in found
        if mapping not in dropped
    ]
    rank = "q_lora_rank"  # where config.json states it, trees of the other kind are not tried
    return [
        _compared(mapping, config)
        for mapping in kept
        if rank not in mapping.fields.values()
        or rank not in config
        or (config[rank] is None) is (rank in mapping.config)
    ]


def _compared(mapping: TreeMapping, config: Mapping[str, Any]) -> TreeMapping:
    """Return the mapping with what config.json states of a family's own choices in MaxText."""
    match mapping.config.get("model_type"):
        case "qwen3_moe" if config.get("norm_topk_prob") is False:
            note = "experts: MaxText divides the weights of the chosen experts by their sum; "
            note += "config.json's norm_topk_prob false does not, so the results differ"
            rest = {k: v for k, v in mapping.config.items() if k != "norm_topk_prob"}
            return dataclasses.replace(mapping, config=rest, note=note)
        case "gpt_oss" if not _alternates(config.get("layer_types")):
            told = "config.json: layer_types: windows do not alternate, from the first layer on, as"
            return dataclasses.replace(mapping, undecided=f"{told} in MaxText's gpt-oss models")
        case "deepseek_v2" | "deepseek_v3":
            return _with_rotation(mapping, config)
    return mapping


def _with_rotation(mapping: TreeMapping, config: Mapping[str, Any]) -> TreeMapping:
    """Return a mapping of DeepSeek with the rotary embedding that follows from config.json.

    MaxText's DeepSeek models have yarn with ``rope_interleave``; its default rotary embedding
    rotates halves. The rows of a rotated part are never permuted: for DeepSeek V3, transformers
    reads ``rope_interleave``, for V2 it always rotates pairs.
    """
    kind, is_v3 = rope_type(config), mapping.config["model_type"] == "deepseek_v3"
    is_halves = is_v3 and config.get("rope_interleave") is False
    if is_halves or kind == "yarn":
        note = f"rotary embedding: {'halves' if is_halves else 'neighbouring pairs'}, as in MaxText"
        note += f" with rope_type: yarn and rope_interleave: {str(not is_halves).lower()}"
        return dataclasses.replace(mapping, note=note)
    told = f"config.json: rope_type: {kind!r} does not determine which rotary embedding MaxText's "
    told += "tree has; give --mapping maxtext-interleaved if it has neighbouring pairs (rope_type: "
    told += "yarn and rope_interleave: true), "
    told += "or --mapping maxtext-halves" if is_v3 else "there is no rule for halves of DeepSeek V2"
    return dataclasses.replace(mapping, undecided=told)


def _alternates(layer_types: Any) -> bool:
    kinds = ("sliding_attention", "full_attention")
    return layer_types is None or all(
        kind == kinds[layer % 2] for layer, kind in enumerate(layer_types)
    )


def given(asked: Rotation) -> tuple[TreeMapping, ...]:
    """Return the mappings of the rotary embedding that the user names."""
    note = f"rotary embedding: {asked}, as --mapping maxtext-{asked} says"
    deepseek = [
        dataclasses.replace(
            mapping, config={**mapping.config, "rope_interleave": asked == "interleaved"}
        )
        if mapping.config["model_type"] == "deepseek_v3"
        else mapping
        for mapping in _DEEPSEEK
        if asked == "interleaved" or mapping.config["model_type"] == "deepseek_v3"
    ]
    return tuple(
        dataclasses.replace(mapping, note=note) for mapping in (*BY_ROTATION[asked], *deepseek)
    )
