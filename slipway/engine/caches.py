"""Caches of a model on a mesh: their shapes, and the bytes of their pages.

Not here: layouts of caches (ops/kv_cache.py), how many pages fit (memory.py).
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway.engine import memory
from slipway.models.decoder import LanguageModel
from slipway.ops import CacheSpec, ExpertLoad, kv_cache
from slipway.ops.kv_cache import AllocatedCache


class Caches:
    """Caches that a model, and perhaps its draft model, declare, as shapes on a mesh."""

    def __init__(
        self,
        declaration: LanguageModel,
        draft_specs: tuple[CacheSpec, ...],
        mesh: Mesh,
        *,
        dtype: Any,
        page_size: int,
    ):
        self._num_drafting = len(draft_specs)
        self._specs = declaration.cache_specs + draft_specs
        self._load_shape = declaration.load_shape
        self._windows = kv_cache.page_windows(self._specs)
        self.mesh = mesh
        self._dtype = dtype
        self._page_size = page_size

    def costs(
        self, max_num_seqs: int, max_num_tokens: int, *, table_width: int
    ) -> tuple[memory.PageCost, ...]:
        """Return, for each pool of pages, the bytes of a page and the useful numbers of pages.

        Pools are those of ``kv_cache.page_windows``; bytes are of one device. ``table_width``: the
        most pages of one sequence.
        """
        sizes = [0] * len(self._windows)
        for cache in self._empty([1] * len(self._windows)):
            # A single page cannot be split over copies of the weights, only over their devices.
            parts = [
                meshes.parts(axis, self.mesh) for axis in cache.axes if axis not in (None, "pages")
            ]
            sizes[cache.numbering] += cache.kv.size * cache.kv.dtype.itemsize // math.prod(parts)
        of_step = -(-max_num_tokens // self._page_size)
        useful = max_num_seqs * table_width

        def needed(window: int | None) -> int:
            seen = table_width if window is None else (window - 1) // self._page_size + 3
            return min(useful, max_num_seqs * seen + of_step)

        return tuple(
            memory.PageCost(size, needed(window), useful)
            for size, window in zip(sizes, self._windows)
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Windows of the pools of pages (kv_cache.page_windows)."""
        return self._windows

    def shapes(self, num_pages: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the caches of the model and of the draft model as shapes with shardings.

        The model's have its ExpertLoad behind them if it has experts. ``num_pages``: of each pool,
        for one of the copies of the weights.
        """
        copies = self.mesh.shape[meshes.DATA]

        def placed(cache: Any) -> AllocatedCache:
            sharding = NamedSharding(self.mesh, meshes.spec(cache.axes, self.mesh))
            kv = jax.ShapeDtypeStruct(cache.kv.shape, cache.kv.dtype, sharding=sharding)
            return dataclasses.replace(cache, kv=kv)

        caches = [placed(cache) for cache in self._empty([copies * count for count in num_pages])]
        of_model = len(caches) - self._num_drafting
        own, drafting = tuple(caches[:of_model]), tuple(caches[of_model:])
        layers, experts = self._load_shape
        if not layers:
            return own, drafting
        by_copy = NamedSharding(self.mesh, P(meshes.DATA))
        counts = jax.ShapeDtypeStruct((copies * layers, experts), np.uint32, sharding=by_copy)
        return (*own, ExpertLoad(counts)), drafting

    def _empty(self, num_pages: list[int]) -> tuple[AllocatedCache, ...]:
        """Return the caches of one copy of the weights, as shapes."""
        sizes = {"page_size": self._page_size, "tensor": meshes.parts("kv_heads", self.mesh)}
        platform = self.mesh.devices.flat[0].platform
        return jax.eval_shape(
            lambda: kv_cache.allocate(
                self._specs, num_pages, platform=platform, dtype=self._dtype, **sizes
            )
        )
