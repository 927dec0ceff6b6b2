"""Updates of the weights over HTTP, with their pieces kept as files until the update is whole.

Every engine checks a whole update before it changes any array. One update runs at a time. An update
that begins discards one that was begun before.

Not here: loading and exchange of arrays (worker.py, engine/updates.py).
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
from slipway.errors import CheckpointError, EngineDead, InvalidRequest, Shown
from slipway.server import openapi, schema
from slipway.server.middleware import json_response
from slipway.server.responses import encode
from slipway.server.service import Service

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class StagedUpdate:
    """Update of the weights that is being sent: its files, and the tensors in them."""

    begun: schema.BeginWeights
    folder: Path
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # tensor -> file
    size_bytes: int = 0


class WeightsHandler:
    """Handler of requests that change the weights of all replicas of a service."""

    def __init__(self, service: Service, folder: Path):
        self._service = service
        self._folder = folder
        self._versions = itertools.count(1)
        self._parts = itertools.count()
        self._staged: StagedUpdate | None = None
        # Files of the weights in use: a restarted engine loads them again.
        self._served: Path | None = None
        self._lock = asyncio.Lock()

    def routes(
        self, read: Callable[[Request, type], Awaitable[tuple[Any, list[str]]]]
    ) -> list[tuple[str, Any, list[str]]]:
        """Return path, handler and methods of each route.

        ``read`` returns the checked body of a request. Without an admin's key, only the route that
        reads the version exists.
        """

        def handler(kind: type, act: Callable[[Any], Awaitable[dict[str, Any]]]) -> Any:
            async def handle(request: Request) -> Response:
                body, _ = await read(request, kind)
                return json_response(encode(await act(body)))

            return openapi.describe([kind], handle, f"{kind.__doc__}")

        post, version = ["POST"], ("/weights_version", self.get_version, ["GET"])
        if not self._service.config.admin_api_key:
            return [version]
        return [
            version,
            ("/update_weights_from_disk", handler(schema.UpdateFromDisk, self.from_disk), post),
            ("/weights/begin", handler(schema.BeginWeights, self.begin), post),
            ("/weights/update", self.update, post),
            ("/weights/finish", handler(schema.FinishWeights, self.finish), post),
            ("/sleep", handler(schema.Sleep, self.sleep), post),
            ("/wake_up", handler(schema.WakeUp, self.wake_up), post),
        ]

    async def get_version(self, _: Request) -> Response:
        """Show the version of the weights in use."""
        return json_response(encode(self.version()))

    async def update(self, request: Request) -> Response:
        """Add a safetensors file to the update that ?update_id= names."""
        update_id = request.query_params.get("update_id", "")
        limit_bytes = self._service.config.max_weights_bytes
        return json_response(encode(await self.add(update_id, request.stream(), limit_bytes)))

    def version(self) -> dict[str, Any]:
        """Return the version of the weights of each engine."""
        versions = {replica.name: replica.weights_version for replica in self._service.replicas}
        return {"weights_version": next(iter(versions.values())), "engines": versions}

    async def from_disk(self, body: schema.UpdateFromDisk) -> dict[str, Any]:
        """Load weights from a directory that the server can read, or from the hub."""
        if body.load_format not in (None, "auto"):
            raise InvalidRequest("load_format", body.load_format, "auto")
        if not body.flush_cache:
            expected = "true: results cached from old weights are not valid for new ones"
            raise InvalidRequest("flush_cache", False, expected)
        return await self._apply(
            body.model_path, body.weight_version, mode=body.mode, policy=body.policy
        )

    async def begin(self, body: schema.BeginWeights) -> dict[str, Any]:
        """Begin an update that is sent in pieces; return its id."""
        self._discard()
        staged = self._staged = StagedUpdate(body, self._folder / f"weights-{uuid.uuid4().hex}")
        staged.folder.mkdir(mode=0o700)
        return {"update_id": staged.id}

    async def add(
        self, update_id: str, chunks: AsyncIterator[bytes], limit_bytes: int
    ) -> dict[str, Any]:
        """Add a safetensors file to an update.

        Raises InvalidRequest or CheckpointError; the file is not part of the update then.
        """
        staged = self._staged_update(update_id)
        path = staged.folder / f"part-{next(self._parts):05d}.safetensors"
        size_bytes = 0
        try:
            with path.open("wb") as file:
                async for chunk in chunks:
                    size_bytes += len(chunk)
                    if staged.size_bytes + size_bytes > limit_bytes:
                        got = Shown(f"more than {limit_bytes} bytes of weights")
                        raise InvalidRequest("body", got, "at most max_weights_bytes")
                    await asyncio.to_thread(file.write, chunk)
            held = await asyncio.to_thread(files.open_file, path)
            if twice := sorted(held.tensors.keys() & staged.names.keys()):
                raise CheckpointError("the update", [f"{name}: sent twice" for name in twice])
        except BaseException:  # also when the client disconnects: no part of a file is kept
            path.unlink(missing_ok=True)
            raise
        staged.names |= dict.fromkeys(held.tensors, path.name)
        staged.size_bytes += size_bytes
        return {
            "tensors": len(held.tensors),
            "bytes": size_bytes,
            "tensors_in_all": len(staged.names),
        }

    async def finish(self, body: schema.FinishWeights) -> dict[str, Any]:
        """Apply an update to all engines. The update is over then, even if it fails."""
        staged = self._staged_update(body.update_id)
        self._staged = None
        index = {"metadata": {"total_size": staged.size_bytes}, "weight_map": staged.names}
        (staged.folder / files.INDEX).write_text(json.dumps(index))
        begun = staged.begun
        try:
            return await self._apply(
                str(staged.folder),
                begun.version,
                mode=begun.mode,
                policy=begun.policy,
                folder=staged.folder,
            )
        finally:
            if self._served != staged.folder:
                shutil.rmtree(staged.folder, ignore_errors=True)

    async def sleep(self, body: schema.Sleep) -> dict[str, Any]:
        """Free the engines' device memory."""
        await self._change_all("sleep", body.level)
        return {"success": True}

    async def wake_up(self, _: schema.WakeUp) -> dict[str, Any]:
        """Bring all engines back from sleep."""
        await self._change_all("wake_up")
        return {"success": True}

    async def _apply(
        self,
        source: str,
        version: str | None,
        *,
        mode: str,
        policy: str,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Load weights from ``source`` into all engines.

        ``folder``: their files, if the server keeps them; those of the weights before are removed.
        """
        async with self._lock:
            version = version or str(next(self._versions))
            await self._change_all("update_weights", *(source, version, mode, policy))
            before = self._served
            self._served = folder
            if before is not None:
                shutil.rmtree(before, ignore_errors=True)
        message = f"weights {version} are served"
        return {"success": True, "message": message, "weights_version": version}

    async def _change_all(self, action: str, *args: Any) -> None:
        """Make a change in every engine; raise the first error.

        If some engines fail, each goes on with its own weights; its responses name their version.
        """
        ready = self._service.ready_replicas
        if len(ready) < len(self._service.replicas):
            raise EngineDead("an engine is not ready: nothing was changed")
        results = await asyncio.gather(
            *(replica.change(action, *args) for replica in ready), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _staged_update(self, update_id: str) -> StagedUpdate:
        if self._staged is None or update_id != self._staged.id:
            expected = "the update_id of the last response of /weights/begin"
            raise InvalidRequest("update_id", update_id, expected)
        return self._staged

    def _discard(self) -> None:
        if self._staged is not None:
            logger.warning("an unfinished update of the weights is discarded: another one begins")
            shutil.rmtree(self._staged.folder, ignore_errors=True)
            self._staged = None
