"""An engine behind an event loop: a thread of its own runs the steps; decides who may queue, and hands out deltas.

Everything that touches the engine runs in that thread, between two steps; results of a step come to the loop together.
"""

import asyncio
import collections
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from slipway.checkpoint.swap import Mode
from slipway.codec.prompt import Prompt, parse_prompt
from slipway.convert import live
from slipway.engine.engine import Engine
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput, RequestSpec
from slipway.engine.stats import Snapshot
from slipway.engine.updates import Policy
from slipway.errors import EngineBusy, EngineDead, SlipwayError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Stream:
    """One request as its caller sees it: deltas, or what ended it."""

    loop: asyncio.AbstractEventLoop
    num_tokens: int
    items: asyncio.Queue[RequestOutput | BaseException]


class AsyncEngine:
    """Requests from any number of tasks and event loops to one engine.

    ``max_requests`` and ``max_tokens`` bound what is queued and running together: beyond them ``generate`` raises
    EngineBusy before anything is begun. All methods may be called from any thread.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 1024, max_tokens: int = 2**20):
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.tokenizer, self.limits, self.defaults = engine.tokenizer, engine.limits, engine.defaults
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()  # of all below, where more than one thread reads and writes
        self._num_requests = self._num_tokens = 0
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="slipway-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0,
        timeout_s: float | None = None, pooling: str = "",
    ) -> AsyncIterator[RequestOutput]:  # fmt: skip
        """Complete a prompt, step by step: each item holds what is new since the one before, the last is ``finished``.

        Leaving the loop early aborts the request. Raises InvalidRequest, EngineBusy or EngineDead.
        """
        params = params or SamplingParams(**self.defaults)
        text, ids, salt = parse_prompt(prompt, self.tokenizer)
        spec = RequestSpec(
            ids, params, prompt=text, priority=priority, timeout_s=timeout_s, cache_salt=salt, pooling=pooling
        )
        stream = _Stream(asyncio.get_running_loop(), params.num_samples * len(ids), asyncio.Queue())
        self._admit(stream)
        request_id, finished = None, False
        try:
            add = self._call(lambda: self._start(stream, spec))
            request_id = await asyncio.wrap_future(add)
            while not finished:
                item = await stream.items.get()
                if isinstance(item, BaseException):
                    raise item
                finished = item.finished
                yield item
        finally:
            if request_id is None:  # refused, or left while it was being queued
                self._call(lambda: self._abandon(stream))
            elif not finished:
                self.abort(request_id)
            self._leave(stream)

    def abort(self, request_id: str) -> None:
        """End a request, if it is running: its pages are free before the next step, its stream ends as aborted."""
        self._call(lambda: self._abort(request_id))

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Admit nobody any more and wait until all have ended; False if some were aborted as time ran out."""
        self._draining = True
        ended = await asyncio.to_thread(self._idle.wait, timeout_s)
        if not ended:
            for request_id in list(self._streams):
                self.abort(request_id)
            await asyncio.to_thread(self._idle.wait)
        return ended

    async def stats(self) -> Snapshot:
        """What runs, waits and is cached now, and the sums since the start."""
        return await self._ask(self._engine.snapshot)

    async def update_weights(
        self, source: Any, *, mapping: str | None = None, mode: Mode = "inplace", policy: Policy = "finish",
        version: str | None = None,
    ) -> str:  # fmt: skip
        """As ``LLM.update_weights``; what is asked is checked beside the steps, which go on meanwhile."""
        weights = self._engine.weights
        values = await asyncio.to_thread(live.values, source, weights, mapping)
        await asyncio.to_thread(values.check, weights, mode)
        return await self._change(
            lambda: self._engine.update_weights(values, version=version, mode=mode, policy=policy)
        )  # fmt: skip

    async def sleep(self, level: int = 1) -> None:
        """As ``LLM.sleep``: what runs waits for ``wake_up``, what comes is refused as busy."""
        await self._change(lambda: self._engine.sleep(level))

    async def wake_up(self) -> None:
        """Undo ``sleep``."""
        await self._change(self._engine.wake_up)

    @property
    def weights_version(self) -> str:
        """Of the weights that serve."""
        return self._engine.weights.version

    async def flush(self) -> int:
        """Forget the cached prefixes; how many pages that freed."""
        return await self._ask(self._engine.flush)

    def close(self) -> None:
        """End what runs, stop the thread and free the device's memory."""
        self._commands.put(None)
        self._thread.join()
        self._engine.close()

    async def _change(self, command: Callable[[], Future[Any]]) -> Any:
        """What a change that the engine makes between two steps comes to."""
        return await asyncio.wrap_future(await self._ask(command))

    def _ask(self, command: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self._call(command))

    def _call(self, command: Callable[[], Any]) -> Future[Any]:
        """Run a command between two steps; its result."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except SlipwayError as error:
                future.set_exception(error)
            except BaseException as error:  # a bug: the engine stops, and the caller learns why
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
                raise EngineBusy(f"{self._num_requests} requests run or wait, as many as may")
            if self._num_requests and self._num_tokens + stream.num_tokens > self.max_tokens:
                raise EngineBusy(f"{self._num_tokens} prompt tokens of {self.max_tokens} run or wait")
            self._num_requests += 1
            self._num_tokens += stream.num_tokens
            self._idle.clear()

    def _leave(self, stream: _Stream) -> None:
        with self._lock:
            self._num_requests -= 1
            self._num_tokens -= stream.num_tokens
            if not self._num_requests:
                self._idle.set()

    # What follows runs in the engine's thread.

    def _start(self, stream: _Stream, spec: RequestSpec) -> str:
        request_id = self._engine.add(spec)
        self._streams[request_id] = stream
        return request_id

    def _abandon(self, stream: _Stream) -> None:
        for request_id in [request_id for request_id, each in self._streams.items() if each is stream]:
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
        except BaseException as error:  # whatever it is, everyone who waits must learn of it
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
        """Run what was asked for; wait if there is nothing else to do. False: stop."""
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
            elif request.finished:  # which samples are the best shows at the end
                out[stream] = request.output()
            if request.finished:
                del self._streams[request.request_id]
        self._deliver(out)

    def _deliver(self, out: dict[_Stream, Any]) -> None:
        """Hand a step's results to each event loop in one go."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = collections.defaultdict(list)
        for stream, item in out.items():
            by_loop[stream.loop].append((stream.items, item))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, items)


def _put(items: list[tuple[asyncio.Queue, Any]]) -> None:
    for stream, item in items:
        stream.put_nowait(item)
