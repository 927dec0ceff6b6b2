"""Descriptions of the server made from its routes: OpenAPI document, HTML page, capabilities.

Not here: the routes (app.py), the fields of bodies (schema.py).
"""

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
# Routes with a file as their body -> the parameter that identifies it.
FILE_ROUTES = {"/weights/update": "update_id"}
HEAD = (
    "<!doctype html><meta charset=utf-8><title>Slipway</title><style>"
    "body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
    "code{background:#8882;padding:.1em .3em}td{padding:.1em 1em .1em 0}</style>"
)


def describe(kinds: Sequence[type], handler: Handler, summary: str) -> Handler:
    """Set the types of a handler's body and its summary, for the document; return the handler."""
    handler.__doc__ = summary
    handler.kinds = tuple(kinds)  # type: ignore[attr-defined]  # functions may have any attributes
    return handler


def body_types(handler: Handler) -> tuple[type, ...]:
    """Return the types that a handler's body may have; none if it reads no JSON."""
    return getattr(handler, "kinds", ())


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document: bodies with their types, responses with their media type."""
    bodies = list(dict.fromkeys(kind for route in routes for kind in body_types(route.endpoint)))
    template = "#/components/schemas/{name}"
    schemas, components = msgspec.json.schema_components(bodies, ref_template=template)
    schema_of = dict(zip(bodies, schemas))
    paths: dict[str, Any] = {}
    for route in routes:
        for method in _methods(route):
            operation = _operation(route, method, schema_of)
            paths.setdefault(_path(route), {})[method.lower()] = operation
    info = {"title": "Slipway", "version": VERSION}
    return {
        "openapi": "3.1.0",
        "info": info,
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route, method: str, schema_of: dict[type, Any]) -> dict[str, Any]:
    """Return OpenAPI's operation object of a route's method."""
    operation: dict[str, Any] = {
        "operationId": _operation_id(route, method),
        "summary": _summary(route),
        "responses": {"default": {"description": "JSON; an error is OpenAI's error object"}},
    }
    if schemas := [schema_of[kind] for kind in body_types(route.endpoint)]:
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.path in FILE_ROUTES:
        file: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
        content = {"application/octet-stream": file}
        operation["requestBody"] = {"required": True, "content": content}
        operation["parameters"] = [_parameter(FILE_ROUTES[route.path], "query")]
    parts = [part for part in route.path.split("/") if part.startswith("{")]
    if parts:
        names = [part.strip("{}").partition(":")[0] for part in parts]
        operation["parameters"] = [_parameter(name, "path") for name in names]
    return operation


def _parameter(name: str, location: str) -> dict[str, Any]:
    return {"name": name, "in": location, "required": True, "schema": {"type": "string"}}


def capabilities(
    routes: Sequence[Route],
    config: ServerConfig,
    *,
    limits: dict[str, Any],
    features: dict[str, bool],
) -> dict[str, Any]:
    """Return the routes with their fields, the model's features, all limits, and the kernels."""
    listed = {
        _path(route): {
            "methods": _methods(route),
            "fields": [field.encode_name for field in _fields(route)],
        }
        for route in routes
    }
    names = [name for name in config.__dataclass_fields__ if name.startswith("max_")]
    server_limits = {name: getattr(config, name) for name in names}
    engine_limits = {name: value for name, value in limits.items() if name != "bodies"}
    return {
        "version": VERSION,
        "routes": listed,
        "features": features,
        "limits": server_limits | engine_limits,
        "kernels": limits.get("bodies", {}),
    }


def html_page(routes: Sequence[Route]) -> bytes:
    """Return an HTML page of the routes and their fields that loads nothing from elsewhere."""
    parts = [
        HEAD,
        f"<h1>Slipway {VERSION}</h1>",
        "<p>The same as an <a href=/openapi.json>OpenAPI document</a>.</p>",
    ]
    for route in routes:
        methods = ", ".join(_methods(route))
        path, summary = html.escape(route.path), html.escape(_summary(route))
        parts.append(f"<h2><code>{methods} {path}</code></h2><p>{summary}</p>")
        rows = "".join(
            f"<tr><td><code>{field.encode_name}</code><td>{html.escape(_type_name(field.type))}"
            for field in _fields(route)
        )
        parts.append(f"<table>{rows}</table>" if rows else "")
    return "".join(parts).encode()


def _methods(route: Route) -> list[str]:
    return sorted(set(route.methods or ()) - {"HEAD"})


def _path(route: Route) -> str:
    return route.path.replace(":path", "")


def _fields(route: Route) -> list[msgspec.structs.FieldInfo]:
    """Return the fields that the bodies of a route may have, each name once."""
    kinds = body_types(route.endpoint)
    fields = [field for kind in kinds for field in msgspec.structs.fields(kind)]
    return list({field.encode_name: field for field in fields}.values())


def _operation_id(route: Route, method: str) -> str:
    """Return the path as an identifier, with the method if the path has several."""
    name = _path(route).strip("/").replace("/", "_").replace("{", "").replace("}", "")
    return name if len(_methods(route)) == 1 else f"{name}_{method.lower()}"


def _summary(route: Route) -> str:
    return (inspect.getdoc(route.endpoint) or "").splitlines()[0]


def _type_name(kind: Any) -> str:
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace("typing.", "")
