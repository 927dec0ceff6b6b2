"""What the server says of itself: an OpenAPI document, the same as a page, its capabilities; read off the routes."""

import html as escaping
import inspect
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from slipway.server.config import ServerConfig

Handler = Callable[[Request], Awaitable[Response]]

VERSION = version("slipway")
FILES = {"/weights/update": "update_id"}  # routes whose body is a file, and the parameter that says of what
HEAD = (
    "<!doctype html><meta charset=utf-8><title>Slipway</title><style>body{font:15px/1.5 system-ui;max-width:60em;"
    "margin:2em auto;padding:0 1em}code{background:#8882;padding:.1em .3em}td{padding:.1em 1em .1em 0}</style>"
)


def taking(kind: type, handler: Handler) -> Handler:
    """A handler as the pages show it: its body is a ``kind``, whose docstring says what it does."""
    handler.__doc__ = f"{kind.__doc__}"
    handler.kind = kind  # type: ignore[attr-defined]  # of a function mypy knows no attributes
    return handler


def openapi(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1; bodies by their types, answers by their media type alone."""
    kinds = [kind for route in routes if (kind := _kind(route)) is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    of_kind = dict(zip(kinds, schemas))
    paths: dict[str, Any] = {}
    for route in routes:
        for method in sorted(set(route.methods or ()) - {"HEAD"}):
            operation: dict[str, Any] = {
                "operationId": _name(route), "summary": _summary(route),
                "responses": {"default": {"description": "JSON; an error is OpenAI's error object"}},
            }  # fmt: skip
            if (kind := _kind(route)) is not None:
                content = {"application/json": {"schema": of_kind[kind]}}
                operation["requestBody"] = {"required": True, "content": content}
            if route.path in FILES:
                content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
                operation["requestBody"] = {"required": True, "content": content}
                operation["parameters"] = [
                    {"name": FILES[route.path], "in": "query", "required": True, "schema": {"type": "string"}}
                ]
            names = [part.strip("{}").partition(":")[0] for part in route.path.split("/") if part.startswith("{")]
            if names:
                operation["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
                ]
            paths.setdefault(route.path.replace(":path", ""), {})[method.lower()] = operation
    info = {"title": "Slipway", "version": VERSION}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}


def capabilities(
    routes: Sequence[Route], config: ServerConfig, limits: dict[str, Any], features: dict[str, bool]
) -> dict[str, Any]:
    """Routes with their fields, what the model can, limits, and which kernels serve."""
    listed = {
        route.path.replace(":path", ""): {
            "methods": sorted(set(route.methods or ()) - {"HEAD"}),
            "fields": [] if (kind := _kind(route)) is None else [f.encode_name for f in msgspec.structs.fields(kind)],
        }
        for route in routes
    }
    ours = {name: getattr(config, name) for name in config.__dataclass_fields__ if name.startswith("max_")}
    kernels = limits.get("bodies", {})
    limits = ours | {name: value for name, value in limits.items() if name != "bodies"}
    return {"version": VERSION, "routes": listed, "features": features, "limits": limits, "kernels": kernels}


def html(routes: Sequence[Route]) -> bytes:
    """A page that lists the routes and their fields; nothing on it is fetched from elsewhere."""
    parts = [HEAD, f"<h1>Slipway {VERSION}</h1><p>The same as <a href=/openapi.json>OpenAPI</a>.</p>"]
    for route in routes:
        methods = ", ".join(sorted(set(route.methods or ()) - {"HEAD"}))
        path, summary = escaping.escape(route.path), escaping.escape(_summary(route))
        parts.append(f"<h2><code>{methods} {path}</code></h2><p>{summary}</p>")
        if (kind := _kind(route)) is not None:
            rows = "".join(
                f"<tr><td><code>{field.encode_name}</code><td>{escaping.escape(_type(field.type))}"
                for field in msgspec.structs.fields(kind)
            )
            parts.append(f"<table>{rows}</table>")
    return "".join(parts).encode()


def _kind(route: Route) -> type | None:
    return getattr(route.endpoint, "kind", None)


def _name(route: Route) -> str:
    return route.path.replace(":path", "").strip("/").replace("/", "_").replace("{", "").replace("}", "")


def _summary(route: Route) -> str:
    return (inspect.getdoc(route.endpoint) or "").splitlines()[0]


def _type(kind: Any) -> str:
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace("typing.", "")
