"""Configuration of a model: fields of config.json with types, and the values that are implemented.

Not here: fields of config.json that no class below declares (reference.py), layers (nn/).
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from slipway.errors import UnsupportedModel
from slipway.models import reference
from slipway.nn.rope import LongQueries, Rope, Scaling

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_ROPE_FIELDS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
MAY_BE_ZERO = (
    "num_experts",
    "max_window_layers",
    "sliding_window",
    "num_key_value_heads",
    "head_dim",
    "mscale",
    "mscale_all_dim",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Fields that dense decoders share; names are those of config.json.

    ``aliases``: other names of fields in config.json. ``default_rope``: the ``rope_parameters`` of
    a config.json without them. ``without_effect``: further fields that the
    reference of an architecture outside transformers does not compute with.
    """

    aliases: ClassVar[Mapping[str, str]] = {}
    default_rope: ClassVar[Mapping[str, Any]] = {}
    without_effect: ClassVar[Collection[str]] = ()

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: num_attention_heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Scaling = Scaling()
    tie_word_embeddings: bool = False

    @property
    def max_context(self) -> int:
        """Longest context in tokens, scaling of positions included."""
        rope, stated = self.rope_scaling, self.max_position_embeddings
        if rope.rope_type in ("linear", "dynamic"):
            return int(stated * rope.factor)
        if rope.rope_type == "yarn":
            return max(stated, int(rope.original_max_position_embeddings * rope.factor))
        return stated

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer in positions, None for full attention."""
        return (None,) * self.num_hidden_layers

    @property
    def normalizes_head(self) -> bool:
        """Whether each column of the output head is divided by its norm."""
        return False

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Glob patterns of tensors that a checkpoint may hold and the model does not use.

        These are the layers behind the last one, which draft tokens: ``num_nextn_predict_layers``.
        """
        first = self.num_hidden_layers
        last = first + getattr(self, "num_nextn_predict_layers", 0)
        return tuple(f"model.layers.{index}.*" for index in range(first, last))

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that are rotated, the first ones."""
        return self.head_dim

    @property
    def ropes(self) -> tuple[Rope | LongQueries, ...]:
        """Rotary embeddings; a layer of attention has the index of its own."""
        return (Rope(self.rotary_dim, self.rope_theta, self.rope_scaling),)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Parse the content of a config.json.

        Raises UnsupportedModel, naming the field, for a missing or impossible value, and for a
        field that transformers computes with and this class does not have.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        raw = _unaliased(raw, cls.aliases)
        values = {
            k: v
            for k, v in raw.items()
            if v is not None or (k in known and known[k].type == int | None)
        }
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            values["num_key_value_heads"] = 0
        length = values.get("max_position_embeddings", known["max_position_embeddings"].default)
        if values.get("rope_scaling") is None and values.get("rope_parameters") is None:
            values["rope_parameters"] = dict(cls.default_rope)
        reference.check_fields(values, {*known, *_ROPE_FIELDS, *cls.without_effect})
        values |= _rope(values, length, cls.rope_theta)
        # Before version 5, transformers reads this field for every architecture.
        share = values.get("partial_rotary_factor", 1.0)
        if "partial_rotary_factor" not in known and share != 1.0:
            raise UnsupportedModel("config.json: partial_rotary_factor", share, "1.0")
        for name, field in known.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise UnsupportedModel(f"config.json: {name}", None, "a value")
        typed = {
            name: _typed(field, values[name]) for name, field in known.items() if name in values
        }
        config = cls(**typed)
        config = dataclasses.replace(
            config,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        )
        for name, got, is_implemented, expected in config.checks():
            if not is_implemented:
                raise UnsupportedModel(f"config.json: {name}", got, expected)
        return config

    def layer_types_check(self, kinds: Sequence[str]) -> tuple[str, Any, bool, str]:
        """Return the check of the kinds of attention of all layers, for ``checks``."""
        is_named = not kinds or (
            len(kinds) == self.num_hidden_layers
            and set(kinds) <= {"full_attention", "sliding_attention"}
        )
        expected = f"{self.num_hidden_layers} times full_attention or sliding_attention"
        return "layer_types", kinds, is_named, expected

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield (field, value, is implemented, expected) of fields with a rule beyond their
        type."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        yield "hidden_act", self.hidden_act, self.hidden_act == "silu", "silu"
        yield (
            "num_key_value_heads",
            kv_heads,
            heads % kv_heads == 0,
            f"a divisor of the {heads} attention heads",
        )
        yield "head_dim", self.head_dim, self.head_dim % 2 == 0, "an even number"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartlyRotatedConfig(DenseConfig):
    """Decoder that rotates a part of each head only: its first ``partial_rotary_factor``.

    ``rotary_size``: the number of rotated dimensions, which a config.json may state instead.
    ``default_share``: of a config.json with neither.
    """

    aliases: ClassVar[Mapping[str, str]] = {"rotary_dim": "rotary_size"}
    default_share: ClassVar[float] = 1.0

    partial_rotary_factor: float | None = None
    rotary_size: int = 0

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that are rotated, the first ones."""
        share = self.partial_rotary_factor
        if share is None and self.rotary_size:
            return self.rotary_size
        return int(self.head_dim * (self.default_share if share is None else share))

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a decoder and that of the rotated part."""
        yield from super().checks()
        size = self.rotary_dim
        is_fine = 0 < size <= self.head_dim and size % 2 == 0
        expected = f"a part of the {self.head_dim} dimensions of a head that is an even number"
        yield "partial_rotary_factor", self.partial_rotary_factor, is_fine, expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedConfig(DenseConfig):
    """Dense decoder of Qwen, with layers that have a sliding window.

    These are the layers that ``layer_types`` names, or without it those from ``max_window_layers``
    on.
    """

    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] = ()

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer in positions, None for full attention."""
        if not self.use_sliding_window:
            return (None,) * self.num_hidden_layers
        full = [i < self.max_window_layers for i in range(self.num_hidden_layers)]
        if self.layer_types:
            full = [kind == "full_attention" for kind in self.layer_types]
        return tuple(None if whole else self.sliding_window for whole in full)

    def checks(self) -> Iterator[tuple[str, Any, bool, str]]:
        """Yield the checks of a dense decoder and those of its sliding windows."""
        yield from super().checks()
        kinds, window = self.layer_types, self.sliding_window
        yield self.layer_types_check(kinds)
        slides = self.use_sliding_window and "sliding_attention" in kinds
        is_zero = self.use_sliding_window and window == 0
        is_missing = slides and window is None
        expected = "a number of positions, for the layers that slide"
        yield "sliding_window", window, not is_zero and not is_missing, expected


def _unaliased(raw: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields under their own names.

    Raises UnsupportedModel for two names of a field with different values.
    """
    fields = {name: value for name, value in raw.items() if name not in aliases}
    for alias, name in aliases.items():
        value = raw.get(alias)
        if value is not None and fields.get(name, value) != value:
            expected = f"{fields[name]}, as {name} has"
            raise UnsupportedModel(f"config.json: {alias}", value, expected)
        fields |= {} if value is None else {name: value}
    return fields


def _rope(values: Mapping[str, Any], length: int, default_theta: float) -> dict[str, Any]:
    """Return ``rope_theta``, ``rope_scaling`` and, where it is stated, ``partial_rotary_factor``.

    ``length``: max_position_embeddings. ``default_theta``: if no field has one. The precedence is
    that of transformers: ``rope_scaling`` before ``rope_parameters``, and a member of these before
    the field of the same name, except ``original_max_position_embeddings``, where the field comes
    first.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if values.get(name) is not None and not isinstance(values[name], Mapping):
            raise UnsupportedModel(f"config.json: {name}", values[name], "an object")
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    stated = {key: value for key, value in (values.get(name) or {}).items() if value is not None}
    rope_type = stated.pop("rope_type", stated.get("type", "default"))
    stated.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModel(
            "config.json: rope_scaling.rope_type", rope_type, " | ".join(ROPE_TYPES)
        )
    thetas = [stated.pop("rope_theta", None), values.get("rope_theta")]
    thetas += [(values.get("rope_parameters") or {}).get("rope_theta")]
    theta = next((theta for theta in thetas if theta is not None), default_theta)
    if values.get("rope_theta", theta) != theta:
        raise UnsupportedModel(
            "config.json: rope_theta", values["rope_theta"], f"{theta}, as its {name} say"
        )
    share = stated.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
    given = _members(rope_type, stated)
    if rope_type in ("yarn", "llama3") and "original_max_position_embeddings" in values:
        given["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    found: dict[str, Any] = {"rope_theta": theta, "rope_scaling": Scaling()}
    found |= {} if share is None else {"partial_rotary_factor": share}
    if rope_type == "default":
        return found
    original = given.setdefault("original_max_position_embeddings", length)
    if rope_type == "yarn" and "factor" not in given and isinstance(original, int) and original > 0:
        given["factor"] = length / original
    if "factor" not in given:
        raise UnsupportedModel(
            "config.json: rope_scaling.factor", None, f"a number, for {rope_type}"
        )
    fields = {field.name: field for field in dataclasses.fields(Scaling)}
    typed = {key: _typed(fields[key], value, "rope_scaling.") for key, value in given.items()}
    return found | {"rope_scaling": Scaling(rope_type=rope_type, **typed)}


def _members(rope_type: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of ``stated`` that transformers reads for this rope type.

    Raises UnsupportedModel for parameters that differ between layers.
    """
    read = reference.ROPE_MEMBERS[rope_type]
    if nested := [member for member, value in stated.items() if isinstance(value, Mapping)]:
        raise UnsupportedModel(
            f"config.json: rope_scaling.{nested[0]}", stated[nested[0]], "the same for all layers"
        )
    if unread := tuple(f"rope_scaling.{member}" for member in stated if member not in read):
        reference.warn_unread(unread)
    return {member: value for member, value in stated.items() if member in read}


def _typed(field: dataclasses.Field, value: Any, prefix: str = "") -> Any:
    """Convert a value to the type of its field: lists to tuples, integers to floats.

    Raises UnsupportedModel for another type, and for a number that is not positive.
    """
    if isinstance(value, list):
        value = tuple(value)
    kinds: dict[Any, type] = {
        int: int,
        float: float,
        bool: bool,
        str: str,
        Scaling: Scaling,
        int | None: int,
    }
    kind = (kinds | {float | None: float}).get(field.type, tuple)
    if value is None and field.type == int | None:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UnsupportedModel(
            f"config.json: {prefix}{field.name}", value, f"a value of type {kind.__name__}"
        )
    number: Any = value
    may_be_zero = field.name in MAY_BE_ZERO or field.default == 0
    if kind in (int, float) and not (number > 0 or (number == 0 and may_be_zero)):
        raise UnsupportedModel(f"config.json: {prefix}{field.name}", value, "a positive number")
    return value
