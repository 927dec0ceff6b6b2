"""What goes between the HTTP process and an engine process: msgspec frames, never pickle; decides their fields alone.

Each side sends lists of messages, all of a step in one frame. Numbers of requests are the HTTP process's.
"""

from typing import Any

import msgspec

from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.stats import Snapshot
from slipway.errors import (
    CheckpointError,
    EngineBusy,
    EngineDead,
    InvalidInput,
    InvalidRequest,
    Shown,
    SlipwayError,
    WeightsLost,
)
from slipway.server.logs import Format


class Start(msgspec.Struct, tag=True):
    """Load a model; the first message."""

    model: str
    config: EngineConfig
    log_format: Format


class Add(msgspec.Struct, tag=True):
    """Run a prompt."""

    number: int
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    pooling: str = ""


class Abort(msgspec.Struct, tag=True):
    """End a request, if it runs."""

    number: int


class Query(msgspec.Struct, tag=True):
    """One of ``stats``, ``flush``, ``pause``, ``resume``, ``start_profile``, ``stop_profile``; answered by an Reply.

    ``folder``: where a trace is to be written.
    """

    number: int
    action: str
    folder: str = ""


class Change(msgspec.Struct, tag=True):
    """``update_weights`` with source, version, mode and policy, ``sleep`` with a level, or ``wake_up``; answered by an
    Reply or a OperationFailed.
    """

    number: int
    action: str
    args: list[Any] = []


class Stop(msgspec.Struct, tag=True):
    """End the process."""


class Sample(msgspec.Struct, array_like=True):
    """What is new in one sample. ``logprobs``: for each new token {id: (log probability, rank)}, its own first."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, tuple[float, int]]] | None = None
    weights: list[tuple[int, str]] | None = None  # with its end: which version, from which token on


class Delta(msgspec.Struct, tag=True):
    """What is new in a request. What belongs to the prompt comes with the last one."""

    number: int
    samples: list[Sample]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] | None = None
    hidden: list[float] | None = None


class Refused(msgspec.Struct, tag=True):
    """The engine does not take a request: InvalidRequest's field, got and expected."""

    number: int
    field: str
    got: str
    expected: str


class Reply(msgspec.Struct, tag=True):
    """To Query."""

    number: int
    value: Any


class OperationFailed(msgspec.Struct, tag=True):
    """To Change, or to an Add that cannot be taken now: the exception's class and what it was made of."""

    number: int
    kind: str
    args: list[Any]


class Ready(msgspec.Struct, tag=True):
    """The engine is loaded and compiled."""

    limits: dict[str, Any]
    defaults: dict[str, Any]


class LoadFailed(msgspec.Struct, tag=True):
    """It could not be loaded; ``kind``: the exception's class, whose text says what to do."""

    kind: str
    text: str


ToEngine = Start | Add | Abort | Query | Change | Stop
FromEngine = Delta | Refused | Reply | OperationFailed | Ready | LoadFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_from_engine = msgspec.msgpack.Decoder(list[FromEngine]).decode


def operation_failed(number: int, error: BaseException) -> OperationFailed:
    """An error as a message."""
    if isinstance(error, CheckpointError):
        return OperationFailed(number, "CheckpointError", [str(error.path), error.problems])
    if isinstance(error, InvalidInput):  # UnsupportedModel, too: of another model's config.json
        return OperationFailed(
            number, "InvalidRequest", [error.field, repr(error.got)[:200], error.expected]
        )
    if isinstance(error, EngineBusy):
        return OperationFailed(number, "EngineBusy", [error.what, error.retry_after_s])
    if isinstance(error, WeightsLost):
        return OperationFailed(number, "WeightsLost", [str(error)])
    return OperationFailed(number, "EngineDead", [f"{type(error).__name__}: {error}"])


def error_of(message: OperationFailed) -> SlipwayError:
    """The inverse of ``operation_failed``."""
    args = message.args
    match message.kind:
        case "CheckpointError":
            return CheckpointError(*args)
        case "InvalidRequest":
            return InvalidRequest(args[0], Shown(args[1]), args[2])
        case "EngineBusy":
            return EngineBusy(*args)
        case "WeightsLost":
            return WeightsLost(*args)
    return EngineDead(*args)


def snapshot(value: Any) -> Snapshot:
    """An Reply's value as what the engine's ``snapshot`` was."""
    return msgspec.convert(value, Snapshot)
