"""HTTP application of the server: routes, reading of bodies, and the smaller handlers.

A body is read within limits of size and time before it is decoded.

Not here: API keys and status codes of errors (middleware.py), completions, chats and embeddings
(completions.py, chat.py, embeddings.py).
"""

import asyncio
import contextlib
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from slipway.errors import InvalidRequest, Shown
from slipway.server import bodies, middleware, openapi, schema, sglang
from slipway.server.chat import ChatHandler
from slipway.server.completions import CompletionHandler
from slipway.server.embeddings import EmbeddingHandler
from slipway.server.event_stream import EventStream, unless_disconnected
from slipway.server.metrics import Metrics
from slipway.server.middleware import (
    BodyTimeout,
    BodyTooLarge,
    ModelNotFound,
    RequestMiddleware,
    json_response,
)
from slipway.server.responses import encode
from slipway.server.service import QueueSlot, Service
from slipway.server.weights import WeightsHandler

logger = logging.getLogger("slipway.access")
BODY_TIMEOUT_S = 60.0
# Paths of fields that may stand in a warning header.
FIELD_PATH = re.compile(r"[\w.\[\]-]+", re.ASCII)
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # the response has it in a header
MAX_WARNING_CHARACTERS = 200
GET, POST = ["GET"], ["POST"]
RouteRow = tuple[str, Any, list[str]]  # path, handler, methods


class App:
    """Routes of one service, and their handlers."""

    def __init__(self, service: Service):
        self.service = service
        self.config = service.config
        self.metrics = Metrics(service.model_name, service.config.vllm_metric_names)

    def asgi(
        self, on_start: Callable[[], Awaitable[None]], on_stop: Callable[[], Awaitable[None]]
    ) -> Starlette:
        """Return the ASGI application, which calls ``on_start`` and ``on_stop`` around its life."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            await on_start()
            yield
            await on_stop()

        layers = [
            Middleware(
                RequestMiddleware,
                keys=self.config.api_key,
                admin_keys=self.config.admin_api_key,
                metrics=self.metrics,
            )
        ]
        if self.config.allow_origins:
            origins = list(self.config.allow_origins)
            cors = Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
            )
            layers.insert(0, cors)
        table = self._inference_routes() + self._information_routes() + self._admin_routes()
        self.routes = [Route(path, endpoint, methods=methods) for path, endpoint, methods in table]
        return Starlette(
            routes=self.routes,
            middleware=layers,
            lifespan=lifespan,
            exception_handlers={
                404: middleware.unknown_route,
                405: middleware.wrong_method,
                Exception: middleware.internal_error,
            },
        )

    def _inference_routes(self) -> list[RouteRow]:
        handler = EmbeddingHandler(self.service)
        completions = self._generating(schema.Completion, CompletionHandler)
        chat = self._generating(schema.Chat, ChatHandler)
        embeddings = self._reading(schema.Embedding, handler.embeddings)
        score = self._reading(schema.Score, handler.score)
        rerank = self._reading(schema.Rerank, handler.rerank)
        dispatch = self._dispatching([chat, completions, rerank, score, embeddings])
        return [
            ("/v1/completions", completions, POST),
            ("/v1/chat/completions", chat, POST),
            ("/generate", self._generating(sglang.Generate, sglang.GenerateHandler), POST),
            ("/v1/embeddings", embeddings, POST),
            ("/v1/score", score, POST),
            ("/score", score, POST),
            ("/v1/rerank", rerank, POST),
            ("/v2/rerank", rerank, POST),
            ("/rerank", rerank, POST),
            ("/classify", self._reading(schema.Classify, handler.classify), POST),
            ("/invocations", dispatch, POST),
        ]

    def _information_routes(self) -> list[RouteRow]:
        routes: list[RouteRow] = [
            ("/v1/models", self.models, GET),
            ("/v1/models/{model:path}", self.model, GET),
            ("/tokenize", self._reading(schema.Tokenize, self.tokenize), POST),
            ("/detokenize", self._reading(schema.Detokenize, self.detokenize), POST),
            ("/load", self.load, GET),
            ("/server_info", self.server_info, GET),
            ("/version", self.version, GET),
            ("/capabilities", self.capabilities, GET),
            ("/metrics", self.prometheus, GET),
            ("/livez", self.livez, GET),
            ("/readyz", self.readyz, GET),
            ("/health", self.readyz, GET),
            ("/health_generate", self.readyz, GET),
            ("/ping", self.readyz, [*GET, *POST]),
            ("/openapi.json", self.openapi, GET),
            ("/docs", self.docs, GET),
        ]
        if self.config.enable_tokenizer_info_endpoint:
            routes.append(("/tokenizer_info", self.tokenizer_info, GET))
        return routes

    def _admin_routes(self) -> list[RouteRow]:
        flush = self._querying("flush", "Empty the prefix cache of every engine.")
        pause = self._querying("pause", "Pause every engine; requests wait until /resume.")
        resume = self._querying("resume", "Let every engine continue after a pause.")
        abort_request = self._reading(schema.AbortRequest, self.abort_request)
        routes: list[RouteRow] = [
            ("/abort_request", abort_request, POST),
            ("/flush_cache", flush, POST),
            ("/pause", pause, POST),
            ("/resume", resume, POST),
            *WeightsHandler(self.service, self.service.folder).routes(self.read_body),
        ]
        if self.config.profile_dir is not None:
            start = self._profiling("start_profile", "Start a trace of every engine.")
            stop = self._profiling("stop_profile", "Stop the traces and write them to profile_dir.")
            routes += [("/start_profile", start, POST), ("/stop_profile", stop, POST)]
        return routes

    def _generating(self, kind: type, make_handler: Any) -> openapi.Handler:
        """Return a route's handler that generates, for a whole response or a stream.

        ``kind``: type of the body. ``make_handler`` makes the object that handles one request.
        """

        async def handle(request: Request) -> Response:
            body, unknown = await self.read_body(request, kind)
            self._check_model(body.model)
            request_id = body.request_id or request.headers.get("x-request-id")
            with contextlib.ExitStack() as stack:
                stack.enter_context(bodies.errors_as_sent(body))
                if request_id is not None and not REQUEST_ID.fullmatch(request_id):
                    expected = "1 to 128 visible ASCII characters"
                    raise InvalidRequest("request_id", request_id, expected)
                handler = make_handler(self.service, body, request_id)
                final_id = request.scope["slipway.id"] = handler.envelope.id
                headers = _warning_header(unknown) | {"x-request-id": final_id}
                slot = stack.enter_context(self.service.queue_slot(_client(request), final_id))
                await handler.prepare()
                if body.stream:
                    events = handler.events(slot)
                    # The first event is awaited here: if the engine refuses the request, the
                    # response is an HTTP error.
                    first = await unless_disconnected(request, anext(events), slot)
                    resources = stack.pop_all()
                    return EventStream(first, events, slot, resources=resources, headers=headers)
                whole = await unless_disconnected(request, handler.full_response(slot), slot)
            return json_response(whole, headers)

        return openapi.describe([kind], handle, f"{kind.__doc__}")

    def _reading(self, kind: type, respond: Any) -> openapi.Handler:
        """Return a route's handler that calls ``respond`` with a body and a queue slot.

        ``kind``: type of the body.
        """

        async def handle(request: Request) -> Response:
            body, unknown = await self.read_body(request, kind)
            self._check_model(getattr(body, "model", None))
            request_id = f"req-{uuid.uuid4().hex}"
            with (
                self.service.queue_slot(_client(request), request_id) as slot,
                bodies.errors_as_sent(body),
            ):
                found = await unless_disconnected(request, respond(body, slot), slot)
            return json_response(encode(found), _warning_header(unknown))

        return openapi.describe([kind], handle, f"{kind.__doc__}")

    def _dispatching(self, handlers: Sequence[openapi.Handler]) -> openapi.Handler:
        """Return a route's handler that passes a body to the one of ``handlers`` it is made for."""

        async def handle(request: Request) -> Response:
            content = request.scope["slipway.body"] = await self._content(request)
            return await _matching_handler(bodies.field_names(content), handlers)(request)

        kinds = [kind for handler in handlers for kind in openapi.body_types(handler)]
        summary = "Handle any inference request (SageMaker's route); its fields tell which."
        return openapi.describe(kinds, handle, summary)

    def _querying(self, action: str, summary: str) -> openapi.Handler:
        """Return a route's handler that runs one of Query's actions in every engine."""

        async def handle(_: Request) -> Response:
            ready = self.service.ready_replicas
            values = await asyncio.gather(*(replica.query(action) for replica in ready))
            found = {"success": True, "engines": len(ready), "values": values}
            return json_response(encode(found))

        return openapi.describe([], handle, summary)

    def _profiling(self, action: str, summary: str) -> openapi.Handler:
        """Return a route's handler that starts or stops JAX's profiler in every engine."""

        async def handle(_: Request) -> Response:
            ready = self.service.ready_replicas
            directory = self.config.profile_dir
            queries = [replica.query(action, f"{directory}/{replica.name}") for replica in ready]
            if not all(await asyncio.gather(*queries)):
                got = Shown("a second call in a row")
                raise InvalidRequest(action, got, "/start_profile, then /stop_profile")
            return json_response(encode({"success": True, "engines": len(ready)}))

        return openapi.describe([], handle, summary)

    async def read_body(self, request: Request, kind: type) -> tuple[Any, list[str]]:
        """Return a checked body, and the paths of its unknown fields. Raises InvalidRequest."""
        content = request.scope.get("slipway.body")
        if content is None:
            content = await self._content(request)
        body, unknown = bodies.read(content, kind, self.config.strict)
        if unknown:
            names = ", ".join(unknown)[:MAX_WARNING_CHARACTERS]
            logger.warning("%s: unknown fields ignored: %s", request.scope["route"].path, names)
        return body, unknown

    async def _content(self, request: Request) -> bytes:
        """Return the bytes of a body. Raises BodyTooLarge and BodyTimeout."""
        limit, chunks, size_bytes = self.config.max_body_bytes, [], 0
        expected = f"at most {limit} bytes"
        if int(declared := request.headers.get("content-length") or 0) > limit:
            raise BodyTooLarge("body", Shown(f"{declared} bytes"), expected)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size_bytes += len(chunk)
                    if size_bytes > limit:
                        raise BodyTooLarge("body", Shown(f"more than {limit} bytes"), expected)
        except TimeoutError as error:
            got = Shown(f"{size_bytes} bytes in {BODY_TIMEOUT_S:.0f} s")
            raise BodyTimeout("body", got, "the whole body in this time") from error
        return b"".join(chunks)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.service.model_name:
            raise ModelNotFound("model", name, self.service.model_name)

    async def tokenize(self, body: schema.Tokenize, _: QueueSlot) -> dict[str, Any]:
        """Return vLLM's response: the token ids and their number."""
        tokenizer = self.service.tokenizer
        if tokenizer is None or (body.prompt is None) == (body.messages is None):
            expected = "either prompt or messages, and a server with a tokenizer"
            raise InvalidRequest("prompt", body.prompt, expected)
        if body.messages is not None:
            ids = await self._conversation_ids(body, body.messages)
        else:
            for field in ("tools", "continue_final_message"):
                if value := getattr(body, field):
                    raise InvalidRequest(field, value, "no value unless messages is given")
            text = str(body.prompt)
            ids = await asyncio.to_thread(tokenizer.encode, text, body.add_special_tokens)
        texts = None
        if body.return_token_strs:
            texts = [tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
        return {
            "tokens": ids,
            "count": len(ids),
            "token_strs": texts,
            "max_model_len": self.service.limits["max_model_len"],
        }

    async def _conversation_ids(
        self, body: schema.Tokenize, messages: list[dict[str, Any]]
    ) -> list[int]:
        """Return the token ids of a conversation. Raises InvalidRequest."""
        kwargs = dict(body.chat_template_kwargs or {})
        tools = kwargs.pop("tools", None) if body.tools is None else body.tools
        if tools and "tools" not in self.service.chat_format(True)[0]:
            expected = "no tools: the model's chat template does not support them"
            raise InvalidRequest("tools", Shown(f"{len(tools)} tools"), expected)
        prompt = await self.service.conversation(
            messages,
            kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            tools=tools,
        )
        return prompt.token_ids

    async def detokenize(self, body: schema.Detokenize, _: QueueSlot) -> dict[str, Any]:
        """Return the text of token ids."""
        if self.service.tokenizer is None:
            raise InvalidRequest("tokens", body.tokens, "a server with a tokenizer")
        if any(not 0 <= token < schema.INT_LIMIT for token in body.tokens):
            raise InvalidRequest("tokens", body.tokens, "token ids")
        return {"prompt": self.service.tokenizer.decode(body.tokens, body.skip_special_tokens)}

    async def abort_request(self, body: schema.AbortRequest, _: QueueSlot) -> dict[str, Any]:
        """Abort a request; return whether it was running."""
        return {"aborted": self.service.abort(body.rid)}

    async def models(self, _: Request) -> Response:
        """List the served model."""
        return json_response(encode({"object": "list", "data": [self._model_card()]}))

    async def model(self, request: Request) -> Response:
        """Describe the served model, by its name."""
        self._check_model(request.path_params["model"])
        return json_response(encode(self._model_card()))

    def _model_card(self) -> dict[str, Any]:
        """Return the model as OpenAI and vLLM list it.

        ``root`` is the name it was loaded by; of a directory, the last part.
        """
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
        """Show tokenizer_config.json with the chat template in use."""
        # Encoded by json: lengths in such files may be integers of more than 64 bits.
        return json_response(json.dumps(self.service.tokenizer_info()).encode())

    async def load(self, _: Request) -> Response:
        """Show the number of requests that run or wait."""
        return json_response(encode({"server_load": self.service.num_requests}))

    async def server_info(self, _: Request) -> Response:
        """Show the effective configuration, without keys, and the engine's limits."""
        names = [name for name in self.config.__dataclass_fields__ if "api_key" not in name]
        values = {name: getattr(self.config, name) for name in names}
        # Only the last part of a path is shown.
        values |= {name: path.name for name, path in values.items() if isinstance(path, Path)}
        found = {"model": self.service.model_name, "server": values, "engine": self.service.limits}
        return json_response(encode(found))

    async def version(self, _: Request) -> Response:
        """Show the version of Slipway."""
        return json_response(encode({"version": openapi.VERSION}))

    async def capabilities(self, _: Request) -> Response:
        """Show all routes with their fields, the model's features, all limits, and the kernels."""
        service = self.service
        found = openapi.capabilities(
            self.routes, self.config, limits=service.limits, features=service.features
        )
        return json_response(encode(found))

    async def prometheus(self, _: Request) -> Response:
        """Publish all metrics in Prometheus' text format."""
        stats = (replica.stats() for replica in self.service.ready_replicas)
        results = await asyncio.gather(*stats, return_exceptions=True)
        snapshots = [each for each in results if not isinstance(each, BaseException)]
        starts = sum(replica.num_starts for replica in self.service.replicas)
        text = self.metrics.text(snapshots, starts)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def livez(self, _: Request) -> Response:
        """Check that the HTTP process answers."""
        return Response(b"ok", media_type="text/plain")

    async def readyz(self, _: Request) -> Response:
        """Check that an engine runs and requests are accepted."""
        ready = self.service.ready
        body, status = (b"ok", 200) if ready else (b"not ready", 503)
        return Response(body, status, media_type="text/plain")

    async def openapi(self, _: Request) -> Response:
        """Describe all routes as an OpenAPI document."""
        return json_response(encode(openapi.document(self.routes)))

    async def docs(self, _: Request) -> Response:
        """Describe all routes as an HTML page."""
        return Response(openapi.html_page(self.routes), media_type="text/html")


def _matching_handler(names: Set[str], handlers: Sequence[openapi.Handler]) -> openapi.Handler:
    """Return the first handler that has a body with these fields. Raises InvalidRequest."""
    for handler in handlers:
        for kind in openapi.body_types(handler):
            if any(set(needed) <= names for needed in bodies.RECOGNIZED[kind]):
                return handler
    alternatives = [needed for several in bodies.RECOGNIZED.values() for needed in several]
    expected = "; ".join(" with ".join(needed) for needed in alternatives)
    got = Shown(f"the fields {', '.join(sorted(names)) or '(none)'}")
    raise InvalidRequest("body", got, f"one of: {expected}")


def _warning_header(unknown: list[str]) -> dict[str, str]:
    if not unknown:
        return {}
    names = ", ".join(name for name in unknown if FIELD_PATH.fullmatch(name))
    return {"x-slipway-warning": f"unknown fields ignored: {names[:MAX_WARNING_CHARACTERS]}"}


def _client(request: Request) -> str:
    """Return the identity of a client: its API key, or its address."""
    address = "" if request.client is None else request.client.host
    return request.scope.get("slipway.client") or address
