"""Members of the objects inside request bodies: which are known, and the removal of those that are null.

Not here: the fields of a body itself (schema.py). Values that belong to clients or templates (JSON schemas, arguments
of calls, chat_template_kwargs, documents) are left as they are.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from slipway.codec.grammar import StructuredOutputs

FUNCTION = {"name", "description", "parameters", "strict"}
CALL = {"name", "arguments"}
KNOWN: dict[str, set[str]] = {  # by path; [] stands for each item of a list
    "stream_options": {"include_usage", "continuous_usage_stats", "include_obfuscation"},
    "response_format": {"type", "json_schema", "format", "structures", "triggers", "at_least_one"},
    "response_format.json_schema": {"name", "description", "schema", "strict"},
    "structured_outputs": {field.name for field in dataclasses.fields(StructuredOutputs)},
    "tools[]": {"type", "function"},
    "tools[].function": FUNCTION,
    "tool_choice": {"type", "function"},
    "tool_choice.function": {"name"},
    "functions[]": FUNCTION,
    "function_call": {"name"},
    "messages[]": {
        "role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations",
        "reasoning", "reasoning_content", "thinking", "tools", "documents",
    },
    "messages[].content[]": {"type", "text", "refusal"},
    "messages[].tool_calls[]": {"id", "type", "index", "function"},
    "messages[].tool_calls[].function": CALL,
    "messages[].function_call": CALL,
}  # fmt: skip
NULLABLE = KNOWN.keys() | {
    "sampling_params",
    "sampling_params[]",
}  # whose unknown members schema.py refuses


def without_null(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without the members that are null, at the top and in the objects of NULLABLE."""
    return {key: _tidied(value, key) for key, value in body.items() if value is not None}


def unknown(body: dict[str, Any]) -> dict[str, Any]:
    """Return the members that no object of KNOWN has, by their paths; of several at one place in lists the first."""
    found: dict[str, tuple[str, Any]] = {}
    for key, value in body.items():
        for place, path, member in _unknown(value, key, key):
            found.setdefault(place, (path, member))
    return dict(found.values())


def _tidied(value: Any, place: str) -> Any:
    if isinstance(value, list) and f"{place}[]" in NULLABLE:
        return [_tidied(each, f"{place}[]") for each in value]
    if isinstance(value, dict) and place in NULLABLE:
        return {
            key: _tidied(each, f"{place}.{key}") for key, each in value.items() if each is not None
        }
    return value


def _unknown(value: Any, place: str, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield place, path and value of each unknown member; a place has [] where a path has numbers."""
    if isinstance(value, list) and f"{place}[]" in KNOWN:
        for number, each in enumerate(value):
            yield from _unknown(each, f"{place}[]", f"{path}[{number}]")
    elif isinstance(value, dict) and place in KNOWN:
        for key, each in value.items():
            inner = f"{place}.{key}", f"{path}.{key}"
            if key not in KNOWN[place]:
                yield *inner, each
            else:
                yield from _unknown(each, *inner)
