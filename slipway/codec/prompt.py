"""What a caller may pass as a prompt, and the token ids that it stands for; knows no engine."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest

Prompt = str | Sequence[int] | Mapping[str, Any]
FIELDS = ("prompt", "prompt_token_ids", "cache_salt")


class ParsedPrompt(NamedTuple):
    """A prompt as the engine takes it. ``text``: None where the caller brought none."""

    text: str | None
    token_ids: list[int]
    cache_salt: str = ""


def parse_prompt(prompt: Any, tokenizer: Tokenizer | None) -> ParsedPrompt:
    """A text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids`` and perhaps ``cache_salt``.

    Raises InvalidRequest, naming the field, for anything else, and for text where there is no tokenizer.
    """
    text: Any = prompt if isinstance(prompt, str) else None
    ids: Any = None if isinstance(prompt, str) else prompt
    salt = ""
    if isinstance(prompt, Mapping):
        if unknown := [key for key in prompt if key not in FIELDS]:
            raise InvalidRequest(f"prompt.{unknown[0]}", prompt[unknown[0]], f"no such field; {', '.join(FIELDS)}")
        text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt", "")
    if ids is None:
        if not isinstance(text, str) or not text:
            raise InvalidRequest("prompt", text, "a text that is not empty")
        if tokenizer is None:
            raise InvalidRequest("prompt", text, "token ids; this engine runs with skip_tokenizer_init")
        ids = tokenizer.encode(text)
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise InvalidRequest("prompt", ids, "a text, token ids, or a mapping with one of them")
    return ParsedPrompt(text, [int(i) if isinstance(i, np.integer) else i for i in ids], salt)


def is_batch(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a list of prompts; a list of integers is one prompt."""
    return (
        isinstance(prompts, Sequence)
        and not isinstance(prompts, str)
        and not (prompts and isinstance(prompts[0], int | np.integer))
    )
