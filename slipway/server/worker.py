"""Engine process of the server: python -m slipway.server.worker ADDRESS.

It runs an engine for the HTTP process that started it, and ends when that process ends or sends
Stop.

Not here: the HTTP process's side (replica.py), the engine itself (engine/).
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
from slipway.convert import weight_sources
from slipway.engine.engine import Engine
from slipway.engine.launch import launch
from slipway.engine.request import Logprobs, Request
from slipway.errors import SlipwayError
from slipway.server import logs, messages
from slipway.server.messages import (
    Abort,
    Add,
    Change,
    Delta,
    LoadFailed,
    Query,
    Ready,
    Reply,
    Sample,
    Start,
    Stop,
)
from slipway.server.process import tune_garbage_collector

logger = logging.getLogger(__name__)
# How long an idle engine waits for a message before it looks:
CHECK_POLL_MS = 5  # whether the check of new weights is finished
PARENT_POLL_MS = 1000  # whether the HTTP process is alive
LOAD_FAILED_LINGER_MS = 5000
LOAD_FAILED_EXIT_CODE = 2


class Worker:
    """Loop that reads messages, runs the engine's steps, and sends messages."""

    def __init__(self, engine: Engine, socket: zmq.Socket):
        self._engine = engine
        self._socket = socket
        self._numbers: dict[str, int] = {}  # the engine's request id -> the HTTP process's number
        self._ids: dict[int, str] = {}
        self._scored: set[int] = set()  # requests with their prompt's log probabilities sent
        self._paused = False
        self._profiling = False
        self._checker = ThreadPoolExecutor(1)  # reads and checks new weights while steps run
        self._checked: list[tuple[Change, Future[Any]]] = []
        self._changes: list[tuple[int, Future[Any]]] = []
        self._out: list[messages.FromEngine] = []

    def run(self) -> None:
        """Serve until Stop is received or the parent process has ended."""
        parent = os.getppid()
        while os.getppid() == parent:
            has_work = self._engine.has_work() and (not self._paused or self._engine.changes_now)
            idle_ms = CHECK_POLL_MS if self._checked else PARENT_POLL_MS
            if self._socket.poll(0 if has_work else idle_ms):
                for message in messages.decode_to_engine(self._socket.recv()):
                    if isinstance(message, Stop):
                        return
                    self._handle(message)
            elif has_work:
                for request in self._engine.step():
                    self._send_output(request)
            if self._checked or self._changes:
                self._follow_changes()
            if self._out:
                self._socket.send(messages.encode(self._out))
                self._out = []

    def _handle(self, message: messages.ToEngine) -> None:
        if isinstance(message, Add):
            self._add(message)
        elif isinstance(message, Abort):
            if (request_id := self._ids.get(message.number)) is not None:
                request = self._engine.request(request_id)
                self._engine.abort(request_id)
                self._send_output(request)
        elif isinstance(message, Query):
            self._out.append(Reply(message.number, self._query(message)))
        elif isinstance(message, Change) and message.action == "update_weights":
            source, _, mode, _ = message.args
            self._checked.append((message, self._checker.submit(self._check, source, mode)))
        elif isinstance(message, Change):
            method = getattr(self._engine, message.action)
            self._start_change(message.number, partial(method, *message.args))

    def _check(self, source: str, mode: Mode) -> Values:
        """Return new weights after checking them against the engine's."""
        values = weight_sources.values(source, self._engine.weights)
        values.check(self._engine.weights, mode)
        return values

    def _start_change(self, number: int, change: Callable[[], Future[Any]]) -> None:
        """Hand a change to the engine; if the engine refuses it, send the error."""
        try:
            self._changes.append((number, change()))
        except Exception as error:  # clients choose the source: the engine must survive any error
            logger.exception("a change is refused")
            self._out.append(messages.operation_failed(number, error))

    def _follow_changes(self) -> None:
        """Hand checked updates to the engine, and send the results of finished changes."""
        for message, checked in [each for each in self._checked if each[1].done()]:
            self._checked.remove((message, checked))
            self._start_change(message.number, partial(self._update_weights, message, checked))
        for number, change in [each for each in self._changes if each[1].done()]:
            self._changes.remove((number, change))
            if (error := change.exception()) is None:
                self._out.append(Reply(number, change.result()))
            else:
                self._out.append(messages.operation_failed(number, error))

    def _update_weights(self, message: Change, checked: Future[Values]) -> Future[Any]:
        _, version, mode, policy = message.args
        return self._engine.update_weights(
            checked.result(), version=version, mode=mode, policy=policy
        )

    def _add(self, message: Add) -> None:
        try:
            request_id = self._engine.add(message.spec)
        except SlipwayError as error:
            self._out.append(messages.operation_failed(message.number, error))
            return
        self._numbers[request_id] = message.number
        self._ids[message.number] = request_id

    def _query(self, message: Query) -> object:
        action = message.action
        if action in ("start_profile", "stop_profile"):
            return self._profile(action == "start_profile", message.folder)
        if action == "stats":
            return dataclasses.asdict(self._engine.snapshot())
        if action == "flush":
            return self._engine.flush()
        self._paused = action == "pause"
        return None

    def _profile(self, starts: bool, folder: str) -> bool:
        """Start a trace, or stop and write it; return False if one runs already, or none runs."""
        if starts == self._profiling:
            return False
        if starts:
            jax.profiler.start_trace(folder)
        else:
            jax.profiler.stop_trace()
        self._profiling = starts
        return True

    def _send_output(self, request: Request) -> None:
        """Queue a Delta with the new output of a request.

        Of best_of samples, only the end shows which are the best; they are sent whole then.
        """
        chooses = request.spec.params.num_samples > request.spec.params.n
        if (chooses or not _is_prompt_scored(request)) and not request.finished:
            return
        outputs = request.output().outputs if chooses else request.deltas()
        samples = [
            _sample(each) for each in outputs if each.token_ids or each.text or each.finish_reason
        ]
        number, finished = self._numbers[request.request_id], request.finished
        delta = Delta(number, samples, finished)
        scored = request.prompt_logprobs
        if scored is not None and (finished or number not in self._scored):
            self._scored.add(number)
            delta.prompt_logprobs = [None if entry is None else _plain(entry) for entry in scored]
        if finished:
            hidden = request.hidden
            self._scored.discard(number)
            delta.num_cached_tokens = request.num_cached
            delta.drafts = request.draft_counts
            delta.hidden = None if hidden is None else hidden.tolist()
            del self._numbers[request.request_id], self._ids[number]
        self._out.append(delta)


def _is_prompt_scored(request: Request) -> bool:
    """Return whether all requested log probabilities of the prompt are computed.

    A stream that echoes the prompt begins with them, even if a sample has tokens earlier.
    """
    scored = request.prompt_logprobs
    return scored is None or len(scored) == len(request.spec.token_ids)


def _sample(output: Any) -> Sample:
    """Return a sample, or its new part, as a part of a message."""
    logprobs = output.logprobs
    return Sample(
        output.index,
        output.text,
        output.token_ids,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        logprobs=None if logprobs is None else [_plain(entry) for entry in logprobs],
        weights=list(output.weights) if output.finish_reason is not None else None,
    )


def _plain(entry: Logprobs) -> dict[int, tuple[float, int]]:
    return {token: (each.logprob, each.rank) for token, each in entry.items()}


def main(address: str) -> None:
    """Load the model that the first message names, and serve it."""
    socket: zmq.Socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(address)
    (start,) = messages.decode_to_engine(socket.recv())
    assert isinstance(start, Start)
    logs.start(start.log_format)
    try:
        engine = launch(start.model, start.config)
    except SlipwayError as error:
        socket.send(messages.encode([LoadFailed(type(error).__name__, str(error))]))
        socket.close(linger=LOAD_FAILED_LINGER_MS)
        sys.exit(LOAD_FAILED_EXIT_CODE)
    limits = dataclasses.asdict(engine.limits)
    num_pages, *num_window_pages = engine.limits.num_pages
    # Pages of the layers that see everything; below, those of each sliding window.
    limits["num_pages"] = num_pages
    limits["windows"] = {
        str(window): count for window, count in zip(engine.limits.windows[1:], num_window_pages)
    }
    tune_garbage_collector()
    socket.send(messages.encode([Ready(limits, engine.defaults)]))
    Worker(engine, socket).run()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
