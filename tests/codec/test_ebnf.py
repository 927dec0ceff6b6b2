"""EBNF grammars of llama.cpp, vLLM and SGLang: texts that fit, and notation that is refused."""

import time
from pathlib import Path

import pytest

from slipway.codec import ebnf
from slipway.codec.grammar import Grammars, StructuredOutputs
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest
from slipway.llm import NANO

pytestmark = pytest.mark.host
TOKENIZER = Tokenizer.load(Path(NANO))
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size, sorted(TOKENIZER.eos_token_ids))
EOS = min(TOKENIZER.eos_token_ids)


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text, and then its end, may be said."""
    matcher = GRAMMARS.matcher(StructuredOutputs(grammar=grammar))
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        if (
            matcher.is_done
            or not matcher.allowed()[token // 32] >> (token % 32) & 1
            or not matcher.accept(token)
        ):
            return False
    return bool(matcher.is_done or matcher.allowed()[EOS // 32] >> (EOS % 32) & 1)


SQL = """
    # vLLM's example, indented as there
    root ::= select_statement
    select_statement ::= "SELECT " column " from " table " where " condition
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""
JSON = r"""
root ::= basic_array | basic_object
basic_any ::= basic_number | basic_string | basic_boolean | basic_null | basic_array | basic_object
basic_number ::= ("0" | "-"? [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+-]? [0-9]+)?
basic_string ::= (([\"] basic_string_1 [\"]))
basic_string_1 ::= "" | [^"\\\x00-\x1F] basic_string_1 | "\\" escape basic_string_1
escape ::= ["\\/bfnrt] | "u" [A-Fa-f0-9] [A-Fa-f0-9] [A-Fa-f0-9] [A-Fa-f0-9]
basic_boolean ::= "true" | "false"
basic_null ::= "null"
basic_array ::= "[" ("" | ws basic_any (ws "," ws basic_any)*) ws "]"
basic_object ::= "{" ("" | ws basic_pair ( ws "," ws basic_pair)*) ws "}"
basic_pair ::= basic_string ws ":" ws basic_any
ws ::= [ \n\t]*
"""
WIDE = "\u4e2d\u00e9A\U0001f600"
SAID = [
    (SQL, ["SELECT col_1  from table_1  where col_2 = 1 "], ["SELECT col_3 ", "SELECT"]),
    (JSON, ['{"a": [1, true, "b\\n\\u00e9"], "c": {"d": null}}', "[-1.5e3]"], ["{a}", "[1", '"a"']),
    (
        'root ::= a b\na ::= [a-z]+\nb ::= "x"',
        ["abcx", "xx"],
        ["abc", "x"],
    ),  # what lexemes would get wrong
    ('root ::=\n  "a" # one\n  | "b"\n\n  | c\nc ::= "c"\n', ["a", "b", "c"], ["d", "ab"]),
    (
        'root ::= my-rule Expr expr\nmy-rule ::= "a"\nExpr ::= "(" Expr ")" | "1"\nexpr ::= "z"',
        ["a((1))z"],
        ["a1"],
    ),
    ('root ::= "a"{2} [bc]{1,2} ("d" "e"?){0,} .', ["aab!", "aabcdded\n"], ["ab!", "aabbbb"]),
    (
        r'root ::= [\u4e00-\u9fff]+ "\u00e9\x41\U0001F600" [/\]\-] [a-]',
        [f"{WIDE}/-", f"{WIDE}]a"],
        ["a", WIDE],
    ),
    (r'root ::= [^\n"]* "\"\\"', ['say "\\'], ['say\n"\\']),
    ('root ::= "" | "b"', ["", "b"], ["bb"]),
]


@pytest.mark.parametrize("grammar, fits, misses", SAID, ids=[str(i) for i in range(len(SAID))])
def test_what_it_says_holds(grammar, fits, misses):
    assert all(accepts(grammar, text) for text in fits)
    assert not any(accepts(grammar, text) for text in misses)


WRONG = {
    'main ::= "a"': "a rule named root",
    'root ::= "a" b': "a rule named b",
    'root ::= "a"\nroot ::= "b"': "once",
    'root ::= "a" (= "b")': "EBNF",
    'root ::= TagDispatch(("<f>", r1))\nr1 ::= "x"': "EBNF",
    'root ::= <|im_end|> "a"': "EBNF",
    "root ::= '": "EBNF",
    'root ::= "a': "EBNF",
    "root ::= []": "one character",
    r'root ::= "\ud800"': "Unicode",
    r'root ::= "\q"': "escape",
    "root ::= [z-a]": "lower",
    'root ::= "a"{99999}': "times",
    '"a"\nroot ::= "a"': "name ::=",
}


@pytest.mark.parametrize("grammar", WRONG)
def test_what_is_not_understood_is_refused(grammar):
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputs(grammar=grammar)
    assert caught.value.field == "grammar"
    assert WRONG[grammar] in caught.value.expected + repr(caught.value.got)


EVIL = {
    "newlines": "\n" * 250_000,
    "dots": "root ::= " + "." * 60_000,
    "open": "root ::= " + "(" * 100_000,
    "rules": "root ::= r0\n" + "".join(f'r{i} ::= "a"\n' for i in range(9000)),
    "a set": "root ::= [" + "a" * 100_000 + "]",
    "signs": "root ::= " + '"a"*+?' * 40_000,
    "repeats": 'root ::= ((("a"{9999}){9999}){9999}){9999}',
    "loop": "root ::= root",
}


@pytest.mark.parametrize("name", EVIL)
def test_nothing_takes_long(name):
    """Far from a measurement: what was quadratic took minutes."""
    started = time.monotonic()
    try:
        GRAMMARS.matcher(StructuredOutputs(grammar=EVIL[name])).allowed()
    except InvalidRequest as error:
        assert error.field in ("grammar", "structured_outputs")
    assert time.monotonic() - started < 20, ebnf.is_ebnf(EVIL[name])
