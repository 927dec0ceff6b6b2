"""HTTP: which route calls what, and what it answers; middleware.py decides who is let in and what a failure becomes.

Bodies are read under a limit, before anything is decoded.
"""

import asyncio
import contextlib
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence, Set
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slipway.errors import InvalidRequest, Shown, SlipwayError
from slipway.server import bodies, middleware, openapi, schema
from slipway.server.chat import ChatHandler
from slipway.server.completions import CompletionHandler
from slipway.server.embeddings import EmbeddingHandler
from slipway.server.metrics import Metrics
from slipway.server.middleware import (
    BodyTimeout,
    BodyTooLarge,
    ModelNotFound,
    RequestMiddleware,
    failure_events,
    json_response,
)
from slipway.server.responses import encode
from slipway.server.service import QueueSlot, Service
from slipway.server.sglang import GenerateHandler
from slipway.server.weights import WeightsHandler

logger = logging.getLogger("slipway.access")
BODY_TIMEOUT_S = 60.0
PATH = re.compile(r"[\w.\[\]-]+", re.ASCII)  # of a field; a warning about it goes into a header
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # it comes back in a header


class App:
    """The routes of one service."""

    def __init__(self, service: Service):
        self.service, self.config = service, service.config
        self.metrics = Metrics(service.model_name, service.config.vllm_metric_names)

    def asgi(
        self, on_start: Callable[[], Awaitable[None]], on_stop: Callable[[], Awaitable[None]]
    ) -> Starlette:
        """The application; ``on_start`` and ``on_stop`` run around its life."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            await on_start()
            yield
            await on_stop()

        keys = self.config.api_key, self.config.admin_api_key
        layers = [
            Middleware(RequestMiddleware, keys=keys[0], admin_keys=keys[1], metrics=self.metrics)
        ]
        if self.config.allow_origins:
            layers.insert(
                0,
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(self.config.allow_origins),
                    allow_methods=["*"],
                    allow_headers=["*"],
                ),
            )
        get, post, vectors = ["GET"], ["POST"], EmbeddingHandler(self.service)
        completions = self._generating(schema.Completion, CompletionHandler)
        chats = self._generating(schema.Chat, ChatHandler)
        embeddings = self._reading(schema.Embedding, vectors.embeddings)
        score = self._reading(schema.Score, vectors.score)
        rerank = self._reading(schema.Rerank, vectors.rerank)
        table: list[tuple[str, Any, list[str]]] = [
            ("/v1/completions", completions, post),
            ("/v1/chat/completions", chats, post),
            ("/generate", self._generating(schema.Generate, GenerateHandler), post),
            ("/v1/embeddings", embeddings, post),
            ("/v1/score", score, post),
            ("/score", score, post),
            ("/v1/rerank", rerank, post),
            ("/v2/rerank", rerank, post),
            ("/rerank", rerank, post),
            ("/classify", self._reading(schema.Classify, vectors.classify), post),
            (
                "/invocations",
                self._dispatching([chats, completions, rerank, score, embeddings]),
                post,
            ),
            ("/v1/models", self.models, get),
            ("/v1/models/{model:path}", self.model, get),
            ("/tokenize", self._reading(schema.Tokenize, self.tokenize), post),
            ("/detokenize", self._reading(schema.Detokenize, self.detokenize), post),
            ("/abort_request", self._reading(schema.AbortRequest, self.abort_request), post),
            ("/flush_cache", self._querying("flush"), post),
            ("/pause", self._querying("pause"), post),
            ("/resume", self._querying("resume"), post),
            ("/load", self.load, get),
            ("/server_info", self.server_info, get),
            ("/version", self.version, get),
            ("/capabilities", self.capabilities, get),
            ("/metrics", self.prometheus, get),
            ("/livez", self.livez, get),
            ("/readyz", self.readyz, get),
            ("/health", self.readyz, get),
            ("/health_generate", self.readyz, get),
            ("/ping", self.readyz, ["GET", "POST"]),
            ("/openapi.json", self.openapi, get),
            ("/docs", self.docs, get),
        ]
        table += WeightsHandler(self.service, self.service.folder).routes(self._body)
        if self.config.profile_dir is not None:
            table += [
                ("/start_profile", self._profiling("start_profile"), post),
                ("/stop_profile", self._profiling("stop_profile"), post),
            ]
        if self.config.enable_tokenizer_info_endpoint:
            table.append(("/tokenizer_info", self.tokenizer_info, get))
        self.routes = [Route(path, endpoint, methods=methods) for path, endpoint, methods in table]
        handlers = {
            404: middleware.unknown_route,
            405: middleware.wrong_method,
            Exception: middleware.internal_error,
        }
        return Starlette(
            routes=self.routes, middleware=layers, lifespan=lifespan, exception_handlers=handlers
        )

    def _generating(self, kind: type, make: Any) -> Callable[[Request], Awaitable[Response]]:
        """A handler whose answer is generated, whole or as a stream."""

        async def handle(request: Request) -> Response:
            body, unknown = await self._body(request, kind)
            self._check_model(body.model)
            request_id = body.request_id or request.headers.get("x-request-id")
            with contextlib.ExitStack() as stack:
                stack.enter_context(bodies.errors_as_sent(body))
                if request_id is not None and not REQUEST_ID.fullmatch(request_id):
                    raise InvalidRequest(
                        "request_id", request_id, "1 to 128 visible ASCII characters"
                    )
                answer = make(self.service, body, request_id)
                request.scope["slipway.id"] = answer.envelope.id
                headers = _headers(unknown) | {"x-request-id": answer.envelope.id}
                slot = stack.enter_context(
                    self.service.queue_slot(_client(request), answer.envelope.id)
                )
                await answer.prepare()
                if body.stream:
                    events = answer.events(slot)
                    # what the engine refuses is an error still, not an event
                    first = await _unless_gone(request, anext(events), slot)
                    return EventStream(first, events, slot, stack.pop_all(), headers)
                whole = await _unless_gone(request, answer.full_response(slot), slot)
            return json_response(whole, headers)

        return openapi.describe([kind], handle, f"{kind.__doc__}")

    def _reading(self, kind: type, answer: Any) -> Callable[[Request], Awaitable[Response]]:
        """A handler that is given a body."""

        async def handle(request: Request) -> Response:
            body, unknown = await self._body(request, kind)
            self._check_model(getattr(body, "model", None))
            name = f"req-{uuid.uuid4().hex}"
            with (
                self.service.queue_slot(_client(request), name) as slot,
                bodies.errors_as_sent(body),
            ):
                found = await _unless_gone(request, answer(body, slot), slot)
            return json_response(encode(found), _headers(unknown))

        return openapi.describe([kind], handle, f"{kind.__doc__}")

    def _dispatching(
        self, handlers: Sequence[openapi.Handler]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that gives a body to the one of ``handlers`` whose fields it has."""

        async def handle(request: Request) -> Response:
            content = request.scope["slipway.body"] = await self._content(request)
            return await _handler(bodies.field_names(content), handlers)(request)

        kinds = [kind for handler in handlers for kind in openapi.body_types(handler)]
        return openapi.describe(
            kinds, handle, "Answer SageMaker's one route: the body's fields name the request."
        )

    def _querying(self, what: str) -> Callable[[Request], Awaitable[Response]]:
        async def handle(_: Request) -> Response:
            ready = [replica for replica in self.service.replicas if replica.ready.is_set()]
            values = await asyncio.gather(*(replica.query(what) for replica in ready))
            return json_response(encode({"success": True, "engines": len(ready), "values": values}))

        handle.__doc__ = f"Every engine: {what}."
        return handle

    def _profiling(self, what: str) -> Callable[[Request], Awaitable[Response]]:
        async def handle(_: Request) -> Response:
            ready = [replica for replica in self.service.replicas if replica.ready.is_set()]
            asked = [
                replica.query(what, f"{self.config.profile_dir}/{replica.name}")
                for replica in ready
            ]
            if not all(await asyncio.gather(*asked)):
                raise InvalidRequest(what, Shown("a second one"), "a start, then a stop")
            return json_response(encode({"success": True, "engines": len(ready)}))

        handle.__doc__ = f"Every engine: {what}, by JAX's profiler."
        return handle

    async def _body(self, request: Request, kind: type) -> tuple[Any, list[str]]:
        """Return a checked body, and its unknown fields. Raises InvalidRequest."""
        content = request.scope.get("slipway.body")
        body, unknown = bodies.read(
            await self._content(request) if content is None else content, kind, self.config.strict
        )
        if unknown:
            logger.warning(
                "%s: unknown fields ignored: %s",
                request.scope["route"].path,
                ", ".join(unknown)[:200],
            )
        return body, unknown

    async def _content(self, request: Request) -> bytes:
        """Return the bytes of a body. Raises BodyTooLarge and BodyTimeout."""
        limit, held, size = self.config.max_body_bytes, [], 0
        if int(request.headers.get("content-length") or 0) > limit:
            raise BodyTooLarge(
                "body", f"{request.headers['content-length']} bytes", f"at most {limit}"
            )
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    held.append(chunk)
                    size += len(chunk)
                    if size > limit:
                        raise BodyTooLarge("body", f"more than {size} bytes", f"at most {limit}")
        except TimeoutError as error:
            raise BodyTimeout(
                "body", f"{size} bytes in {BODY_TIMEOUT_S:.0f} s", "all of it"
            ) from error
        return b"".join(held)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.service.model_name:
            raise ModelNotFound("model", name, self.service.model_name)

    async def tokenize(self, body: schema.Tokenize, _: QueueSlot) -> dict[str, Any]:
        """vLLM's answer: the ids and how many they are."""
        tokenizer = self.service.tokenizer
        if tokenizer is None or (body.prompt is None) == (body.messages is None):
            raise InvalidRequest(
                "prompt", body.prompt, "either prompt or messages, and a tokenizer"
            )
        if body.messages is not None:
            kwargs = dict(body.chat_template_kwargs or {})
            tools = kwargs.pop("tools", None) if body.tools is None else body.tools
            if tools and "tools" not in self.service.chat_format(True)[0]:
                raise InvalidRequest(
                    "tools", Shown(f"{len(tools)} tools"), "none: the chat template knows no tools"
                )
            prompt = await self.service.conversation(
                body.messages,
                kwargs,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                tools=tools,
            )
            ids = prompt.token_ids
        else:
            for field in ("tools", "continue_final_message"):
                if value := getattr(body, field):
                    raise InvalidRequest(field, value, "messages beside it, not prompt")
            ids = await asyncio.to_thread(
                tokenizer.encode, str(body.prompt), body.add_special_tokens
            )
        found: dict[str, Any] = {"tokens": ids, "count": len(ids), "token_strs": None}
        found["max_model_len"] = self.service.limits["max_model_len"]
        if body.return_token_strs:
            found["token_strs"] = [
                tokenizer.token_bytes(token).decode(errors="replace") for token in ids
            ]
        return found

    async def detokenize(self, body: schema.Detokenize, _: QueueSlot) -> dict[str, Any]:
        """The text of token ids."""
        if self.service.tokenizer is None:
            raise InvalidRequest("tokens", body.tokens, "a server with a tokenizer")
        if any(not 0 <= token < 2**31 for token in body.tokens):
            raise InvalidRequest("tokens", body.tokens, "token ids")
        return {"prompt": self.service.tokenizer.decode(body.tokens, body.skip_special_tokens)}

    async def abort_request(self, body: schema.AbortRequest, _: QueueSlot) -> dict[str, Any]:
        """Whether it was running."""
        return {"aborted": self.service.abort(body.rid)}

    async def models(self, _: Request) -> Response:
        """The one that is served."""
        return json_response(encode({"object": "list", "data": [self._card()]}))

    async def model(self, request: Request) -> Response:
        """The one that is served, by its name."""
        self._check_model(request.path_params["model"])
        return json_response(encode(self._card()))

    def _card(self) -> dict[str, Any]:
        """Return the model as OpenAI and vLLM list it; ``root``: the name that it was loaded by, without folders."""
        service = self.service
        return {
            "id": service.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "slipway",
            "root": service.root,
            "parent": None,
            "max_model_len": service.limits["max_model_len"],
        }

    async def tokenizer_info(self, _: Request) -> Response:
        """Show tokenizer_config.json, with the chat template that is in use."""
        # by json: lengths in such files may be integers beyond 64 bits
        return json_response(json.dumps(self.service.tokenizer_info()).encode())

    async def load(self, _: Request) -> Response:
        """Requests that run or wait."""
        return json_response(encode({"server_load": self.service.num_requests}))

    async def server_info(self, _: Request) -> Response:
        """The effective configuration without its secrets, and the engine's limits."""
        shown = {
            name: getattr(self.config, name)
            for name in self.config.__dataclass_fields__
            if "api_key" not in name
        }
        shown |= {name: value.name for name, value in shown.items() if isinstance(value, Path)}
        return json_response(
            encode(
                {"model": self.service.model_name, "server": shown, "engine": self.service.limits}
            )
        )

    async def version(self, _: Request) -> Response:
        """Of Slipway."""
        return json_response(encode({"version": openapi.VERSION}))

    async def capabilities(self, _: Request) -> Response:
        """Every route with its fields, what the model can, every limit, and the kernels that serve."""
        service = self.service
        return json_response(
            encode(openapi.capabilities(self.routes, self.config, service.limits, service.features))
        )

    async def prometheus(self, _: Request) -> Response:
        """For Prometheus."""
        ready = [replica for replica in self.service.replicas if replica.ready.is_set()]
        asked = await asyncio.gather(
            *(replica.stats() for replica in ready), return_exceptions=True
        )
        snapshots = [each for each in asked if not isinstance(each, BaseException)]
        starts = sum(replica.num_starts for replica in self.service.replicas)
        return Response(
            self.metrics.text(snapshots, starts), media_type="text/plain; version=0.0.4"
        )

    async def livez(self, _: Request) -> Response:
        """This process answers."""
        return Response(b"ok", media_type="text/plain")

    async def readyz(self, _: Request) -> Response:
        """An engine runs, and requests are admitted."""
        ready = self.service.ready
        return Response(
            b"ok" if ready else b"not ready", 200 if ready else 503, media_type="text/plain"
        )

    async def openapi(self, _: Request) -> Response:
        """The routes as an OpenAPI document."""
        return json_response(encode(openapi.document(self.routes)))

    async def docs(self, _: Request) -> Response:
        """The same for people."""
        return Response(openapi.html_page(self.routes), media_type="text/html")


def _handler(names: Set[str], handlers: Sequence[openapi.Handler]) -> openapi.Handler:
    """Return the handler of the request that fields belong to. Raises InvalidRequest."""
    for handler in handlers:
        if any(
            set(needed) <= names
            for kind in openapi.body_types(handler)
            for needed in bodies.RECOGNIZED[kind]
        ):
            return handler
    pairs = [" with ".join(needed) for several in bodies.RECOGNIZED.values() for needed in several]
    raise InvalidRequest(
        "body",
        Shown(f"the fields {', '.join(sorted(names)) or '(none)'}"),
        f"one of: {'; '.join(pairs)}",
    )


def _headers(unknown: list[str]) -> dict[str, str]:
    names = ", ".join(name for name in unknown if PATH.fullmatch(name))[:200]
    return {"x-slipway-warning": f"unknown fields ignored: {names}"} if unknown else {}


def _client(request: Request) -> str:
    return request.scope.get("slipway.client") or (
        request.client.host if request.client is not None else ""
    )


async def _unless_gone(request: Request, work: Any, slot: QueueSlot) -> Any:
    """The result of ``work``, unless the client goes before it is there."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            slot.abort()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, written as they come; a client that goes ends them."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        slot: QueueSlot,
        stack: contextlib.ExitStack,
        headers: dict[str, str],
    ):
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]
        self._first, self._rest, self._slot, self._stack = first, rest, slot, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        gone = asyncio.ensure_future(self._abort_when_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # In a task of its own: else every event would wake all that waits around this, one in the other.
            await asyncio.ensure_future(self._write(scope.get("slipway.send", send)))
        finally:
            gone.cancel()
            await self._rest.aclose()
            self._stack.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for event in self._rest:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except SlipwayError as error:
            await send(
                {"type": "http.response.body", "body": failure_events(error), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _abort_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._slot.abort()  # the engine ends what runs, and that ends the events
