"""Caches of keys and values: their declaration by a model, and their layouts in pages.

Not here: the layout that the TPU kernel reads (tpu.py), the owners of pages (cache/).

A numbering is a set of caches that use the same page numbers: the caches of layers with the same
window.
"""

import abc
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

    ``window``: the number of positions that a token sees in these layers, itself included; None:
    all. Pages before the window are freed while a sequence runs. ``latent_dim``: the values are the
    first numbers of the keys, so that only keys are stored (nn/latent_attention.py); 0: keys and
    values are different.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    latent_dim: int = 0


def page_windows(specs: Sequence[CacheSpec]) -> tuple[int | None, ...]:
    """Return the window of each numbering of pages; caches with equal windows share a numbering.

    The first is always None, for full attention: the prefix tree follows its pages, which are never
    freed while a sequence runs. It exists even if no cache uses it.
    """
    return (None, *dict.fromkeys(spec.window for spec in specs if spec.window is not None))


class KVCache(Protocol):
    """Keys and values of one or more layers, as a pytree."""

    def attend(
        self,
        q_TNH: Any,
        k_TKH: Any,
        v_TKH: Any,
        *,
        layer: Any,
        step: StepInput,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks_N: Any = None,
    ) -> tuple[Any, Self]:
        """Write the step's keys and values, then attend: -> ([T, heads, head_dim], cache after it).

        ``v_TKH``: None in a cache of latents, where the keys hold the values.
        ``layer``: the layer's index in this cache. ``window``: the number of positions that a token
        sees, itself included; None: all. ``soft_cap``: scores s become soft_cap * tanh(s /
        soft_cap) (Gemma 2, 2024). ``sinks_N``: for each head, a score that is part of the softmax's
        sum but has no value (gpt-oss, 2025).
        """


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of attention, as described in ``KVCache.attend``."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks_N: Any = None


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """Sizes of one cache; ``num_kv_heads``: of all devices, repeated heads included."""

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class AllocatedCache(abc.ABC):
    """KVCache that ``allocate`` makes: an array of the pages of one numbering, for several layers.

    A subclass is a layout of the array ``kv``. ``numbering``: the index in ``StepInput.pages`` of
    the pages that it uses.
    """

    kv: Any
    numbering: int = static(default=0)

    @classmethod
    @abc.abstractmethod
    def empty(cls, sizes: CacheSizes, dtype: Any) -> Any:
        """Return an array ``kv`` that holds nothing."""

    @property
    @abc.abstractmethod
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the array; a mesh splits "pages" over copies of the weights."""

    @abc.abstractmethod
    def write(self, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput) -> Self:
        """Return the cache with the keys and values of the step's tokens.

        Tokens with a slot outside the cache are dropped. The array is updated in place if the
        caller donates it.
        """

    @abc.abstractmethod
    def read(self, q_TNH: Any, *, layer: Any, step: StepInput, options: AttentionOptions) -> Any:
        """Return the attention of every token to its sequence, the step's own tokens included."""

    def attend(
        self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput, **options: Any
    ) -> tuple[Any, Self]:
        """Write, then read, as described in ``KVCache.attend``."""
        written = self.write(k_TKH, v_TKH, layer=layer, step=step)
        found = written.read(q_TNH, layer=layer, step=step, options=AttentionOptions(**options))
        return found, written


def allocate(
    specs: Sequence[CacheSpec],
    num_pages: Sequence[int],
    *,
    platform: str,
    page_size: int,
    dtype: Any,
    tensor: int = 1,
) -> tuple[AllocatedCache, ...]:
    """Return an empty cache for each spec, in the layout of a platform.

    ``num_pages``: of each numbering (``page_windows``). ``tensor``: the number of devices that the
    heads are split over; a model with fewer KV heads holds each of them several times.
    """
    host, windows = backend.of(platform), page_windows(specs)

    def one(spec: CacheSpec) -> AllocatedCache:
        choose, head_dim = host.cache_class, spec.head_dim
        cache_class: Any = PagedCache if choose is None else choose(head_dim)
        if spec.latent_dim:
            cache_class, head_dim = LatentCache, -(-head_dim // host.lanes) * host.lanes
        numbering = windows.index(spec.window)
        sizes = CacheSizes(
            num_layers=spec.num_layers,
            num_pages=num_pages[numbering],
            page_size=page_size,
            num_kv_heads=max(spec.num_kv_heads, tensor),
            head_dim=head_dim,
        )
        kv = cache_class.empty(sizes, dtype)
        latent = {"latent_dim": spec.latent_dim} if spec.latent_dim else {}
        return cache_class(kv, numbering, **latent)

    return tuple(one(spec) for spec in specs)


@module
class PagedCache(AllocatedCache):
    """Portable cache kv_LPK2SH: for each layer, page and head the keys, then the values.

    Pages are read by the body that wrote them only: the C++ bodies order the numbers of a page in
    their own way. 16-bit floats are stored as their bits (xla.py).
    """

    @classmethod
    def empty(cls, sizes: CacheSizes, dtype: Any) -> Any:
        """Return zeros in this layout."""
        L, P, S = sizes.num_layers, sizes.num_pages, sizes.page_size
        held_as = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype
        return jnp.zeros((L, P, sizes.num_kv_heads, 2, S, sizes.head_dim), held_as)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of kv_LPK2SH."""
        return (None, "pages", "kv_heads", None, None, None)

    def write(self, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput) -> "PagedCache":
        """Write with the platform's body of ``write_kv``."""
        slots_T = step.pages[self.numbering].slots_T
        kv = backend.call("write_kv", self.kv, layer, k_TKH, v_TKH, step.num_tokens, slots_T)
        return PagedCache(kv, self.numbering)

    def read(self, q_TNH: Any, *, layer: Any, step: StepInput, options: AttentionOptions) -> Any:
        """Attend with the platform's body of ``paged_attention``."""
        table_BM = step.pages[self.numbering].page_table_BM
        given = q_TNH, self.kv, layer, step, table_BM, options.sinks_N
        static = {name: getattr(options, name) for name in ("scale", "window", "soft_cap")}
        return backend.call("paged_attention", *given, **static)


@module
class LatentCache(AllocatedCache):
    """Cache kv_LPSH of latents: a vector for each layer, page and slot, on every device.

    ``latent_dim``: the leading numbers of a vector, which are the values too. A vector may be
    longer than the keys, by zeros at its end. 16-bit floats are stored as their bits, as in
    PagedCache.
    """

    latent_dim: int = static(default=0)

    @classmethod
    def empty(cls, sizes: CacheSizes, dtype: Any) -> Any:
        """Return zeros in this layout."""
        held_as = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype
        shape = sizes.num_layers, sizes.num_pages, sizes.page_size, sizes.head_dim
        return jnp.zeros(shape, held_as)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of kv_LPSH."""
        return (None, "pages", None, None)

    def write(self, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput) -> "LatentCache":
        """Write the vectors of the step's tokens; ``v_TKH`` must be None."""
        assert v_TKH is None, "values are a part of the keys"
        slots_T = step.pages[self.numbering].slots_T
        kv = backend.call("write_latent", self.kv, layer, self._padded(k_TKH)[:, 0], slots_T)
        return dataclasses.replace(self, kv=kv)

    def read(self, q_TNH: Any, *, layer: Any, step: StepInput, options: AttentionOptions) -> Any:
        """Attend with the platform's body of ``latent_attention``: -> [T, heads, latent_dim]."""
        table_BM = step.pages[self.numbering].page_table_BM
        static = {name: getattr(options, name) for name in ("scale", "window", "soft_cap")}
        given = self._padded(q_TNH), self.kv, layer, step, table_BM, options.sinks_N
        return backend.call("latent_attention", *given, latent_dim=self.latent_dim, **static)

    def _padded(self, x_TNH: Any) -> Any:
        return jnp.pad(x_TNH, [(0, 0), (0, 0), (0, self.kv.shape[-1] - x_TNH.shape[-1])])


@module
class BorrowedCache:
    """Cache of another engine: an array for each layer, used by that engine's kernel.

    ``kernel(q_TNH, k_TKH, v_TKH, cache=, where=, scale=, window=, soft_cap=, sinks_N=)`` writes and
    reads it and returns (o_TNH, cache). ``where``: the other engine's map of tokens to pages.
    ``layer`` is a number, not traced: the layers are called one after the other in Python.
    """

    caches: tuple[jax.Array, ...]
    where: Any
    kernel: Callable[..., Any] = static()

    def attend(
        self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *, layer: int, step: StepInput, **options: Any
    ) -> Any:
        """Call the other engine's kernel; arguments as described in ``KVCache.attend``."""
        del step  # ``where`` stands for it
        given = {"cache": self.caches[layer], "where": self.where}
        defaults = {"soft_cap": None, "sinks_N": None}
        o_TNH, cache = self.kernel(q_TNH, k_TKH, v_TKH, **(given | defaults | options))
        caches = (*self.caches[:layer], cache, *self.caches[layer + 1 :])
        return o_TNH, BorrowedCache(caches, self.where, self.kernel)
