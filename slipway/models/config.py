"""Reads config.json into typed fields under HF's names; decides which values are implemented; knows no layers.

A field that a model does not implement is refused by name, never ignored: what it would have changed is unknown.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from slipway.errors import UnsupportedModel
from slipway.nn.rope import Scaling

# Fields that do not change what a forward pass computes.
INERT = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "return_dict",
    "output_attentions", "output_hidden_states", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward", "torchscript", "use_bfloat16", "pruned_heads", "task_specific_params",
    "gradient_checkpointing", "unsloth_version", "unsloth_fixed",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """What dense decoders share. ``sliding_window`` applies to the layers that ``layer_types`` calls sliding."""

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
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()

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
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Parse the content of a config.json.

        Raises UnsupportedModel, naming the field, on an unknown field that is set, a missing or impossible value.
        """
        values = {key: value for key, value in raw.items() if value is not None}
        values |= _rope(values, values.pop("rope_parameters", None) or values.pop("rope_scaling", None) or {})
        known = {field.name: field for field in dataclasses.fields(cls)}
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
    """Qwen's way to say which layers slide: those from ``max_window_layers`` on, if ``use_sliding_window``."""

    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window, None where it sees everything."""
        if not self.use_sliding_window:
            return (None,) * self.num_hidden_layers
        if self.layer_types:
            return super().windows
        return tuple(None if i < self.max_window_layers else self.sliding_window for i in range(self.num_hidden_layers))


def _rope(values: dict[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and a Scaling, from either of the two ways in which config.json says them."""
    rope = {"rope_type": rope.get("type", "default")} | {k: v for k, v in rope.items() if v is not None and k != "type"}
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    if rope["rope_type"] not in ROPE_TYPES:
        raise UnsupportedModel("config.json: rope_scaling.rope_type", rope["rope_type"], " | ".join(ROPE_TYPES))
    if rope["rope_type"] == "default":
        rope = {key: rope[key] for key in rope if key != "factor"}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("config.json: partial_rotary_factor", "another value", "1.0")
    fields = {field.name for field in dataclasses.fields(Scaling)}
    if unknown := sorted(set(rope) - fields):
        raise UnsupportedModel(f"config.json: rope_scaling.{unknown[0]}", rope[unknown[0]], "no such field")
    length = values.get("max_position_embeddings", 0)
    if rope["rope_type"] == "dynamic":  # transformers measures it against this field alone
        rope["original_max_position_embeddings"] = length
    rope.setdefault("original_max_position_embeddings", length)
    return {"rope_theta": theta, "rope_scaling": Scaling(**rope)}


def _typed(field: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if field.type in (float, "float") and type(value) is int:
        value = float(value)
    kinds: dict[Any, type] = {int: int, float: float, bool: bool, str: str, Scaling: Scaling, int | None: int}
    kind = kinds.get(field.type, tuple)
    if type(value) is not kind:
        raise UnsupportedModel(f"config.json: {field.name}", value, f"a value of type {kind.__name__}")
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
        raise UnsupportedModel(f"config.json: {field.name}", value, "a positive number")
    return value


def _check(config: DenseConfig) -> None:
    """Refuse values that no layer computes, and values that contradict each other."""
    heads, kv_heads, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    checks = {
        "hidden_act": (config.hidden_act, config.hidden_act == "silu", "silu"),
        "num_key_value_heads": (kv_heads, heads % kv_heads == 0, f"a divisor of the {heads} attention heads"),
        "head_dim": (config.head_dim, config.head_dim % 2 == 0, "an even number"),
        "layer_types": (
            config.layer_types,
            not config.layer_types
            or (
                len(config.layer_types) == layers and set(config.layer_types) <= {"full_attention", "sliding_attention"}
            ),
            f"{layers} times full_attention or sliding_attention",
        ),
        "sliding_window": (
            config.sliding_window,
            config.sliding_window is not None or "sliding_attention" not in config.layer_types,
            "a number of positions, for the layers that slide",
        ),
    }
    for field, (got, fine, expected) in checks.items():
        if not fine:
            raise UnsupportedModel(f"config.json: {field}", got, expected)
