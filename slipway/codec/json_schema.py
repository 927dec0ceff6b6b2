"""Limits, references and error locations of the JSON schemas in requests.

llguidance compiles the schemas. grammar.py and structural_tags.py put each schema into a grammar as
a document of its own, so that its references (`#`, `#/$defs/...`, `$id`, `$anchor`) keep their
root.

Not here: grammars (grammar.py).
"""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

from slipway.errors import InvalidRequest, Shown

MAX_CHARS = 256 * 1024
MAX_DEPTH = 64
# keywords with values that are not schemas
DATA = frozenset({"const", "default", "enum", "example", "examples"})
# keywords with values that map names to schemas
NAMED = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
)
URI = frozenset({"$ref", "$id", "id"})
URI_CHARACTERS = "!$&'()*+,-./:;=?@_~%"  # besides letters and digits (RFC 3986, without brackets)
TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
}


def notation(schema: dict[str, Any] | bool, field: str = "json", **guidance: Any) -> str:
    """Return the JSON text that llguidance reads; `guidance` overrides the schema's `x-guidance`.

    Raises InvalidRequest if the schema is too large or nested too deeply, or if a chain of
    references leads back to itself.
    """
    if isinstance(schema, bool):
        return json.dumps({} if schema else {"not": {}})
    check(schema, field)
    if at := _reference_to_itself(schema):
        raise InvalidRequest(
            field, Shown(f"a reference to itself at {at}"), "references that lead to a schema"
        )
    return json.dumps(_with_valid_uris(schema) | ({"x-guidance": guidance} if guidance else {}))


def check(schema: Any, field: str) -> None:
    """Raise InvalidRequest if a schema is too large or nested too deeply for recursion."""
    if depth(schema) > MAX_DEPTH:
        raise InvalidRequest(field, "a schema", f"one nested at most {MAX_DEPTH} deep")
    if (size := len(json.dumps(schema))) > MAX_CHARS:
        raise InvalidRequest(field, f"{size} characters", f"at most {MAX_CHARS}")


def location(schema: Any, problem: str) -> str:
    """Return the JSON pointer of the part that llguidance's message `problem` names, or "".

    The message holds a keyword or a value (in quotes, after a colon, or as a word), but no
    location.
    """
    message = problem.partition("\n")[0]
    quoted = set(re.findall(r"""["']([^"']+)["']""", message)) | set(
        re.findall(r": ([^\s:]+)$", message)
    )
    for words, with_values in ((quoted, True), (set(re.findall(r"\w+", message)), False)):
        for pointer, part in _schemas(schema):
            for keyword, value in part.items():
                is_text = with_values and isinstance(value, str) and keyword not in DATA
                texts = {value, unquote(value).lstrip("#")} if is_text else set()
                if keyword in words or texts & words:
                    return f"{pointer}/{_escaped(keyword)}"
    return ""


def types(schema: Any, root: Any, seen: tuple[str, ...] = ()) -> frozenset[str]:
    """Return the JSON types of the values that a schema admits; empty if all are admitted.

    References are followed within `root`; `seen` holds the references followed so far.
    """
    if not isinstance(schema, dict):
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return frozenset([kind] if isinstance(kind, str) else kind)
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(TYPES.get(type(value), "null") for value in values)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        return types(resolved(root, reference), root, (*seen, reference))
    for keyword in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(keyword), list):
            each = [types(branch, root, seen) for branch in branches]
            return frozenset().union(*each) if all(each) else frozenset()
    branches = schema.get("allOf")
    each = [
        types(branch, root, seen) for branch in (branches if isinstance(branches, list) else ())
    ]
    return next((found for found in each if found), frozenset())


def resolved(root: Any, reference: str) -> Any:
    """Return the part of `root` to which the JSON pointer `reference` points, or None."""
    steps = unquote(reference).split("/")
    if steps[0] != "#":
        return None
    found = root
    for step in steps[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, dict) and step in found:
            found = found[step]
        else:
            return None
    return found


def depth(value: Any) -> int:
    """Return the nesting depth of a JSON value.

    A client chooses the value, so this works without recursion.
    """
    deepest = 0
    stack = [(value, 1)]
    while stack:
        item, level = stack.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack += [(each, level + 1) for each in inner]
    return deepest


def _schemas(
    schema: Any, pointer: str = "#", is_map: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema within a schema with its JSON pointer, the outer one first.

    `is_map`: `schema` is a mapping of names to schemas.
    """
    if isinstance(schema, list):
        for number, each in enumerate(schema):
            yield from _schemas(each, f"{pointer}/{number}")
    elif isinstance(schema, dict):
        if not is_map:
            yield pointer, schema
        for key, value in schema.items():
            if is_map or key not in DATA:
                inner = f"{pointer}/{_escaped(key)}"
                yield from _schemas(
                    value, inner, is_map=not is_map and key in NAMED and isinstance(value, dict)
                )


def _with_valid_uris(schema: Any, is_map: bool = False) -> Any:
    """Return a copy with its references percent-encoded.

    Generators of schemas write characters into references that a URI must not have.
    """
    if isinstance(schema, list):
        return [_with_valid_uris(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {}
    for key, value in schema.items():
        if not is_map and key in URI and isinstance(value, str):
            copy[key] = _uri(value)
        elif not is_map and key in DATA:
            copy[key] = value
        else:
            copy[key] = _with_valid_uris(
                value, is_map=not is_map and key in NAMED and isinstance(value, dict)
            )
    return copy


def _uri(text: str) -> str:
    base, hash_mark, fragment = re.sub(r"%(?![0-9a-fA-F]{2})", "%25", text).partition("#")
    return quote(base, safe=URI_CHARACTERS) + hash_mark + quote(fragment, safe=URI_CHARACTERS)


def _reference_to_itself(root: dict[str, Any]) -> str:
    """Return the JSON pointer of a chain of references that leads back to itself, or ""."""
    checked: set[str] = set()
    for pointer, part in _schemas(root):
        followed: set[str] = set()
        while (
            isinstance(part, dict)
            and isinstance(reference := part.get("$ref"), str)
            and reference not in checked
        ):
            if reference in followed:
                return f"{pointer}/$ref"
            followed.add(reference)
            part = resolved(root, reference)
        checked |= followed
    return ""


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
