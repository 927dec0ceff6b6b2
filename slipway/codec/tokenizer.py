"""Tokenizer of a checkpoint: reading of its files, and conversion between text and token ids.

The files are read as transformers 5 reads them, so that ids equal those that the model was trained
on. In particular, only tokenizer.json decides whether a bos token is added: add_bos_token of
tokenizer_config.json is meant for slow tokenizers and is ignored.

Not here: rendering of chat templates (chat.py), stop strings (detokenizer.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from slipway.codec import tiktoken_file
from slipway.codec.offsets import spans_to_offsets
from slipway.codec.token_text import Stream, TokenTexts, special_ids, token_texts
from slipway.errors import CheckpointError, InvalidRequest

NO_TOKENIZER = (
    "tokenizer.json is missing. A sentencepiece tokenizer.model is not supported; to convert it: "
    'transformers.AutoTokenizer.from_pretrained("{directory}").save_pretrained("{directory}")'
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Conversion between text and token ids, with the settings of the tokenizer.

    `special_tokens` maps names to texts ("bos_token" -> "<s>"), as chat templates read them.
    `eos_token_ids` are all ids that end a generation, including those of generation_config.json.
    `chat_templates` maps names to sources of chat templates; if a model has only one template, its
    name is "default".
    """

    raw: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    chat_templates: Mapping[str, str]

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read a checkpoint directory. Raises CheckpointError, naming every unreadable file."""
        problems: list[str] = []
        raw = _read_raw(directory, problems)
        config = _read_json(directory / "tokenizer_config.json", problems)
        # saved by transformers before 4.34, or without added tokens
        if "added_tokens_decoder" not in config:
            config |= _read_json(directory / "special_tokens_map.json", problems)
        generation = _read_json(directory / "generation_config.json", problems)
        chat_templates = _chat_templates(directory, config, problems)
        if raw is None or problems:
            raise CheckpointError(directory, problems)
        if not (directory / "tokenizer.json").is_file():
            # The settings of a tiktoken vocabulary are code of its repository.
            config = {"eos_token": tiktoken_file.END} | config
            chat_templates = chat_templates or {"default": tiktoken_file.CHAT_TEMPLATE}
        special_tokens = {
            name: text
            for name in config
            if name.endswith("_token") and (text := _content(config[name]))
        }
        _add_tokens(raw, config, special_tokens)
        ends = [
            raw.token_to_id(special_tokens.get("eos_token", "")),
            *_as_list(generation.get("eos_token_id")),
        ]
        eos_token_ids = frozenset(i for i in ends if i is not None)
        return cls(raw, special_tokens, eos_token_ids, chat_templates=chat_templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`.

        `add_special_tokens` runs the post-processor, which often adds a bos token.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text, computed on several threads.

        Raises InvalidRequest for a text that cannot be encoded as UTF-8.
        """
        for text in texts:
            _check_text(text)
        encodings = self.raw.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`.

        An id beyond the vocabulary, which a padded lm_head can produce, has an empty text.
        """
        return self.raw.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds after other text; empty beyond the vocabulary.

        These are the byte of a byte token ("<0xF0>"), the text of another token including its
        space, and the name of a special token. The bytes of all tokens of a text, joined, are the
        text's bytes, except for a space that the decoder strips from the first token.
        """
        return self._all_texts.bytes_of(token_id)

    def stream(self, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> Stream:
        """Return a stream for the tokens of one sequence after `prompt`.

        Its text is `decode` of prompt and tokens together, without the prompt's text.
        """
        return self.token_texts(skip_special_tokens).stream(prompt)

    def token_texts(self, skip_special_tokens: bool) -> TokenTexts:
        """Return the texts of tokens, with special tokens left out or kept."""
        return self._visible_texts if skip_special_tokens else self._all_texts

    def offsets(self, text: str) -> list[int]:
        """Return the position in `text`, in characters, at which each token of `encode` begins."""
        return spans_to_offsets(self.raw.encode(text).offsets)

    @cached_property
    def vocab_size(self) -> int:
        """Highest id, including added tokens, plus 1; the model's embedding may have more rows."""
        return max(self.raw.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out by default."""
        return special_ids(self.raw)

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template named "default"; None if there is none."""
        return self.chat_templates.get("default")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token at the beginning of a sequence; None if there is none."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's own end of a sequence; None if there is none."""
        return self._named_id("eos_token")

    @cached_property
    def _visible_texts(self) -> TokenTexts:
        return token_texts(self.raw, skip_special_tokens=True)

    @cached_property
    def _all_texts(self) -> TokenTexts:
        return token_texts(self.raw, skip_special_tokens=False)

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.raw.token_to_id(text)


def _read_raw(directory: Path, problems: list[str]) -> tokenizers.Tokenizer | None:
    path = directory / "tokenizer.json"
    vocabulary = tiktoken_file.find(directory)
    if not path.is_file() and vocabulary is not None:
        return tiktoken_file.load(vocabulary)
    if not path.is_file():
        problems.append(NO_TOKENIZER.format(directory=directory))
        return None
    with _BareExceptions(problems, "tokenizer.json"):
        raw = tokenizers.Tokenizer.from_file(str(path))
        # Some repositories save the limits of their training run. A prompt must not be cut or
        # padded.
        raw.no_truncation()
        raw.no_padding()
        return raw
    return None


class _BareExceptions:
    """Context manager that turns an error of the tokenizers library into an entry of `problems`.

    The library raises Exception itself. An `except Exception` would also hide bugs, so only this
    exact type is caught here.
    """

    def __init__(self, problems: list[str], name: str):
        self._problems = problems
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> bool:
        if kind is not Exception:
            return False
        self._problems.append(f"{self._name}: {error}")
        return True


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name}: {error}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name}: got {type(value).__name__}, expected an object")
        return {}
    return value


def _chat_templates(directory: Path, config: dict[str, Any], problems: list[str]) -> dict[str, str]:
    """Return the chat templates by name, from the first of these places that has one.

    The places are the .jinja files, tokenizer_config.json, and chat_template.json, which older
    processors saved.
    """
    files = {
        path.stem: path
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    if (path := directory / "chat_template.jinja").is_file():
        files = {"default": path} | files
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    found = config.get("chat_template")
    if found is not None:
        return _named_templates(found, "tokenizer_config.json", problems)
    name = "chat_template.json"
    return _named_templates(
        _read_json(directory / name, problems).get("chat_template"), name, problems
    )


def _named_templates(value: object, file: str, problems: list[str]) -> dict[str, str]:
    """Return the templates of a `chat_template` field by name.

    The field is a string, an object, or a list of {"name": ..., "template": ...}.
    """
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    match value:
        case None:
            return {}
        case str():
            return {"default": value}
        case [*entries]:
            found: dict[str, str] = {}
            for number, entry in enumerate(entries):
                match entry:
                    case {"name": str(name), "template": str(template)}:
                        found[name] = template
                    case _:
                        expected = "a name and a template, both strings"
                        problems.append(f"{file} chat_template[{number}]: expected {expected}")
            return found
    problems.append(
        f"{file} chat_template: got {type(value).__name__}, expected a string or named templates"
    )
    return {}


def _add_tokens(
    raw: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Add the tokens that tokenizer_config.json declares and tokenizer.json lacks."""
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder", {})
    tokens = [tokenizers.AddedToken(**declared[i]) for i in sorted(declared, key=int)]
    raw.add_tokens([token for token in tokens if token.content not in known])
    known |= {token.content for token in tokens}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [
        *special_tokens.values(),
        *map(_content, extra.values() if isinstance(extra, dict) else extra),
    ]
    raw.add_special_tokens([text for text in special if text and text not in known])


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "prompt", text, f"text without lone surrogates (one at {error.start})"
        ) from error


def _content(token: object) -> str | None:
    """Return the text of a token, which is a string or {"content": ...} in a config file."""
    match token:
        case str(text) | {"content": str(text)}:
            return text
    return None


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
