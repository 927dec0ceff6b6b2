"""Reading of request bodies: from JSON to the classes of schema.py, with errors for clients.

Not here: the fields of the bodies (schema.py), and the members of nested objects (members.py).
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from slipway.errors import InvalidRequest, Shown
from slipway.server import members
from slipway.server.schema import (
    SCORE_PAIRS,
    Chat,
    Completion,
    Embedding,
    HasEngineNames,
    Rerank,
    Score,
)

# Type of a body -> alternatives of fields by which /invocations recognizes it.
RECOGNIZED: dict[type, list[tuple[str, ...]]] = {
    Chat: [("messages",)],
    Completion: [("prompt",), ("prompt_embeds",)],
    Rerank: [("query", "documents")],
    Score: [*SCORE_PAIRS],
    Embedding: [("input",)],
}


def read(body: bytes, kind: type[Any], strict: bool) -> tuple[Any, list[str]]:
    """Return a body as an object of type ``kind``, and the paths of its unknown fields.

    A field that is null counts as absent. Raises InvalidRequest; if ``strict``, for an unknown
    field, too.
    """
    raw = _decoded(body)
    names = _field_names(kind)  # type: ignore[arg-type]  # mypy: type[Any] is not hashable
    unknown = {name: raw[name] for name in sorted(raw.keys() - names)}
    raw = members.without_null({name: value for name, value in raw.items() if name in names})
    unknown |= members.unknown(raw)
    if unknown and strict:
        name, value = next(iter(unknown.items()))
        raise InvalidRequest(name, value, "only known fields, as the server runs with --strict")
    try:
        return msgspec.convert(raw, kind), list(unknown)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from error
    except RecursionError as error:
        raise InvalidRequest("body", Shown("JSON nested too deeply"), "a JSON object") from error


@contextlib.contextmanager
def errors_as_sent(body: Any) -> Iterator[None]:
    """Name fields in errors as the client sent them, where the engine has another name for them."""
    try:
        yield
    except InvalidRequest as error:
        names = body.client_names() if isinstance(body, HasEngineNames) else {}
        if (name := names.get(error.field)) is None:
            raise
        raise InvalidRequest(name, error.got, error.expected) from error


def _type_error(problem: str) -> InvalidRequest:
    """Return msgspec's error about a body as an error that names the field."""
    text, _, path = problem.partition(" - at `$")
    path = path.strip("`.")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        name = f"{path}.{missing[1]}".lstrip(".")
        return InvalidRequest(name, Shown("nothing"), "a value: the field is required")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        name = f"{path}.{unknown[1]}".lstrip(".")
        return InvalidRequest(name, Shown("an unknown field"), "only known fields")
    return InvalidRequest(path or "body", Shown(text), "a value of the field's type")


def field_names(body: bytes) -> frozenset[str]:
    """Return the names of the fields in a body of a type not known yet. Raises InvalidRequest."""
    return frozenset(name for name, value in _decoded(body).items() if value is not None)


def _decoded(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; {} for an empty one. Raises InvalidRequest."""
    try:
        raw = msgspec.json.decode(body or b"{}")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", Shown(f"invalid JSON: {error}"), "a JSON object") from error
    if not isinstance(raw, dict):
        raise InvalidRequest("body", raw, "a JSON object")
    return raw


@functools.cache
def _field_names(kind: Any) -> frozenset[str]:
    """Return the names that clients use for a body's fields.

    Cached, because msgspec evaluates all annotations of the type to find them.
    """
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))
