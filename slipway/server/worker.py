"""An engine process: python -m slipway.server.worker ADDRESS. Runs an engine for the HTTP process that started it.

It ends when it is told to, and when that process is gone. Knows no HTTP.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import zmq

from slipway.checkpoint.swap import Mode, Values
from slipway.convert import live
from slipway.engine.engine import Engine
from slipway.engine.launch import launch
from slipway.engine.request import Logprobs, Request, RequestSpec
from slipway.errors import InvalidRequest, SlipwayError
from slipway.server import logs, messages
from slipway.server.messages import (
    Abort,
    Add,
    Change,
    Delta,
    LoadFailed,
    Query,
    Ready,
    Refused,
    Reply,
    Sample,
    Start,
    Stop,
)
from slipway.server.process import tune_garbage_collector

logger = logging.getLogger(__name__)
CHECKING_MS = 5  # how often an idle engine looks whether new weights are checked
ORPHANED_MS = 1000  # how often an idle engine looks whether its parent lives


class Worker:
    """Messages in, an engine's steps, messages out."""

    def __init__(self, engine: Engine, socket: zmq.Socket):
        self._engine, self._socket = engine, socket
        self._numbers: dict[str, int] = {}  # the engine's request id -> the HTTP process's number
        self._ids: dict[int, str] = {}
        self._scored: set[int] = set()  # those whose prompt's log probabilities have been told
        self._paused = self._profiling = False
        self._checker = ThreadPoolExecutor(1)  # reads and checks new weights beside the steps
        self._checked: list[tuple[Change, Future[Any]]] = []
        self._changes: list[tuple[int, Future[Any]]] = []
        self._out: list[messages.FromEngine] = []

    def run(self) -> None:
        """Serve until told to stop, or until the parent is gone."""
        parent = os.getppid()
        while os.getppid() == parent:
            works = self._engine.has_work() and (not self._paused or self._engine.changes_now)
            if self._socket.poll(0 if works else CHECKING_MS if self._checked else ORPHANED_MS):
                for message in messages.decode_to_engine(self._socket.recv()):
                    if isinstance(message, Stop):
                        return
                    self._obey(message)
            elif works:
                for request in self._engine.step():
                    self._tell(request)
            if self._checked or self._changes:
                self._follow_changes()
            if self._out:
                self._socket.send(messages.encode(self._out))
                self._out = []

    def _obey(self, message: messages.ToEngine) -> None:
        if isinstance(message, Add):
            self._add(message)
        elif isinstance(message, Abort):
            if (request_id := self._ids.get(message.number)) is not None:
                request = self._engine.request(request_id)
                self._engine.abort(request_id)
                self._tell(request)
        elif isinstance(message, Query):
            self._out.append(Reply(message.number, self._answer(message)))
        elif isinstance(message, Change) and message.action == "update_weights":
            self._checked.append(
                (message, self._checker.submit(self._check, message.args[0], message.args[2]))
            )
        elif isinstance(message, Change):
            self._change(
                message.number, lambda: getattr(self._engine, message.action)(*message.args)
            )

    def _check(self, source: str, mode: Mode) -> Values:
        values = live.values(source, self._engine.weights)
        values.check(self._engine.weights, mode)
        return values

    def _change(self, number: int, ask: Callable[[], Future[Any]]) -> None:
        """Query the engine for a change."""
        try:
            self._changes.append((number, ask()))
        except Exception as error:  # of a source, which is a client's: the engine serves on
            logger.exception("a change is refused")
            self._out.append(messages.operation_failed(number, error))

    def _follow_changes(self) -> None:
        """Query for what has been checked, and say what has been made."""
        for message, checked in [each for each in self._checked if each[1].done()]:
            self._checked.remove((message, checked))
            self._change(message.number, partial(self._exchange, message, checked))
        for number, change in [each for each in self._changes if each[1].done()]:
            self._changes.remove((number, change))
            error = change.exception()
            answer = (
                Reply(number, change.result())
                if error is None
                else messages.operation_failed(number, error)
            )
            self._out.append(answer)

    def _exchange(self, message: Change, checked: Future[Values]) -> Future[Any]:
        _, version, mode, policy = message.args
        return self._engine.update_weights(
            checked.result(), version=version, mode=mode, policy=policy
        )

    def _add(self, message: Add) -> None:
        try:
            request_id = self._engine.add(
                RequestSpec(
                    message.token_ids,
                    message.params,
                    priority=message.priority,
                    timeout_s=message.timeout_s,
                    cache_salt=message.cache_salt,
                    pooling=message.pooling,
                )
            )
        except InvalidRequest as error:
            self._out.append(
                Refused(message.number, error.field, repr(error.got)[:200], error.expected)
            )
            return
        except SlipwayError as error:  # it sleeps, or has lost its weights
            self._out.append(messages.operation_failed(message.number, error))
            return
        self._numbers[request_id], self._ids[message.number] = message.number, request_id

    def _answer(self, message: Query) -> object:
        what = message.action
        if what in ("start_profile", "stop_profile"):
            return self._profile(what == "start_profile", message.folder)
        if what == "stats":
            return dataclasses.asdict(self._engine.snapshot())
        if what == "flush":
            return self._engine.flush()
        self._paused = what == "pause"
        return None

    def _profile(self, starts: bool, folder: str) -> bool:
        """Start a trace, or write what was traced; False if one runs already, or none."""
        if starts == self._profiling:
            return False
        if starts:
            jax.profiler.start_trace(folder)
        else:
            jax.profiler.stop_trace()
        self._profiling = starts
        return True

    def _tell(self, request: Request) -> None:
        """What is new in a request; the whole of its best samples at the end, where only that shows which they are."""
        chooses, scored = request.spec.params.num_samples > request.spec.params.n, request.prompt_logprobs
        if (chooses or not _is_scored(request)) and not request.finished:
            return
        samples = [
            Sample(
                each.index,
                each.text,
                each.token_ids,
                each.finish_reason,
                each.stop_reason,
                None if each.logprobs is None else [_plain(entry) for entry in each.logprobs],
                list(each.weights) if each.finish_reason is not None else None,
            )
            for each in (request.output().outputs if chooses else request.deltas())
            if each.token_ids or each.text or each.finish_reason
        ]
        number, finished = self._numbers[request.request_id], request.finished
        delta = Delta(number, samples, finished)
        if scored is not None and (finished or number not in self._scored):
            self._scored.add(number)
            delta.prompt_logprobs = [None if entry is None else _plain(entry) for entry in scored]
        if finished:
            hidden = request.hidden
            self._scored.discard(number)
            delta.num_cached_tokens = request.num_cached
            delta.hidden = None if hidden is None else hidden.tolist()
            del self._numbers[request.request_id], self._ids[number]
        self._out.append(delta)


def _is_scored(request: Request) -> bool:
    """Whether its prompt is scored as far as asked: a stream that echoes begins with that, though a sample is ahead."""
    return request.prompt_logprobs is None or len(request.prompt_logprobs) == len(
        request.prompt_token_ids
    )


def _plain(entry: Logprobs) -> dict[int, tuple[float, int]]:
    return {token: (each.logprob, each.rank) for token, each in entry.items()}


def main(address: str) -> None:
    """Load what the first message names, and serve."""
    socket: zmq.Socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(address)
    (start,) = messages.decode_to_engine(socket.recv())
    assert isinstance(start, Start)
    logs.start(start.log_format)
    try:
        engine = launch(start.model, start.config)
    except SlipwayError as error:
        socket.send(messages.encode([LoadFailed(type(error).__name__, str(error))]))
        socket.close(linger=5000)
        sys.exit(2)
    limits = dataclasses.asdict(engine.limits)
    tune_garbage_collector()
    socket.send(messages.encode([Ready(limits, engine.defaults)]))
    Worker(engine, socket).run()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
