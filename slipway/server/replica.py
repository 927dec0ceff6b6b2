"""An engine process as the HTTP process sees it: started, talked to, found dead, started again; knows no HTTP.

Sockets lie in a directory that only this user can enter.
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
from slipway.engine.params import SamplingParams
from slipway.engine.stats import Snapshot
from slipway.errors import EngineBusy, EngineDead, InvalidRequest, Shown, SlipwayError, WeightsLost
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
    Refused,
    Reply,
    Start,
    Stop,
)

logger = logging.getLogger(__name__)
FIRST_BACKOFF_S, LONGEST_BACKOFF_S, STEADY_S = 0.5, 30.0, 60.0
POLL_S = 0.2  # how often the process is looked after


class Stream:
    """A request's answers as they come. Whoever opened it closes it; what has not ended then is aborted."""

    def __init__(self, replica: "Replica", number: int, num_tokens: int):
        self._replica, self._number, self.num_tokens = replica, number, num_tokens
        self._items: list[Delta | SlipwayError] = []
        self._waiter: asyncio.Future[None] | None = None
        self.finished = False

    async def next(self) -> list[Delta]:
        """What has come since the last call, at least one; the last of all is finished. One task asks at a time.

        Raises InvalidRequest or EngineDead.
        """
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        deltas = []
        for item in items:
            if isinstance(item, SlipwayError):
                self.finished = True
                raise item
            self.finished |= item.finished
            deltas.append(item)
        return deltas

    def put(self, item: Delta | SlipwayError) -> None:
        """Something has come."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self) -> None:
        """End the request where it stands; the stream ends as it does by itself."""
        if not self.finished:
            self._replica.send(Abort(self._number))

    def close(self) -> None:
        """Nobody reads any more."""
        self.abort()
        self._replica.forget(self._number, self)


class Replica:
    """One engine process. All methods are called from one event loop."""

    def __init__(
        self, model: str, config: EngineConfig, folder: Path, name: str, log_format: Format
    ):
        self._start, self._address = Start(model, config, log_format), f"ipc://{folder / name}"
        self.name, self.ready = name, asyncio.Event()
        self.info: Ready | None = None  # of the last start
        self.load_failure: LoadFailed | None = (
            None  # why the first start failed: another would, too
        )
        self.num_starts = self.load = 0
        self.weights_version, self.refuses = "0", ""  # why it takes no request though it runs
        self._dropped = False
        self._update: list[
            Any
        ] = []  # the arguments of the last that succeeded: a new process needs it, too
        self._process: subprocess.Popen | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._out: list[messages.ToEngine] = []
        self._task: asyncio.Task | None = None
        self._restore_task: asyncio.Future | None = None

    def start(self) -> None:
        """Begin, and from now on see to it that an engine runs."""
        self._task = asyncio.create_task(self._keep_running(), name=f"replica {self.name}")

    def open(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
        pooling: str = "",
    ) -> Stream:
        """Start a request. Raises EngineDead or EngineBusy; what is wrong with it comes through the stream."""
        if not self.ready.is_set():
            raise EngineDead("the engine is not ready")
        if self.refuses:
            raise EngineBusy(self.refuses)
        number = next(self._numbers)
        stream = self._streams[number] = Stream(self, number, params.num_samples * len(token_ids))
        self.load += stream.num_tokens
        self.send(Add(number, token_ids, params, priority, timeout_s, cache_salt, pooling))
        return stream

    def forget(self, number: int, stream: Stream) -> None:
        """A stream is closed."""
        self.load -= stream.num_tokens
        self._streams.pop(number, None)

    @property
    def serves(self) -> bool:
        """Whether it takes requests."""
        return self.ready.is_set() and not self.refuses

    async def query(self, action: str, folder: str = "") -> Any:
        """One of Query's questions. Raises EngineDead."""
        return await self._replied(lambda number: Query(number, action, folder))

    async def change(self, action: str, *args: Any) -> Any:
        """``update_weights``, ``sleep`` or ``wake_up``. Raises what the engine's do, or EngineDead."""
        try:
            value = await self._replied(lambda number: Change(number, action, list(args)))
        except WeightsLost as error:
            self.refuses = str(error)
            raise
        if action == "sleep":
            self.refuses = "the engine sleeps"
            if args == (2,):
                self._dropped = True
        elif action == "wake_up":
            self.refuses = "the engine has no weights: update them" if self._dropped else ""
        else:
            self.weights_version, self._update, self._dropped = value, list(args), False
            if not self.refuses.startswith("the engine sleeps"):
                self.refuses = ""
        return value

    async def _replied(self, message: Callable[[int], messages.ToEngine]) -> Any:
        if not self.ready.is_set():
            raise EngineDead("the engine is not ready")
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        self.send(message(number))
        return await future

    async def stats(self) -> Snapshot:
        """What runs, waits and is cached. Raises EngineDead."""
        return messages.snapshot(await self.query("stats"))

    async def close(self) -> None:
        """End the process; what runs ends with EngineDead."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None and self._process.poll() is None:
            if self._socket is not None and not self._socket.closed:
                with contextlib.suppress(
                    TimeoutError
                ):  # it may be ending by itself, and read no more
                    await asyncio.wait_for(self._socket.send(messages.encode([Stop()])), 1)
            try:
                await asyncio.to_thread(self._process.wait, 10)
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
                return  # it never ran: the server says why and ends
            if time.monotonic() - started > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            logger.error(
                "engine process %s has died; starting it again in %.1f s", self.name, backoff_s
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    async def _run(self) -> None:
        """Start a process and hand out what it says, until it ends."""
        if self._socket is not None:
            self._socket.close(linger=0)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.bind(self._address)
        command = [sys.executable, "-m", "slipway.server.worker", self._address]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.num_starts += 1
        await self._socket.send(messages.encode([self._start]))
        dead = asyncio.create_task(_died(self._process))
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
        if isinstance(message, Delta):
            if (stream := self._streams.get(message.number)) is not None:
                stream.put(message)
        elif isinstance(message, Refused):
            if (stream := self._streams.get(message.number)) is not None:
                stream.put(InvalidRequest(message.field, Shown(message.got), message.expected))
        elif isinstance(message, Reply):
            if (
                future := self._answers.pop(message.number, None)
            ) is not None and not future.done():
                future.set_result(message.value)
        elif isinstance(message, OperationFailed):
            error = messages.error_of(message)
            if (stream := self._streams.get(message.number)) is not None:
                stream.put(error)
            elif (
                future := self._answers.pop(message.number, None)
            ) is not None and not future.done():
                future.set_exception(error)
        elif isinstance(message, Ready):
            self.info = message
            self.refuses, self._dropped = "", False
            self.ready.set()
            if self._update:  # it has loaded what the first process did
                self.refuses = "the engine is given the weights that it had"
                self._restore_task = asyncio.ensure_future(self._restore_weights())
        else:
            self.load_failure = message

    async def _restore_weights(self) -> None:
        try:
            await self.change("update_weights", *self._update)
        except SlipwayError as error:
            self.refuses = f"the engine has died, and its weights {self.weights_version} cannot be had again: {error}"
            logger.error("%s", self.refuses)

    def send(self, message: messages.ToEngine) -> None:
        """Send what was said in this turn of the loop in one frame."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(message)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._socket is not None and not self._socket.closed and self.ready.is_set():
            task = asyncio.ensure_future(self._socket.send(messages.encode(out)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _fail_pending(self, why: str) -> None:
        """End everything that waits for the engine."""
        for stream in self._streams.values():
            stream.put(EngineDead(why))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(EngineDead(why))
        self._answers.clear()
        self._out.clear()


async def _died(process: subprocess.Popen) -> None:
    while process.poll() is None:
        await asyncio.sleep(POLL_S)
