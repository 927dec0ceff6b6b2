"""Reading of request bodies: from JSON to the classes of schema.py, and errors in the client's terms.

Not here: the bodies' fields (schema.py), and what nested objects may hold (members.py).
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from slipway.errors import InvalidRequest, Shown
from slipway.server import members
from slipway.server.schema import Chat, Completion, Embedding, HasEngineNames, Rerank, Score

RECOGNIZED: dict[
    type, list[tuple[str, ...]]
] = {  # kind of body -> fields by which /invocations knows it
    Chat: [("messages",)],
    Completion: [("prompt",), ("prompt_embeds",)],
    Rerank: [("query", "documents")],
    Score: [
        ("queries", "documents"),
        ("queries", "items"),
        ("data_1", "data_2"),
        ("text_1", "text_2"),
    ],
    Embedding: [("input",)],
}


def read(body: bytes, kind: type[Any], strict: bool) -> tuple[Any, list[str]]:
    """Return a body, and the paths of its unknown fields. A field that is null counts as absent.

    Raises InvalidRequest.
    """
    raw = _decoded(body)
    names = _names(kind)  # type: ignore[arg-type]  # to mypy a type[Any] has no hash
    unknown = {name: raw[name] for name in sorted(raw.keys() - names)}
    raw = members.without_null({name: value for name, value in raw.items() if name in names})
    unknown |= members.unknown(raw)
    if unknown and strict:
        name, value = next(iter(unknown.items()))
        raise InvalidRequest(name, value, "no such field (--strict)")
    try:
        return msgspec.convert(raw, kind), list(unknown)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error
    except RecursionError as error:
        raise InvalidRequest("body", Shown("JSON nested too deeply"), "a JSON object") from error


@contextlib.contextmanager
def errors_as_sent(body: Any) -> Iterator[None]:
    """Name fields in errors as the client sent them, where the engine has another name for them."""
    try:
        yield
    except InvalidRequest as error:
        names = body.names() if isinstance(body, HasEngineNames) else {}
        if (name := names.get(error.field)) is None:
            raise
        raise InvalidRequest(name, error.got, error.expected) from error


def _wrong_type(problem: str) -> InvalidRequest:
    """Return msgspec's error about a body as an error that names the field."""
    text, _, path = problem.partition(" - at `$")
    path = path.strip("`.")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        return InvalidRequest(
            f"{path}.{missing[1]}".lstrip("."), Shown("nothing"), "a value: the field is required"
        )
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        return InvalidRequest(
            f"{path}.{unknown[1]}".lstrip("."), Shown("an unknown field"), "no such field"
        )
    return InvalidRequest(path or "body", Shown(text), "what the type says")


def field_names(body: bytes) -> frozenset[str]:
    """Return the names of the fields in a body whose kind is not known yet. Raises InvalidRequest."""
    return frozenset(name for name, value in _decoded(body).items() if value is not None)


def _decoded(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; {} for an empty one. Raises InvalidRequest."""
    try:
        raw = msgspec.json.decode(body or b"{}")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest("body", Shown(f"no JSON: {error}"), "a JSON object") from error
    if not isinstance(raw, dict):
        raise InvalidRequest("body", raw, "a JSON object")
    return raw


@functools.cache
def _names(kind: Any) -> frozenset[str]:
    """The fields of a body, as clients spell them; msgspec evaluates all annotations to tell."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))
