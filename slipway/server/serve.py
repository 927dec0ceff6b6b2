"""`slipway serve`: from options to a server that runs until it is told to stop; decides the order of start and end."""

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
from slipway.server.process import run_event_loop, tune_garbage_collector
from slipway.server.replica import Replica
from slipway.server.service import Service

logger = logging.getLogger(__name__)
POLL_S = 0.05


def serve(model: str, name: str, engine: EngineConfig, config: ServerConfig, replicas: int) -> None:
    """Serve ``model`` until SIGTERM or SIGINT. Raises what loading it raises, before a request is taken."""
    logs.start(config.log_format)
    logger.info("process %d, %s", os.getpid(), config.without_secrets())
    with _service(model, name, engine, config, replicas) as service:
        run_event_loop(_run(service, config))


def batch(model: str, name: str, engine: EngineConfig, source: Path, target: Path) -> int:
    """Answer a file of batch requests; how many failed. Raises what loading ``model`` raises, or what a file does."""
    config = ServerConfig(
        max_queued_requests=2**20, max_requests_per_client=2**20, max_queued_tokens=2**40
    )
    logs.start(config.log_format)
    logger.info("process %d, %s", os.getpid(), config.without_secrets())
    with _service(model, name, engine, config, 1) as service:
        return run_event_loop(_run_batch(service, source, target, 4 * engine.max_num_seqs))


@contextlib.contextmanager
def _service(
    model: str, name: str, engine: EngineConfig, config: ServerConfig, replicas: int
) -> Iterator[Service]:
    """The model as its clients use it, not started yet."""
    directory = hub.resolve(model, engine.revision, hub.WITHOUT_WEIGHTS)
    tokenizer = None if engine.skip_tokenizer_init else Tokenizer.load(directory)
    templates = _templates(
        {} if tokenizer is None else tokenizer.chat_templates, config.chat_template
    )
    folder = Path(
        tempfile.mkdtemp(prefix="slipway-")
    )  # mode 700: sockets in it are this user's alone
    try:
        engines = [
            Replica(model, engine, folder, f"engine-{number}", config.log_format)
            for number in range(replicas)
        ]
        described = directory / "tokenizer_config.json"
        shown = (
            json.loads(described.read_text())
            if tokenizer is not None and described.is_file()
            else None
        )
        called = config.served_model_name or name
        yield Service(
            config,
            called,
            tokenizer,
            templates,
            engines,
            folder,
            root=_root(name),
            tokenizer_config=shown,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _templates(own: Mapping[str, str], chosen: str | None) -> Mapping[str, str]:
    """Return the model's own chat templates, or the one that is chosen, a file or a name. Raises InvalidConfig."""
    if chosen is None:
        return own
    if (path := Path(chosen)).is_file():
        return {"default": path.read_text(encoding="utf-8")}
    if chosen not in own:
        named = f", or one of the model's chat templates: {', '.join(own)}" if own else ""
        raise InvalidConfig("chat_template", chosen, f"a file{named}")
    return {"default": own[chosen]}


def _root(name: str) -> str:
    """Return the name that a model was loaded by: a hub id whole, of a directory its last part."""
    return Path(name).resolve().name if Path(name).is_dir() else name


async def _run_batch(service: Service, source: Path, target: Path, at_a_time: int) -> int:
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
                service, source, target, at_a_time, lambda: progress.advance(task)
            )
    finally:
        service.close()
        await replica.close()


async def _run(service: Service, config: ServerConfig) -> None:
    started, failure = time.monotonic(), None

    async def start() -> None:
        for replica in service.replicas:
            replica.start()
        tune_garbage_collector()  # it takes 0.1 s: now, while the engines load

    async def stop() -> None:
        service.close()
        await asyncio.gather(*(replica.close() for replica in service.replicas))

    server = _Server(
        uvicorn.Config(
            App(service).asgi(start, stop),
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            http=HttpProtocol,
            ws="none",
            timeout_keep_alive=75,
            server_header=False,
            timeout_graceful_shutdown=int(config.drain_timeout_s) + 5,
        )
    )
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    running = asyncio.create_task(server.serve())
    while not ending.is_set() and not running.done():
        if service.ready and started:
            logger.info(
                "ready on http://%s:%d after %.1f s",
                config.host,
                config.port,
                time.monotonic() - started,
            )
            started = 0.0
        if failure is None and (
            failure := next(
                (r.load_failure for r in service.replicas if r.load_failure is not None), None
            )
        ):
            break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), POLL_S)
    await _drain(service, 0.0 if failure is not None else config.drain_timeout_s)
    server.should_exit = True
    await running
    if failure is not None:
        raise StartFailed(f"{failure.kind}: {failure.text}")


async def _drain(service: Service, timeout_s: float) -> None:
    """Admit nobody, wait for what runs, and end the rest."""
    service.draining = True
    deadline = time.monotonic() + timeout_s
    while service.num_requests and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    if service.num_requests:
        logger.warning("%d requests are ended: the time to drain is over", service.num_requests)
        service.abort_all()
        for _ in range(100):
            if not service.num_requests:
                break
            await asyncio.sleep(POLL_S)


class StartFailed(SlipwayError):
    """The engine could not be loaded."""


class _Server(uvicorn.Server):
    """Leaves signals to us: it would end at once what we want to drain."""

    def capture_signals(self) -> Any:
        """None."""
        return contextlib.nullcontext()
