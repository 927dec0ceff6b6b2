"""Oracles of the ops: slow, obvious, and independent of the bodies that they judge."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from slipway.ops.quantized import Quantized, dequantized


def linear(x_TD, w_OD, num_tokens):
    """Compute ``ops.linear`` in f32 throughout; padding rows are zero."""
    w_OD = dequantized(w_OD) if isinstance(w_OD, Quantized) else w_OD.astype(jnp.float32)
    y_TO = x_TD.astype(jnp.float32) @ w_OD.T
    return jnp.where((jnp.arange(x_TD.shape[0]) < num_tokens)[:, None], y_TO, 0.0)


def write_kv(kv, layer, k_TKH, v_TKH, step):
    """Compute ``PagedCache.write`` one token after the other."""
    page_size = kv.shape[4]
    for t in range(int(step.num_tokens)):
        page, offset = divmod(int(step.pages[0].slots_T[t]), page_size)
        kv = kv.at[layer, page, :, :, offset].set(stored(jnp.stack([k_TKH[t], v_TKH[t]], axis=1)))
    return kv


def paged_attention(q_TNH, kv, layer, step, scale, window, soft_cap=None, sinks_N=None):
    """Compute ``PagedCache.read`` in NumPy and f32.

    For each token and head, a softmax over the keys that the token sees.
    """
    kv = np.asarray(numbers(kv[layer], q_TNH.dtype).astype(jnp.float32))
    q_TNH, step = np.asarray(q_TNH.astype(jnp.float32)), jax.tree.map(np.asarray, step)
    out_TNH, group = np.zeros_like(q_TNH), q_TNH.shape[1] // kv.shape[1]
    for row, (start, count) in enumerate(zip(step.starts_B, step.counts_B)):
        pages_PKSH = (kv[step.pages[0].page_table_BM[row], :, i] for i in (0, 1))
        k_SKH, v_SKH = (
            x.transpose(0, 2, 1, 3).reshape(-1, kv.shape[1], kv.shape[4]) for x in pages_PKSH
        )
        for t in range(start, start + count):
            stop = step.positions_T[t] + 1
            seen = slice(max(0, stop - window) if window else 0, stop)
            for n in range(q_TNH.shape[1]):
                scores_S = k_SKH[seen, n // group] @ q_TNH[t, n] * scale
                scores_S = scores_S if soft_cap is None else soft_cap * np.tanh(scores_S / soft_cap)
                sink = -np.inf if sinks_N is None else float(sinks_N[n])
                weights_S = np.exp(scores_S - max(scores_S.max(), sink))
                total = weights_S.sum() + np.exp(sink - max(scores_S.max(), sink))
                out_TNH[t, n] = weights_S @ v_SKH[seen, n // group] / total
    return out_TNH


def stored(x):
    """Return 16-bit numbers as their bits, as PagedCache holds them."""
    return x if x.dtype.itemsize != 2 else lax.bitcast_convert_type(x, jnp.uint16)


def numbers(x, dtype):
    """Return the numbers of which ``stored`` made bits."""
    return x if x.dtype != jnp.uint16 else lax.bitcast_convert_type(x, dtype)
