"""The TPU bodies: decides the cache's layout there and what JAX's ragged paged attention kernel serves.

The cache is kv_LPSXH: per layer, page and slot the heads' keys and values by turns (X = 2 K), as that kernel reads it.
It is given the stacked cache whole, with page numbers counted from the layer's first: a layer sliced off in a scan
would be copied. The kernel: jax.experimental.pallas.ops.tpu.ragged_paged_attention; it compiles under ``jax.set_mesh``.
"""

import jax
import jax.numpy as jnp

LANES = 128
QUERIES_PER_BLOCK, KEYS_PER_BLOCK = 32, 128
NDIM = 5  # of such a cache; the portable one has 6
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def refuses_heads(platform: str, head_dim: int) -> str:
    """Why the kernel does not serve here; empty if it does."""
    if platform != "tpu":
        return f"for {platform}"
    return f"head_dim {head_dim}, no multiple of {LANES}" if head_dim % LANES else ""


def allocate_kv(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype):
    """An empty cache."""
    return jnp.zeros((num_layers, num_pages, page_size, 2 * num_kv_heads, head_dim), dtype)


def write_kv(kv, layer, k_TKH, v_TKH, ragged):
    """As ops.write_kv."""
    (L, P, S, X, H), T = kv.shape, k_TKH.shape[0]
    rows_TXH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, X, H).astype(kv.dtype)
    at_T = jnp.where(ragged.slots_T < P * S, layer * P * S + ragged.slots_T, L * P * S)
    return kv.reshape(L * P * S, X, H).at[at_T].set(rows_TXH, mode="drop").reshape(kv.shape)


def paged_attention(q_TNH, kv, layer, ragged, *, scale, window, soft_cap):
    """As ops.paged_attention, without sinks. Rows with tokens come first, one after the other."""
    # Imported here: Pallas for TPUs is half a second of every start, on any machine.
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernels

    (L, P, S, X, H), M = kv.shape, ragged.page_table_BM.shape[1]
    ends_B = jnp.cumsum(ragged.counts_B)
    return kernels.ragged_paged_attention(
        q_TNH, kv.reshape(L * P, S, X, H), ragged.lengths_B, ragged.page_table_BM + layer * P,
        jnp.concatenate([jnp.zeros(1, jnp.int32), ends_B.astype(jnp.int32)]),
        jnp.sum(ragged.counts_B > 0, keepdims=True).astype(jnp.int32),
        sm_scale=scale, sliding_window=window, soft_cap=soft_cap, mask_value=MASKED,
        num_kv_pages_per_block=min(M, max(1, KEYS_PER_BLOCK // S)),
        num_queries_per_block=min(q_TNH.shape[0], QUERIES_PER_BLOCK),
    )  # fmt: skip


def is_mine(kv: jax.Array) -> bool:
    """Whether a cache has this layout."""
    return kv.ndim == NDIM
