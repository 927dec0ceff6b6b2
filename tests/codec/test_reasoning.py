"""Grammars that begin where reasoning ends, budgets, structural tags; marks that are tokens, marks that are text."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from slipway.codec.grammar import Grammars, StructuredOutputs
from slipway.codec.reasoning import Reasoning
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
    return Tokenizer(raw, TEXTS.special_tokens, TEXTS.eos_token_ids, None)


TOKENIZERS = {"texts": TEXTS, "tokens": with_tokens()}
GRAMMARS = {name: Grammars(t, t.vocab_size, sorted(t.eos_token_ids)) for name, t in TOKENIZERS.items()}
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
    "json": (StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
             '{"a": 1}', '{"a": "b"}'),
    "lark": (StructuredOutputs(grammar='start: "x" other\nother: "y"'), "xy", "yx"),
    "ebnf": (StructuredOutputs(grammar='root ::= [0-9] "z"'), "5z", "z"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ANSWERS)
def test_a_structure_begins_where_reasoning_ends(kind, name):
    structure, fits, misses = ANSWERS[name]
    for thought in ("", "\nwell, {x} or not\n", "a < b and b > </ c"):
        for line in ("", "\n\n"):
            assert accepts(kind, f"{thought}</think>{line}{fits}", structure, thinking(True))
            assert accepts(kind, f"<think>{thought}</think>{line}{fits}", structure, thinking(False))
            assert not accepts(kind, f"{thought}</think>{line}{misses}", structure, thinking(True))
            assert not accepts(kind, f"<think>{thought}</think>{line}{misses}", structure, thinking(False))
    assert accepts(kind, fits, structure, thinking(False)), "it may answer at once"
    assert not accepts(kind, fits, structure, thinking(True)) and not accepts(kind, "<think>", structure)
    assert not accepts(kind, f"<think>{fits}", structure, thinking(False)), "reasoning owes its end, and the answer"


def said(kind, walk, text, most=60):
    """What comes where the model says ``text`` as far as it may, and what it must otherwise."""
    tokenizer, found = TOKENIZERS[kind], []
    wanted = iter(tokenizer.encode(text, add_special_tokens=False))
    token = next(wanted)
    while len(found) < most:
        words = walk.allowed()
        forced = [i for i in range(len(words) * 32) if words[i // 32] >> (i % 32) & 1] if not may(walk, token) else []
        assert len(forced) <= 1, "there is one way on, or the model's"
        found.append(forced[0] if forced else token)
        assert walk.accept(found[-1])
        if not forced and (token := next(wanted, -1)) < 0:
            break
    return tokenizer.decode(found, skip_special_tokens=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_budget_forces_the_end(kind):
    tokens = [TOKENIZERS[kind].decode([i]) for i in TOKENIZERS[kind].encode(" a b c d e f", add_special_tokens=False)]
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
    assert said(kind, walk, " ayes") == " a</think>yes" and walk.is_done


def test_an_end_that_was_half_said_is_said_again():
    walk = GRAMMARS["texts"].matcher(None, thinking(True, 2))
    assert said("texts", walk, " a</b") == " a</</think>b"


MARKED = {
    "choice": {"choice": ("a</tool_call>", "a<tool_call>b")}, "regex": {"regex": "a</tool_call>"},
    "json": {"json": {"const": "a</tool_call>b"}}, "ebnf": {"grammar": 'root ::= "a" "<tool_call>"'},
    "lark": {"grammar": 'start: "a" "<tool_call>"'},
}  # fmt: skip


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
    "type": "structural_tag", "triggers": ["<tool_call>", "<function="],
    "structures": [
        {"begin": "<tool_call>\n", "schema": {"enum": [1, 2]}, "end": "\n</tool_call>"},
        {"begin": "<function=add>", "schema": {"type": "integer"}, "end": "</function>"},
        {"begin": "<function=stop>", "schema": {"const": {}}, "end": ""},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tags_stand_in_free_text(kind):
    structure = StructuredOutputs(structural_tag=TAGS)
    call, add = "<tool_call>\n1\n</tool_call>", "<function=add>12</function>"
    for text in ("hello\n<b>", call, f"first {call} and {add}{call} then", "<function=stop>{} on"):
        assert accepts(kind, text, structure), text
    for text in ("<tool_call>", "<tool_call>\n3\n</tool_call>", "<function=sub>1</function>", "<function=add>x"):
        assert not accepts(kind, text, structure), text
    owed = StructuredOutputs(structural_tag=TAGS | {"at_least_one": True})
    assert accepts(kind, f"so {add} on", owed) and not accepts(kind, "so", owed) and accepts(kind, "so", structure)
    assert accepts(kind, f"hm <function=x </think>\n\nso {add}", structure, thinking(True)), "none in the reasoning"


BAD = {
    "structural_tag": [{}, [], "x", {"structures": [], "triggers": [], "more": 1}, {"format": {"type": "any_text"}}],
    "structural_tag.at_least_one": [TAGS | {"at_least_one": 1}],
    "structural_tag.triggers": [TAGS | {"triggers": []}, TAGS | {"triggers": [""]}, TAGS | {"triggers": 5}],
    "structural_tag.structures": [TAGS | {"structures": []}, TAGS | {"structures": TAGS["structures"] * 43}],
    "structural_tag.structures[0]": [TAGS | {"structures": [5]}, TAGS | {"structures": [{"begin": "<function="}]}],
    "structural_tag.structures[0].begin": [TAGS | {"triggers": ["<x"]}],
}  # fmt: skip


@pytest.mark.parametrize("field, given", [(field, given) for field, each in BAD.items() for given in each], ids=str)
def test_tags_that_are_none_are_refused(field, given):
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputs(structural_tag=given)
    assert caught.value.field == field


def test_reasoning_that_is_none_is_refused():
    for fields, field in (({"start": ""}, "reasoning.start"), ({"budget": -1}, "thinking_token_budget")):
        with pytest.raises(InvalidRequest) as caught:
            Reasoning(**{"start": "<think>", "end": "</think>", "opened": True} | fields)
        assert caught.value.field == field
