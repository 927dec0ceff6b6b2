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
FUNCTION_CALL = "function_call"  # OpenAI's older field for a call, and its finish_reason
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# no free white space: a small model may choose nothing else for ever
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a body says of its tools. ``forced``: the names of which one must be called; none: the model decides.

    ``listed``: the tools, as chat templates read them. ``fields``: where the body states the schema of each function.
    ``legacy``: the body has OpenAI's older ``functions``, and the answer has its ``function_call``.
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
        choice_field = "function_call" if legacy else "tool_choice"
        if legacy:
            listed, chosen = _from_functions(body)
            field = "functions"
        schemas, fields = _schemas(listed, field)
        choice = ("auto" if schemas else "none") if chosen is None else chosen
        if choice != "none" and not schemas:
            raise InvalidRequest(choice_field, choice, f"none, where there are no {field}")
        if schemas and "tools" not in (template or ""):
            raise InvalidRequest(
                field, list(schemas), "none: this model's chat template knows no tools"
            )
        forced: tuple[str, ...] = ()
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if choice.get("type") != "function" or name not in schemas:
                raise InvalidRequest(
                    choice_field, choice, f"one of the {field}: {', '.join(schemas)}"
                )
            forced = (str(name),)
        elif choice == "required":
            forced = tuple(schemas)
        if choice == "none":
            schemas = {}
        if schemas and not forced and family.calls is None:
            raise InvalidRequest(
                choice_field, choice, "none, required or a function: no format of calls is known"
            )
        if forced:  # its format is ours to choose: the one that every family can be made to write
            family = dataclasses.replace(FAMILIES["hermes"], thinking=family.thinking)
        parallel = body.parallel_tool_calls is not False and not legacy
        return Tools(listed, schemas, fields, forced, parallel, family, legacy)

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
            raise InvalidRequest(
                "thinking_token_budget", budget, "none: this model's family marks no reasoning"
            )
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

    def __init__(self, parser: Parts, tools: Tools):
        self._parser = parser
        self._parallel = tools.parallel
        self._legacy = tools.legacy
        self._num_calls = 0

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's finish_reason of an answer that called a function; None if there was no call."""
        return (FUNCTION_CALL if self._legacy else "tool_calls") if self._num_calls else None

    def push(self, text: str, ended: bool) -> dict[str, Any]:
        """Return what a piece of text adds, as a delta: content, reasoning_content, tool_calls or function_call."""
        parts = self._parser.push(text)
        if ended:
            parts += self._parser.finish()
        delta: dict[str, Any] = {}
        for part in parts:
            if part.kind == "call":
                if self._num_calls and not self._parallel:
                    continue  # one call is all that was asked for
                call = self._call(part)
                if self._legacy:
                    delta[FUNCTION_CALL] = call["function"]
                else:
                    delta.setdefault("tool_calls", []).append(call)
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


def _from_functions(body: schema.Chat) -> tuple[list[dict[str, Any]], Any]:
    """Return OpenAI's older `functions` and `function_call` as `tools` and `tool_choice`. Raises InvalidRequest."""
    for name in ("tools", "tool_choice"):
        if (given := getattr(body, name)) is not None:
            raise InvalidRequest(
                name, given, "nothing beside functions and function_call, which are its older form"
            )
    choice = body.function_call
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    return [{"type": "function", "function": each} for each in body.functions or []], choice


def _schemas(tools: Sequence[Any], where: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the schema of each function's parameters, and its field, by the function's name."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(where, f"{len(tools)} of them", f"at most {MAX_TOOLS}")
    schemas: dict[str, dict[str, Any]] = {}
    fields: dict[str, str] = {}
    for number, tool in enumerate(tools):
        held = (
            tool.get("function")
            if isinstance(tool, dict) and tool.get("type") == "function"
            else None
        )
        function = held if isinstance(held, dict) else None
        name = None if function is None else function.get("name")
        field = f"{where}[{number}]"
        if (
            function is None
            or not isinstance(name, str)
            or not NAME.fullmatch(name)
            or name in schemas
        ):
            raise InvalidRequest(
                field, tool, '{"type": "function", "function": {"name": ...}}, its name its own'
            )
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        fields[name] = (
            f"{field}.parameters" if where == "functions" else f"{field}.function.parameters"
        )
        if not isinstance(parameters, dict):
            raise InvalidRequest(fields[name], parameters, "a JSON schema")
        json_schema.check(parameters, fields[name])
        schemas[name] = parameters
    return schemas, fields
