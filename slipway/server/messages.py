"""Messages between the HTTP process and an engine process, as msgspec frames (never pickle).

Each side sends lists of messages. One frame holds all messages of an engine's step, or of a turn of
the HTTP process's event loop. The HTTP process numbers the requests.

Not here: sending them (replica.py, worker.py).
"""

from typing import Any

import msgspec

from slipway.engine.config import EngineConfig
from slipway.engine.request import DraftCounts, RequestSpec
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

MAX_GOT_CHARACTERS = 200  # of a wrong value in an error


class Start(msgspec.Struct, tag=True):
    """Order to load a model; the first message."""

    model: str
    config: EngineConfig
    log_format: Format


class Add(msgspec.Struct, tag=True):
    """Order to run a prompt."""

    number: int
    spec: RequestSpec


class Abort(msgspec.Struct, tag=True):
    """Order to end a request if it is running."""

    number: int


class Query(msgspec.Struct, tag=True):
    """Order that the engine answers at once with a Reply.

    ``action`` is one of ``stats``, ``flush``, ``pause``, ``resume``, ``start_profile``,
    ``stop_profile``. ``folder``: directory for a trace.
    """

    number: int
    action: str
    folder: str = ""


class Change(msgspec.Struct, tag=True):
    """Order to change the engine's weights, answered later with a Reply or OperationFailed.

    ``action`` and ``args``: ``update_weights`` with source, version, mode and policy; ``sleep``
    with a level; or ``wake_up``.
    """

    number: int
    action: str
    args: list[Any] = []


class Stop(msgspec.Struct, tag=True):
    """Order to end the process."""


class Sample(msgspec.Struct, array_like=True):
    """New part of one sample.

    ``logprobs``: for each new token {id: (log probability, rank)}, its own first. ``weights``: in
    the last part, each version of the weights with the first token it generated.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, tuple[float, int]]] | None = None
    weights: list[tuple[int, str]] | None = None


class Delta(msgspec.Struct, tag=True):
    """New output of a request.

    The first and the last Delta have ``prompt_logprobs``. Only the last has ``num_cached_tokens``,
    ``drafts``, the sums of speculation, and ``hidden``, the pooled hidden state of the prompt.
    """

    number: int
    samples: list[Sample]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] | None = None
    hidden: list[float] | None = None
    drafts: DraftCounts = DraftCounts()


class Reply(msgspec.Struct, tag=True):
    """Result of a Query or a Change."""

    number: int
    value: Any


class OperationFailed(msgspec.Struct, tag=True):
    """Failure of an Add or a Change: the exception's class and the arguments to make it again."""

    number: int
    kind: str
    args: list[Any]


class Ready(msgspec.Struct, tag=True):
    """Notice that the engine is loaded and compiled."""

    limits: dict[str, Any]
    defaults: dict[str, Any]


class LoadFailed(msgspec.Struct, tag=True):
    """Notice that the model cannot be loaded: the exception's class and text."""

    kind: str
    text: str


ToEngine = Start | Add | Abort | Query | Change | Stop
FromEngine = Delta | Reply | OperationFailed | Ready | LoadFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_from_engine = msgspec.msgpack.Decoder(list[FromEngine]).decode


def operation_failed(number: int, error: BaseException) -> OperationFailed:
    """Return an error as a message."""
    if isinstance(error, CheckpointError):
        return OperationFailed(number, "CheckpointError", [str(error.path), error.problems])
    # Also UnsupportedModel, for the config.json of new weights.
    if isinstance(error, InvalidInput):
        got = repr(error.got)[:MAX_GOT_CHARACTERS]
        return OperationFailed(number, "InvalidRequest", [error.field, got, error.expected])
    if isinstance(error, EngineBusy):
        return OperationFailed(number, "EngineBusy", [error.what, error.retry_after_s])
    if isinstance(error, WeightsLost):
        return OperationFailed(number, "WeightsLost", [str(error)])
    return OperationFailed(number, "EngineDead", [f"{type(error).__name__}: {error}"])


def error_of(message: OperationFailed) -> SlipwayError:
    """Return the error in a message of ``operation_failed``."""
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
    """Return the value of a Reply to ``stats`` as a Snapshot."""
    return msgspec.convert(value, Snapshot)
