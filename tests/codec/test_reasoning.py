"""Grammars after reasoning, budgets and structural tags, with marker tokens and marker texts."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from slipway.codec.grammar import Grammars, StructuredOutputs
from slipway.codec.reasoning import Reasoning, ReasoningTokens
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest
from slipway.llm import NANO

pytestmark = pytest.mark.host
TEXTS = Tokenizer.load(Path(NANO))


def with_tokens() -> Tokenizer:
    """nano's, with tokens of their own for marks: of Qwen's kind, and special ones."""
    raw = tokenizers.Tokenizer.from_str(TEXTS.raw.to_str())
    raw.add_tokens(["<think>", "</think>", "<tool_call>"])
    raw.add_special_tokens(["</tool_call>"])
    return Tokenizer(raw, TEXTS.special_tokens, TEXTS.eos_token_ids, {})


TOKENIZERS = {"texts": TEXTS, "tokens": with_tokens()}
GRAMMARS = {
    name: Grammars(t, t.vocab_size, sorted(t.eos_token_ids)) for name, t in TOKENIZERS.items()
}
EOS = min(TEXTS.eos_token_ids)


def may(walk, token):
    return bool(walk.allowed()[token // 32] >> (token % 32) & 1)


def accepts(kind, text, structure, before=None):
    """Whether the whole text, and then its end, may be said."""
    walk = GRAMMARS[kind].matcher(structure, before)
    for token in TOKENIZERS[kind].encode(text, add_special_tokens=False):
        if walk.is_done or not may(walk, token) or not walk.accept(token):
            return False
    return walk.is_done or may(walk, EOS)


def thinking(opened, budget=None):
    return Reasoning(start="<think>", end="</think>", opened=opened, budget=budget)


ANSWERS = {
    "choice": (StructuredOutputs(choice=("yes", "no")), "yes", "perhaps"),
    "regex": (StructuredOutputs(regex="[ab]{2}"), "ab", "abc"),
    "json": (
        StructuredOutputs(
            json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        ),
        '{"a": 1}',
        '{"a": "b"}',
    ),
    "lark": (StructuredOutputs(grammar='start: "x" other\nother: "y"'), "xy", "yx"),
    "ebnf": (StructuredOutputs(grammar='root ::= [0-9] "z"'), "5z", "z"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ANSWERS)
def test_a_structure_begins_where_reasoning_ends(kind, name):
    structure, fits, misses = ANSWERS[name]
    for thought in ("", "\nwell, {x} or not\n", "a < b and b > </ c"):
        for line in ("", "\n\n"):
            assert accepts(kind, f"{thought}</think>{line}{fits}", structure, thinking(True))
            assert accepts(
                kind, f"<think>{thought}</think>{line}{fits}", structure, thinking(False)
            )
            assert not accepts(kind, f"{thought}</think>{line}{misses}", structure, thinking(True))
            assert not accepts(
                kind, f"<think>{thought}</think>{line}{misses}", structure, thinking(False)
            )
    assert accepts(kind, fits, structure, thinking(False)), "it may answer at once"
    assert not accepts(kind, fits, structure, thinking(True))
    assert not accepts(kind, "<think>", structure)
    assert not accepts(kind, f"<think>{fits}", structure, thinking(False)), "reasoning must end"


def said(kind, walk, text, most=60):
    """Return the output of a model that says ``text`` wherever the constraint allows it."""
    tokenizer, found = TOKENIZERS[kind], []
    wanted = iter(tokenizer.encode(text, add_special_tokens=False))
    token = next(wanted)
    while len(found) < most:
        words = walk.allowed()
        forced = (
            [i for i in range(len(words) * 32) if words[i // 32] >> (i % 32) & 1]
            if not may(walk, token)
            else []
        )
        assert len(forced) <= 1, "there is one way on, or the model's"
        found.append(forced[0] if forced else token)
        assert walk.accept(found[-1])
        if not forced and (token := next(wanted, -1)) < 0:
            break
    return tokenizer.decode(found, skip_special_tokens=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_budget_forces_the_end(kind):
    tokens = [
        TOKENIZERS[kind].decode([i])
        for i in TOKENIZERS[kind].encode(" a b c d e f", add_special_tokens=False)
    ]
    for budget in (0, 1, 4):
        expected = "".join([*tokens[:budget], "</think>", *tokens[budget:]])
        walk = GRAMMARS[kind].matcher(None, thinking(True, budget))
        assert said(kind, walk, " a b c d e f") == expected
    walk = GRAMMARS[kind].matcher(None, thinking(False, 2))
    assert said(kind, walk, "<think> a b c") == "<think> a b</think> c", "it counts from the mark"
    walk = GRAMMARS[kind].matcher(None, thinking(False, 2))
    assert said(kind, walk, " a b c d e") == " a b c d e", "what does not reason has no budget"
    walk = GRAMMARS[kind].matcher(None, thinking(True, 20))
    assert said(kind, walk, " a</think> b c") == " a</think> b c", "an end of its own is the end"
    walk = GRAMMARS[kind].matcher(StructuredOutputs(choice=("yes",)), thinking(True, 1))
    assert said(kind, walk, " ayes") == " a</think>yes"
    assert walk.is_done


def test_an_end_that_was_half_said_is_said_again():
    walk = GRAMMARS["texts"].matcher(None, thinking(True, 2))
    assert said("texts", walk, " a</b") == " a</</think>b"


MARKED = {
    "choice": {"choice": ("a</tool_call>", "a<tool_call>b")},
    "regex": {"regex": "a</tool_call>"},
    "json": {"json": {"const": "a</tool_call>b"}},
    "ebnf": {"grammar": 'root ::= "a" "<tool_call>"'},
    "lark": {"grammar": 'start: "a" "<tool_call>"'},
}


@pytest.mark.parametrize("before", [None, thinking(True)], ids=["at once", "after reasoning"])
@pytest.mark.parametrize("name", MARKED)
def test_marks_within_texts_do_not_end_the_output(name, before):
    """A mark that is a token of its own is no text to llguidance: it has to be spelled."""
    walk, found = GRAMMARS["tokens"].matcher(StructuredOutputs(**MARKED[name]), before), b""
    if before is not None:
        assert walk.accept(TOKENIZERS["tokens"].raw.token_to_id("</think>"))
    while not walk.is_done and len(found) < 40:
        bits = np.flatnonzero(np.unpackbits(walk.allowed().view(np.uint8), bitorder="little"))
        token = int(bits[-1])
        assert walk.accept(token), TOKENIZERS["tokens"].token_bytes(token)
        found += TOKENIZERS["tokens"].token_bytes(token)
    assert b"tool_call>" in found, found


TAGS = {
    "type": "structural_tag",
    "triggers": ["<tool_call>", "<function="],
    "structures": [
        {"begin": "<tool_call>\n", "schema": {"enum": [1, 2]}, "end": "\n</tool_call>"},
        {"begin": "<function=add>", "schema": {"type": "integer"}, "end": "</function>"},
        {"begin": "<function=stop>", "schema": {"const": {}}, "end": ""},
    ],
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tags_stand_in_free_text(kind):
    structure = StructuredOutputs(structural_tag=TAGS)
    call, add = "<tool_call>\n1\n</tool_call>", "<function=add>12</function>"
    for text in ("hello\n<b>", call, f"first {call} and {add}{call} then", "<function=stop>{} on"):
        assert accepts(kind, text, structure), text
    for text in (
        "<tool_call>",
        "<tool_call>\n3\n</tool_call>",
        "<function=sub>1</function>",
        "<function=add>x",
    ):
        assert not accepts(kind, text, structure), text
    owed = StructuredOutputs(structural_tag=TAGS | {"at_least_one": True})
    assert accepts(kind, f"so {add} on", owed)
    assert not accepts(kind, "so", owed)
    assert accepts(kind, "so", structure)
    assert accepts(kind, f"hm <function=x </think>\n\nso {add}", structure, thinking(True)), (
        "none in the reasoning"
    )


ANY, TRUE = {"type": "any_text"}, {"type": "json_schema", "json_schema": {"const": True}}
CALL = {"type": "tag", "begin": "<call>", "content": TRUE, "end": "</call>"}
CALLS = {"type": "tags_with_separator", "tags": [CALL, CALL | {"begin": "<do>"}], "separator": ", "}
TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<c", "<d"],
    "tags": [CALL, CALL | {"begin": "<do>"}],
}
TRUE_CALL = "<call>true</call>"
FORMATS: list[
    tuple[dict, list[str], list[str]]
] = [  # a format, texts that it has and texts that it has not
    ({"type": "const_string", "value": 'a"b'}, ['a"b'], ["a", 'a"bc']),
    ({"type": "regex", "pattern": "[0-9]{2}"}, ["12"], ["1", "123"]),
    ({"type": "grammar", "grammar": 'root ::= "(" root ")" | [x-z]'}, ["((y))"], ["(y", "w"]),
    (ANY, ["", "all\n<call> of it"], []),
    (
        {"type": "sequence", "elements": [TRUE, {"type": "const_string", "value": ";"}, ANY]},
        ["true; x"],
        ["true x"],
    ),
    ({"type": "or", "elements": [TRUE, CALL]}, ["true", TRUE_CALL], ["<call>", f"true{TRUE_CALL}"]),
    ({"type": "optional", "content": CALL}, ["", TRUE_CALL], [2 * TRUE_CALL]),
    ({"type": "plus", "content": CALL}, [TRUE_CALL, 3 * TRUE_CALL], [""]),
    (
        {"type": "repeat", "min": 2, "max": 3, "content": CALL},
        [2 * TRUE_CALL, 3 * TRUE_CALL],
        [TRUE_CALL, 4 * TRUE_CALL],
    ),
    (
        CALL | {"content": ANY, "end": ["</call>", "</done>"]},
        ["<call>x</done>", "<call></call>"],
        ["<call>x", "<call></call>x"],
    ),
    (CALLS, ["", TRUE_CALL, f"<do>true</call>, {TRUE_CALL}"], [2 * TRUE_CALL, f"{TRUE_CALL}, "]),
    (
        CALLS | {"at_least_one": True, "stop_after_first": True},
        [TRUE_CALL],
        ["", f"{TRUE_CALL}, {TRUE_CALL}"],
    ),
    (
        TRIGGERED,
        ["", "so", f"so {TRUE_CALL} and <do>true</call> on"],
        ["so <call>1", "<d", "<call>true"],
    ),
    (TRIGGERED | {"at_least_one": True}, [f"so {TRUE_CALL} on"], ["so"]),
    (
        TRIGGERED | {"at_least_one": True, "stop_after_first": True},
        [f"so {TRUE_CALL}"],
        ["so", f"{TRUE_CALL} on"],
    ),
    (
        CALL | {"content": {"type": "sequence", "elements": [TRUE, CALL | {"content": ANY}]}},
        ["<call>true<call>a <b></call></call>"],
        ["<call>true<call>a</call>"],
    ),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("given, inside, outside", FORMATS, ids=lambda each: str(each)[:60])
def test_formats(kind, given, inside, outside):
    structure = StructuredOutputs(structural_tag={"type": "structural_tag", "format": given})
    for text in inside:
        assert accepts(kind, text, structure), text
    for text in outside:
        assert not accepts(kind, text, structure), text


BAD = {
    "structural_tag": [
        {},
        [],
        "x",
        {"structures": [], "triggers": [], "more": 1},
        {"format": {}, "triggers": []},
    ],
    "structural_tag.format.type": [
        {"format": 5},
        {"format": {}},
        {"format": {"type": "token", "token": 5}},
    ],
    "structural_tag.format.value": [{"format": {"type": "const_string"}}],
    "structural_tag.format.style": [
        {"format": {"type": "json_schema", "json_schema": True, "style": "qwen_xml"}}
    ],
    "structural_tag.format.elements": [{"format": {"type": "or", "elements": []}}],
    "structural_tag.format.elements[0]": [{"format": {"type": "sequence", "elements": [ANY, ANY]}}],
    "structural_tag.format.stop_after_first": [
        {
            "format": {
                "type": "tags_with_separator",
                "tags": [CALL],
                "separator": "",
                "stop_after_first": 1,
            }
        }
    ],
    "structural_tag.format.tags[0].type": [
        {"format": {"type": "tags_with_separator", "tags": [ANY], "separator": ""}}
    ],
    "structural_tag.format.end": [{"format": CALL | {"end": []}}, {"format": CALL | {"end": [5]}}],
    "structural_tag.format.content": [{"format": {"type": "star", "content": ANY}}],
    "structural_tag.format": [{"format": {"type": "repeat", "min": 2, "max": 1, "content": TRUE}}],
    "structural_tag.at_least_one": [TAGS | {"at_least_one": 1}],
    "structural_tag.triggers": [
        TAGS | {"triggers": []},
        TAGS | {"triggers": [""]},
        TAGS | {"triggers": 5},
    ],
    "structural_tag.structures": [
        TAGS | {"structures": []},
        TAGS | {"structures": TAGS["structures"] * 43},
    ],
    "structural_tag.structures[0]": [
        TAGS | {"structures": [5]},
        TAGS | {"structures": [{"begin": "<function="}]},
    ],
    "structural_tag.structures[0].begin": [TAGS | {"triggers": ["<x"]}],
}


@pytest.mark.parametrize(
    "field, given", [(field, given) for field, each in BAD.items() for given in each], ids=str
)
def test_tags_that_are_none_are_refused(field, given):
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputs(structural_tag=given)
    assert caught.value.field == field


def test_reasoning_that_is_none_is_refused():
    for fields, field in (
        ({"start": ""}, "reasoning.start"),
        ({"budget": -1}, "thinking_token_budget"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            Reasoning(**{"start": "<think>", "end": "</think>", "opened": True} | fields)
        assert caught.value.field == field


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_tokens_of_reasoning_are_those_between_its_marks(kind, opened, size):
    def encoded(text):
        return TOKENIZERS[kind].encode(text, add_special_tokens=False)

    thought = encoded("a long < thought </th, not its end")
    ids = [
        *(() if opened else encoded("<think>")),
        *thought,
        *encoded("</think>"),
        *encoded("an answer </think> x"),
    ]
    counter = ReasoningTokens(
        Reasoning(start="<think>", end="</think>", opened=opened), TOKENIZERS[kind]
    )
    for first in range(0, len(ids), size):
        counter.push(ids[first : first + size])
    assert counter.count == len(thought)


def test_an_answer_without_reasoning_has_no_tokens_of_it():
    counter = ReasoningTokens(Reasoning(start="<think>", end="</think>", opened=False), TEXTS)
    counter.push(TEXTS.encode("<thin answer</think>", add_special_tokens=False))
    assert counter.count == 0
