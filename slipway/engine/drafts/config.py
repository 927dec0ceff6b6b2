"""Options of speculative decoding, under vLLM's names (``--speculative-config``).

Not here: SGLang's flags (flags.py), what needs the model's files (engine/launch.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from slipway.errors import InvalidConfig

METHODS = ("ngram", "mtp", "eagle", "eagle3", "draft_model")
# Methods of which ``model`` names the files.
OF_OTHER_FILES = ("eagle", "eagle3", "draft_model")
MAX_DRAFTS = 64
MAX_LOOKUP = 256
MAX_SHARED_TOKENS = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Options of speculation. Raises InvalidConfig, naming the field, for an invalid value."""

    method: str
    """Source of the drafts. ngram: text that is repeated; mtp: the model's own prediction layer;
    eagle, eagle3: a head trained for the model; draft_model: a smaller model."""
    model: str = ""
    """Directory or hub id of the head or of the smaller model; mtp: of the prediction layer, if
    that is not among the model's files."""
    revision: str | None = None
    """Branch, tag or commit of a hub id in ``model``."""
    num_speculative_tokens: int
    """Most drafts of a sequence in one step; fewer, or none, where fewer pay."""
    prompt_lookup_min: int = 1
    """ngram: fewest tokens of a match."""
    prompt_lookup_max: int = 32
    """ngram: tokens from which on a longer match is not preferred."""
    shared_tokens: int = 0
    """ngram: about as many of the engine's newest output tokens are searched, too, except those of
    requests with a cache_salt; 0: a sequence's own tokens only."""

    def __post_init__(self):
        """Raise InvalidConfig for a value out of its range."""
        ranges = {
            "num_speculative_tokens": (1, MAX_DRAFTS),
            "prompt_lookup_min": (1, MAX_LOOKUP),
            "prompt_lookup_max": (1, MAX_LOOKUP),
            "shared_tokens": (0, MAX_SHARED_TOKENS),
        }
        if self.method not in METHODS:
            raise _invalid("method", self.method, " | ".join(METHODS))
        if not isinstance(self.model, str) or (self.model and self.method == "ngram"):
            raise _invalid(
                "model", self.model, "a directory or hub id, and a method other than ngram"
            )
        if not self.model and self.method in OF_OTHER_FILES:
            raise _invalid("model", "nothing", f"a directory or hub id, for {self.method}")
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                raise _invalid(field, value, f"an integer from {low} to {high}")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            expected = f"at least prompt_lookup_min ({self.prompt_lookup_min})"
            raise _invalid("prompt_lookup_max", self.prompt_lookup_max, expected)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Return the options in a mapping. Raises InvalidConfig for unknown and missing fields."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in fields:
                raise _invalid(name, given[name], f"no such field; there are {', '.join(fields)}")
        for name in ("method", "num_speculative_tokens"):
            if name not in given:
                raise _invalid(name, "nothing", "a value")
        return cls(**given)


def _invalid(field: str, got: Any, expected: str) -> InvalidConfig:
    return InvalidConfig(f"speculative_config: {field}", got, expected)
