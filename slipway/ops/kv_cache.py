"""Caches of keys and values: what a model declares, and the layouts in which pages hold them.

Not here: the layout that the TPU kernel reads (tpu.py), and which page belongs to whom (cache/).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from slipway.ops import backend
from slipway.ops.step_input import StepInput
from slipway.tree import module, static


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Cache of ``num_layers`` layers that a model declares.

    ``window``: how many positions its layers see, the token itself included; None: all. Pages before the window are
    freed while a sequence runs.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


def page_windows(specs: Sequence[CacheSpec]) -> tuple[int | None, ...]:
    """Return the window of each numbering of pages: caches of equal windows share one.

    The first, None, keeps every page; the prefix tree follows it, so it stands there even if no cache uses it.
    """
    return (None, *dict.fromkeys(spec.window for spec in specs if spec.window is not None))


class KVCache(Protocol):
    """Keys and values of some layers, as a pytree with the pages of one numbering (``StepInput.pages[numbering]``)."""

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of its array; a mesh splits "pages" over copies of the weights, and "kv_heads"."""

    def attend(
        self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput, scale: float,
        window: int | None = None, soft_cap: float | None = None, sinks_N: Any = None,
    ) -> tuple[Any, Self]:  # fmt: skip
        """Write the step's keys and values, then attend: [T, heads, head_dim], and the cache that holds them.

        ``layer``: the layer's index in this cache. ``window``: how many positions a token sees, itself included; None:
        all. ``soft_cap``: scores s become soft_cap * tanh(s / soft_cap) (Gemma 2, 2024). ``sinks_N``: a score per head
        that takes its share of the softmax and adds nothing (gpt-oss, 2025).
        """


def allocate(
    specs: Sequence[CacheSpec], num_pages: Sequence[int], *, platform: str, page_size: int, dtype: Any, tensor: int = 1
) -> tuple[Any, ...]:
    """Return an empty cache for each spec, in the layout of a platform.

    ``num_pages``: of each numbering (``page_windows``). ``tensor``: the number of devices that split the heads; a model
    with fewer KV heads has each of them several times.
    """
    choose, windows = backend.of(platform).cache_class, page_windows(specs)

    def one(spec: CacheSpec) -> Any:
        cache_class: Any = PagedCache if choose is None else choose(spec.head_dim)
        numbering = windows.index(spec.window)
        return cache_class.allocate(
            num_layers=spec.num_layers,
            num_pages=num_pages[numbering],
            page_size=page_size,
            num_kv_heads=max(spec.num_kv_heads, tensor),
            head_dim=spec.head_dim,
            numbering=numbering,
            dtype=dtype,
        )

    return tuple(one(spec) for spec in specs)


@module
class PagedCache:
    """The portable cache kv_LPK2SH: per layer, page and head the keys, then the values.

    Only the body that wrote a page reads it; the C++ bodies keep the numbers of a page in an order of their own.
    16-bit floats are stored as their bits (xla.py).
    """

    kv: Any
    numbering: int = static(default=0)

    @staticmethod
    def allocate(
        *, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, numbering: int, dtype: Any
    ) -> "PagedCache":
        """Return an empty cache."""
        held_as = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype
        return PagedCache(jnp.zeros((num_layers, num_pages, num_kv_heads, 2, page_size, head_dim), held_as), numbering)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """As KVCache.axes."""
        return (None, "pages", "kv_heads", None, None, None)

    def write(self, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput) -> "PagedCache":
        """Return the cache with the keys and values of the step's tokens; in place where the caller donates it."""
        slots_T = step.pages[self.numbering].slots_T
        kv = backend.call("write_kv", self.kv, layer, k_TKH, v_TKH, step.num_tokens, slots_T)
        return PagedCache(kv, self.numbering)

    def read(
        self, q_TNH: Any, *, layer: Any, step: StepInput, scale: float, window: int | None = None,
        soft_cap: float | None = None, sinks_N: Any = None,
    ) -> Any:  # fmt: skip
        """Return the attention of every token to its sequence, the step's own tokens included."""
        table_BM = step.pages[self.numbering].page_table_BM
        options = {"scale": scale, "window": window, "soft_cap": soft_cap}
        return backend.call("paged_attention", q_TNH, self.kv, layer, step, table_BM, sinks_N, **options)

    def attend(self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput, **options: Any) -> Any:
        """As KVCache.attend."""
        written = self.write(k_TKH, v_TKH, layer=layer, step=step)
        return written.read(q_TNH, layer=layer, step=step, **options), written


@module
class BorrowedCache:
    """The cache of another engine: an array for each layer, written and read by that engine's kernel.

    ``kernel(q_TNH, k_TKH, v_TKH, cache=, where=, scale=, window=, soft_cap=, sinks_N=) -> (o_TNH, cache)``;
    ``where`` is that engine's own account of which tokens lie in which pages. ``layer`` is not traced: layers follow
    each other in Python.
    """

    caches: tuple[jax.Array, ...]
    where: Any
    kernel: Callable[..., Any] = static()

    def attend(self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *, layer: int, step: StepInput, **options: Any) -> Any:
        """As KVCache.attend."""
        del step  # ``where`` has the other engine's
        options = {"cache": self.caches[layer], "where": self.where, "soft_cap": None, "sinks_N": None} | options
        o_TNH, cache = self.kernel(q_TNH, k_TKH, v_TKH, **options)
        caches = (*self.caches[:layer], cache, *self.caches[layer + 1 :])
        return o_TNH, BorrowedCache(caches, self.where, self.kernel)
