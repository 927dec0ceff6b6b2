"""Functions that a chat may call: checked, forced where that is asked for, read out of the answer; knows no stream."""

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from slipway.codec import json_schema, tags
from slipway.codec.grammar import StructuredOutputs
from slipway.codec.parts import FAMILIES, Family, Part, Parts
from slipway.codec.reasoning import Reasoning
from slipway.errors import InvalidRequest
from slipway.server import schema

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# no free white space: a small model may choose nothing else for ever
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a body says of its tools. ``forced``: the names of which one must be called; none: the model decides.

    ``fields``: where the body states the schema of each function.
    """

    schemas: dict[str, dict[str, Any]]
    fields: dict[str, str]
    forced: tuple[str, ...]
    parallel: bool
    family: Family

    @staticmethod
    def read(body: schema.Chat, family: Family, template: str | None) -> "Tools":
        """Of a body. Raises InvalidRequest, naming the field."""
        schemas, fields = _schemas(body.tools or [])
        choice = ("auto" if schemas else "none") if body.tool_choice is None else body.tool_choice
        if choice != "none" and not schemas:
            raise InvalidRequest("tool_choice", choice, "none, where there are no tools")
        if schemas and "tools" not in (template or ""):
            raise InvalidRequest("tools", list(schemas), "none: this model's chat template knows no tools")
        forced: tuple[str, ...] = ()
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if choice.get("type") != "function" or name not in schemas:
                raise InvalidRequest("tool_choice", choice, f"one of the tools: {', '.join(schemas)}")
            forced = (str(name),)
        elif choice == "required":
            forced = tuple(schemas)
        if choice == "none":
            schemas = {}
        if schemas and not forced and family.calls is None:
            raise InvalidRequest("tool_choice", choice, "none, required or a function: no format of calls is known")
        if forced:  # its format is ours to choose: the one that every family can be made to write
            family = dataclasses.replace(FAMILIES["hermes"], thinking=family.thinking)
        return Tools(schemas, fields, forced, body.parallel_tool_calls is not False, family)

    def structure(self, marks: Mapping[str, int]) -> StructuredOutputs | None:
        """Return the grammar of an answer that must call a function; None if the model decides.

        `marks`: tokens that models write instead of their texts. Each function's schema is a document of its own in
        the grammar, so that its references keep their root.
        """
        if not self.forced:
            return None
        calls = [f"call_{number}" for number in range(len(self.forced))]
        many = "+" if self.parallel and len(calls) > 1 else ""
        rules = [f"start: ({' | '.join(calls)}){many}"]
        end = " ".join(tags.spelled("}\n</tool_call>", marks))
        for rule, name in zip(calls, self.forced):
            opening = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
            start = " ".join(tags.spelled(opening, marks))
            schema = json_schema.notation(self.schemas[name], self.fields[name], **COMPACT)
            rules.append(f"{rule}: {start} %json {schema} {end}")
        return StructuredOutputs(grammar="\n".join(rules))

    def forced_schemas(self) -> dict[str, dict[str, Any]]:
        """Return the schemas of the functions of which one must be called, by their fields."""
        return {self.fields[name]: self.schemas[name] for name in self.forced}

    def parser(self, reasons: bool, prompt: str) -> Parts:
        """For one answer to a prompt, which may have opened its reasoning."""
        return Parts(self.family, self.schemas, reasons, bool(self._begins_inside(prompt)))

    def reasoning(self, prompt: str, budget: int | None) -> Reasoning | None:
        """What an answer to a prompt begins with, where the family reasons and the prompt has not ended that."""
        inside, thinking = self._begins_inside(prompt), self.family.thinking
        if thinking is None and budget is not None:
            raise InvalidRequest("thinking_token_budget", budget, "none: this model's family marks no reasoning")
        if thinking is None or inside is None:
            return None
        return Reasoning(start=thinking[0], end=thinking[1], opened=inside, budget=budget)

    def _begins_inside(self, prompt: str) -> bool | None:
        """Whether the prompt has opened reasoning; False: the answer may; None: there is none, or it is over."""
        thinking, prompt = self.family.thinking, prompt.rstrip()
        if thinking is None or prompt.endswith(thinking[1]):
            return None
        return self.family.thinks_first or prompt.endswith(thinking[0])


class Message:
    """One answer as it comes: its parts in OpenAI's fields."""

    def __init__(self, parser: Parts, parallel: bool):
        self._parser, self._parallel, self._num_calls = parser, parallel, 0

    @property
    def calls(self) -> bool:
        """Whether a function was called."""
        return self._num_calls > 0

    def push(self, text: str, ended: bool) -> dict[str, Any]:
        """What a piece of text adds, as a delta: content, reasoning_content, tool_calls."""
        parts = self._parser.push(text)
        if ended:
            parts += self._parser.finish()
        delta: dict[str, Any] = {}
        for part in parts:
            if part.kind == "call":
                if self._num_calls and not self._parallel:
                    continue  # one call is all that was asked for
                delta.setdefault("tool_calls", []).append(self._call(part))
            else:
                field = "content" if part.kind == "content" else "reasoning_content"
                delta[field] = delta.get(field, "") + part.text
        return delta

    def _call(self, part: Part) -> dict[str, Any]:
        self._num_calls += 1
        return {
            "index": self._num_calls - 1, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": part.name, "arguments": part.text},
        }  # fmt: skip


def with_parsed_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose earlier calls hold their arguments as objects: OpenAI sends texts, templates want to read them."""
    found = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list):
            message = message | {"tool_calls": [_parsed(call) for call in calls]}
        found.append(message)
    return found


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {"function": function | {"arguments": json.loads(function["arguments"])}}
    except (json.JSONDecodeError, RecursionError):
        return call


def _schemas(tools: Sequence[Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the schema of each function's parameters, and its field, by the function's name."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"{len(tools)} of them", f"at most {MAX_TOOLS}")
    schemas: dict[str, dict[str, Any]] = {}
    fields: dict[str, str] = {}
    for number, tool in enumerate(tools):
        held = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        function = held if isinstance(held, dict) else None
        name = None if function is None else function.get("name")
        field = f"tools[{number}]"
        if function is None or not isinstance(name, str) or not NAME.fullmatch(name) or name in schemas:
            raise InvalidRequest(field, tool, '{"type": "function", "function": {"name": ...}}, its name its own')
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            raise InvalidRequest(f"{field}.function.parameters", parameters, "a JSON schema")
        fields[name] = f"{field}.function.parameters"
        json_schema.check(parameters, fields[name])
        schemas[name] = parameters
    return schemas, fields
