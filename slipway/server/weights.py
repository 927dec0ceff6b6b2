"""New weights over HTTP: what a client sends is staged as files, whole, before any engine sees it; knows replicas, no
arrays. Every engine checks all of an update before it changes anything.
"""

import asyncio
import dataclasses
import itertools
import json
import logging
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from slipway.checkpoint import files
from slipway.errors import CheckpointError, EngineDead, InvalidRequest
from slipway.server import openapi, schema
from slipway.server.middleware import json_response
from slipway.server.responses import encode
from slipway.server.service import Service

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Staged:
    """An update that is being sent: its files, and which tensors they hold."""

    begun: schema.BeginWeights
    folder: Path
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # tensor -> file
    size: int = 0


class WeightsHandler:
    """The weights of all replicas of a service. One update at a time; a new one that begins discards one begun."""

    def __init__(self, service: Service, folder: Path):
        self._service, self._folder = service, folder
        self._versions, self._parts = itertools.count(1), itertools.count()
        self._staged: Staged | None = None
        self._served: Path | None = None  # what an engine that has died is given again
        self._lock = asyncio.Lock()

    def routes(
        self, read: Callable[[Request, type], Awaitable[tuple[Any, list[str]]]]
    ) -> list[tuple[str, Any, Any]]:
        """Path, handler and methods; ``read`` makes a checked body of a request. Without an admin nothing changes."""

        def handler(kind: type, act: Callable[[Any], Awaitable[dict[str, Any]]]) -> Any:
            async def handle(request: Request) -> Response:
                return json_response(encode(await act((await read(request, kind))[0])))

            return openapi.describe([kind], handle, f"{kind.__doc__}")

        post, shown = ["POST"], ("/weights_version", self.shown, ["GET"])
        if not self._service.config.admin_api_key:
            return [shown]
        return [
            shown,
            ("/update_weights_from_disk", handler(schema.UpdateFromDisk, self.from_disk), post),
            ("/weights/begin", handler(schema.BeginWeights, self.begin), post),
            ("/weights/update", self.update, post),
            ("/weights/finish", handler(schema.FinishWeights, self.finish), post),
            ("/sleep", handler(schema.Sleep, self.sleep), post),
            ("/wake_up", handler(schema.WakeUp, self.wake_up), post),
        ]

    async def shown(self, _: Request) -> Response:
        """Which weights are served."""
        return json_response(encode(self.version()))

    async def update(self, request: Request) -> Response:
        """A safetensors file of the update ``?update_id=``."""
        update_id, limit = (
            request.query_params.get("update_id", ""),
            self._service.config.max_weights_bytes,
        )
        return json_response(encode(await self.add(update_id, request.stream(), limit)))

    def version(self) -> dict[str, Any]:
        """Which weights each engine serves."""
        versions = {replica.name: replica.weights_version for replica in self._service.replicas}
        return {"weights_version": next(iter(versions.values())), "engines": versions}

    async def from_disk(self, body: schema.UpdateFromDisk) -> dict[str, Any]:
        """SGLang's: from a directory that the server can read, or a hub id."""
        if body.load_format not in (None, "auto"):
            raise InvalidRequest("load_format", body.load_format, "auto")
        if not body.flush_cache:
            raise InvalidRequest(
                "flush_cache", False, "true: what old weights computed is not the new ones'"
            )
        return await self._apply(body.model_path, body.weight_version, body.mode, body.policy, None)

    async def begin(self, body: schema.BeginWeights) -> dict[str, Any]:
        """An update that follows in pieces."""
        self._discard()
        staged = self._staged = Staged(body, self._folder / f"weights-{uuid.uuid4().hex}")
        staged.folder.mkdir(mode=0o700)
        return {"update_id": staged.id}

    async def add(self, update_id: str, chunks: AsyncIterator[bytes], limit: int) -> dict[str, Any]:
        """A safetensors file of the update. Raises InvalidRequest, or CheckpointError; the piece is then not there."""
        staged = self._named(update_id)
        path = staged.folder / f"part-{next(self._parts):05d}.safetensors"
        size = 0
        try:
            with path.open("wb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if staged.size + size > limit:
                        raise InvalidRequest(
                            "body",
                            f"more than {limit} bytes of weights",
                            "max_weights_bytes at most",
                        )
                    await asyncio.to_thread(file.write, chunk)
            held = await asyncio.to_thread(files.open_file, path)
            if twice := sorted(held.tensors.keys() & staged.names.keys()):
                raise CheckpointError("the update", [f"{name}: sent twice" for name in twice])
        except BaseException:  # a client that goes leaves no half of a piece
            path.unlink(missing_ok=True)
            raise
        staged.names |= dict.fromkeys(held.tensors, path.name)
        staged.size += size
        return {"tensors": len(held.tensors), "bytes": size, "tensors_in_all": len(staged.names)}

    async def finish(self, body: schema.FinishWeights) -> dict[str, Any]:
        """Let the engines take the update. Whatever comes of it, it is over."""
        staged = self._named(body.update_id)
        self._staged = None
        index = {"metadata": {"total_size": staged.size}, "weight_map": staged.names}
        (staged.folder / files.INDEX).write_text(json.dumps(index))
        begun = staged.begun
        try:
            return await self._apply(
                str(staged.folder), begun.version, begun.mode, begun.policy, staged.folder
            )
        finally:
            if self._served != staged.folder:
                shutil.rmtree(staged.folder, ignore_errors=True)

    async def sleep(self, body: schema.Sleep) -> dict[str, Any]:
        """Let the engines' memory go."""
        await self._every("sleep", body.level)
        return {"success": True}

    async def wake_up(self, _: schema.WakeUp) -> dict[str, Any]:
        """Undo sleep."""
        await self._every("wake_up")
        return {"success": True}

    async def _apply(
        self, source: str, version: str | None, mode: str, policy: str, folder: Path | None
    ) -> dict[str, Any]:
        async with self._lock:
            version = version or str(next(self._versions))
            await self._every("update_weights", source, version, mode, policy)
            before, self._served = self._served, folder
            if before is not None:
                shutil.rmtree(before, ignore_errors=True)
        return {
            "success": True,
            "message": f"weights {version} are served",
            "weights_version": version,
        }

    async def _every(self, what: str, *args: Any) -> None:
        """Ask every engine; the first failure is the answer. Engines that took an update and those that did not go on
        with what each has, and say so in what they answer.
        """
        ready = [replica for replica in self._service.replicas if replica.ready.is_set()]
        if len(ready) < len(self._service.replicas):
            raise EngineDead("an engine is not ready: nothing was changed")
        results = await asyncio.gather(
            *(replica.change(what, *args) for replica in ready), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _named(self, update_id: str) -> Staged:
        if self._staged is None or update_id != self._staged.id:
            raise InvalidRequest("update_id", update_id, "what /weights/begin answered last")
        return self._staged

    def _discard(self) -> None:
        if self._staged is not None:
            logger.warning("an update that was begun is discarded: another one begins")
            shutil.rmtree(self._staged.folder, ignore_errors=True)
            self._staged = None
