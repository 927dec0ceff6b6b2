"""TPU backend: a cache in the layout of JAX's ragged paged attention kernel, and calls of kernels.

Not here: the ops without a body of their own on a TPU (xla.py).

The kernels are those of jax.experimental.pallas.ops.tpu: ragged_paged_attention, which compiles
under ``jax.set_mesh``, and megablox, the grouped product of experts.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from slipway.errors import UnsupportedModel
from slipway.ops import backend, row_exchange, xla
from slipway.ops.backend import Backend, Body
from slipway.ops.kv_cache import AllocatedCache, AttentionOptions, CacheSizes, PagedCache
from slipway.ops.quantized import Quantized
from slipway.ops.step_input import StepInput
from slipway.tree import StackedArray, module

LANES = 128
# Sizes of the tiles of a grouped product: rows, and most numbers along the other dimensions.
ROWS_PER_TILE, TILE = 128, 1024
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


def multiply_by_group(
    x_SI, matrix, counts_E, *, is_transposed: bool = False, interpret: bool = False
):
    """Multiply runs of rows by the matrices of their groups, as ``xla.multiply_by_group`` does.

    The kernel gets the matrices of all layers of a scan, and counts that are zero for all but the
    layer's own: a slice of one layer would be copied. ``interpret``: run without a TPU.
    """
    # Imported here: Pallas for TPUs takes half a second of every start, on any machine.
    from jax.experimental.pallas.ops.tpu import megablox

    if isinstance(matrix, StackedArray):
        layers, num_groups = matrix.array.shape[:2]
        counts = jnp.zeros(layers * num_groups, jnp.int32)
        at = (matrix.index * num_groups,)
        counts_E = lax.dynamic_update_slice(counts, counts_E.astype(jnp.int32), at)
        matrix = matrix.array.reshape(layers * num_groups, *matrix.array.shape[2:])
    rows = x_SI.shape[0]
    padded_SI = jnp.pad(x_SI, [(0, -rows % ROWS_PER_TILE), (0, 0)])
    in_size, out_size = matrix.shape[1:] if is_transposed else matrix.shape[:0:-1]
    tiles = ROWS_PER_TILE, _tile(in_size), _tile(out_size)
    return megablox.gmm(
        padded_SI,
        matrix,
        counts_E.astype(jnp.int32),
        preferred_element_type=jnp.float32,
        tiling=tiles,
        transpose_rhs=not is_transposed,
        interpret=interpret,
    )[:rows]


def _tile(size: int) -> int:
    """Return the largest part of a dimension, in whole lanes, that tiles have."""
    if size <= TILE or size % LANES:
        return min(size, TILE)
    return max(part for part in range(LANES, TILE + 1, LANES) if size % part == 0)


def _refuses_experts(x_TD, experts_TK, weights_TK, matrices, num_tokens, num_experts) -> str:
    """Return why the kernel does not compute these experts, "" if it does."""
    del x_TD, experts_TK, weights_TK, num_tokens, num_experts
    return "packed weights" if isinstance(matrices.down, Quantized) else ""


def cache_class(head_dim: int) -> type:
    """Return the class of a cache for heads of ``head_dim`` numbers.

    The kernel takes multiples of LANES only.
    """
    return PagedCache if head_dim % LANES else TpuCache


BACKEND = Backend(
    platform="tpu",
    lowers_for=("tpu",),
    bodies={
        "experts": Body(partial(xla.experts, multiply=multiply_by_group), _refuses_experts),
        "send_rows": Body(row_exchange.ragged, lambda rows_RD, counts_NN, **_: ""),
    },
    label=lambda: LABEL,
    cache_class=cache_class,
    # Rows of other lengths get a layout with the pages last, and a step copies the cache twice.
    lanes=LANES,
    # Without this option TPU7x copies every weight into other tiles at every step: 7.8 GB a device
    # for 32 B parameters on 8 devices.
    compiler_options={"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"},
)
