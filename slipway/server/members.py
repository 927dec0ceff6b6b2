"""Members of the objects inside request bodies: lists of known ones, removal of null ones.

Values that belong to clients or templates (JSON schemas, arguments of calls, chat_template_kwargs,
documents) are left as they are.

Not here: the fields of a body itself (schema.py).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from slipway.codec.grammar import StructuredOutputs

FUNCTION = {"name", "description", "parameters", "strict"}
CALL = {"name", "arguments"}
# Known members by the location of their object; [] stands for each item of a list.
KNOWN: dict[str, set[str]] = {
    "stream_options": {"include_usage", "continuous_usage_stats", "include_obfuscation"},
    "response_format": {
        "type", "json_schema", "format", "structures", "triggers", "at_least_one",
    },
    "response_format.json_schema": {"name", "description", "schema", "strict"},
    "structured_outputs": {field.name for field in dataclasses.fields(StructuredOutputs)},
    "tools[]": {"type", "function"},
    "tools[].function": FUNCTION,
    "tool_choice": {"type", "function"},
    "tool_choice.function": {"name"},
    "functions[]": FUNCTION,
    "function_call": {"name"},
    "messages[]": {
        "role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal",
        "audio", "annotations", "reasoning", "reasoning_content", "thinking", "tools", "documents",
    },
    "messages[].content[]": {"type", "text", "refusal"},
    "messages[].tool_calls[]": {"id", "type", "index", "function"},
    "messages[].tool_calls[].function": CALL,
    "messages[].function_call": CALL,
}  # fmt: skip
# Objects that lose their null members. Of the sampling_params, schema.py refuses unknown members.
NULLABLE = KNOWN.keys() | {"sampling_params", "sampling_params[]"}


def without_null(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without null members, at the top and in the objects of NULLABLE."""
    return {key: _without_null(value, key) for key, value in body.items() if value is not None}


def unknown(body: dict[str, Any]) -> dict[str, Any]:
    """Return the values of members that are not in KNOWN, by their paths.

    Of several unknown members at the same location in the items of a list, only the first counts.
    """
    found: dict[str, tuple[str, Any]] = {}
    for key, value in body.items():
        for location, path, member in _unknown(value, key, key):
            found.setdefault(location, (path, member))
    return dict(found.values())


def _without_null(value: Any, location: str) -> Any:
    if isinstance(value, list) and f"{location}[]" in NULLABLE:
        return [_without_null(item, f"{location}[]") for item in value]
    if isinstance(value, dict) and location in NULLABLE:
        return {
            key: _without_null(member, f"{location}.{key}")
            for key, member in value.items()
            if member is not None
        }
    return value


def _unknown(value: Any, location: str, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield location, path and value of each unknown member.

    A location has [] where a path has the number of an item.
    """
    if isinstance(value, list) and f"{location}[]" in KNOWN:
        for number, item in enumerate(value):
            yield from _unknown(item, f"{location}[]", f"{path}[{number}]")
    elif isinstance(value, dict) and location in KNOWN:
        for key, member in value.items():
            inner = f"{location}.{key}", f"{path}.{key}"
            if key not in KNOWN[location]:
                yield *inner, member
            else:
                yield from _unknown(member, *inner)
