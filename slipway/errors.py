"""Tree of the exceptions that Slipway raises.

SlipwayError
├── InvalidInput (ValueError)      an invalid field of a caller's input: .field, .got, .expected
│   ├── InvalidRequest             a prompt or a sampling parameter
│   │   ├── ContextTooLong         a prompt too long for the model's context: .max_model_len
│   │   └── InvalidBatch           several requests of one call: .errors, .outputs
│   ├── InvalidConfig              an engine option, or options that contradict each other
│   └── UnsupportedModel           an architecture or config.json value that is not implemented
├── CheckpointError (ValueError)   an invalid model directory, or one that does not fit: .problems
├── OutOfMemory (MemoryError)      the weights, or a single page, exceed the memory budget
├── EngineBusy                     the queue is full; the request was not started
│   └── ClientBusy                 one client's share of the queue is full
├── WeightsLost                    an update failed half-way, or the weights were dropped
└── EngineDead                     the engine has stopped, by an error or because it was closed

Not here: the HTTP status of an error (server/middleware.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any


class SlipwayError(Exception):
    """Base class of all errors that Slipway raises on purpose."""


class InvalidInput(SlipwayError, ValueError):
    """Invalid value of one field.

    ``field`` is its name, ``got`` the value, ``expected`` a description of the valid values.
    """

    def __init__(self, field: str, got: object, expected: str):
        super().__init__(f"{field}: got {_short(got)}, expected {expected}")
        self.field = field
        self.got = got
        self.expected = expected


class InvalidRequest(InvalidInput):
    """Invalid prompt or sampling parameter."""


class ContextTooLong(InvalidRequest):
    """Prompt too long for the model's context.

    Clients that shorten a conversation and retry search the message for "maximum context length is
    N tokens".
    """

    def __init__(self, field: str, got: str, max_model_len: int):
        super().__init__(field, Shown(got), f"fewer than max_model_len ({max_model_len})")
        self.args = (
            f"{field}: This model's maximum context length is {max_model_len} tokens, and an "
            f"answer needs at least one of them; got {got}. Shorten the prompt.",
        )
        self.max_model_len = max_model_len


class InvalidBatch(InvalidRequest):
    """Refusal of some requests of one call, after the others have finished.

    ``errors`` maps the position of a refused prompt to its InvalidRequest. ``outputs`` holds, in
    the order of the prompts, the finished outputs, and None for refused prompts.
    """

    def __init__(self, errors: Mapping[int, InvalidRequest], outputs: Sequence[Any]):
        position, first = next(iter(errors.items()))
        super().__init__(f"prompts[{position}].{first.field}", first.got, first.expected)
        self.errors = dict(errors)
        self.outputs = list(outputs)
        if len(errors) > 1:
            self.args = ("\n".join(f"prompts[{i}].{error}" for i, error in errors.items()),)


class InvalidConfig(InvalidInput):
    """Engine option out of its range, or in contradiction to another option."""


class UnsupportedModel(InvalidInput):
    """Architecture or config value of a checkpoint that is not implemented.

    Such a checkpoint is refused, never approximated.
    """


class CheckpointError(SlipwayError, ValueError):
    """Checkpoint with invalid files, or with files that do not fit the model's declaration.

    ``problems`` lists every mismatch.
    """

    def __init__(self, path: object, problems: Sequence[str]):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{path}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.path = path
        self.problems = list(problems)


class OutOfMemory(SlipwayError, MemoryError):
    """Memory budget too small for the weights and the pages of one request."""


RETRY_AFTER_S = 1.0  # after a refusal because of a full queue


class EngineBusy(SlipwayError):
    """Full queue: ``what`` says which limit of requests or tokens is reached.

    ``retry_after_s`` is the number of seconds after which a retry may succeed.
    """

    def __init__(self, what: str, retry_after_s: float = RETRY_AFTER_S):
        super().__init__(f"{what}; try again in {retry_after_s:.0f} s")
        self.what = what
        self.retry_after_s = retry_after_s


class EngineDead(SlipwayError):
    """Stopped engine; its requests end with this error."""


class WeightsLost(SlipwayError):
    """Engine without complete weights; it serves again after a successful update."""


class ClientBusy(EngineBusy):
    """Limit of the requests of one client is reached."""


class Shown:
    """Description that takes the place of a value in an error's ``got``."""

    def __init__(self, text: str):
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
