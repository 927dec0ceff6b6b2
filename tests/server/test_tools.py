"""Functions over HTTP, through OpenAI's SDK: forced by grammar, so that nano, which knows none, calls them too."""

import json
from pathlib import Path

import openai
import pytest
import tokenizers

from slipway.codec.grammar import Grammars
from slipway.codec.parts import FAMILIES
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
    "type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "required": ["city", "days"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}}}},
}  # fmt: skip
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


def ask(client, **fields):
    return client.chat.completions.create(**({"model": "nano", "messages": CHAT, "max_tokens": 100} | fields))


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
    answer = ask(client, tools=[WEATHER, STOP], tool_choice=choice, temperature=temperature, seed=1)
    (found,) = answer.choices
    (call,) = found.message.tool_calls
    assert fits(call) and call.function.name == "get_weather" and call.id.startswith("call_")
    assert found.finish_reason == "tool_calls" and found.message.content is None


def test_some_function_is_called_where_one_is_required(client):
    for seed in range(4):
        answer = ask(client, tools=[WEATHER, STOP], tool_choice="required", temperature=1.5, seed=seed)
        calls = answer.choices[0].message.tool_calls
        assert calls and all(fits(call) for call in calls)
        one = ask(
            client, tools=[WEATHER, STOP], tool_choice="required", temperature=1.5, seed=seed, parallel_tool_calls=False
        )
        assert len(one.choices[0].message.tool_calls) == 1


def test_streams_carry_the_same_calls(client):
    asked = {"tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    whole = ask(client, **asked).choices[0].message.tool_calls
    found, reasons = {}, []
    for chunk in ask(client, stream=True, **asked):
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            entry = found.setdefault(call.index, [call.function.name, ""])
            entry[1] += call.function.arguments
    assert [tuple(entry) for entry in found.values()] == [(c.function.name, c.function.arguments) for c in whole]
    assert reasons[-1] == "tool_calls"


def test_templates_see_tools_and_earlier_calls(server):
    def size(**fields):
        answer = server.post("/v1/chat/completions", **({"messages": CHAT, "max_tokens": 1} | fields))
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    assert size(tools=[WEATHER]) > size() and size(tools=[WEATHER], tool_choice="none") == size(tools=[WEATHER])
    earlier = [{"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"}]  # fmt: skip
    assert size(messages=CHAT + earlier) > size()


def test_calls_are_forced_in_the_models_own_tokens():
    """A mark that is a token of its own is not written in pieces; one that the text would leave out is."""
    plain = Tokenizer.load(Path(NANO))
    raw = tokenizers.Tokenizer.from_str(plain.raw.to_str())
    raw.add_tokens(["<tool_call>"])
    raw.add_special_tokens(["</tool_call>"])
    tokenizer = Tokenizer(raw, plain.special_tokens, plain.eos_token_ids, None)
    marks = Service(ServerConfig(), "nano", tokenizer, None, [], Path()).marks
    body = schema.Chat(messages=CHAT, tools=[STOP], tool_choice="required")
    structure = Tools.read(body, FAMILIES["hermes"], TEMPLATE).structure(marks)
    walk = Grammars(tokenizer, tokenizer.vocab_size, [0]).matcher(structure)
    text = '<tool_call>\n{"name": "stop", "arguments": {}}\n'
    pieces = plain.encode("</tool_call>", add_special_tokens=False)
    ids = [*tokenizer.encode(text, add_special_tokens=False), *pieces]
    assert ids[0] == raw.token_to_id("<tool_call>") and len(pieces) > 1
    for token in ids:
        assert walk.allowed()[token // 32] >> (token % 32) & 1 and walk.accept(token), token
    assert walk.is_done and tokenizer.decode(ids) == f"{text}</tool_call>"


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
    "two structures": ({"tools": [STOP], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
    "an evil schema": (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "unicorn"}}}],
            "tool_choice": "required",
        },
        "structured_outputs",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tools_that_are_none_are_refused(server, name):
    fields, field = BAD[name]
    answer = server.post("/v1/chat/completions", messages=CHAT, max_tokens=2, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text
