"""Outputs of each model family, cut at each character: same parts, none too early, none lost."""

import json

import pytest

from slipway.codec.output_parser import FAMILIES, OutputParser, OutputPart, family
from slipway.errors import InvalidConfig

pytestmark = pytest.mark.host
TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": "array"},
        },
    },
    "stop": {"type": "object", "properties": {}},
}
WEATHER = {"city": "Zürich", "days": 3}


def call(name, arguments):
    return "call", name, arguments


CASES = {
    "text": ("qwen3", "Just <b>text</b>, 3 < 4.", [("content", "Just <b>text</b>, 3 < 4.")]),
    "a call": (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Zürich", "days": 3}}\n</tool_call>',
        [call("get_weather", WEATHER)],
    ),
    "text and two calls": (
        "hermes",
        'Let me see.\n<tool_call>{"name": "stop", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "get_weather", '
        '"arguments": {"city": "</tool", "days": 1}}</tool_call>',
        [
            ("content", "Let me see.\n"),
            call("stop", {}),
            ("content", "\n"),
            call("get_weather", {"city": "</tool", "days": 1}),
        ],
    ),
    "thought, text, call": (
        "qwen3",
        "<think>\nIt <may> rain.\n</think>\n\nSo:"
        '<tool_call>{"name": "stop", "arguments": {}}</tool_call>',
        [("reasoning", "It <may> rain.\n"), ("content", "So:"), call("stop", {})],
    ),
    "a call that is none": (
        "hermes",
        "<tool_call>not JSON</tool_call> on",
        [("content", "<tool_call>not JSON</tool_call> on")],
    ),
    "white space, a call": (
        "hermes",
        ' \n<tool_call>{"name": "stop", "arguments": {}}</tool_call>',
        [call("stop", {})],
    ),
    "white space, thought": (
        "qwen3",
        " <think>It may.</think>So",
        [("reasoning", "It may."), ("content", "So")],
    ),
    "white space, text": ("qwen3", "  <b>", [("content", "  <b>")]),
    "white space alone": ("qwen3", " \n", [("content", " \n")]),
    "white space, half a mark": ("qwen3", " <thin", [("content", " <thin")]),
    "white space, a call that is none": (
        "hermes",
        " <tool_call>no</tool_call> "
        '<tool_call>{"name": "stop", "arguments": {}}</tool_call><tool_call>x</tool_call>',
        [
            ("content", " <tool_call>no</tool_call> "),
            call("stop", {}),
            ("content", "<tool_call>x</tool_call>"),
        ],
    ),
    "white space, a call that is cut": (
        "hermes",
        ' <tool_call>{"na',
        [("content", ' <tool_call>{"na')],
    ),
    "a call that is cut": (
        "hermes",
        'x<tool_call>{"name": "st',
        [("content", 'x<tool_call>{"name": "st')],
    ),
    "a mark that is none": ("qwen3", "a <tool_cal> b <thin", [("content", "a <tool_cal> b <thin")]),
    "tagged calls": (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\nHB\n</parameter>\n"
        "<parameter=days>\n3\n"
        '</parameter>\n<parameter=units>\n["C"]\n</parameter>\n</function>\n</tool_call>',
        [call("get_weather", {"city": "Zürich\nHB", "days": 3, "units": ["C"]})],
    ),
    "a tagged string that looks like a number": (
        "mimo",
        "<tool_call><function=get_weather><parameter=city>12</parameter></function></tool_call>",
        [call("get_weather", {"city": "12"})],
    ),
    "thought from the start": (
        "deepseek_r1",
        "Hm.\n</think>\n\nYes.",
        [("reasoning", "Hm.\n"), ("content", "Yes.")],
    ),
    "thought without an end": ("deepseek_r1", "Hm, </thi", [("reasoning", "Hm, </thi")]),
    "a call without marks": (
        "llama3",
        '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 3}}',
        [call("get_weather", WEATHER)],
    ),
    "a call behind a mark": (
        "llama3",
        'Ok<|python_tag|>{"name": "stop", "parameters": {}}; {"name": "stop", "parameters": {}}',
        [("content", "Ok"), call("stop", {}), call("stop", {})],
    ),
    "JSON that is no call": ("llama3", '{"a": 1}', [("content", '{"a": 1}')]),
    "plain": (
        "plain",
        "<think>x</think><tool_call>{}</tool_call>",
        [("content", "<think>x</think><tool_call>{}</tool_call>")],
    ),
}


def shown(parts):
    """Parts with neighbours of one kind joined and arguments parsed."""
    whole = []
    for part in parts:
        assert part.text or part.kind == "call", "an empty part"
        if part.kind == "call":
            whole.append(call(part.name, json.loads(part.text)))
        elif whole and whole[-1][0] == part.kind:
            whole[-1] = part.kind, whole[-1][1] + part.text
        else:
            whole.append((part.kind, part.text))
    return whole


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_same_however_the_text_is_cut(name):
    of, text, expected = CASES[name]
    for cut in range(len(text) + 1):
        parser = OutputParser(FAMILIES[of], TOOLS)
        assert (
            shown([*parser.push(text[:cut]), *parser.push(text[cut:]), *parser.finish()])
            == expected
        ), cut
    parser = OutputParser(FAMILIES[of], TOOLS)
    single = [part for char in text for part in parser.push(char)] + parser.finish()
    assert shown(single) == expected


def test_only_what_might_be_a_mark_is_held_back():
    parser = OutputParser(FAMILIES["qwen3"], TOOLS)
    assert parser.push("ab<") == [OutputPart("content", "ab")]
    assert parser.push("tool") == []
    assert parser.push("s") == [OutputPart("content", "<tools")]
    assert parser.push("<think>x</") == [OutputPart("reasoning", "x")]


def test_without_tools_calls_are_text_and_without_reasons_so_is_thought():
    text = '<think>a</think><tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    assert shown(OutputParser(FAMILIES["qwen3"], {}, reasons=False).push(text)) == [
        ("content", text)
    ]


def test_a_family_is_found_by_its_template():
    cases = {
        "<tool_call> <function= <think>": "qwen3_coder",
        "<tool_call>": "hermes",
        "<tool_call><think>": "qwen3",
        "<think>": "deepseek_r1",
        "<|python_tag|>": "llama3",
        "": "plain",
    }
    for template, name in cases.items():
        assert family("auto", template) is FAMILIES[name]
    assert family("hermes", None) is FAMILIES["hermes"]
    assert family("auto", None) is FAMILIES["plain"]
    with pytest.raises(InvalidConfig, match="qwen3"):
        family("gpt", None)
