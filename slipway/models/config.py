"""Reads config.json into typed fields under HF's names; decides which values are implemented; knows no layers.

A field that a model does not implement is refused by name, never ignored: what it would have changed is unknown.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from slipway.errors import UnsupportedModel
from slipway.nn.rope import Scaling

# Fields that do not change what a forward pass computes; old files hold defaults of generation, too.
INERT = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "return_dict",
    "output_attentions", "output_hidden_states", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward", "torchscript", "use_bfloat16", "pruned_heads", "task_specific_params",
    "gradient_checkpointing", "unsloth_version", "unsloth_fixed", "max_length", "min_length", "num_beams",
    "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "do_sample",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
MAY_BE_ZERO = ("max_window_layers", "sliding_window", "num_key_value_heads", "head_dim", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """What dense decoders share."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Scaling = Scaling()
    tie_word_embeddings: bool = False

    @property
    def max_context(self) -> int:
        """How many tokens the model can read, its position scaling included."""
        rope, stated = self.rope_scaling, self.max_position_embeddings
        if rope.rope_type in ("linear", "dynamic"):
            return int(stated * rope.factor)
        return (
            max(stated, int(rope.original_max_position_embeddings * rope.factor))
            if rope.rope_type == "yarn"
            else stated
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window, None where it sees everything."""
        return (None,) * self.num_hidden_layers

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Parse the content of a config.json.

        Raises UnsupportedModel, naming the field, on an unknown field that is set, a missing or impossible value.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        values = {k: v for k, v in raw.items() if v is not None or (k in known and known[k].type == int | None)}
        length = values.get("max_position_embeddings", known["max_position_embeddings"].default)
        values |= _rope(values.pop("rope_scaling", None), values.pop("rope_parameters", None), values, length)
        for key, value in values.items():
            if key not in known and key not in INERT and not key.startswith("_") and value is not False:
                expected = f"no such field; hf_overrides={{{key!r}: None}} loads the model as if it were absent"
                raise UnsupportedModel(f"config.json: {key}", value, expected)
        for name, field in known.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise UnsupportedModel(f"config.json: {name}", None, "a value")
        typed = {name: _typed(field, values[name]) for name, field in known.items() if name in values}
        config = cls(**typed)
        config = dataclasses.replace(
            config,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        )
        _check(config)
        return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(DenseConfig):
    """Qwen's way to say which layers slide: ``layer_types``, or those from ``max_window_layers`` on."""

    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] = ()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window, None where it sees everything."""
        if not self.use_sliding_window:
            return (None,) * self.num_hidden_layers
        full = [i < self.max_window_layers for i in range(self.num_hidden_layers)]
        if self.layer_types:
            full = [kind == "full_attention" for kind in self.layer_types]
        return tuple(None if whole else self.sliding_window for whole in full)


def _rope(old: Any, new: Any, values: Mapping[str, Any], length: int) -> dict[str, Any]:
    """``rope_theta`` and a Scaling, from the two ways in which config.json says them: the old one wins, as in HF."""
    for name, given in (("rope_scaling", old), ("rope_parameters", new)):
        if given is not None and not isinstance(given, Mapping):
            raise UnsupportedModel(f"config.json: {name}", given, "an object")
    given = {key: value for key, value in (old or new or {}).items() if value is not None}
    given["rope_type"] = given.pop("type", None) if "rope_type" not in given else given["rope_type"]
    given["rope_type"] = given["rope_type"] or "default"
    theta = given.pop("rope_theta", (new or {}).get("rope_theta", values.get("rope_theta", 10000.0)))
    if values.get("rope_theta", theta) != theta:
        raise UnsupportedModel("config.json: rope_theta", values["rope_theta"], f"{theta}, as its rope_parameters say")
    if given["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModel("config.json: rope_scaling.rope_type", given["rope_type"], " | ".join(ROPE_TYPES))
    given.pop("type", None)
    if (part := given.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("config.json: partial_rotary_factor", part, "1.0")
    fields = {field.name: field for field in dataclasses.fields(Scaling)}
    if unknown := sorted(set(given) - set(fields)):
        raise UnsupportedModel(f"config.json: rope_scaling.{unknown[0]}", given[unknown[0]], "no such field")
    if given["rope_type"] == "default":
        return {"rope_theta": theta, "rope_scaling": Scaling()}
    if given["rope_type"] == "dynamic":  # transformers measures it against this field alone
        given["original_max_position_embeddings"] = length
    original = given.setdefault("original_max_position_embeddings", length)
    if given["rope_type"] == "yarn" and "factor" not in given and isinstance(original, int) and original > 0:
        given["factor"] = length / original
    if "factor" not in given:
        raise UnsupportedModel("config.json: rope_scaling.factor", None, f"a number, for {given['rope_type']}")
    scaling = Scaling(**{key: _typed(fields[key], value, "rope_scaling.") for key, value in given.items()})
    return {"rope_theta": theta, "rope_scaling": scaling}


def _typed(field: dataclasses.Field, value: Any, prefix: str = "") -> Any:
    """The value as the field's type, which a number that JSON wrote without a point may need."""
    if isinstance(value, list):
        value = tuple(value)
    kinds: dict[Any, type] = {int: int, float: float, bool: bool, str: str, Scaling: Scaling, int | None: int}
    kind = (kinds | {float | None: float}).get(field.type, tuple)
    if value is None and field.type == int | None:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UnsupportedModel(f"config.json: {prefix}{field.name}", value, f"a value of type {kind.__name__}")
    number: Any = value
    if kind in (int, float) and not number > 0 and not (number == 0 and field.name in MAY_BE_ZERO):
        raise UnsupportedModel(f"config.json: {prefix}{field.name}", value, "a positive number")
    return value


def _check(config: DenseConfig) -> None:
    """Refuse values that no layer computes, and values that contradict each other."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    checks = {
        "hidden_act": (config.hidden_act, config.hidden_act == "silu", "silu"),
        "num_key_value_heads": (kv_heads, heads % kv_heads == 0, f"a divisor of the {heads} attention heads"),
        "head_dim": (config.head_dim, config.head_dim % 2 == 0, "an even number"),
    }
    if isinstance(config, WindowedConfig):
        kinds, layers, window = config.layer_types, config.num_hidden_layers, config.sliding_window
        named = not kinds or (len(kinds) == layers and set(kinds) <= {"full_attention", "sliding_attention"})
        slides = config.use_sliding_window and "sliding_attention" in kinds
        checks["layer_types"] = (kinds, named, f"{layers} times full_attention or sliding_attention")
        checks["sliding_window"] = (
            window,
            not (config.use_sliding_window and window == 0) and not (slides and window is None),
            "a number of positions, for the layers that slide",
        )
    for field, (got, fine, expected) in checks.items():
        if not fine:
            raise UnsupportedModel(f"config.json: {field}", got, expected)
