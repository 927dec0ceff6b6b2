"""Fields of config.json: from given fields, the shapes of the tensors and the mapping.

All three must agree. Not here: files (conversion.py), the check of the result by a model
(slipway/models).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from slipway.checkpoint.shards import Spec
from slipway.convert.plan import Plan
from slipway.convert.rules import TreeMapping

TIE = "tie_word_embeddings"


@dataclasses.dataclass(frozen=True)
class HfConfig:
    """Content of config.json, and what contradicts it."""

    config: dict[str, Any]
    problems: tuple[str, ...]


def known_sizes(mapping: TreeMapping, given: Mapping[str, Any]) -> dict[str, int]:
    """Return the axis sizes that ``given`` states, for rules with tensors that do not show them."""
    sizes = {
        axis: given[field]
        for axis, field in mapping.fields.items()
        if axis.isidentifier() and _is_count(given.get(field))
    }
    if (
        "head_dim" in mapping.fields
        and "head_dim" not in sizes
        and {"heads", "embed"} <= sizes.keys()
    ):
        sizes["head_dim"] = sizes["embed"] // sizes["heads"]
    if "kv_heads" in mapping.fields and "heads" in sizes:
        sizes.setdefault("kv_heads", sizes["heads"])
    return sizes


def configure(plan: Plan, given: Mapping[str, Any], targets: Mapping[str, Spec]) -> HfConfig:
    """Return config.json for the HF directory that holds ``targets``, without tied tensors.

    A field of ``given`` takes precedence; a tensor or a mapping that contradicts it is a problem.
    """
    mapping, config = plan.mapping, dict(given)
    problems = [*_settle(config, _facts(plan, targets), given)]
    problems += [
        f"config.json: {field}: missing; it does not follow from the tensors, give it with --config"
        for field in mapping.required
        if not any(
            field in (place or {})
            for place in (config, config.get("rope_parameters"), config.get("rope_scaling"))
        )
    ]
    dtypes = sorted({str(spec.dtype) for spec in targets.values()})
    if len(dtypes) == 1:
        config |= {
            field: dtypes[0]
            for field in ("dtype", "torch_dtype")
            if field == "dtype" or field in config
        }
    return HfConfig(config, tuple(problems))


def _facts(plan: Plan, targets: Mapping[str, Spec]) -> Iterator[tuple[str, Any, str]]:
    """Yield (field, value, source of the value)."""
    for field, value in plan.mapping.config.items():
        yield field, value, f"mapping {plan.mapping.name!r}"
    for axis, field in plan.mapping.fields.items():
        if (size := plan.mapping.size(axis, plan.sizes)) is not None:
            yield field, size, f"axis {axis} of the tensors"
    if plan.unmatched:  # the head may be there under an unknown name
        return
    for head in plan.mapping.tied:
        is_tied = head not in targets
        yield TIE, is_tied, f"{head}, which is {'not ' if is_tied else ''}there"


def _settle(
    config: dict[str, Any], facts: Iterator[tuple[str, Any, str]], given: Mapping[str, Any]
) -> Iterator[str]:
    for field, value, reason in facts:
        if field not in given:
            config[field] = value
        elif given[field] != value and not (given[field] is None and value is False):
            yield f"config.json: {field}: got {given[field]!r}, expected {value!r} ({reason})"


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
