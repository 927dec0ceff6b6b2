"""The exception tree: decides what can go wrong and what each failure must say; knows nothing of who raises it.

SlipwayError
├── InvalidInput (ValueError)      one field of something a caller passed: .field, .got, .expected
│   ├── InvalidRequest             a prompt or a sampling parameter
│   │   ├── ContextTooLong         a prompt that does not fit the model's context: .max_model_len
│   │   └── InvalidBatch           several requests of one call: .errors, and .outputs of those that finished
│   ├── InvalidConfig              an engine option, or options that contradict each other
│   └── UnsupportedModel           an architecture or a config.json value that is not implemented
├── CheckpointError (ValueError)   a directory that is no model, or does not fit its declaration: .problems
├── OutOfMemory (MemoryError)      the weights, or a single page, exceed the memory budget
├── EngineBusy                     as many requests wait as may; nothing of this one was begun
│   └── ClientBusy                 as many of one client
├── WeightsLost                    an update failed half-way, or the weights are dropped; until one succeeds
└── EngineDead                     the engine has stopped, by an error or because it was closed
"""

from collections.abc import Mapping, Sequence
from typing import Any


class SlipwayError(Exception):
    """Base of everything that Slipway raises on purpose."""


class InvalidInput(SlipwayError, ValueError):
    """One field holds a value that cannot be honoured."""

    def __init__(self, field: str, got: object, expected: str):
        super().__init__(f"{field}: got {_short(got)}, expected {expected}")
        self.field, self.got, self.expected = field, got, expected


class InvalidRequest(InvalidInput):
    """A prompt or a sampling parameter is out of its range."""


class ContextTooLong(InvalidRequest):
    """A prompt has no room in the model's context.

    Clients that shorten a conversation and try again look for "maximum context length is N tokens" in the message.
    """

    def __init__(self, field: str, got: str, max_model_len: int):
        super().__init__(field, Shown(got), f"fewer than max_model_len ({max_model_len})")
        self.args = (
            f"{field}: This model's maximum context length is {max_model_len} tokens, and an answer needs at least one "
            f"of them; got {got}. Shorten the prompt.",
        )
        self.max_model_len = max_model_len


class InvalidBatch(InvalidRequest):
    """Some requests of one call were refused; the others ran to their end.

    ``errors`` maps a prompt's position to its InvalidRequest; ``outputs`` holds, in the order of the prompts, what
    finished, and None where the request was refused.
    """

    def __init__(self, errors: Mapping[int, InvalidRequest], outputs: Sequence[Any]):
        first = next(iter(errors))
        super().__init__(f"prompts[{first}].{errors[first].field}", errors[first].got, errors[first].expected)
        self.errors, self.outputs = dict(errors), list(outputs)
        if len(errors) > 1:
            self.args = ("\n".join(f"prompts[{i}].{error}" for i, error in errors.items()),)


class InvalidConfig(InvalidInput):
    """An engine option is out of range, or contradicts another one."""


class UnsupportedModel(InvalidInput):
    """The checkpoint's architecture or one of its config values is not implemented: refused, never approximated."""


class CheckpointError(SlipwayError, ValueError):
    """A checkpoint is not what its files, or the model's declaration, say it is. ``problems`` lists every mismatch."""

    def __init__(self, path: object, problems: Sequence[str]):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{path}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.path, self.problems = path, list(problems)


class OutOfMemory(SlipwayError, MemoryError):
    """The memory budget does not hold the weights and at least one request's pages."""


RETRY_AFTER_S = 1.0  # after a refusal for lack of room


class EngineBusy(SlipwayError):
    """The queue of requests, or of their tokens, is full. ``retry_after_s``: seconds until another try may succeed."""

    def __init__(self, what: str, retry_after_s: float = RETRY_AFTER_S):
        super().__init__(f"{what}; try again in {retry_after_s:.0f} s")
        self.what, self.retry_after_s = what, retry_after_s


class EngineDead(SlipwayError):
    """The engine does not run any more; requests that it had end with this error."""


class WeightsLost(SlipwayError):
    """The engine holds no whole version of the weights; it serves again once an update has succeeded."""


class ClientBusy(EngineBusy):
    """One client has reached its limit of requests."""


class Shown:
    """A description where an error's value belongs, when that is not at hand."""

    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
