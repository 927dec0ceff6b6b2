"""The parts of an answer: reasoning, text, tool calls; one streaming parser, driven by a table row per model family.

What might still become a marker is held back; nothing else is. A call is given when it is complete. What begins like a
call and is none comes out as the text that it is.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from slipway.codec import json_schema
from slipway.errors import InvalidConfig


class OutputPart(NamedTuple):
    """``kind``: content | reasoning | call. Of a call ``text`` holds the arguments as JSON, ``name`` the function."""

    kind: str
    text: str
    name: str = ""


Schemas = Mapping[str, Mapping[str, Any]]  # of each function's parameters, by its name


@dataclasses.dataclass(frozen=True)
class Family:
    """How models of one family mark what they say.

    ``thinking``: marks around reasoning. ``thinks_first``: the prompt opens it, so an answer begins inside. ``calls``:
    marks around calls; an empty end is the end of the answer. ``read`` makes calls of what stands between, or nothing.
    """

    thinking: tuple[str, str] | None = None
    thinks_first: bool = False
    calls: tuple[str, str] | None = None
    read: Callable[[str, Schemas], list[OutputPart]] | None = None
    bare: bool = False  # an answer that begins with { is a call without marks
    keeps_special: bool = False  # the marks are special tokens, which text leaves out


def _json_calls(text: str, _: Schemas) -> list[OutputPart]:
    """{"name": ..., "arguments" or "parameters": ...}, one or a list of them, or several behind semicolons."""
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
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(OutputPart("call", shown, call["name"]))
        rest = rest[end:].lstrip().lstrip(";").lstrip()
    return found


FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _tagged_calls(text: str, schemas: Schemas) -> list[OutputPart]:
    """<function=name><parameter=key>value</parameter></function>; values by the types that the schema states."""
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
    """Return a parameter's value: a string as it stands where only that fits its schema, else what the JSON says."""
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
    """Return the properties of a function's parameters, which may be a reference."""
    if isinstance(schema, dict) and "properties" not in schema and isinstance(schema.get("$ref"), str):
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
}  # fmt: skip


def family(name: str, template: str | None) -> Family:
    """By its name, or ``auto``: by what the chat template mentions. Raises InvalidConfig."""
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
    """One answer, read as it comes. ``tools``: schemas of the functions that may be called; none: calls are text."""

    def __init__(self, of: Family, tools: Schemas, reasons: bool = True, begins_inside: bool | None = None):
        self._family, self._tools = of, tools
        inside = of.thinks_first if begins_inside is None else begins_inside
        self._marks = [of.thinking[0]] if of.thinking is not None and reasons else []
        if of.calls is not None and of.read is not None and tools:
            self._marks.append(of.calls[0])
        self._state = "reasoning" if of.thinking is not None and reasons and inside else "start"
        self._held, self._strips = "", False  # strips: line breaks behind a mark belong to nobody
        self._lead = ""  # white space before a first mark: text only if the mark proves to be text

    def push(self, text: str) -> list[OutputPart]:
        """What a piece of text makes certain."""
        self._held += text
        found: list[OutputPart] = []
        while self._step(found):
            pass
        return _joined(found)

    def finish(self) -> list[OutputPart]:
        """What was held back."""
        held, self._held = self._held, ""
        if not held:
            return []
        if self._state == "call" or (self._state == "start" and self._is_bare(held)):
            return self._calls(held) or [OutputPart("content", self._opening() + held)]
        return [OutputPart("reasoning" if self._state == "reasoning" else "content", held)]

    def _step(self, found: list[OutputPart]) -> bool:
        """Take what is certain off the held text; whether there may be more."""
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
            return False  # a call is given when it is whole
        body, _, self._held = self._held.partition(end)
        found += self._calls(body) or [OutputPart("content", self._opening() + body + end)]
        self._state, self._lead = "content", ""
        return True

    def _until(self, marks: Sequence[str], kind: str, found: list[OutputPart]) -> bool:
        """Give text up to the first mark, and enter what the mark opens or closes."""
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
            self._state, self._strips = "content", True
        elif thinking is not None and mark == thinking[0]:
            self._state, self._strips, self._lead = "reasoning", True, ""
        else:
            self._state = "call"
        return True

    def _calls(self, text: str) -> list[OutputPart]:
        return self._family.read(text, self._tools) if self._family.read is not None and self._tools else []

    def _opening(self) -> str:
        """Return the mark of the call that is being read, with what stood before it; empty outside of a call."""
        return self._lead + self._family.calls[0] if self._state == "call" and self._family.calls is not None else ""

    def _is_bare(self, text: str) -> bool:
        return self._family.bare and bool(self._tools) and text.lstrip().startswith("{")


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text might begin the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _joined(parts: list[OutputPart]) -> list[OutputPart]:
    """Neighbours of one kind as one."""
    whole: list[OutputPart] = []
    for part in parts:
        if whole and part.kind != "call" and whole[-1].kind == part.kind:
            whole[-1] = OutputPart(part.kind, whole[-1].text + part.text)
        else:
            whole.append(part)
    return whole
