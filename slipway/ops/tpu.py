"""TPU backend: a cache in the layout of JAX's ragged paged attention kernel, and calls of it.

Not here: the ops without a body of their own on a TPU (xla.py).

The kernel is jax.experimental.pallas.ops.tpu.ragged_paged_attention; it compiles under
``jax.set_mesh``.
"""

from typing import Any

import jax.numpy as jnp

from slipway.errors import UnsupportedModel
from slipway.ops import backend, kv_cache
from slipway.ops.backend import Backend
from slipway.ops.step_input import StepInput
from slipway.tree import module, static

LANES = 128
QUERIES_PER_BLOCK = 32
KEYS_PER_BLOCK = 128
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
LABEL = "pallas (ops/tpu.py)"


@module
class TpuCache:
    """Cache kv_LPSXH: for each layer, page and slot, key and value of each head in turn (X = 2 K).

    The kernel gets the whole cache of all layers, and page numbers that are offset to the layer's
    first page: a slice of one layer in a scan would be copied.
    """

    kv: Any
    numbering: int = static(default=0)

    @staticmethod
    def allocate(
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        numbering: int,
        dtype: Any,
    ) -> "TpuCache":
        """Return an empty cache."""
        shape = (num_layers, num_pages, page_size, 2 * num_kv_heads, head_dim)
        return TpuCache(jnp.zeros(shape, dtype), numbering)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the array."""
        return (None, "pages", None, "kv_heads", None)

    def write(self, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput) -> "TpuCache":
        """Return the cache with the keys and values of the step's tokens.

        Tokens with a slot outside the cache are dropped.
        """
        backend.record("write_kv", LABEL)
        slots_T = step.pages[self.numbering].slots_T
        (L, P, S, X, H), T = self.kv.shape, k_TKH.shape[0]
        rows_TXH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, X, H).astype(self.kv.dtype)
        at_T = jnp.where(slots_T < P * S, layer * P * S + slots_T, L * P * S)
        flat = self.kv.reshape(L * P * S, X, H).at[at_T].set(rows_TXH, mode="drop")
        return TpuCache(flat.reshape(self.kv.shape), self.numbering)

    def read(
        self,
        q_TNH: Any,
        *,
        layer: Any,
        step: StepInput,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks_N: Any = None,
    ) -> Any:
        """Return the attention of every token to its sequence, the step's own tokens included.

        The rows with tokens must precede the unused ones. Raises UnsupportedModel for attention
        sinks.
        """
        # Imported here: Pallas for TPUs takes half a second of every start, on any machine.
        from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernels

        if sinks_N is not None:
            expected = "none: the TPU kernel has no place for them"
            raise UnsupportedModel("attention sinks", "some", expected)
        backend.record("paged_attention", LABEL)
        table_BM = step.pages[self.numbering].page_table_BM
        (L, P, S, X, H), M = self.kv.shape, table_BM.shape[1]
        ends_B = jnp.cumsum(step.counts_B)
        rows = (
            table_BM + layer * P,
            jnp.concatenate([jnp.zeros(1, jnp.int32), ends_B.astype(jnp.int32)]),
            jnp.sum(step.counts_B > 0, keepdims=True).astype(jnp.int32),
        )
        return kernels.ragged_paged_attention(
            q_TNH,
            self.kv.reshape(L * P, S, X, H),
            step.lengths_B,
            *rows,
            sm_scale=scale,
            sliding_window=window,
            soft_cap=soft_cap,
            mask_value=MASKED,
            num_kv_pages_per_block=min(M, max(1, KEYS_PER_BLOCK // S)),
            num_queries_per_block=min(q_TNH.shape[0], QUERIES_PER_BLOCK),
        )

    def attend(
        self, q_TNH: Any, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput, **options: Any
    ) -> Any:
        """Write, then read, as described in ``KVCache.attend``."""
        written = self.write(k_TKH, v_TKH, layer=layer, step=step)
        return written.read(q_TNH, layer=layer, step=step, **options), written


def cache_class(head_dim: int) -> type:
    """Return the class of a cache for heads of ``head_dim`` numbers.

    The kernel takes multiples of LANES only.
    """
    return kv_cache.PagedCache if head_dim % LANES else TpuCache


BACKEND = Backend(
    platform="tpu",
    lowers_for=("tpu",),
    cache_class=cache_class,
    # Without this option TPU7x copies every weight into other tiles at every step: 7.8 GB a device
    # for 32 B parameters on 8 devices.
    compiler_options={"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"},
)
