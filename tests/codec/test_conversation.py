"""Conversations as clients send them back: forms of calls, of their results and of refusals."""

import copy
import json

import pytest

from slipway.codec.chat import ChatTemplate
from slipway.codec.conversation import normalized
from slipway.errors import InvalidRequest

pytestmark = pytest.mark.host
USER = {"role": "user", "content": "hi"}
ITEMS = ChatTemplate(
    "{% for m in messages %}{{ m.role }}:{{ m.content }};"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}("
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }},{% endfor %}"
    "){% endfor %}{% endfor %}",
    {},
)
TEXT = ChatTemplate(
    "{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}", {}
)
ANY = "messages[0].tool_calls[0].function.arguments"


def called(arguments, **more):
    function = {"name": "f"} | ({} if arguments is ... else {"arguments": arguments})
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    } | more


@pytest.mark.parametrize("arguments", [..., None, "", " \n", "null", " null ", "{}", {}], ids=repr)
def test_no_arguments_are_an_empty_object(arguments):
    assert TEXT.render([called(arguments)]) == "{}"
    assert ITEMS.render([called(arguments)]).endswith("f()")


def test_arguments_are_objects_to_templates():
    for arguments in ('{"a": 1, "b": [null]}', {"a": 1, "b": [None]}):
        assert ITEMS.render([called(arguments)]).endswith("f(a=1,b=[None],)")


@pytest.mark.parametrize(
    "arguments", ['{"a": ', "[1]", "5", '"x"', "x", "[" * 100_000], ids=lambda text: text[:9]
)
def test_arguments_that_are_no_object_stay_a_text_or_are_named(arguments):
    assert json.loads(TEXT.render([called(arguments)])) == arguments
    with pytest.raises(InvalidRequest) as caught:
        ITEMS.render([called(arguments)])
    assert caught.value.field == ANY


@pytest.mark.parametrize("arguments", [5, [1], True], ids=repr)
def test_arguments_of_another_type_are_named(arguments):
    for template in (ITEMS, TEXT):
        with pytest.raises(InvalidRequest) as caught:
            template.render([called(arguments)])
        assert caught.value.field == ANY


def test_older_calls_and_results_are_todays():
    old = [
        USER,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "f", "arguments": '{"a": 1}'},
        },
        {"role": "function", "name": "f", "content": "2"},
    ]
    before = copy.deepcopy(old)
    _, call, result = normalized(old)
    (only,) = call["tool_calls"]
    assert only["function"] == {"name": "f", "arguments": {"a": 1}}
    assert "function_call" not in call
    assert (result["role"], result["tool_call_id"], result["name"]) == ("tool", only["id"], "f")
    assert ITEMS.render(old) == "user:hi;assistant:;f(a=1,)tool:2;"
    assert old == before


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "ab"),
        (
            {"content": "yes", "refusal": None, "audio": None, "annotations": None, "name": None},
            "yes",
        ),
        ({"content": None, "tool_calls": []}, ""),
        ({"content": None, "tool_calls": None}, ""),
        ({}, ""),
    ],
)
def test_what_an_assistant_may_have_said(message, content):
    assert ITEMS.render([USER, {"role": "assistant"} | message]) == f"user:hi;assistant:{content};"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "tool_calls[0]"),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]},
            "tool_calls[0].function",
        ),
        ({"role": "assistant", "function_call": "f"}, "function_call"),
        (called("{}", function_call={"name": "f"}), "function_call"),
        ({"role": "function", "content": "2"}, "name"),
        ({"role": "tool", "content": None}, "content"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": 5}]}, "content[0]"),
    ],
)
def test_what_is_wrong_in_a_message_is_named(message, field):
    with pytest.raises(InvalidRequest) as caught:
        normalized([USER, message])
    assert caught.value.field == f"messages[1].{field}"
