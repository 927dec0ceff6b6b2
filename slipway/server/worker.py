"""An engine process: python -m slipway.server.worker ADDRESS. Runs an engine for the HTTP process that started it.

It ends when it is told to, and when that process is gone. Knows no HTTP.
"""

import dataclasses
import logging
import os
import sys

import zmq

from slipway.engine.engine import Engine
from slipway.engine.launch import launch
from slipway.engine.request import Logprobs, Request
from slipway.errors import InvalidRequest, SlipwayError
from slipway.server import messages
from slipway.server.messages import Abort, Add, Answer, Ask, Delta, Failed, Ready, Refused, Sample, Start, Stop

logger = logging.getLogger(__name__)
ORPHANED_MS = 1000  # how often an idle engine looks whether its parent lives


class Worker:
    """Messages in, an engine's steps, messages out."""

    def __init__(self, engine: Engine, socket: zmq.Socket):
        self._engine, self._socket = engine, socket
        self._numbers: dict[str, int] = {}  # the engine's request id -> the HTTP process's number
        self._ids: dict[int, str] = {}
        self._paused = False
        self._out: list[messages.FromEngine] = []

    def run(self) -> None:
        """Serve until told to stop, or until the parent is gone."""
        parent = os.getppid()
        while os.getppid() == parent:
            works = self._engine.has_work() and not self._paused
            if self._socket.poll(0 if works else ORPHANED_MS):
                for message in messages.decode_to_engine(self._socket.recv()):
                    if isinstance(message, Stop):
                        return
                    self._obey(message)
            elif works:
                for request in self._engine.step():
                    self._tell(request)
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
        elif isinstance(message, Ask):
            self._out.append(Answer(message.number, self._answer(message.what)))

    def _add(self, message: Add) -> None:
        try:
            request_id = self._engine.add(
                message.token_ids, message.params, priority=message.priority, timeout_s=message.timeout_s,
                cache_salt=message.cache_salt, pooling=message.pooling,
            )  # fmt: skip
        except InvalidRequest as error:
            self._out.append(Refused(message.number, error.field, repr(error.got)[:200], error.expected))
            return
        self._numbers[request_id], self._ids[message.number] = message.number, request_id

    def _answer(self, what: str) -> object:
        if what == "stats":
            return dataclasses.asdict(self._engine.snapshot())
        if what == "flush":
            return self._engine.flush()
        self._paused = what == "pause"
        return None

    def _tell(self, request: Request) -> None:
        """What is new in a request; the whole of its best samples at the end, where only that shows which they are."""
        chooses = request.params.num_samples > request.params.n
        if chooses and not request.finished:
            return
        output = request.output() if chooses else request.delta()
        samples = [
            Sample(
                each.index, each.text, each.token_ids, each.finish_reason, each.stop_reason,
                None if each.logprobs is None else [_plain(entry) for entry in each.logprobs],
            )
            for each in output.outputs if each.token_ids or each.text or each.finish_reason
        ]  # fmt: skip
        number = self._numbers[request.request_id]
        delta = Delta(number, samples, output.finished)
        if output.finished:
            hidden = output.hidden
            delta.num_cached_tokens = output.num_cached_tokens
            if output.prompt_logprobs is not None:
                delta.prompt_logprobs = [None if entry is None else _plain(entry) for entry in output.prompt_logprobs]
            delta.hidden = None if hidden is None else hidden.tolist()
            del self._numbers[request.request_id], self._ids[number]
        self._out.append(delta)


def _plain(entry: Logprobs) -> dict[int, tuple[float, int]]:
    return {token: (each.logprob, each.rank) for token, each in entry.items()}


def main(address: str) -> None:
    """Load what the first message names, and serve."""
    logging.basicConfig(level=logging.INFO, format="engine: %(message)s")
    socket: zmq.Socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(address)
    (start,) = messages.decode_to_engine(socket.recv())
    assert isinstance(start, Start)
    try:
        engine = launch(start.model, start.config)
    except SlipwayError as error:
        socket.send(messages.encode([Failed(type(error).__name__, str(error))]))
        socket.close(linger=5000)
        sys.exit(2)
    limits = dataclasses.asdict(engine.limits)
    socket.send(messages.encode([Ready(limits, engine.defaults)]))
    Worker(engine, socket).run()
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
