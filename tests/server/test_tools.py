"""Calls of functions through OpenAI's SDK, forced by a grammar: nano is not trained to call any."""

import enum
import json
from pathlib import Path
from typing import Literal

import openai
import pytest
import tokenizers
from pydantic import BaseModel, Field

from slipway.codec.grammar import Grammars
from slipway.codec.output_parser import FAMILIES
from slipway.codec.tokenizer import Tokenizer
from slipway.llm import NANO
from slipway.server import schema
from slipway.server.config import ServerConfig
from slipway.server.service import Service
from slipway.server.tools import Tools
from tests.server.conftest import templated

pytestmark = pytest.mark.xdist_group("server")
TEMPLATE = """{#- <tool_call> -#}
{%- if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}
{%- for call in m.tool_calls or [] %}[{{ call.function.arguments.city }}]{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "required": ["city", "days"],
            "additionalProperties": False,
            "properties": {
                "city": {"enum": ["Rome", "Oslo"]},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
            },
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop", "parameters": {
    "type": "object", "properties": {}, "additionalProperties": False}}}  # fmt: skip
CHAT = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with templated(TEMPLATE, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete_chat(client, **fields):
    return client.chat.completions.create(
        **({"model": "nano", "messages": CHAT, "max_tokens": 100} | fields)
    )


def fits(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "stop":
        return arguments == {}
    return (
        call.function.name == "get_weather"
        and set(arguments) == {"city", "days"}
        and arguments["city"] in ("Rome", "Oslo")
    )


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_named_function_is_called(client, temperature):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = complete_chat(
        client, tools=[WEATHER, STOP], tool_choice=choice, temperature=temperature, seed=1
    )
    (found,) = answer.choices
    (call,) = found.message.tool_calls
    assert fits(call)
    assert call.function.name == "get_weather"
    assert call.id.startswith("call_")
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None


def test_a_required_call_calls_one_of_the_functions(client):
    for seed in range(4):
        answer = complete_chat(
            client, tools=[WEATHER, STOP], tool_choice="required", temperature=1.5, seed=seed
        )
        calls = answer.choices[0].message.tool_calls
        assert calls
        assert all(fits(call) for call in calls)
        one = complete_chat(
            client,
            tools=[WEATHER, STOP],
            tool_choice="required",
            temperature=1.5,
            seed=seed,
            parallel_tool_calls=False,
        )
        assert len(one.choices[0].message.tool_calls) == 1


def test_streams_carry_the_same_calls(client):
    request = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    whole = complete_chat(client, **request).choices[0].message.tool_calls
    found, reasons = {}, []
    for chunk in complete_chat(client, stream=True, **request):
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            entry = found.setdefault(call.index, [call.function.name, ""])
            entry[1] += call.function.arguments
    assert [tuple(entry) for entry in found.values()] == [
        (c.function.name, c.function.arguments) for c in whole
    ]
    assert reasons[-1] == "tool_calls"


def test_templates_see_tools_and_earlier_calls(server):
    def size(**fields):
        answer = server.post(
            "/v1/chat/completions", **({"messages": CHAT, "max_tokens": 1} | fields)
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    assert size(tools=[WEATHER]) > size()
    assert size(tools=[WEATHER], tool_choice="none") == size(tools=[WEATHER])
    earlier = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    assert size(messages=CHAT + earlier) > size()


def test_forced_calls_use_the_models_own_tokens():
    """A mark with a token of its own is written as this token, but not if the token is special."""
    plain = Tokenizer.load(Path(NANO))
    raw = tokenizers.Tokenizer.from_str(plain.raw.to_str())
    raw.add_tokens(["<tool_call>"])
    raw.add_special_tokens(["</tool_call>"])
    tokenizer = Tokenizer(raw, plain.special_tokens, plain.eos_token_ids, {})
    marks = Service(ServerConfig(), "nano", tokenizer, {}, [], Path()).marks
    body = schema.Chat(messages=CHAT, tools=[STOP], tool_choice="required")
    structure = Tools.read(body, FAMILIES["hermes"], TEMPLATE).structure(marks)
    constraint = Grammars(tokenizer, tokenizer.vocab_size, [0]).matcher(structure)
    text = '<tool_call>\n{"name": "stop", "arguments": {}}\n'
    pieces = plain.encode("</tool_call>", add_special_tokens=False)
    ids = [*tokenizer.encode(text, add_special_tokens=False), *pieces]
    assert ids[0] == raw.token_to_id("<tool_call>")
    assert len(pieces) > 1
    for token in ids:
        assert constraint.allowed()[token // 32] >> (token % 32) & 1, token
        assert constraint.accept(token), token
    assert constraint.is_done
    assert tokenizer.decode(ids) == f"{text}</tool_call>"


class Unit(enum.StrEnum):
    """Unit of a length."""

    METRE = "m"
    MILE = "mi"


class Length(BaseModel):
    """Model that is nested in others."""

    value: int = Field(ge=0, le=99)
    unit: Unit


class Step(BaseModel):
    """Model that nests one and is nested itself."""

    turn: Literal["left", "right"]
    length: Length


class Route(BaseModel):
    """Model that nests lists of models."""

    start: Length
    steps: list[Step] = Field(max_length=2)


class Measure(BaseModel):
    """Another model that nests Length."""

    length: Length | None


def test_nested_models_are_called_and_parsed_by_openais_sdk(client):
    tools = [openai.pydantic_function_tool(each) for each in (Route, Measure)]
    assert all("$defs" in tool["function"]["parameters"] for tool in tools)
    choices = [
        "required",
        *({"type": "function", "function": {"name": each}} for each in ("Route", "Measure")),
    ]
    for seed in range(3):
        for choice in choices:
            answer = client.chat.completions.parse(
                model="nano",
                messages=CHAT,
                tools=tools,
                tool_choice=choice,
                temperature=1.2,
                seed=seed,
                max_tokens=600,
                parallel_tool_calls=False,
            )
            (call,) = answer.choices[0].message.tool_calls
            model = {"Route": Route, "Measure": Measure}[call.function.name]
            assert isinstance(call.function.parsed_arguments, model)
            assert choice == "required" or call.function.name == choice["function"]["name"]
    answer = client.chat.completions.parse(
        model="nano", messages=CHAT, response_format=Measure, max_tokens=100, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Measure)


@pytest.mark.parametrize("choice", [{"name": "get_weather"}, "auto"])
def test_functions_in_openais_older_form_are_called(client, choice):
    request = {
        "functions": [WEATHER["function"], STOP["function"]],
        "function_call": choice,
        "temperature": 0,
    }
    if choice == "auto":  # nano calls nothing by itself: a grammar makes its text look like a call
        call = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
        request["extra_body"] = {"structured_outputs": {"choice": [call]}}
    whole = complete_chat(client, **request).choices[0]
    called = whole.message.function_call
    assert whole.finish_reason == "function_call"
    assert whole.message.tool_calls is None
    assert whole.message.content is None
    assert called.name == ("stop" if choice == "auto" else "get_weather")
    assert choice == "auto" or fits(
        openai.types.chat.ChatCompletionMessageFunctionToolCall(
            id="c", type="function", function={"name": called.name, "arguments": called.arguments}
        )
    )
    name = arguments = ""
    for chunk in complete_chat(client, stream=True, **request):
        reason, delta = chunk.choices[0].finish_reason, chunk.choices[0].delta
        assert delta.tool_calls is None
        if delta.function_call is not None:
            name += delta.function_call.name or ""
            arguments += delta.function_call.arguments or ""
    assert (name, arguments, reason) == (called.name, called.arguments, "function_call")
    again = [
        *CHAT,
        whole.message.model_dump(),
        {"role": "function", "name": called.name, "content": "sunny"},
    ]
    assert complete_chat(
        client, messages=again, functions=request["functions"], max_tokens=1
    ).choices


def test_functions_equal_tools(server):
    def size(**fields):
        answer = server.post("/v1/chat/completions", messages=CHAT, max_tokens=1, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    assert size(functions=[WEATHER["function"]]) == size(tools=[WEATHER]) > size()
    assert size(functions=[WEATHER["function"]], function_call="none") == size(tools=[WEATHER])


def function(name, **parameters):
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object"} | parameters},
    }


CANNOT = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"not": {"type": "string"}}}}


def test_an_unsupported_schema_is_refused_with_its_location(server):
    def refused(path="/v1/chat/completions", /, **fields):
        body = {"messages": CHAT} if path.endswith("chat/completions") else {"prompt": "def f("}
        if path == "/generate":
            body = {"text": "def f("}
        answer = server.post(path, **body | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert "#/$defs/A/not" in error["message"], error
        assert "not" in error["message"], error
        return error["param"]

    tools = [STOP, function("f", **CANNOT)]
    assert refused(tools=tools, tool_choice="required") == "tools[1].function.parameters"
    named = {"type": "function", "function": {"name": "f"}}
    assert refused(tools=tools, tool_choice=named, stream=True) == "tools[1].function.parameters"
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": CANNOT}}
    assert refused(response_format=given) == "response_format.json_schema.schema"
    field = refused("/v1/completions", structured_outputs={"json": CANNOT})
    assert field == "structured_outputs.json"
    assert refused("/v1/completions", guided_json=json.dumps(CANNOT)) == "guided_json"
    field = refused("/generate", sampling_params={"json_schema": json.dumps(CANNOT)})
    assert field == "sampling_params.json_schema"
    tag = {
        "type": "tag",
        "begin": "(",
        "content": {"type": "json_schema", "json_schema": CANNOT},
        "end": ")",
    }
    field = refused(response_format={"type": "structural_tag", "format": tag})
    assert field == "response_format.format.content.json_schema"
    before = {"structures": [{"begin": "(", "schema": CANNOT, "end": ")"}], "triggers": ["("]}
    field = refused("/v1/completions", structured_outputs={"structural_tag": before})
    assert field == "structured_outputs.structural_tag.structures[0].schema"


BAD = {
    "no list": ({"tools": {}}, "tools"),
    "no function": ({"tools": [{"type": "function"}]}, "tools[0]"),
    "a strange name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
    "twice": ({"tools": [STOP, STOP]}, "tools[1]"),
    "too many": ({"tools": [STOP] * 129}, "tools"),
    "no schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
        "tools[0].function.parameters",
    ),
    "an unknown one": (
        {"tools": [STOP], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
    ),
    "a choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "a strange choice": ({"tool_choice": "any"}, "tool_choice"),
    "functions and tools": ({"functions": [STOP["function"]], "tools": [STOP]}, "tools"),
    "functions and a choice of tools": (
        {"functions": [STOP["function"]], "tool_choice": "auto"},
        "tool_choice",
    ),
    "an unknown function": (
        {"functions": [STOP["function"]], "function_call": {"name": "f"}},
        "function_call",
    ),
    "a call without functions": ({"function_call": "auto"}, "function_call"),
    "a function of no schema": (
        {"functions": [{"name": "f", "parameters": 5}]},
        "functions[0].parameters",
    ),
    "two structures": (
        {"tools": [STOP], "tool_choice": "required", "guided_regex": "a"},
        "tool_choice",
    ),
    "an evil schema": (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "unicorn"}}}
            ],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_tools_are_refused(server, name):
    fields, field = BAD[name]
    answer = server.post("/v1/chat/completions", messages=CHAT, max_tokens=2, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field, answer.text
