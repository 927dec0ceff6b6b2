"""Asynchronous interface to an engine, with a limited queue and streamed outputs.

A thread of its own runs the engine's steps. Everything that touches the engine runs in that thread,
between two steps; all results of a step are passed to an event loop together.

Not here: HTTP (server/), the order in which requests run (engine/scheduler.py).
"""

import asyncio
import collections
import dataclasses
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from slipway.checkpoint.swap import Mode
from slipway.codec.prompt import Prompt, parse_prompt
from slipway.convert import weight_sources
from slipway.engine.config import MAX_QUEUED_REQUESTS, MAX_QUEUED_TOKENS
from slipway.engine.engine import Engine
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput, RequestSpec
from slipway.engine.stats import Snapshot
from slipway.engine.updates import Policy
from slipway.errors import EngineBusy, EngineDead, SlipwayError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Stream:
    """Results of one request on their way to its caller: outputs, or the error that ended it."""

    loop: asyncio.AbstractEventLoop
    num_tokens: int
    items: asyncio.Queue[RequestOutput | BaseException]


class AsyncEngine:
    """Queue of requests from any number of tasks and event loops to one engine.

    ``max_requests`` and ``max_tokens`` (of prompts) limit the queued and the running requests
    together. Beyond these limits ``generate`` raises EngineBusy before it does anything. All
    methods may be called from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_requests: int = MAX_QUEUED_REQUESTS,
        max_tokens: int = MAX_QUEUED_TOKENS,
    ):
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.tokenizer = engine.tokenizer
        self.limits = engine.limits
        self.defaults = engine.defaults
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()  # for the fields below, which several threads read and write
        self._num_requests = 0
        self._num_tokens = 0
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="slipway-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        pooling: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Complete a prompt; yield what is new after each step, with ``finished`` in the last.

        Leaving the loop early aborts the request. Raises InvalidRequest, EngineBusy or EngineDead.
        """
        params = params or SamplingParams(**self.defaults)
        text, ids, salt = parse_prompt(prompt, self.tokenizer)
        spec = RequestSpec(
            ids,
            params,
            prompt=text,
            priority=priority,
            timeout_s=timeout_s,
            cache_salt=salt,
            pooling=pooling,
        )
        stream = _Stream(asyncio.get_running_loop(), params.num_samples * len(ids), asyncio.Queue())
        self._admit(stream)
        request_id, finished = None, False
        try:
            request_id = await self._ask(lambda: self._start(stream, spec))
            while not finished:
                item = await stream.items.get()
                if isinstance(item, BaseException):
                    raise item
                finished = item.finished
                yield item
        finally:
            if request_id is None:  # refused, or abandoned while it was being queued
                self._call(lambda: self._abandon(stream))
            elif not finished:
                self.abort(request_id)
            self._leave(stream)

    def abort(self, request_id: str) -> None:
        """Abort a request if it is running.

        Its pages are free before the next step, and its stream ends as aborted.
        """
        self._call(lambda: self._abort(request_id))

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait until all others have ended.

        Return False if some were aborted because ``timeout_s`` was over.
        """
        self._draining = True
        ended = await asyncio.to_thread(self._idle.wait, timeout_s)
        if not ended:
            for request_id in list(self._streams):
                self.abort(request_id)
            await asyncio.to_thread(self._idle.wait)
        return ended

    async def stats(self) -> Snapshot:
        """Return the current numbers of requests and pages, and the sums since the start."""
        return await self._ask(self._engine.snapshot)

    async def update_weights(
        self,
        source: Any,
        *,
        mapping: str | None = None,
        mode: Mode = "inplace",
        policy: Policy = "finish",
        version: str | None = None,
    ) -> str:
        """Replace the weights as ``LLM.update_weights`` does.

        ``source`` is checked in another thread, while steps go on.
        """
        weights = self._engine.weights
        values = await asyncio.to_thread(weight_sources.values, source, weights, mapping=mapping)
        await asyncio.to_thread(values.check, weights, mode)
        change = functools.partial(
            self._engine.update_weights,
            values,
            version=version,
            mode=mode,
            policy=policy,
        )
        return await self._change(change)

    async def sleep(self, level: int = 1) -> None:
        """Free memory as ``LLM.sleep`` does.

        Current requests wait for ``wake_up``; new ones are refused with EngineBusy.
        """
        await self._change(lambda: self._engine.sleep(level))

    async def wake_up(self) -> None:
        """Undo ``sleep`` and continue the waiting requests."""
        await self._change(self._engine.wake_up)

    @property
    def weights_version(self) -> str:
        """Version of the weights in use."""
        return self._engine.weights.version

    async def flush(self) -> int:
        """Drop the cached prefixes; return the number of pages freed."""
        return await self._ask(self._engine.flush)

    @property
    def error(self) -> BaseException | None:
        """Error that stopped the engine; None while it runs."""
        return self._error

    def close(self) -> None:
        """End all requests, stop the thread and free the device's memory."""
        self._commands.put(None)
        self._thread.join()
        self._engine.close()

    async def _change(self, command: Callable[[], Future[Any]]) -> Any:
        """Run a command that requests a change between two steps; return the change's result."""
        return await asyncio.wrap_future(await self._ask(command))

    def _ask(self, command: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self._call(command))

    def _call(self, command: Callable[[], Any]) -> Future[Any]:
        """Run a command between two steps; return its future result."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except SlipwayError as error:
                future.set_exception(error)
            except BaseException as error:  # a bug: the engine stops, and the caller gets the error
                future.set_exception(error)
                raise

        with self._lock:
            if self._error is None:
                self._commands.put(run)
                return future
        future.set_exception(EngineDead(f"the engine has stopped: {self._error}"))
        return future

    def _admit(self, stream: _Stream) -> None:
        with self._lock:
            if self._draining:
                raise EngineBusy("the engine is draining")
            if self._num_requests >= self.max_requests:
                held = f"{self._num_requests} of {self.max_requests}"
                raise EngineBusy(f"queue full: {held} requests running or waiting")
            if self._num_requests and self._num_tokens + stream.num_tokens > self.max_tokens:
                held = f"{self._num_tokens} of {self.max_tokens}"
                raise EngineBusy(f"queue full: {held} prompt tokens running or waiting")
            self._num_requests += 1
            self._num_tokens += stream.num_tokens
            self._idle.clear()

    def _leave(self, stream: _Stream) -> None:
        with self._lock:
            self._num_requests -= 1
            self._num_tokens -= stream.num_tokens
            if not self._num_requests:
                self._idle.set()

    # All methods below run in the engine's thread.

    def _start(self, stream: _Stream, spec: RequestSpec) -> str:
        request_id = self._engine.add(spec)
        self._streams[request_id] = stream
        return request_id

    def _abandon(self, stream: _Stream) -> None:
        own = [request_id for request_id, each in self._streams.items() if each is stream]
        for request_id in own:
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        if not self._engine.is_running(request_id):
            return
        request = self._engine.request(request_id)
        self._engine.abort(request_id)
        self._deliver({self._streams.pop(request_id): request.delta()})

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work():
                    self._step()
            raise EngineDead("the engine was closed")
        except BaseException as error:  # all waiting requests must end with the error
            if not isinstance(error, EngineDead):
                logger.exception("the engine stops")
            with self._lock:
                self._error = error
        finally:
            while not self._commands.empty():
                if (command := self._commands.get()) is not None:
                    command()
            dead = EngineDead(f"the engine has stopped: {self._error}")
            self._engine.fail_updates(dead)
            self._deliver(dict.fromkeys(self._streams.values(), dead))
            self._streams.clear()

    def _obey(self) -> bool:
        """Run the queued commands; wait for one if there is no other work.

        Return False if the thread is to stop.
        """
        waits = not self._engine.has_work()
        while waits or not self._commands.empty():
            if (command := self._commands.get()) is None:
                return False
            command()
            waits = False
        return True

    def _step(self) -> None:
        out: dict[_Stream, RequestOutput | BaseException] = {}
        for request in self._engine.step():
            stream = self._streams.get(request.request_id)
            if stream is None:
                continue
            if request.spec.params.num_samples == request.spec.params.n:
                out[stream] = request.delta()
            elif request.finished:  # the best samples are chosen at the end
                out[stream] = request.output()
            if request.finished:
                del self._streams[request.request_id]
        self._deliver(out)

    def _deliver(self, out: dict[_Stream, Any]) -> None:
        """Pass a step's results to the event loops, with one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = collections.defaultdict(list)
        for stream, item in out.items():
            by_loop[stream.loop].append((stream.items, item))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, items)


def _put(items: list[tuple[asyncio.Queue, Any]]) -> None:
    for stream, item in items:
        stream.put_nowait(item)
