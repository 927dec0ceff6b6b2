"""Reasoning in chats: structures after it, budgets that end it, effort in the template."""

import re
from pathlib import Path

import openai
import pytest

from slipway.codec.tokenizer import Tokenizer
from slipway.llm import NANO
from tests.server.conftest import events, templated

pytestmark = pytest.mark.xdist_group("server")
TEMPLATE = """{#- <tool_call> -#}
{%- if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}
{%- if reasoning_effort is defined %}Effort: {{ reasoning_effort }}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant: {% if enable_thinking is defined %}<think>
{% if not enable_thinking %}{{ "\\n</think>\\n\\n" }}{% endif %}{% endif %}"""
CHAT = [{"role": "user", "content": "What is the weather?"}]
OPENED = {"messages": CHAT, "temperature": 0, "chat_template_kwargs": {"enable_thinking": True}}
TOKENIZER = Tokenizer.load(Path(NANO))
END = TOKENIZER.encode("</think>", add_special_tokens=False)
STRUCTURES = {
    "regex": ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
    "format": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 22]}}}},
        "1|22",
    ),
    "grammar": ({"ebnf": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with templated(TEMPLATE, tmp_path_factory) as server:
        yield server


def complete_chat(server, **fields):
    answer = server.post("/v1/chat/completions", **OPENED | {"max_tokens": 40} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def message(server, **fields):
    return complete_chat(server, **fields)["choices"][0]["message"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_hold_after_the_reasoning(server, name):
    fields, pattern = STRUCTURES[name]
    found = message(server, thinking_token_budget=10, **fields)
    assert re.fullmatch(pattern, found["content"]), found
    assert len(found["reasoning_content"]) > 5, found
    free = message(server, max_tokens=30, **fields)
    assert free["content"] == ""
    reasoning = free["reasoning_content"]
    assert not re.match(pattern, reasoning), "the structure must not bind the reasoning"
    assert reasoning.startswith(found["reasoning_content"]), "the budget only cuts the reasoning"


def test_an_output_without_reasoning_follows_the_structure_at_once(server):
    fields, pattern = STRUCTURES["regex"]
    found = message(server, chat_template_kwargs={"enable_thinking": False}, **fields)
    assert re.fullmatch(pattern, found["content"])
    assert "reasoning_content" not in found
    for seed in range(4):  # the model decides whether it begins to reason
        request = {"temperature": 1.5, "seed": seed, "thinking_token_budget": 0}
        found = message(server, chat_template_kwargs={}, **request, **fields)
        assert re.fullmatch(pattern, found["content"])


@pytest.mark.parametrize("budget", [0, 1, 7, 20])
def test_a_budget_ends_the_reasoning(server, budget):
    choice = complete_chat(server, thinking_token_budget=budget, return_token_ids=True)["choices"][
        0
    ]
    ids = choice["token_ids"]
    assert ids[budget : budget + len(END)] == END
    assert len(ids) == 40
    reasoning = choice["message"].get("reasoning_content", "")
    assert TOKENIZER.decode(ids[:budget]).lstrip("\n") == reasoning
    free = complete_chat(server, return_token_ids=True)["choices"][0]
    assert free["token_ids"][:budget] == ids[:budget]
    assert free["message"]["content"] == ""
    sampling = {"temperature": 1.0, "seed": 3, "n": 3}
    sampled = complete_chat(server, thinking_token_budget=budget, return_token_ids=True, **sampling)
    assert all(each["token_ids"][budget : budget + len(END)] == END for each in sampled["choices"])


@pytest.mark.parametrize("budget", [0, 1, 7, 20])
def test_usage_counts_the_tokens_of_reasoning(server, budget):
    fields = {"thinking_token_budget": budget, "temperature": 1.0, "seed": 3, "n": 3}
    whole = complete_chat(server, **fields)["usage"]
    assert whole["completion_tokens_details"] == {"reasoning_tokens": 3 * budget}
    request = OPENED | {"max_tokens": 40} | fields
    request |= {"stream": True, "stream_options": {"include_usage": True}}
    streamed = events(server.post("/v1/chat/completions", **request))[-1]["usage"]
    # The first of the two requests may find nothing in the prefix cache.
    details = "prompt_tokens_details"
    assert streamed | {details: None} == whole | {details: None}
    cut = complete_chat(server, max_tokens=12)["usage"]
    assert cut["completion_tokens"] == 12
    assert cut["completion_tokens_details"]["reasoning_tokens"] == 12, "all is reasoning"
    none = complete_chat(server, chat_template_kwargs={"enable_thinking": False})["usage"]
    assert none["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_reasoning_is_separated_unless_disabled(server):
    fields = {"thinking_token_budget": 8, "structured_outputs": {"choice": ["yes"]}}
    apart, together = message(server, **fields), message(server, separate_reasoning=False, **fields)
    assert apart["content"] == "yes"
    assert "reasoning_content" not in together
    whole = together["content"]
    assert whole.lstrip("\n").startswith(apart["reasoning_content"])
    assert whole.endswith("yes")
    assert "</think>" in whole
    found = events(server.post("/v1/chat/completions", **OPENED, **fields, stream=True))
    deltas = [event["choices"][0]["delta"] for event in found]
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert reasoning == apart["reasoning_content"]
    assert "".join(delta.get("content") or "" for delta in deltas) == "yes"


def test_a_call_is_forced_after_the_reasoning(server):
    parameters = {"type": "object", "properties": {"day": {"enum": [1, 2]}}, "required": ["day"],
                  "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="nano",
            messages=CHAT,
            tools=[tool],
            tool_choice="required",
            temperature=0,
            max_tokens=100,
            extra_body={
                "thinking_token_budget": 6,
                "chat_template_kwargs": {"enable_thinking": True},
            },
        )
    (choice,) = answer.choices
    assert choice.message.tool_calls[0].function.arguments in ('{"day": 1}', '{"day": 2}')
    assert choice.message.reasoning_content
    assert choice.finish_reason == "tool_calls"


def test_effort_reaches_the_template(server):
    request = {"messages": CHAT, "max_tokens": 1, "return_token_ids": True}

    def prompt(**fields):
        answer = server.post("/v1/chat/completions", **request, **fields).json()
        return TOKENIZER.decode(answer["prompt_token_ids"])

    assert "Effort: high" in prompt(reasoning_effort="high")
    assert "Effort" not in prompt()
    assert prompt(reasoning_effort="none").endswith("<think>\n\n</think>\n\n")
    twice = server.post(
        "/v1/chat/completions",
        **request,
        reasoning_effort="none",
        chat_template_kwargs={"enable_thinking": True},
    )
    assert twice.status_code == 400
    assert twice.json()["error"]["param"] == "chat_template_kwargs.enable_thinking"
    extreme = server.post("/v1/chat/completions", **request, reasoning_effort="extreme")
    assert extreme.status_code == 400


def test_options_without_support_in_the_model_are_refused(_server):
    for field, value in (
        ("reasoning_effort", "high"),
        ("reasoning_effort", "none"),
        ("thinking_token_budget", 5),
    ):
        answer = _server.post("/v1/chat/completions", messages=CHAT, max_tokens=1, **{field: value})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == field, answer.text


def test_an_invalid_budget_is_refused(server):
    for bad in (-1, 2**40, "x"):
        answer = server.post("/v1/chat/completions", **OPENED, thinking_token_budget=bad)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "thinking_token_budget", answer.text


def test_tokenize_a_conversation_with_tools(server, _server):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    request = {"messages": CHAT, "tools": [tool]}
    refused = _server.post("/tokenize", **request)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools", "its template does not support tools"
    ids = server.post("/tokenize", **request).json()["tokens"]
    chat = request | {"max_tokens": 1, "return_token_ids": True}
    assert ids == server.post("/v1/chat/completions", **chat).json()["prompt_token_ids"]
    assert ids != server.post("/tokenize", messages=CHAT).json()["tokens"]
    last = [*CHAT, {"role": "assistant", "content": "def"}]
    left_open = {"messages": last, "add_generation_prompt": False, "continue_final_message": True}
    assert TOKENIZER.decode(server.post("/tokenize", **left_open).json()["tokens"]).endswith("def")
    by_kwargs = {"messages": CHAT, "chat_template_kwargs": {"tools": [tool]}}
    assert server.post("/tokenize", **by_kwargs).json()["tokens"] == ids
    twice = server.post("/tokenize", **request, chat_template_kwargs={"tools": []})
    assert twice.status_code == 400
    assert twice.json()["error"]["param"] == "chat_template_kwargs.tools"
