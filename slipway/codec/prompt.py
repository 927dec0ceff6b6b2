"""Parsing of a caller's prompt into token ids.

Not here: conversations (chat.py), limits of the prompt's length (engine/admission.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest

Prompt = str | Sequence[int] | Mapping[str, Any]
FIELDS = ("prompt", "prompt_token_ids", "cache_salt")


class ParsedPrompt(NamedTuple):
    """Prompt as the engine takes it. ``text`` is None if the caller gave only token ids."""

    text: str | None
    token_ids: list[int]
    cache_salt: str = ""


def parse_prompt(prompt: Any, tokenizer: Tokenizer | None) -> ParsedPrompt:
    """Parse a text, token ids, or a mapping; ``tokenizer`` is None for an engine without one.

    The fields of a mapping are ``prompt``, ``prompt_token_ids`` and ``cache_salt``. Raises
    InvalidRequest, naming the field, for any other prompt, and for a text without a tokenizer.
    """
    text: Any = prompt if isinstance(prompt, str) else None
    ids: Any = None if isinstance(prompt, str) else prompt
    salt = ""
    if isinstance(prompt, Mapping):
        if unknown := [key for key in prompt if key not in FIELDS]:
            raise InvalidRequest(
                f"prompt.{unknown[0]}", prompt[unknown[0]], f"no such field; {', '.join(FIELDS)}"
            )
        text, ids, salt = (
            prompt.get("prompt"),
            prompt.get("prompt_token_ids"),
            prompt.get("cache_salt", ""),
        )
    if ids is None:
        if not isinstance(text, str) or not text:
            raise InvalidRequest("prompt", text, "a non-empty text")
        if tokenizer is None:
            raise InvalidRequest(
                "prompt", text, "token ids, because this engine runs with skip_tokenizer_init"
            )
        ids = tokenizer.encode(text)
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise InvalidRequest("prompt", ids, "a text, token ids, or a mapping with one of them")
    return ParsedPrompt(text, [int(i) if isinstance(i, np.integer) else i for i in ids], salt)


def is_batch(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Return whether ``prompts`` is a list of prompts; a list of integers is one prompt."""
    return (
        isinstance(prompts, Sequence)
        and not isinstance(prompts, str)
        and not (prompts and isinstance(prompts[0], int | np.integer))
    )
