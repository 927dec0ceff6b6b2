"""Registry of platforms: their bodies of ops, form of layers, options and memory share.

Not here: the bodies (cpu.py, tpu.py, and xla.py for every platform), the ops (__init__.py), the
caches (kv_cache.py).
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from jax import lax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Body:
    """Implementation of one op on one platform.

    ``unsupported`` takes the arguments of ``call`` and returns the reason why ``call`` cannot
    compute them, "" if it can. ``is_only`` takes them too and returns whether no other body can,
    because they are in a form that exists on this platform only.
    """

    call: Callable[..., Any]
    unsupported: Callable[..., str]
    is_only: Callable[..., bool] = lambda *args, **static: False


@dataclasses.dataclass(frozen=True)
class Backend:
    """Everything that differs between platforms.

    ``platform``: the name that JAX gives its devices. ``lowers_for``: the names under which XLA
    compiles for them. ``label``: returns a name of the bodies, which is logged at start.
    ``cache_class``: returns the class of the KVCache for a ``head_dim``; None: the portable one.
    ``lanes``: vectors of a latent cache are padded to a multiple of it. ``layer_form``: function of
    a declaration, its mesh and its dtype that takes stacks apart; None: stacked layers stay so and
    are scanned. ``memory_fraction``: the default share of free memory that the engine uses.
    ``uses_host_memory``: the devices share the memory of the host. ``decode_steps``: the number of
    decode steps in one call for a small model on one device.
    """

    platform: str
    lowers_for: tuple[str, ...]
    bodies: Mapping[str, Body] = dataclasses.field(default_factory=dict)
    label: Callable[[], str] = lambda: "xla"
    cache_class: Callable[[int], type] | None = None
    lanes: int = 1
    layer_form: Callable[[Any, Mesh, Any], Any] | None = None
    compiler_options: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    memory_fraction: float = 0.9
    uses_host_memory: bool = False
    decode_steps: int = 1


_backends: dict[str, Backend] = {}
_portable: dict[str, Callable[..., Any]] = {}
# The recording that runs in this thread: its platform, and the body of each op.
_record: contextvars.ContextVar[tuple[str, dict[str, str]] | None] = contextvars.ContextVar(
    "record", default=None
)


def register(backend: Backend) -> None:
    """Add a platform, or replace the one of the same name."""
    _backends[backend.platform] = backend


def register_portable(bodies: Mapping[str, Callable[..., Any]]) -> None:
    """Add the bodies that compute an op for which a platform has no body of its own."""
    _portable.update(bodies)


def of(platform: str) -> Backend:
    """Return the backend of a platform, as JAX names it (``device.platform``)."""
    return _backends.get(platform) or Backend(platform, (platform,))


def call(op: str, *args: Any, **static: Any) -> Any:
    """Call the body of an op: that of the platform being compiled for, or else the portable one.

    ``static``: arguments with values at trace time.
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
        if body.is_only(*args, **static):
            return body.call(*args, **static)
    record(op, "xla")
    return lax.platform_dependent(*args, **served, default=portable) if served else portable(*args)


def record(op: str, body: str, platform: str | None = None) -> None:
    """Note the body of an op in the recording of this thread, unless it has one for that op.

    ``platform``: the recording must be of this platform; None: of any.
    """
    found = _record.get()
    if found is not None and platform in (None, found[0]):
        found[1].setdefault(op, body)


@contextlib.contextmanager
def recording(platform: str) -> Iterator[dict[str, str]]:
    """Collect the body of each op that this thread traces in the context.

    Where that is not the platform's own body, the entry has the reason in brackets.
    """
    bodies: dict[str, str] = {}
    token = _record.set((platform, bodies))
    try:
        yield bodies
    finally:
        _record.reset(token)
