"""TPU backend: a cache in the layout of JAX's ragged paged attention kernel, and calls of it.

Not here: the ops without a body of their own on a TPU (xla.py).

The kernel is jax.experimental.pallas.ops.tpu.ragged_paged_attention; it compiles under
``jax.set_mesh``.
"""

from typing import Any

import jax.numpy as jnp

from slipway.errors import UnsupportedModel
from slipway.ops import backend
from slipway.ops.backend import Backend
from slipway.ops.kv_cache import AllocatedCache, AttentionOptions, CacheSizes, PagedCache
from slipway.ops.step_input import StepInput
from slipway.tree import module

LANES = 128
QUERIES_PER_BLOCK = 32
KEYS_PER_BLOCK = 128
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
LABEL = "pallas (ops/tpu.py)"


@module
class TpuCache(AllocatedCache):
    """Cache kv_LPSXH: for each layer, page and slot, key and value of each head in turn (X = 2 K).

    The kernel gets the whole cache of all layers, and page numbers that are offset to the layer's
    first page: a slice of one layer in a scan would be copied.
    """

    @classmethod
    def empty(cls, sizes: CacheSizes, dtype: Any) -> Any:
        """Return zeros in this layout."""
        L, P, S = sizes.num_layers, sizes.num_pages, sizes.page_size
        return jnp.zeros((L, P, S, 2 * sizes.num_kv_heads, sizes.head_dim), dtype)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of kv_LPSXH."""
        return (None, "pages", None, "kv_heads", None)

    def write(self, k_TKH: Any, v_TKH: Any, *, layer: Any, step: StepInput) -> "TpuCache":
        """Write with a scatter, in XLA's operations."""
        backend.record("write_kv", LABEL)
        slots_T = step.pages[self.numbering].slots_T
        (L, P, S, X, H), T = self.kv.shape, k_TKH.shape[0]
        rows_TXH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, X, H).astype(self.kv.dtype)
        at_T = jnp.where(slots_T < P * S, layer * P * S + slots_T, L * P * S)
        flat = self.kv.reshape(L * P * S, X, H).at[at_T].set(rows_TXH, mode="drop")
        return TpuCache(flat.reshape(self.kv.shape), self.numbering)

    def read(self, q_TNH: Any, *, layer: Any, step: StepInput, options: AttentionOptions) -> Any:
        """Attend with the kernel; the rows with tokens must precede the unused ones.

        Raises UnsupportedModel for attention sinks.
        """
        # Imported here: Pallas for TPUs takes half a second of every start, on any machine.
        from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernels

        if options.sinks_N is not None:
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
            sm_scale=options.scale,
            sliding_window=options.window,
            soft_cap=options.soft_cap,
            mask_value=MASKED,
            num_kv_pages_per_block=min(M, max(1, KEYS_PER_BLOCK // S)),
            num_queries_per_block=min(q_TNH.shape[0], QUERIES_PER_BLOCK),
        )


def cache_class(head_dim: int) -> type:
    """Return the class of a cache for heads of ``head_dim`` numbers.

    The kernel takes multiples of LANES only.
    """
    return PagedCache if head_dim % LANES else TpuCache


BACKEND = Backend(
    platform="tpu",
    lowers_for=("tpu",),
    cache_class=cache_class,
    # Without this option TPU7x copies every weight into other tiles at every step: 7.8 GB a device
    # for 32 B parameters on 8 devices.
    compiler_options={"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"},
)
