"""Translation of EBNF, as llama.cpp (GBNF) and xgrammar write it, to Lark's notation.

llguidance's own converter turns rules into lexemes, which match greedily: after `a ::= [a-z]+` it
forbids an "x" that the grammar allows there. Here a rule stays a rule. Time is linear in the length
of the text. As in xgrammar, a newline ends a rule only if another rule begins after it.

Not here: building of the translated grammar (grammar.py).
"""

import json
import re
from collections.abc import Iterator

from slipway.errors import InvalidRequest, Shown

TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+) | (?P<rule>[\w-]+)[ \t]*::= | (?P<text>"(?:\\.|[^"\\\n])*")
    | (?P<set>\[\^?(?:\\.|[^\]\\\n])*\]) | \{\s*(?P<low>\d+)\s*(?P<open>,\s*(?P<high>\d*)\s*)?\}
    | (?P<name>[\w-]+) | (?P<any>\.) | (?P<sign>[|()*+?])""",
    re.VERBOSE,
)
ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))|(.)", re.DOTALL
)
NAMED = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "0": "\0",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "e": "\x1b",
}
HEAD = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
MAX_TIMES = 10_000  # upper bound of one repetition


def is_ebnf(text: str) -> bool:
    """Return whether a grammar has rules in EBNF (`name ::= ...`)."""
    return HEAD.search(text) is not None


def lark(text: str, prefix: str = "") -> str:
    """Return an EBNF grammar in Lark's notation.

    ``prefix`` is put before the names of its rules; the root rule is named ``{prefix}start``.
    Raises InvalidRequest for notation that is not supported.
    """
    heads = [match["rule"] for match in _tokens(text) if match["rule"]]
    if "root" not in heads:
        raise _wrong(text, 0, "a rule named root")
    names = {
        name: prefix + ("start" if name == "root" else f"r{n}") for n, name in enumerate(heads)
    }
    if len(names) < len(heads):
        raise _wrong(text, 0, "each rule to be defined once")
    out: list[str] = []
    for match in _tokens(text):
        if name := match["rule"]:
            out.append(f"\n{names[name]}:")
        elif not out and not match["space"]:
            raise _wrong(text, match.start(), "a rule: name ::= ...")
        elif name := match["name"]:
            if name not in names:
                raise _wrong(text, match.start(), f"a rule named {name}")
            out.append(names[name])
        elif match["text"]:
            codes = _characters(match["text"][1:-1], text, match.start())
            out.append(json.dumps("".join(chr(code) for code, _ in codes), ensure_ascii=False))
        elif match["set"]:
            out.append(_set(match["set"], text, match.start()))
        elif match["low"]:
            out.append(_times(match, text))
        elif match["any"]:
            out.append("/(?s:.)/")
        elif match["sign"]:
            out.append(match["sign"])
    return " ".join(out)


def _tokens(text: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(text):
        if (match := TOKEN.match(text, at)) is None:
            raise _wrong(text, at, "EBNF: names, texts, sets of characters, | ( ) * + ? {m,n}")
        yield match
        at = match.end()


def _set(given: str, text: str, at: int) -> str:
    """Return a set of characters as a regex.

    Characters are written as numbers, so that none of them has a special meaning.
    """
    negated = given.startswith("[^")
    found, items = list[str](), _characters(given[1 + negated : -1], text, at)
    if not items:
        raise _wrong(text, at, "a set with at least one character")
    place = 0
    while place < len(items):
        low, ranges = (
            items[place][0],
            items[place + 1 : place + 2] == [(ord("-"), False)] and place + 2 < len(items),
        )
        high = items[place + 2][0] if ranges else low
        if high < low:
            raise _wrong(text, at, "ranges from a lower character to a higher one")
        found.append(rf"\x{{{low:x}}}" + rf"-\x{{{high:x}}}" * ranges)
        place += 3 if ranges else 1
    return f"/[{'^' * negated}{''.join(found)}]/"


def _times(match: re.Match[str], text: str) -> str:
    low = match["low"]
    high = match["high"] if match["open"] else low
    if any(len(number) > 5 or int(number) > MAX_TIMES for number in (low, high or "0")):
        raise _wrong(text, match.start(), f"at most {MAX_TIMES} times")
    return f"{{{int(low)},{int(high) if high else ''}}}"


def _characters(given: str, text: str, at: int) -> list[tuple[int, bool]]:
    """Return the code points of a text or a set, each with whether it was escaped.

    Raises InvalidRequest.
    """
    found = []
    for match in ESCAPE.finditer(given):
        *numbers, escaped, plain = match.groups()
        number = next((int(each, 16) for each in numbers if each), None)
        if number is None and escaped is not None:
            if escaped.isalnum() and escaped not in NAMED:
                raise _wrong(text, at, f"a supported escape; \\{escaped} is not")
            number = ord(NAMED.get(escaped, escaped))
        code = ord(plain) if number is None else number
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise _wrong(text, at, "characters of Unicode")
        found.append((code, plain is None))
    return found


def _wrong(text: str, at: int, expected: str) -> InvalidRequest:
    line, shown = text.count("\n", 0, at) + 1, text[at : at + 40].partition("\n")[0]
    return InvalidRequest("grammar", Shown(f"{shown!r} in line {line}"), expected)
