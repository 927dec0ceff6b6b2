"""Commands `slipway serve` and `slipway run-batch`: start and end of HTTP server and engines.

Not here: routes (app.py), the queue (service.py), engine processes (replica.py).
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipway.checkpoint import hub
from slipway.codec.tokenizer import Tokenizer
from slipway.engine.config import EngineConfig
from slipway.errors import InvalidConfig, SlipwayError
from slipway.server import logs
from slipway.server.app import App
from slipway.server.batch_file import run_batch
from slipway.server.config import ServerConfig
from slipway.server.http_limits import HttpProtocol
from slipway.server.messages import LoadFailed
from slipway.server.process import run_event_loop, tune_garbage_collector
from slipway.server.replica import Replica
from slipway.server.service import Service

logger = logging.getLogger(__name__)
POLL_S = 0.05  # interval of checks for start, failure and end
ABORT_TIMEOUT_S = 5.0  # time for aborted requests to end
KEEP_ALIVE_TIMEOUT_S = 75
UNLIMITED_REQUESTS, UNLIMITED_TOKENS = 2**20, 2**40  # bounds of the queue for a batch file
REQUESTS_PER_SEQUENCE = 4  # requests of a batch file in flight, for each sequence of the engine


class StartFailed(SlipwayError):
    """The engine cannot load its model."""


def serve(model: str, name: str, engine: EngineConfig, config: ServerConfig, replicas: int) -> None:
    """Serve ``model`` until SIGTERM or SIGINT. Raises the errors of loading it."""
    _start_log(config)
    with _service(model, name, engine, config=config, num_replicas=replicas) as service:
        run_event_loop(_run(service, config))


def batch(model: str, name: str, engine: EngineConfig, source: Path, target: Path) -> int:
    """Respond to a file of batch requests; return the number of failed ones.

    Raises the errors of loading ``model``, and of reading and writing the files.
    """
    config = ServerConfig(
        max_queued_requests=UNLIMITED_REQUESTS,
        max_requests_per_client=UNLIMITED_REQUESTS,
        max_queued_tokens=UNLIMITED_TOKENS,
    )
    _start_log(config)
    concurrency = REQUESTS_PER_SEQUENCE * engine.max_num_seqs
    with _service(model, name, engine, config=config, num_replicas=1) as service:
        return run_event_loop(_run_batch(service, source, target, concurrency=concurrency))


def _start_log(config: ServerConfig) -> None:
    logs.start(config.log_format)
    logger.info("process %d, %s", os.getpid(), config.without_secrets())


@contextlib.contextmanager
def _service(
    model: str, name: str, engine: EngineConfig, *, config: ServerConfig, num_replicas: int
) -> Iterator[Service]:
    """Make a service with replicas that are not started yet; remove its files at the end."""
    directory = hub.resolve(model, engine.revision, hub.WITHOUT_WEIGHTS)
    tokenizer = None if engine.skip_tokenizer_init else Tokenizer.load(directory)
    own = {} if tokenizer is None else tokenizer.chat_templates
    templates = chat_templates(own, config.chat_template)
    folder = Path(tempfile.mkdtemp(prefix="slipway-"))  # mode 700: only this user can enter it
    try:
        yield Service(
            config,
            config.served_model_name or name,
            tokenizer,
            templates=templates,
            replicas=[
                Replica(model, engine, folder, name=f"engine-{i}", log_format=config.log_format)
                for i in range(num_replicas)
            ],
            folder=folder,
            root=_root(name),
            tokenizer_config=None if tokenizer is None else _tokenizer_config(directory),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tokenizer_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "tokenizer_config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def chat_templates(own: Mapping[str, str], chosen: str | None) -> Mapping[str, str]:
    """Return the model's own chat templates by name, or the chosen one as the default.

    ``chosen``: a file, or a name in ``own``. Raises InvalidConfig.
    """
    if chosen is None:
        return own
    if (path := Path(chosen)).is_file():
        return {"default": path.read_text(encoding="utf-8")}
    if chosen not in own:
        names = f", or one of the model's chat templates: {', '.join(own)}" if own else ""
        raise InvalidConfig("chat_template", chosen, f"a file{names}")
    return {"default": own[chosen]}


def _root(name: str) -> str:
    """Return the name that a model was loaded by: a hub id, or the last part of a directory."""
    return Path(name).resolve().name if Path(name).is_dir() else name


async def _run_batch(service: Service, source: Path, target: Path, *, concurrency: int) -> int:
    """Start the engine and respond to a batch file; return the number of failed requests."""
    (replica,) = service.replicas
    replica.start()
    try:
        while not replica.ready.is_set():
            if (failure := replica.load_failure) is not None:
                raise StartFailed(f"{failure.kind}: {failure.text}")
            await asyncio.sleep(POLL_S)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True) as progress:
            total = sum(bool(line.strip()) for line in source.read_text().splitlines())
            task = progress.add_task("requests", total=total)
            return await run_batch(
                service,
                source,
                target,
                concurrency=concurrency,
                on_response=lambda: progress.advance(task),
            )
    finally:
        service.close()
        await replica.close()


async def _run(service: Service, config: ServerConfig) -> None:
    """Run the HTTP server and the engines until a signal. Raises StartFailed."""
    server = _http_server(service, config)
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    running = asyncio.create_task(server.serve())
    failure = await _wait_for_end(service, config, ending=ending, running=running)
    await _drain(service, 0.0 if failure is not None else config.drain_timeout_s)
    server.should_exit = True
    await running
    if failure is not None:
        raise StartFailed(f"{failure.kind}: {failure.text}")


def _http_server(service: Service, config: ServerConfig) -> "_Server":
    async def start() -> None:
        for replica in service.replicas:
            replica.start()
        tune_garbage_collector()  # takes 0.1 s: now, while the engines load

    async def stop() -> None:
        service.close()
        await asyncio.gather(*(replica.close() for replica in service.replicas))

    return _Server(
        uvicorn.Config(
            App(service).asgi(start, stop),
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            http=HttpProtocol,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
            server_header=False,
            timeout_graceful_shutdown=int(config.drain_timeout_s + ABORT_TIMEOUT_S),
        )
    )


async def _wait_for_end(
    service: Service, config: ServerConfig, *, ending: asyncio.Event, running: asyncio.Task
) -> LoadFailed | None:
    """Wait for a signal or the end of the HTTP server; return the failure of an engine's start."""
    started, is_ready = time.monotonic(), False
    while not ending.is_set() and not running.done():
        if service.ready and not is_ready:
            is_ready = True
            seconds = time.monotonic() - started
            logger.info("ready on http://%s:%d after %.1f s", config.host, config.port, seconds)
        for replica in service.replicas:
            if replica.load_failure is not None:
                return replica.load_failure
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), POLL_S)
    return None


async def _drain(service: Service, timeout_s: float) -> None:
    """Refuse new requests, wait for the running ones, and abort those that take too long."""
    service.draining = True
    await _wait_until_idle(service, timeout_s)
    if service.num_requests:
        text = "%d requests are aborted: they did not end within %.0f s of the shutdown"
        logger.warning(text, service.num_requests, timeout_s)
        service.abort_all()
        await _wait_until_idle(service, ABORT_TIMEOUT_S)


async def _wait_until_idle(service: Service, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while service.num_requests and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end requests without draining."""

    def capture_signals(self) -> Any:
        """Return a context that leaves the signal handlers as they are."""
        return contextlib.nullcontext()
