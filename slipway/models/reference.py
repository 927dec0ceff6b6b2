"""Fields of a config.json that transformers, the reference implementation, reads.

Not here: the fields that Slipway implements (config.py).

A field that transformers does not read cannot change a result: one warning names such fields. A
field that it reads and Slipway does not implement is refused, unless it has its default value. The
table, reference.json, is written by tools/config_fields.py from the source of transformers.
"""

import functools
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from slipway.errors import UnsupportedModel

logger = logging.getLogger(__name__)
_TABLE = json.loads(Path(__file__).with_name("reference.json").read_text())
ROPE_MEMBERS: Mapping[str, Mapping[str, Any]] = _TABLE[
    "rope"
]  # of each rope type: member -> default
# Fields that transformers reads but that do not change the logits, or that other modules read.
HARMLESS = {
    # names, versions and labels
    "architectures", "id2label", "label2id", "model_type", "name_or_path", "num_labels",
    "problem_type",
    # dtype and special tokens (engine/launch.py); padding changes gradients only
    "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "sep_token_id", "torch_dtype",
    # training and initial values
    "attention_dropout", "gradient_checkpointing", "init_std", "initializer_factor",
    "initializer_range",
    # the way in which transformers computes, and what it returns
    "attn_implementation", "base_model_pp_plan", "base_model_tp_plan", "distributed_config",
    "experts_implementation", "fusion_config", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache",
}  # fmt: skip


def check_fields(raw: Mapping[str, Any], implemented: Collection[str]) -> None:
    """Check the fields of a config.json against ``implemented`` ones and the architecture's table.

    ``raw``: the fields without those that are null. Raises UnsupportedModel for the first field
    that transformers reads, that Slipway does not implement, and that does not have its default
    value. Warns once in a process of fields that nothing reads.
    """
    names = raw.get("architectures") or [None]
    architecture = names[0] if names[0] in _TABLE["architectures"] else None
    read, declared = _fields(architecture)
    known = {*implemented, *HARMLESS, *declared, *_TABLE["generation"]}
    unread = []
    for field, value in raw.items():
        if field in implemented or field in HARMLESS or field.startswith("_"):
            continue
        if field in read and not _is_default(field, value, read[field]):
            of = "transformers" if architecture is None else f"transformers' {architecture}"
            raise UnsupportedModel(
                f"config.json: {field}",
                value,
                f"{read[field]!r}: {of} computes with it, and Slipway does not implement it",
            )
        if field not in known and field not in read:
            unread.append(field)
    if unread:
        warn_unread(tuple(unread))


@functools.cache
def warn_unread(fields: tuple[str, ...]) -> None:
    """Log, once in a process, that nothing reads these fields."""
    logger.warning(
        "config.json: %s: not read by transformers for this architecture, and without effect",
        ", ".join(fields),
    )


@functools.cache
def _fields(architecture: str | None) -> tuple[dict[str, Any], set[str]]:
    """Return the fields that transformers reads, with their defaults, and those that it declares.

    ``architecture`` None: the fields of all architectures.
    """
    tables = [
        table for name, table in _TABLE["architectures"].items() if architecture in (name, None)
    ]
    read = {field: default for table in tables for field, default in table["read"].items()}
    return read, {field for table in tables for field in table["declared"]}


def _is_default(field: str, value: Any, default: Any) -> bool:
    # Without ``layer_types`` all layers have full attention.
    if field == "layer_types":
        return isinstance(value, list | tuple) and set(value) <= {"full_attention"}
    return value == default and isinstance(value, bool) == isinstance(default, bool)
