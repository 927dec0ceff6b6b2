"""What the server says of itself: an OpenAPI document, the same as a page, its capabilities; read off the routes."""

import html
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
FILES = {
    "/weights/update": "update_id"
}  # routes whose body is a file, and the parameter that says of what
HEAD = (
    "<!doctype html><meta charset=utf-8><title>Slipway</title><style>body{font:15px/1.5 system-ui;max-width:60em;"
    "margin:2em auto;padding:0 1em}code{background:#8882;padding:.1em .3em}td{padding:.1em 1em .1em 0}</style>"
)


def describe(kinds: Sequence[type], handler: Handler, summary: str) -> Handler:
    """Return a handler as the pages show it: its body is one of ``kinds``."""
    handler.__doc__ = summary
    handler.kinds = tuple(kinds)  # type: ignore[attr-defined]  # of a function mypy knows no attributes
    return handler


def body_types(handler: Handler) -> tuple[type, ...]:
    """Return the types that a handler's body may have; none for a handler that reads no JSON."""
    return getattr(handler, "kinds", ())


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1; bodies by their types, answers by their media type alone."""
    bodies = list(dict.fromkeys(kind for route in routes for kind in body_types(route.endpoint)))
    schemas, components = msgspec.json.schema_components(
        bodies, ref_template="#/components/schemas/{name}"
    )
    of_kind = dict(zip(bodies, schemas))
    paths: dict[str, Any] = {}
    for route in routes:
        for method in sorted(set(route.methods or ()) - {"HEAD"}):
            operation: dict[str, Any] = {
                "operationId": _name(route, method),
                "summary": _summary(route),
                "responses": {
                    "default": {"description": "JSON; an error is OpenAI's error object"}
                },
            }
            if taken := [of_kind[kind] for kind in body_types(route.endpoint)]:
                content = {
                    "application/json": {
                        "schema": taken[0] if len(taken) == 1 else {"anyOf": taken}
                    }
                }
                operation["requestBody"] = {"required": True, "content": content}
            if route.path in FILES:
                content = {
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
                }
                operation["requestBody"] = {"required": True, "content": content}
                operation["parameters"] = [
                    {
                        "name": FILES[route.path],
                        "in": "query",
                        "required": True,
                        "schema": {"type": "string"},
                    }
                ]
            names = [
                part.strip("{}").partition(":")[0]
                for part in route.path.split("/")
                if part.startswith("{")
            ]
            if names:
                operation["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in names
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
            "fields": [field.encode_name for field in _fields(route)],
        }
        for route in routes
    }
    ours = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if name.startswith("max_")
    }
    kernels = limits.get("bodies", {})
    limits = ours | {name: value for name, value in limits.items() if name != "bodies"}
    return {
        "version": VERSION,
        "routes": listed,
        "features": features,
        "limits": limits,
        "kernels": kernels,
    }


def html_page(routes: Sequence[Route]) -> bytes:
    """A page that lists the routes and their fields; nothing on it is fetched from elsewhere."""
    parts = [
        HEAD,
        f"<h1>Slipway {VERSION}</h1><p>The same as <a href=/openapi.json>OpenAPI</a>.</p>",
    ]
    for route in routes:
        methods = ", ".join(sorted(set(route.methods or ()) - {"HEAD"}))
        path, summary = html.escape(route.path), html.escape(_summary(route))
        parts.append(f"<h2><code>{methods} {path}</code></h2><p>{summary}</p>")
        rows = "".join(
            f"<tr><td><code>{field.encode_name}</code><td>{html.escape(_type(field.type))}"
            for field in _fields(route)
        )
        parts.append(f"<table>{rows}</table>" if rows else "")
    return "".join(parts).encode()


def _fields(route: Route) -> list[msgspec.structs.FieldInfo]:
    """Return the fields that the bodies of a route may have, each name once."""
    fields = [
        field for kind in body_types(route.endpoint) for field in msgspec.structs.fields(kind)
    ]
    return list({field.encode_name: field for field in fields}.values())


def _name(route: Route, method: str) -> str:
    """Return an operation's id: the path, and the method where there is more than one."""
    name = (
        route.path.replace(":path", "")
        .strip("/")
        .replace("/", "_")
        .replace("{", "")
        .replace("}", "")
    )
    return name if len(set(route.methods or ()) - {"HEAD"}) == 1 else f"{name}_{method.lower()}"


def _summary(route: Route) -> str:
    return (inspect.getdoc(route.endpoint) or "").splitlines()[0]


def _type(kind: Any) -> str:
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace("typing.", "")
