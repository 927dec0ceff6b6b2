"""References in schemas of tools and structures, which resolve as in the schema by itself."""

import json
from pathlib import Path

import jsonschema_rs
import pytest

from slipway.codec import json_schema
from slipway.codec.grammar import Grammars, StructuredOutputs
from slipway.codec.output_parser import FAMILIES, OutputParser
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest
from slipway.llm import NANO
from slipway.server import schema
from slipway.server.tools import Tools

pytestmark = pytest.mark.host
TOKENIZER = Tokenizer.load(Path(NANO))
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size, sorted(TOKENIZER.eos_token_ids))
EOS = min(TOKENIZER.eos_token_ids)
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
FITS, MISSES = {"p": {"x": 1}}, ({"p": {"x": "1"}}, {"p": 1}, {"p": {}})


def holder(reference, **more):
    """Schema of an object with one property, which is a reference."""
    return {
        "type": "object",
        "properties": {"p": reference},
        "required": ["p"],
        "additionalProperties": False,
    } | more


def to(reference, **more):
    return holder({"$ref": reference}, **more)


DRAFT_7 = "http://json-schema.org/draft-07/schema#"
REFERENCES = {
    "$defs": to("#/$defs/P", **{"$defs": {"P": POINT}}),
    "definitions": to("#/definitions/P", definitions={"P": POINT}),
    "draft 7": to("#/definitions/P", definitions={"P": POINT}, **{"$schema": DRAFT_7}),
    "another property": holder({"$ref": "#/properties/q"})
    | {"properties": {"p": {"$ref": "#/properties/q"}, "q": POINT}},
    "an item of a list": to(
        "#/$defs/L/anyOf/1", **{"$defs": {"L": {"anyOf": [{"type": "null"}, POINT]}}}
    ),
    "an anchor": to("#P", **{"$defs": {"P": POINT | {"$anchor": "P"}}}),
    "the root's $id": to(
        "https://a.example/tool#/$defs/P",
        **{"$id": "https://a.example/tool", "$defs": {"P": POINT}},
    ),
    "within the root's $id": to(
        "#/$defs/P", **{"$id": "https://a.example/tool", "$defs": {"P": POINT}}
    ),
    "relative to the root's $id": to(
        "p", **{"$id": "https://a.example/t", "$defs": {"P": POINT | {"$id": "p"}}}
    ),
    "an inner $id": to(
        "urn:p",
        **{
            "$defs": {
                "P": {"$id": "urn:p", "$ref": "#/$defs/Q", "$defs": {"Q": POINT}},
                "Q": {"type": "null"},
            }
        },
    ),
    "escapes": to("#/$defs/a~1b~0c%25d%20e", **{"$defs": {"a/b~c%d e": POINT}}),
    "beside a description": holder(
        {"$ref": "#/$defs/P", "description": "d", "default": {"x": 0}}, **{"$defs": {"P": POINT}}
    ),
    "the whole is a reference": {"$ref": "#/$defs/T", "$defs": {"T": to("#/$defs/P"), "P": POINT}},
    "data that looks like one": to(
        "#/$defs/P", **{"$defs": {"P": POINT}, "default": {"$ref": "#/nowhere"}}
    ),
    "a property of that name": to("#/properties/$ref")
    | {"properties": {"p": {"$ref": "#/properties/$ref"}, "$ref": POINT}},
}
UNENCODED = {
    name: to(f"#/$defs/{name}", **{"$defs": {name: POINT}})
    for name in ("Box[int]", "Ämter", "a b", "L«T»")
}


def accepts(structure, text):
    """Whether the whole text, and then its end, may be said."""
    matcher = GRAMMARS.matcher(structure)
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        if (
            matcher.is_done
            or not matcher.allowed()[token // 32] >> (token % 32) & 1
            or not matcher.accept(token)
        ):
            return False
    return bool(matcher.is_done or matcher.allowed()[EOS // 32] >> (EOS % 32) & 1)


def forced(tools, choice="required"):
    """The structure of an answer that must call one of the functions, given by name and schema."""
    listed = [
        {"type": "function", "function": {"name": n, "parameters": s, "strict": True}}
        for n, s in tools
    ]
    body = schema.Chat(
        messages=[{"role": "user", "content": "hi"}], tools=listed, tool_choice=choice
    )
    return Tools.read(body, FAMILIES["hermes"], "tools").structure({})


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def tag(given):
    content = {"type": "json_schema", "json_schema": given}
    return {
        "type": "structural_tag",
        "format": {"type": "tag", "begin": "(", "content": content, "end": ")"},
    }


def legacy_tag(given):
    return {
        "structures": [{"begin": "(", "schema": given, "end": ")"}],
        "triggers": ["("],
        "at_least_one": True,
    }


@pytest.mark.parametrize("name", REFERENCES)
def test_references_hold_wherever_a_schema_stands(name):
    given = REFERENCES[name]
    validator = jsonschema_rs.validator_for(given)
    for value in (FITS, *MISSES):
        text = json.dumps(value)
        expected = validator.is_valid(value)
        assert expected == (value is FITS), "the oracle"
        assert accepts(StructuredOutputs(json=given), text) == expected
        assert accepts(StructuredOutputs(structural_tag=tag(given)), f"({text})") == expected
        assert accepts(StructuredOutputs(structural_tag=legacy_tag(given)), f"({text})") == expected
        assert accepts(forced([("f", given)]), call("f", value)) == expected
        assert accepts(forced([("g", POINT), ("f", given)]), call("f", value)) == expected


@pytest.mark.parametrize("name", UNENCODED)
def test_references_of_generators_that_encode_nothing_hold(name):
    for value in (FITS, *MISSES):
        assert accepts(StructuredOutputs(json=UNENCODED[name]), json.dumps(value)) == (
            value is FITS
        )
        assert accepts(forced([("f", UNENCODED[name])]), call("f", value)) == (value is FITS)


def test_definitions_of_one_name_are_each_tools_own():
    one = to("#/$defs/P", **{"$defs": {"P": {"enum": ["a"]}}, "$id": "https://a.example/tool"})
    other = to("#/$defs/P", **{"$defs": {"P": {"enum": ["b"]}}, "$id": "https://a.example/tool"})
    structure = forced([("f", one), ("g", other)])
    for name, value, fits in (
        ("f", "a", True),
        ("f", "b", False),
        ("g", "b", True),
        ("g", "a", False),
    ):
        assert accepts(structure, call(name, {"p": value})) == fits, (name, value)
    assert accepts(structure, call("f", {"p": "a"}) + call("g", {"p": "b"}))
    tags = [
        legacy_tag(each)["structures"][0] | {"begin": mark}
        for each, mark in ((one, "(f"), (other, "(g"))
    ]
    tagged = StructuredOutputs(
        structural_tag={"structures": tags, "triggers": ["("], "at_least_one": True}
    )
    for text, fits in (('(f{"p": "a"})', True), ('(g{"p": "a"})', False), ('(g{"p": "b"})', True)):
        assert accepts(tagged, text) == fits, text


def test_a_schema_may_hold_itself():
    node = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["n", "c"],
        "additionalProperties": False,
    }
    validator = jsonschema_rs.validator_for(node)
    leaf = {"n": 1, "c": []}
    for value in (
        leaf,
        {"n": 2, "c": [leaf, {"n": 3, "c": [leaf]}]},
        {"n": 2, "c": [{"n": 3}]},
        {"n": 1, "c": [1]},
    ):
        assert accepts(forced([("f", node)]), call("f", value)) == validator.is_valid(value), value


def test_constraints_beside_a_reference_hold():
    given = holder(
        {"$ref": "#/$defs/N", "maximum": 5}, **{"$defs": {"N": {"type": "integer", "minimum": 0}}}
    )
    for value in (3, 7, -1):
        assert accepts(forced([("f", given)]), call("f", {"p": value})) == (0 <= value <= 5)


@pytest.mark.parametrize(
    "given",
    [
        {"$ref": "#"},
        to("#/$defs/A", **{"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}}),
    ],
)
def test_references_that_lead_to_nothing_but_themselves_are_refused(given):
    with pytest.raises(InvalidRequest) as caught:
        forced([("f", given)])
    assert caught.value.field == "tools[0].function.parameters"
    assert "/$ref" in str(caught.value)
    with pytest.raises(InvalidRequest):
        StructuredOutputs(json=given)


PROBLEMS = {
    "a keyword": (holder({"not": {}}), 'Unimplemented keys: ["not"]', "#/properties/p/not"),
    "a keyword, not a property": (
        {"properties": {"if": {"if": {}}}},
        'Unimplemented keys: ["if"]',
        "#/properties/if/if",
    ),
    "a pointer": (
        to("#/$defs/Q%20R"),
        "Pointer '/$defs/Q R' does not exist",
        "#/properties/p/$ref",
    ),
    "a value": (holder({"type": "unicorn"}), "Invalid type: unicorn", "#/properties/p/type"),
    "a word": (
        holder({"minimum": 5, "maximum": 1}),
        "minimum (5) is greater than maximum (1)",
        "#/properties/p/minimum",
    ),
    "an escaped name": (
        {"$defs": {"a/b": {"not": {}}}},
        'Unimplemented keys: ["not"]',
        "#/$defs/a~1b/not",
    ),
    "nothing": (POINT, "Too complex", ""),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_located(name):
    given, problem, expected = PROBLEMS[name]
    assert json_schema.location(given, problem) == expected


TAGGED = {
    "type": "object",
    "properties": {
        "name": {"$ref": "#/$defs/Name"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "kind": {"enum": ["1", "2"]},
        "count": {"$ref": "#/$defs/Count"},
        "either": {"type": ["integer", "string"]},
        "point": {"$ref": "#/$defs/P"},
    },
    "$defs": {"Name": {"type": "string"}, "Count": {"type": "integer"}, "P": POINT},
}


@pytest.mark.parametrize(
    "root", [TAGGED, {"$ref": "#/$defs/T", "$defs": {"T": TAGGED} | TAGGED["$defs"]}]
)
def test_tagged_parameters_have_the_types_of_what_they_refer_to(root):
    said = {
        "name": "12",
        "note": "3",
        "kind": "1",
        "count": "4",
        "either": "5",
        "point": '{"x": 1}',
    }
    text = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in said.items())
    parser = OutputParser(FAMILIES["qwen3_coder"], {"f": root})
    (part,) = (
        parser.push(f"<tool_call>\n<function=f>\n{text}</function>\n</tool_call>") + parser.finish()
    )
    expected = {"name": "12", "note": "3", "kind": "1", "count": 4, "either": 5, "point": {"x": 1}}
    assert json.loads(part.text) == expected
