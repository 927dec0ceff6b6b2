"""Streaming parser of a model's output into reasoning, content and tool calls.

One parser serves all model families; a row of the table FAMILIES describes each. Only text that may
still become a marker is held back. A tool call is returned when it is complete. Text that begins
like a call but is not one is returned as content.

Not here: grammars that constrain a call (server/tools.py), counts of reasoning tokens
(reasoning.py).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slipway.codec import json_schema
from slipway.errors import InvalidConfig


class OutputPart(NamedTuple):
    """Part of an output; ``kind`` is "content", "reasoning" or "call".

    For a call, ``text`` holds its arguments as JSON, and ``name`` the name of the function.
    """

    kind: str
    text: str
    name: str = ""


# name of a function -> JSON schema of its parameters
Schemas = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """Output format of one model family.

    ``thinking`` holds the markers around reasoning. ``thinks_first``: the prompt opens the
    reasoning, so an output begins inside it. ``calls`` holds the markers around tool calls; an
    empty second marker stands for the end of the output. ``read`` parses the text between them and
    returns the calls, or an empty list if the text is not a list of calls. ``bare``: an output that
    begins with { is a call without markers. ``keeps_special``: the markers are special tokens,
    which decoding must keep.
    """

    thinking: tuple[str, str] | None = None
    thinks_first: bool = False
    calls: tuple[str, str] | None = None
    read: Callable[[str, Schemas], list[OutputPart]] | None = None
    bare: bool = False
    keeps_special: bool = False


def _json_calls(text: str, _: Schemas) -> list[OutputPart]:
    """Parse {"name": ..., "arguments" or "parameters": ...}.

    The text holds one such object, a list, or several separated by semicolons.
    """
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (json.JSONDecodeError, RecursionError):
            return []
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return []
            arguments = call.get("arguments", call.get("parameters", {}))
            shown = (
                arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False)
            )
            found.append(OutputPart("call", shown, call["name"]))
        rest = rest[end:].lstrip().lstrip(";").lstrip()
    return found


FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _tagged_calls(text: str, schemas: Schemas) -> list[OutputPart]:
    """Parse <function=name><parameter=key>value</parameter></function>.

    A value is converted to a type that the function's schema admits.
    """
    found, at = [], 0
    while (match := FUNCTION.match(text, at)) is not None:
        name, body = match.group(1).strip(), match.group(2)
        root = schemas.get(name, {})
        properties = _properties(root)
        pairs, inner = {}, 0
        while (pair := PARAMETER.match(body, inner)) is not None:
            key = pair.group(1).strip()
            pairs[key] = _typed(pair.group(2), properties.get(key, {}), root)
            inner = pair.end()
        if body[inner:].strip():
            return []
        found.append(OutputPart("call", json.dumps(pairs, ensure_ascii=False), name))
        at = match.end()
    return found if at == len(text) else []


def _typed(text: str, schema: Any, root: Any) -> Any:
    """Return the value of a parameter written as text.

    This is the text itself if the schema admits only strings, if the text is not JSON, or if only a
    string fits the schema; otherwise the parsed JSON.
    """
    kinds = json_schema.types(schema, root)
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text
    kind = json_schema.TYPES.get(type(value), "null")
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return text if "string" in kinds and not fits else value


def _properties(schema: Any) -> dict[str, Any]:
    """Return the properties of an object's schema, which may be a reference."""
    if (
        isinstance(schema, dict)
        and "properties" not in schema
        and isinstance(schema.get("$ref"), str)
    ):
        schema = json_schema.resolved(schema, schema["$ref"])
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


THINK, TOOL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
FAMILIES = {
    "plain": Family(),
    "hermes": Family(calls=TOOL, read=_json_calls),
    "qwen3": Family(thinking=THINK, calls=TOOL, read=_json_calls),
    "qwen3_coder": Family(thinking=THINK, calls=TOOL, read=_tagged_calls),
    "mimo": Family(thinking=THINK, calls=TOOL, read=_tagged_calls),
    "deepseek_r1": Family(thinking=THINK, thinks_first=True),
    "llama3": Family(calls=("<|python_tag|>", ""), read=_json_calls, bare=True, keeps_special=True),
}


def family(name: str, template: str | None) -> Family:
    """Return the family of that name, or for "auto" the one that fits the chat template.

    The markers that the template holds decide. Raises InvalidConfig for an unknown name.
    """
    if name != "auto":
        if name not in FAMILIES:
            raise InvalidConfig("parser", name, f"auto, {', '.join(FAMILIES)}")
        return FAMILIES[name]
    source = template or ""
    calls, thinks = "<tool_call>" in source, "<think>" in source
    if "<|python_tag|>" in source:
        return FAMILIES["llama3"]
    if calls and "<function=" in source:
        return FAMILIES["qwen3_coder"]
    if calls:
        return FAMILIES["qwen3" if thinks else "hermes"]
    return FAMILIES["deepseek_r1" if thinks else "plain"]


class OutputParser:
    """Parser of one output.

    ``tools`` holds the schemas of the functions that may be called; if it is empty, calls are
    content. ``reasons``: whether reasoning is told apart from content. ``begins_inside``: whether
    the prompt has opened the reasoning; None takes the family's ``thinks_first``.
    """

    def __init__(
        self, of: Family, tools: Schemas, reasons: bool = True, begins_inside: bool | None = None
    ):
        self._family = of
        self._tools = tools
        inside = of.thinks_first if begins_inside is None else begins_inside
        self._marks = [of.thinking[0]] if of.thinking is not None and reasons else []
        if of.calls is not None and of.read is not None and tools:
            self._marks.append(of.calls[0])
        self._state = "reasoning" if of.thinking is not None and reasons and inside else "start"
        self._held = ""
        # whether line breaks come next that follow a marker and belong to no part
        self._strips = False
        # white space before the first marker: content only if the marker turns out to be content
        self._lead = ""

    def push(self, text: str) -> list[OutputPart]:
        """Add a piece of text; return the parts that are certain now."""
        self._held += text
        found: list[OutputPart] = []
        while self._step(found):
            pass
        return _joined(found)

    def finish(self) -> list[OutputPart]:
        """End the output; return the parts that were held back."""
        held = self._held
        self._held = ""
        if not held:
            return []
        if self._state == "call" or (self._state == "start" and self._is_bare(held)):
            return self._calls(held) or [OutputPart("content", self._opening() + held)]
        return [OutputPart("reasoning" if self._state == "reasoning" else "content", held)]

    def _step(self, found: list[OutputPart]) -> bool:
        """Move what is certain from the held text to ``found``; return whether to try again."""
        if self._strips:
            self._held = self._held.lstrip("\n")
            self._strips = not self._held
        if self._state == "start":
            stripped = self._held.lstrip()
            if not stripped or (self._family.bare and self._is_bare(stripped)):
                return False
            if any(mark != stripped and mark.startswith(stripped) for mark in self._marks):
                return False
            if stripped.startswith(tuple(self._marks)):
                self._lead = self._held[: -len(stripped)]
                self._held = stripped
            self._state = "content"
            return True
        if self._state == "content":
            return self._until(self._marks, "content", found)
        end = (
            (self._family.thinking or ("", ""))[1]
            if self._state == "reasoning"
            else (self._family.calls or ("", ""))[1]
        )
        if self._state == "reasoning":
            return self._until([end], "reasoning", found)
        if not end or end not in self._held:
            return False  # a call is returned when it is complete
        body, _, self._held = self._held.partition(end)
        found += self._calls(body) or [OutputPart("content", self._opening() + body + end)]
        self._state = "content"
        self._lead = ""
        return True

    def _until(self, marks: Sequence[str], kind: str, found: list[OutputPart]) -> bool:
        """Move text up to the first marker to ``found``, and enter the state that it opens.

        Return whether a marker was found.
        """
        at, mark = min(((i, m) for m in marks if (i := self._held.find(m)) >= 0), default=(-1, ""))
        if at < 0:
            keep = max((_overlap(self._held, mark) for mark in marks), default=0)
            certain = len(self._held) - keep
            if certain:
                found.append(OutputPart(kind, self._held[:certain]))
                self._held = self._held[certain:]
            return False
        if at:
            found.append(OutputPart(kind, self._held[:at]))
        self._held = self._held[at + len(mark) :]
        thinking = self._family.thinking
        if kind == "reasoning":
            self._state = "content"
            self._strips = True
        elif thinking is not None and mark == thinking[0]:
            self._state = "reasoning"
            self._strips = True
            self._lead = ""
        else:
            self._state = "call"
        return True

    def _calls(self, text: str) -> list[OutputPart]:
        return (
            self._family.read(text, self._tools)
            if self._family.read is not None and self._tools
            else []
        )

    def _opening(self) -> str:
        """Return the opening marker of the current call with the white space before it, or ""."""
        return (
            self._lead + self._family.calls[0]
            if self._state == "call" and self._family.calls is not None
            else ""
        )

    def _is_bare(self, text: str) -> bool:
        return self._family.bare and bool(self._tools) and text.lstrip().startswith("{")


def _overlap(text: str, mark: str) -> int:
    """Return the number of characters at the end of the text that may begin the marker."""
    return next(
        (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0
    )


def _joined(parts: list[OutputPart]) -> list[OutputPart]:
    """Return the parts with neighbours of the same kind joined, except calls."""
    whole: list[OutputPart] = []
    for part in parts:
        if whole and part.kind != "call" and whole[-1].kind == part.kind:
            whole[-1] = OutputPart(part.kind, whole[-1].text + part.text)
        else:
            whole.append(part)
    return whole
