"""Registry of platforms: bodies of ops, form of layers, compiler options and memory share of each.

Not here: the bodies (cpu.py, tpu.py, and xla.py for every platform), the ops (__init__.py), the caches (kv_cache.py).
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from jax import lax


@dataclasses.dataclass(frozen=True)
class Body:
    """Implementation of one op on one platform.

    ``unsupported`` takes the arguments of ``call`` and returns why ``call`` does not serve them, "" if it does.
    """

    call: Callable[..., Any]
    unsupported: Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Everything that differs between platforms.

    ``platform``: the name that JAX gives its devices. ``lowers_for``: the names under which XLA compiles for them.
    ``cache_class``: the KVCache for heads of a number of elements; None: the portable one. ``layer_form``: how stacked
    layers are taken apart; None: they stay stacked and are scanned. ``decode_steps``: how many decode steps one call
    makes for a small model on one device.
    """

    platform: str
    lowers_for: tuple[str, ...]
    bodies: Mapping[str, Body] = dataclasses.field(default_factory=dict)
    label: Callable[[], str] = lambda: "xla"  # of the bodies, printed at start
    cache_class: Callable[[int], type] | None = None
    layer_form: Callable[[Any], Any] | None = None
    compiler_options: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    memory_fraction: float = 0.9
    uses_host_memory: bool = False
    decode_steps: int = 1


_backends: dict[str, Backend] = {}
_portable: dict[str, Callable[..., Any]] = {}
# The recording that runs in this thread: platform, and body of each op.
_record: contextvars.ContextVar[tuple[str, dict[str, str]] | None] = contextvars.ContextVar("record", default=None)


def register(backend: Backend) -> None:
    """Add a platform, or replace the one of the same name."""
    _backends[backend.platform] = backend


def register_portable(bodies: Mapping[str, Callable[..., Any]]) -> None:
    """Add the bodies that serve an op where no platform's own does."""
    _portable.update(bodies)


def of(platform: str) -> Backend:
    """Return the backend of a platform: ``mesh.devices.flat[0].platform``, or a device's."""
    return _backends.get(platform) or Backend(platform, (platform,))


def call(op: str, *args: Any, **static: Any) -> Any:
    """Call the body of an op: that of the platform for which the step is lowered, else the portable one.

    ``static`` are values that are known while tracing.
    """
    portable = partial(_portable[op], **static)
    served: dict[str, Callable[..., Any]] = {}
    for backend in _backends.values():
        if (body := backend.bodies.get(op)) is None:
            continue
        why_not = body.unsupported(*args, **static)
        if not why_not:
            served |= dict.fromkeys(backend.lowers_for, partial(body.call, **static))
        record(op, f"xla ({why_not})" if why_not else backend.label(), backend.platform)
    record(op, "xla")
    return lax.platform_dependent(*args, **served, default=portable) if served else portable(*args)


def record(op: str, body: str, platform: str | None = None) -> None:
    """Note which body serves an op, if a recording runs for ``platform`` (None: for any) and has no body yet."""
    found = _record.get()
    if found is not None and platform in (None, found[0]):
        found[1].setdefault(op, body)


@contextlib.contextmanager
def recording(platform: str) -> Iterator[dict[str, str]]:
    """Collect which body serves each op that is traced in this thread meanwhile, and why not the platform's own."""
    bodies: dict[str, str] = {}
    token = _record.set((platform, bodies))
    try:
        yield bodies
    finally:
        _record.reset(token)
