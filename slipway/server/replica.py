"""An engine process as the HTTP process uses it: start, requests, failure, restart.

The sockets are in a directory that only the server's user can enter.

Not here: the engine process itself (worker.py), the messages (messages.py).
"""

import asyncio
import contextlib
import itertools
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from slipway.engine.config import EngineConfig
from slipway.engine.request import RequestSpec
from slipway.engine.stats import Snapshot
from slipway.errors import EngineBusy, EngineDead, SlipwayError, WeightsLost
from slipway.server import messages
from slipway.server.logs import Format
from slipway.server.messages import (
    Abort,
    Add,
    Change,
    Delta,
    LoadFailed,
    OperationFailed,
    Query,
    Ready,
    Reply,
    Start,
    Stop,
)

logger = logging.getLogger(__name__)
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
STEADY_S = 60.0  # an engine that ran longer is restarted with the first backoff
POLL_S = 0.2  # interval of checks whether the process is alive
STOP_SEND_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 10.0
NOT_READY = "the engine is not ready"
ASLEEP = "the engine sleeps"


class Stream:
    """Messages about one request. Closing it aborts the request if it is still running.

    The code that opened a stream must close it.
    """

    def __init__(self, replica: "Replica", number: int, num_tokens: int):
        self.num_tokens = num_tokens
        self.finished = False
        self._replica = replica
        self._number = number
        self._items: list[Delta | SlipwayError] = []
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[Delta]:
        """Wait for messages; return all since the last call, at least one.

        The last message of all is finished. Only one task may wait at a time. Raises
        InvalidRequest, EngineBusy, WeightsLost or EngineDead.
        """
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items = self._items
        self._items = []
        deltas = []
        for item in items:
            if isinstance(item, SlipwayError):
                self.finished = True
                raise item
            self.finished |= item.finished
            deltas.append(item)
        return deltas

    def put(self, item: Delta | SlipwayError) -> None:
        """Add a message or an error from the engine."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self) -> None:
        """End the request; the stream then finishes as usual."""
        if not self.finished:
            self._replica.send(Abort(self._number))

    def close(self) -> None:
        """Abort the request if it is running, and drop its further messages."""
        self.abort()
        self._replica.forget(self._number, self)


class Replica:
    """One engine process. All methods are called from one event loop."""

    def __init__(
        self, model: str, config: EngineConfig, folder: Path, *, name: str, log_format: Format
    ):
        self.name = name
        self.ready = asyncio.Event()
        self.info: Ready | None = None
        """Limits and defaults that the last started engine reported."""
        self.load_failure: LoadFailed | None = None
        """Reason why the first start failed; another start would fail, too."""
        self.num_starts = 0
        self.load = 0
        """Tokens of the prompts that run or wait, times their samples."""
        self.weights_version = "0"
        self.refuses = ""
        """Reason why a running engine takes no requests; empty if it does."""
        self._start = Start(model, config, log_format)
        self._address = f"ipc://{folder / name}"
        self._has_dropped_weights = False
        # Arguments of the last successful update, which a restarted process needs again.
        self._update: list[Any] = []
        self._process: subprocess.Popen | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._out: list[messages.ToEngine] = []
        self._task: asyncio.Task | None = None
        self._restore_task: asyncio.Future | None = None

    def start(self) -> None:
        """Start an engine process, and restart it whenever it dies."""
        self._task = asyncio.create_task(self._keep_running(), name=f"replica {self.name}")

    def open(self, spec: RequestSpec) -> Stream:
        """Start a request. Raises EngineDead or EngineBusy.

        The stream raises the errors that the engine finds in the request.
        """
        if not self.ready.is_set():
            raise EngineDead(NOT_READY)
        if self.refuses:
            raise EngineBusy(self.refuses)
        number = next(self._numbers)
        stream = Stream(self, number, spec.params.num_samples * len(spec.token_ids))
        self._streams[number] = stream
        self.load += stream.num_tokens
        self.send(Add(number, spec))
        return stream

    def forget(self, number: int, stream: Stream) -> None:
        """Remove a closed stream."""
        self.load -= stream.num_tokens
        self._streams.pop(number, None)

    @property
    def serves(self) -> bool:
        """Whether the engine takes requests."""
        return self.ready.is_set() and not self.refuses

    async def query(self, action: str, folder: str = "") -> Any:
        """Run one of Query's actions; return its result. Raises EngineDead."""
        return await self._reply(lambda number: Query(number, action, folder))

    async def change(self, action: str, *args: Any) -> Any:
        """Run ``update_weights``, ``sleep`` or ``wake_up``; return its result.

        Raises the engine's errors, or EngineDead.
        """
        try:
            value = await self._reply(lambda number: Change(number, action, list(args)))
        except WeightsLost as error:
            self.refuses = str(error)
            raise
        if action == "sleep":
            self.refuses = ASLEEP
            if args == (2,):
                self._has_dropped_weights = True
        elif action == "wake_up":
            self.refuses = ""
            if self._has_dropped_weights:
                self.refuses = "the engine has no weights: update them"
        else:
            self.weights_version = value
            self._update = list(args)
            self._has_dropped_weights = False
            if self.refuses != ASLEEP:
                self.refuses = ""
        return value

    async def _reply(self, message: Callable[[int], messages.ToEngine]) -> Any:
        if not self.ready.is_set():
            raise EngineDead(NOT_READY)
        number = next(self._numbers)
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        self.send(message(number))
        return await future

    async def stats(self) -> Snapshot:
        """Return a snapshot of the engine's figures. Raises EngineDead."""
        return messages.snapshot(await self.query("stats"))

    async def close(self) -> None:
        """End the process; running requests end with EngineDead."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None and self._process.poll() is None:
            if self._socket is not None and not self._socket.closed:
                # The process may be ending by itself, and no longer read.
                with contextlib.suppress(TimeoutError):
                    sending = self._socket.send(messages.encode([Stop()]))
                    await asyncio.wait_for(sending, STOP_SEND_TIMEOUT_S)
            try:
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._fail_pending("the server is stopping")
        if self._socket is not None:
            self._socket.close(linger=0)

    async def _keep_running(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            try:
                await self._run()
            finally:
                self.ready.clear()
            self._fail_pending("the engine process has died")
            if self.info is None:
                return  # the model cannot be loaded: the server reports the reason and ends
            if time.monotonic() - started > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            text = "engine process %s has died; it is restarted in %.1f s"
            logger.error(text, self.name, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _run(self) -> None:
        """Start a process and dispatch its messages until it ends."""
        if self._socket is not None:
            self._socket.close(linger=0)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.bind(self._address)
        # -P: the folder in which the server was started is not searched for modules.
        command = [sys.executable, "-P", "-m", "slipway.server.worker", self._address]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.num_starts += 1
        await self._socket.send(messages.encode([self._start]))
        dead = asyncio.create_task(_wait_until_dead(self._process))
        frame = asyncio.ensure_future(self._socket.recv())
        try:
            while True:
                await asyncio.wait((frame, dead), return_when=asyncio.FIRST_COMPLETED)
                if not frame.done():
                    return
                for message in messages.decode_from_engine(frame.result()):
                    self._dispatch(message)
                frame = asyncio.ensure_future(self._socket.recv())
        finally:
            dead.cancel()
            frame.cancel()

    def _dispatch(self, message: messages.FromEngine) -> None:
        """Pass a message to the stream or the task that waits for it."""
        if isinstance(message, Delta):
            if (stream := self._streams.get(message.number)) is not None:
                stream.put(message)
        elif isinstance(message, Reply):
            if (future := self._waiting(message.number)) is not None:
                future.set_result(message.value)
        elif isinstance(message, OperationFailed):
            error = messages.error_of(message)
            if (stream := self._streams.get(message.number)) is not None:
                stream.put(error)
            elif (future := self._waiting(message.number)) is not None:
                future.set_exception(error)
        elif isinstance(message, Ready):
            self._engine_ready(message)
        else:
            self.load_failure = message

    def _waiting(self, number: int) -> asyncio.Future[Any] | None:
        """Remove and return the future of a Query or Change; None if nothing waits for it."""
        future = self._replies.pop(number, None)
        return None if future is None or future.done() else future

    def _engine_ready(self, message: Ready) -> None:
        self.info = message
        self.refuses = ""
        self._has_dropped_weights = False
        self.ready.set()
        if self._update:  # the restarted process has loaded the weights from before the update
            self.refuses = "the engine was restarted and is loading the updated weights again"
            self._restore_task = asyncio.ensure_future(self._restore_weights())

    async def _restore_weights(self) -> None:
        try:
            await self.change("update_weights", *self._update)
        except SlipwayError as error:
            self.refuses = (
                f"the engine was restarted, but its weights {self.weights_version} "
                f"could not be loaded again: {error}"
            )
            logger.error("%s", self.refuses)

    def send(self, message: messages.ToEngine) -> None:
        """Queue a message; all messages of one turn of the event loop are sent in one frame."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(message)

    def _flush(self) -> None:
        out = self._out
        self._out = []
        if self._socket is not None and not self._socket.closed and self.ready.is_set():
            task = asyncio.ensure_future(self._socket.send(messages.encode(out)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _fail_pending(self, reason: str) -> None:
        """End everything that waits for the engine with EngineDead."""
        for stream in self._streams.values():
            stream.put(EngineDead(reason))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(EngineDead(reason))
        self._replies.clear()
        self._out.clear()


async def _wait_until_dead(process: subprocess.Popen) -> None:
    while process.poll() is None:
        await asyncio.sleep(POLL_S)
