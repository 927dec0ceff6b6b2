"""Translation of structural tags (free text with constrained tags in it) to Lark's notation.

Supported are xgrammar's formats, as vLLM and SGLang take them ({"format": {"type":
"triggered_tags", ...}}), and the older form ({"structures": [{"begin", "schema", "end"}],
"triggers": [...]}, with SGLang's "at_least_one").

Not here: building of the grammar (grammar.py), checks of schemas (json_schema.py).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from llguidance import LLMatcher

from slipway.codec import ebnf
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest

MAX_STRUCTURES, MAX_DEPTH, MAX_TIMES = 128, 32, 1024
# fields of each format and their types
TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "const_string": {"value": (str,)},
    "json_schema": {"json_schema": (dict, bool)},
    "regex": {"pattern": (str,)},
    "grammar": {"grammar": (str,)},
    "any_text": {},
    "sequence": {"elements": (list,)},
    "or": {"elements": (list,)},
    "optional": {"content": (dict,)},
    "star": {"content": (dict,)},
    "plus": {"content": (dict,)},
    "repeat": {"content": (dict,), "min": (int,), "max": (int,)},
    "tag": {"begin": (str,), "content": (dict,), "end": (str, list)},
    "triggered_tags": {"triggers": (list,), "tags": (list,)},
    "tags_with_separator": {"tags": (list,), "separator": (str,)},
}
TIMES = {"optional": "?", "star": "*", "plus": "+"}
FLAGS = {"triggered_tags": ("at_least_one", "stop_after_first")}
FLAGS["tags_with_separator"] = FLAGS["triggered_tags"]
Schema = Callable[[Any], str]
Spelled = Callable[[str], list[str]]
# texts, one of which ends a format; an empty sequence: the format ends with the output
Follows = Sequence[str] | Literal["something"]


def lark(given: Any, schema: Schema, spelled: Spelled) -> str:
    """Return the grammar of a structural tag in Lark's notation.

    ``schema`` checks a schema and returns its text; ``spelled`` splits a text into Lark's strings
    and tokens. Raises InvalidRequest, naming the field.
    """
    expected = '{"type": "structural_tag"} with "format", or with "structures" and "triggers"'
    if not isinstance(given, dict) or given.get("type", "structural_tag") != "structural_tag":
        raise InvalidRequest("structural_tag", given, expected)
    writer = _Writer(schema, spelled)
    fields = given.keys() - {"type"}
    if fields == {"format"}:
        body = writer.write(given["format"], "structural_tag.format", ())
    elif fields - {"at_least_one"} == {"structures", "triggers"}:
        body = writer.triggered(_before(given), "structural_tag", ())
    else:
        raise InvalidRequest("structural_tag", given, expected)
    return "\n".join([f"start: {body}", *writer.rules, "text: TEXT", r"TEXT: /(.|\n)*/", ""])


def schemas(given: Any, field: str) -> dict[str, Any]:
    """Return field -> JSON schema for all schemas in a checked structural tag at ``field``."""
    found = {}
    stack = [(given, field)]
    while stack:
        part, at = stack.pop()
        if isinstance(part, list):
            stack += [(each, f"{at}[{number}]") for number, each in enumerate(part)]
        elif isinstance(part, dict):
            name = "json_schema" if part.get("type") == "json_schema" else "schema"
            if name in part:
                found[f"{at}.{name}"] = part[name]
            stack += [(value, f"{at}.{key}") for key, value in part.items() if key != name]
    return found


class _Writer:
    """Writer of the rules of one grammar.

    A method that writes a format also writes the texts that end it (``follows``), because the rule
    of free text depends on them.
    """

    def __init__(self, schema: Schema, spelled: Spelled):
        self._schema = schema
        self._spelled = spelled
        self.rules: list[str] = []

    def write(self, given: Any, field: str, follows: Follows, depth: int = 0) -> str:
        """Write a format and the text that ends it; return the body of a rule for both."""
        kind = _checked(given, field, depth)
        match kind:
            case "any_text":
                return self._text(field, follows)
            case "sequence":
                *first, last = _items(given["elements"], f"{field}.elements")
                parts = [self.write(each, at, "something", depth=depth + 1) for each, at in first]
                return " ".join([*parts, self.write(*last, follows, depth=depth + 1)])
            case "or":
                each = _items(given["elements"], f"{field}.elements")
                return (
                    f"({' | '.join(self.write(*item, follows, depth=depth + 1) for item in each)})"
                )
            case "triggered_tags":
                return self.triggered(given, field, follows, depth=depth)
        return " ".join([self._closed(kind, given, field, depth=depth), *self._ends(follows)])

    def triggered(self, given: Any, field: str, follows: Follows, depth: int = 0) -> str:
        """Write free text in which each trigger begins one of the tags."""
        if follows:
            raise InvalidRequest(
                field, "triggered_tags", "nothing after it, because its text has no end"
            )
        triggers = given["triggers"]
        if not triggers or not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise InvalidRequest(f"{field}.triggers", triggers, "a list of non-empty texts")
        where = "structures" if "structures" in given else "tags"
        tags = _items(given["tags"], f"{field}.{where}")
        choice = [self._opened(tag, triggers, field=at, depth=depth + 1) for tag, at in tags]
        one = f"({' | '.join(choice)})"
        if given.get("stop_after_first", False):
            return one if given.get("at_least_one", False) else f"({one} | text)"
        return f"{one}{'+' if given.get('at_least_one', False) else '*'} text"

    def _opened(self, tag: Any, triggers: list[str], field: str, depth: int) -> str:
        """Write free text up to a tag, and the tag."""
        _checked(tag, field, depth, only="tag")
        begin = tag["begin"]
        # the longest trigger: a tag that it begins can continue in no other way
        trigger = max((t for t in triggers if begin.startswith(t)), key=len, default="")
        if not trigger:
            raise InvalidRequest(
                f"{field}.begin", begin, f"one that begins with a trigger: {', '.join(triggers)}"
            )
        rest = self._inside(tag, field, depth, begin=self._spelled(begin.removeprefix(trigger)))
        return self._rule(f"{self._until(trigger)} {rest}")

    def _closed(self, kind: str, given: Any, field: str, depth: int) -> str:
        """Write a format that needs no text after it to end."""
        match kind:
            case "const_string":
                return " ".join(self._spelled(given["value"])) or '""'
            case "json_schema":
                return f"%json {self._schema(given['json_schema'])}"
            case "regex":
                (built,) = json.loads(LLMatcher.grammar_from_regex(given["pattern"]))["grammars"]
                return self._rule(built["lark_grammar"].removeprefix("start:").strip())
            case "grammar":
                prefix = f"g{len(self.rules)}_"
                self.rules.append(ebnf.lark(given["grammar"], prefix))
                return f"{prefix}start"
            case "tag":
                return self._inside(given, field, depth, begin=self._spelled(given["begin"]))
            case "tags_with_separator":
                tags = _items(given["tags"], f"{field}.tags")
                for tag, at in tags:
                    _checked(tag, at, depth + 1, only="tag")
                one = self._rule(
                    " | ".join(self.write(*tag, "something", depth=depth + 1) for tag in tags)
                )
                more = " ".join([*self._spelled(given["separator"]), one])
                body = one if given.get("stop_after_first", False) else f"{one} ({more})*"
                return f"({body})" if given.get("at_least_one", False) else f"({body})?"
        inner = self.write(given["content"], f"{field}.content", "something", depth=depth + 1)
        return f"({inner}){TIMES.get(kind) or _times(given, field)}"

    def _inside(self, tag: Any, field: str, depth: int, begin: list[str]) -> str:
        ends = tag["end"] if isinstance(tag["end"], list) else [tag["end"]]
        if not ends or not all(isinstance(end, str) for end in ends):
            raise InvalidRequest(f"{field}.end", ends, "a text, or a list of texts")
        follows: Follows = ends if any(ends) else "something"
        content = self.write(tag["content"], f"{field}.content", follows, depth=depth + 1)
        return " ".join([*begin, content])

    def _ends(self, follows: Follows) -> list[str]:
        if isinstance(follows, str) or not follows:
            return []
        each = [" ".join(self._spelled(text)) or '""' for text in follows]
        return each if len(each) == 1 else [f"({' | '.join(each)})"]

    def _text(self, field: str, follows: Follows) -> str:
        """Write any text up to the text that ends it."""
        if isinstance(follows, str) or not all(follows):
            raise InvalidRequest(
                field,
                "any_text",
                "the end of a tag or nothing after it, because it has no other end",
            )
        return f"({' | '.join(map(self._until, follows))})" if follows else "text"

    def _until(self, text: str) -> str:
        """Write free text that ends with the first occurrence of ``text``."""
        first, *others = self._spelled(text)
        if first.startswith("<["):  # a token cannot occur within TEXT
            return " ".join(["TEXT", first, *others])
        return " ".join([self._rule(f"TEXT {first}", "[lazy]"), *others])

    def _rule(self, body: str, how: str = "") -> str:
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{how}: {body}")
        return name


def marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Return text -> id of the added tokens in <...>.

    llguidance matches these tokens only by their ids, never as text.
    """
    added = {token.content: i for i, token in tokenizer.raw.get_added_tokens_decoder().items()}
    return {text: i for text, i in added.items() if text[:1] == "<" and text[-1:] == ">"}


def spelled(text: str, known: Mapping[str, int]) -> list[str]:
    """Split a text into Lark's strings, and a token <[id]> for each text of ``known``."""
    pattern = "|".join(re.escape(mark) for mark in sorted(known, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if known else [text]
    return [f"<[{known[part]}]>" if part in known else json.dumps(part) for part in parts if part]


def as_text(text: str) -> list[str]:
    """Return a text as Lark's strings, for a vocabulary without tokens for markers."""
    return spelled(text, {})


def _before(given: dict[str, Any]) -> dict[str, Any]:
    """Return the older form, ``structures`` with ``triggers``, as a format "triggered_tags"."""
    structures, triggers = given["structures"], given["triggers"]
    if not isinstance(triggers, list):
        raise InvalidRequest("structural_tag.triggers", triggers, "a list of non-empty texts")
    for number, structure in enumerate(structures if isinstance(structures, list) else ()):
        texts = isinstance(structure, dict) and all(
            isinstance(structure.get(key), str) for key in ("begin", "end")
        )
        if (
            not texts
            or structure.keys() != {"begin", "schema", "end"}
            or not isinstance(structure["schema"], dict)
        ):
            field = f"structural_tag.structures[{number}]"
            raise InvalidRequest(
                field, structure, '{"begin": "...", "schema": {...}, "end": "..."}'
            )
    _items(structures, "structural_tag.structures")
    tags = [
        {
            "type": "tag",
            "begin": each["begin"],
            "end": each["end"],
            "content": {"type": "json_schema", "json_schema": each["schema"]},
        }
        for each in structures
    ]
    owes = given.get("at_least_one", False)
    _flag("structural_tag.at_least_one", owes)
    return {"triggers": triggers, "tags": tags, "at_least_one": owes, "structures": True}


def _checked(given: Any, field: str, depth: int, only: str = "") -> str:
    """Check the fields of a format and return its type; ``only`` is the one type allowed."""
    kind = given.get("type", only) if isinstance(given, dict) else None
    if kind not in TYPES or only not in ("", kind):
        raise InvalidRequest(f"{field}.type", kind, only or f"one of {', '.join(TYPES)}")
    if depth > MAX_DEPTH:
        raise InvalidRequest(field, "a format", f"a nesting depth of at most {MAX_DEPTH}")
    fields, flags = TYPES[kind], FLAGS.get(kind, ())
    for name, types in fields.items():
        value = given.get(name)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise InvalidRequest(
                f"{field}.{name}", value, " or ".join(each.__name__ for each in types)
            )
    for name in flags:
        _flag(f"{field}.{name}", given.get(name, False))
    # fields that xgrammar always writes out
    defaults = {"style": "json", "any_order": False}
    for name in sorted(given.keys() - {"type", *fields, *flags}):
        if given[name] not in (None, [], defaults.get(name)):
            raise InvalidRequest(f"{field}.{name}", given[name], f"no such field of {kind} here")
    return kind


def _items(given: Any, field: str) -> list[tuple[Any, str]]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_STRUCTURES:
        raise InvalidRequest(field, given, f"a list of 1 to {MAX_STRUCTURES}")
    return [(each, f"{field}[{number}]") for number, each in enumerate(given)]


def _times(given: dict[str, Any], field: str) -> str:
    low, high = given["min"], given["max"]
    if not 0 <= low <= MAX_TIMES or not (high == -1 or low <= high <= MAX_TIMES):
        raise InvalidRequest(field, [low, high], f"0 <= min <= max <= {MAX_TIMES}, or a max of -1")
    return f"{{{low},{'' if high == -1 else high}}}"


def _flag(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(field, value, "true or false")
