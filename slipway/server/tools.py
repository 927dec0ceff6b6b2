"""Tools of a chat: checks, grammars that force a call, calls and reasoning in the output.

Not here: the parser of the output (codec/output_parser.py), the chat itself (chat.py).
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from slipway.codec import json_schema, structural_tags
from slipway.codec.grammar import StructuredOutputs
from slipway.codec.output_parser import FAMILIES, Family, OutputParser, OutputPart
from slipway.codec.reasoning import Reasoning
from slipway.errors import InvalidRequest, Shown
from slipway.server import schema

MAX_TOOLS = 128
FUNCTION_CALL = "function_call"  # OpenAI's older field for a call, and its finish_reason
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# No free white space: a small model may generate nothing else without end.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclasses.dataclass(frozen=True)
class Tools:
    """Tools of one request, and the format of their calls.

    ``listed``: the tools in the form that chat templates read. ``schemas``: the JSON schema of each
    function's parameters; ``fields``: its path in the body. ``forced``: names of the functions of
    which one must be called; empty if the model decides. ``legacy``: whether the body has OpenAI's
    older ``functions``, so that the response has ``function_call``.
    """

    listed: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    fields: dict[str, str]
    forced: tuple[str, ...]
    parallel: bool
    family: Family
    legacy: bool = False

    @staticmethod
    def read(body: schema.Chat, family: Family, template: str | None) -> "Tools":
        """Read the tools of a body. Raises InvalidRequest, naming the field."""
        legacy = body.functions is not None or body.function_call is not None
        listed, field, chosen = body.tools or [], "tools", body.tool_choice
        choice_field = FUNCTION_CALL if legacy else "tool_choice"
        if legacy:
            listed, chosen = _from_functions(body)
            field = "functions"
        schemas, fields = _schemas(listed, field)
        choice = ("auto" if schemas else "none") if chosen is None else chosen
        if choice != "none" and not schemas:
            raise InvalidRequest(
                choice_field, choice, f"'none' or no value, as {field} is not given"
            )
        if schemas and "tools" not in (template or ""):
            expected = "no tools: the model's chat template does not support them"
            raise InvalidRequest(field, list(schemas), expected)
        forced = _forced(choice, choice_field, schemas, field=field)
        if choice == "none":
            schemas = {}
        if schemas and not forced and family.calls is None:
            expected = (
                "none, required or a function: the model's format of calls is unknown, "
                "so only forced calls can be read"
            )
            raise InvalidRequest(choice_field, choice, expected)
        if forced:  # a grammar can make every model write the format of hermes
            family = dataclasses.replace(FAMILIES["hermes"], thinking=family.thinking)
        return Tools(
            listed,
            schemas,
            fields,
            forced=forced,
            parallel=body.parallel_tool_calls is not False and not legacy,
            family=family,
            legacy=legacy,
        )

    def structure(self, marks: Mapping[str, int]) -> StructuredOutputs | None:
        """Return the grammar of an output that must call a function; None if the model decides.

        ``marks``: texts that models write as single tokens, and these tokens. Each function's
        schema is a document of its own in the grammar, so that its references keep their root.
        """
        if not self.forced:
            return None
        calls = [f"call_{number}" for number in range(len(self.forced))]
        repeat = "+" if self.parallel and len(calls) > 1 else ""
        rules = [f"start: ({' | '.join(calls)}){repeat}"]
        end = " ".join(structural_tags.spelled("}\n</tool_call>", marks))
        for rule, name in zip(calls, self.forced):
            opening = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
            start = " ".join(structural_tags.spelled(opening, marks))
            notation = json_schema.notation(self.schemas[name], self.fields[name], **COMPACT)
            rules.append(f"{rule}: {start} %json {notation} {end}")
        return StructuredOutputs(grammar="\n".join(rules))

    def forced_schemas(self) -> dict[str, dict[str, Any]]:
        """Return the schemas of the functions of which one must be called, by their paths."""
        return {self.fields[name]: self.schemas[name] for name in self.forced}

    def parser(self, separates_reasoning: bool, prompt: str) -> OutputParser:
        """Return a parser of one output, which may continue reasoning that the prompt opened."""
        opened = bool(self._begins_inside(prompt))
        return OutputParser(self.family, self.schemas, separates_reasoning, begins_inside=opened)

    def reasoning(self, prompt: str, budget: int | None) -> Reasoning | None:
        """Return the reasoning at the start of the output.

        None if the model does not reason, or the prompt has ended the reasoning. ``budget``: most
        tokens of reasoning. Raises InvalidRequest for a budget without reasoning.
        """
        opened, thinking = self._begins_inside(prompt), self.family.thinking
        if thinking is None and budget is not None:
            expected = "no value: the model's output marks no reasoning"
            raise InvalidRequest("thinking_token_budget", budget, expected)
        if thinking is None or opened is None:
            return None
        return Reasoning(start=thinking[0], end=thinking[1], opened=opened, budget=budget)

    def _begins_inside(self, prompt: str) -> bool | None:
        """Return whether the prompt has opened the reasoning.

        False: the output may open it. None: there is no reasoning, or the prompt has ended it.
        """
        thinking, prompt = self.family.thinking, prompt.rstrip()
        if thinking is None or prompt.endswith(thinking[1]):
            return None
        return self.family.thinks_first or prompt.endswith(thinking[0])


class Message:
    """Reader of one output: the parts of its text in OpenAI's fields of a message."""

    def __init__(self, parser: OutputParser, tools: Tools):
        self._parser = parser
        self._parallel = tools.parallel
        self._legacy = tools.legacy
        self._num_calls = 0

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's finish_reason of an output that called a function; None without a call."""
        if not self._num_calls:
            return None
        return FUNCTION_CALL if self._legacy else "tool_calls"

    def push(self, text: str, *, ended: bool) -> dict[str, Any]:
        """Return the fields that new text adds, as a delta.

        They are content, reasoning_content, tool_calls or function_call. ``ended``: whether the
        text is the last.
        """
        parts = self._parser.push(text)
        if ended:
            parts += self._parser.finish()
        delta: dict[str, Any] = {}
        for part in parts:
            if part.kind == "call":
                if self._num_calls and not self._parallel:
                    continue  # the request allows one call only
                call = self._call(part)
                if self._legacy:
                    delta[FUNCTION_CALL] = call["function"]
                else:
                    delta.setdefault("tool_calls", []).append(call)
            else:
                field = "content" if part.kind == "content" else "reasoning_content"
                delta[field] = delta.get(field, "") + part.text
        return delta

    def _call(self, part: OutputPart) -> dict[str, Any]:
        self._num_calls += 1
        return {
            "index": self._num_calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": part.name, "arguments": part.text},
        }


def _forced(
    choice: Any, choice_field: str, schemas: Mapping[str, Any], *, field: str
) -> tuple[str, ...]:
    """Return the names of the functions of which one must be called. Raises InvalidRequest."""
    if choice == "required":
        return tuple(schemas)
    if not isinstance(choice, dict):
        return ()
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or name not in schemas:
        raise InvalidRequest(choice_field, choice, f"one of the {field}: {', '.join(schemas)}")
    return (str(name),)


def _from_functions(body: schema.Chat) -> tuple[list[dict[str, Any]], Any]:
    """Return OpenAI's older ``functions`` and ``function_call`` as ``tools`` and ``tool_choice``.

    Raises InvalidRequest.
    """
    for name in ("tools", "tool_choice"):
        if (given := getattr(body, name)) is not None:
            expected = "no value beside functions and function_call, its older form"
            raise InvalidRequest(name, given, expected)
    choice = body.function_call
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    return [{"type": "function", "function": each} for each in body.functions or []], choice


def _schemas(tools: Sequence[Any], where: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the JSON schema of each function's parameters, and its path, by function name.

    ``where``: the body's field with the tools. Raises InvalidRequest.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(where, Shown(f"{len(tools)} tools"), f"at most {MAX_TOOLS}")
    schemas: dict[str, dict[str, Any]] = {}
    fields: dict[str, str] = {}
    for number, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type") == "function"
        found = tool.get("function") if is_function else None
        function = found if isinstance(found, dict) else {}
        name = function.get("name")
        field = f"{where}[{number}]"
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in schemas:
            expected = '{"type": "function", "function": {"name": ...}} with a unique name'
            raise InvalidRequest(field, tool, expected)
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        suffix = "parameters" if where == "functions" else "function.parameters"
        fields[name] = f"{field}.{suffix}"
        if not isinstance(parameters, dict):
            raise InvalidRequest(fields[name], parameters, "a JSON schema")
        json_schema.check(parameters, fields[name])
        schemas[name] = parameters
    return schemas, fields
