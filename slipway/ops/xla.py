"""Portable bodies of the ops, in plain JAX for every platform.

Not here: the signatures of the ops (__init__.py), the C++ bodies (cpu.py), the TPU kernel (tpu.py).

They avoid weak points of XLA's CPU compiler (docs/performance.md): it compiles a dot with one row,
or with a bf16 result, to a naive loop; and it widens the whole cache to f32 for a bf16 scatter or
update, so 16-bit caches are stored as their bits.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from slipway import tree
from slipway.ops import row_exchange
from slipway.ops.quantized import Quantized, dequantized
from slipway.ops.routing import route

# Keys for each turn of the attention loop, and queries for each tile of a prefill.
BLOCK_TOKENS = 128
# Keys for each turn of a single query: 0.14 ms a layer against 0.36 at a context of 240.
LONE_BLOCK_TOKENS = 16
# A step with at most this number of rows attends to them one by one.
FEW_ROWS = 2
# Score of a masked key: finite, so that a row without any key gets no NaN.
MASKED = -1e30
# Logit of a token that must not be sampled.
DROPPED = -jnp.inf


def embed(ids_T, table_VD, num_tokens):
    """Look up rows of the table; an id that this device does not hold gives zeros."""
    del num_tokens  # a gather cannot skip rows
    is_packed = isinstance(table_VD, Quantized)
    held_T = (ids_T >= 0) & (ids_T < (table_VD.packed if is_packed else table_VD).shape[0])
    rows_T = jnp.where(held_T, ids_T, 0)
    if is_packed:
        x_TD = dequantized(table_VD, rows_T).astype(table_VD.scale.dtype)
    else:
        x_TD = table_VD[rows_T]
    return jnp.where(held_T[:, None], x_TD, jnp.zeros_like(x_TD))


def linear(x_TD, weight, num_tokens, bias=None, dtype=jnp.float32):
    """Compute ``x @ weight.T + bias``, summed in f32."""
    del num_tokens  # XLA's dots cannot skip rows
    rows = x_TD.shape[0]
    if rows == 1:
        x_TD = jnp.concatenate([x_TD, x_TD])
    y_TO = tree.call(partial(_dot, x_TD), weight)[:rows]
    if bias is not None:
        y_TO = y_TO + tree.value(bias).astype(jnp.float32)[None]
    return y_TO.astype(dtype)


def linears(x_TD, weights, num_tokens, biases, dtype=jnp.float32):
    """Compute ``linear`` of the same tokens with each of the weights."""
    pairs = zip(weights, biases)
    return tuple(linear(x_TD, w, num_tokens, bias=bias, dtype=dtype) for w, bias in pairs)


def _dot(x_TD, w_OD):
    if isinstance(w_OD, Quantized):
        x_TD, w_OD = x_TD.astype(jnp.float32), dequantized(w_OD)
    return lax.dot_general(x_TD, w_OD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def gated_linear(x_TD, gate, up, num_tokens, gate_bias=None, up_bias=None, dtype=jnp.float32):
    """Compute ``silu(linear(x, gate)) * linear(x, up)``, in f32 until the end.

    Shazeer, GLU variants improve transformer, 2020.
    """
    gate_TO = linear(x_TD, gate, num_tokens, bias=gate_bias)
    return (jax.nn.silu(gate_TO) * linear(x_TD, up, num_tokens, bias=up_bias)).astype(dtype)


# Dimensions of a product of rows [S, in], sorted by group, and matrices [group, out, in] or, where
# they lie transposed, [group, in, out].
_BY_GROUP = {
    is_transposed: lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (1 if is_transposed else 2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    for is_transposed in (False, True)
}


def multiply_by_group(x_SI, matrix, counts_E, *, is_transposed=False):
    """Multiply runs of rows, ``counts_E[e]`` each, by matrix e: [S, in] -> f32 [S, out]."""

    def multiply(matrix):
        is_packed = isinstance(matrix, Quantized)
        return lax.ragged_dot_general(
            x_SI,
            dequantized(matrix).astype(x_SI.dtype) if is_packed else matrix,
            counts_E,
            ragged_dot_dimension_numbers=_BY_GROUP[is_transposed],
            preferred_element_type=jnp.float32,
        )

    return tree.call(multiply, matrix)


def experts(
    x_TD, experts_TK, weights_TK, matrices, num_tokens, *, num_experts, multiply=multiply_by_group
):
    """Sort the tokens by expert, and multiply each run by the matrices of its expert.

    The sum of a token's experts is in f32, in the order in which they were chosen. ``multiply``:
    the grouped product, with the arguments of ``multiply_by_group``.
    """
    (T, K), dtype = experts_TK.shape, x_TD.dtype
    is_live = (jnp.arange(T) < num_tokens)[:, None]
    is_held = is_live & (experts_TK >= 0) & (experts_TK < num_experts)
    # Those that this device does not compute are sorted behind all others.
    expert_S = jnp.where(is_held, experts_TK, num_experts).reshape(T * K)
    order_S = jnp.argsort(expert_S)
    counts_E = jnp.bincount(expert_S, length=num_experts)

    multiply = partial(multiply, is_transposed=matrices.lie_transposed)

    def biased(y_SO, bias, parts=1):
        if bias is None:
            return y_SO
        rows_S = jnp.minimum(expert_S[order_S], num_experts - 1)
        return y_SO + tree.value(bias)[rows_S].astype(jnp.float32) / parts

    x_SD = x_TD[order_S // K]
    if matrices.lie_transposed:
        both_SX = biased(multiply(x_SD, matrices.into[0], counts_E), matrices.into_bias)
        gate_SF, up_SF = both_SX[:, 0::2], both_SX[:, 1::2]
    else:
        gate_SF, up_SF = (multiply(x_SD, matrix, counts_E) for matrix in matrices.into)
    hidden_SF = _gated(gate_SF, up_SF, matrices.clamp).astype(dtype)
    y_SD = multiply(hidden_SF, matrices.down, counts_E)
    y_SD = biased(y_SD, matrices.down_bias, parts=matrices.parts)
    y_TKD = y_SD[jnp.argsort(order_S)].reshape(T, K, -1)
    # The rows behind the last group are undefined, not zero.
    y_TKD = jnp.where(is_held[..., None], y_TKD * weights_TK[..., None], 0.0)
    return sum(y_TKD[:, k] for k in range(K))


def _gated(gate, up, clamp):
    if not clamp:
        return jax.nn.silu(gate) * up
    alpha, limit = clamp
    gate = jnp.minimum(gate, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (jnp.clip(up, -limit, limit) + 1)


def rms_norm(x_TD, weight, num_tokens, eps):
    """Normalize by the root mean square, in f32.

    As in transformers, the result is rounded to the dtype of x before the weight is applied.
    """
    del num_tokens
    return _normed(x_TD, tree.value(weight), eps)


def _normed(x, weight, eps):
    x32 = x.astype(jnp.float32)
    normed = (x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normed * jnp.expand_dims(weight, range(x.ndim - 1))


def rotate(x_TNH, weight, angles, num_tokens, eps):
    """Rotate each pair (i, i + R) of every head by its angle, in f32.

    With a weight, the heads are normalized first.
    """
    del num_tokens
    if weight is not None:
        x_TNH = _normed(x_TNH, tree.value(weight), eps)
    cos_TNR, sin_TNR = (x_TR[:, None] for x_TR in angles)
    R = cos_TNR.shape[-1]
    first_TNR, second_TNR, rest_TNH = jnp.split(x_TNH, (R, 2 * R), axis=-1)
    first_TNR, second_TNR = first_TNR.astype(jnp.float32), second_TNR.astype(jnp.float32)
    turned = first_TNR * cos_TNR - second_TNR * sin_TNR, second_TNR * cos_TNR + first_TNR * sin_TNR
    return jnp.concatenate([*(x.astype(x_TNH.dtype) for x in turned), rest_TNH], axis=-1)


def write_kv(kv, layer, k_TKH, v_TKH, num_tokens, slots_T):
    """Write keys and values into their slots of PagedCache.kv; a slot outside it is dropped."""
    del num_tokens  # the slots of padding lie outside
    page_size = kv.shape[4]
    rows_TK2H = _to_storage(jnp.stack([k_TKH, v_TKH], axis=2))
    at = kv.at[layer, slots_T // page_size, :, :, slots_T % page_size]
    return at.set(rows_TK2H, mode="drop")


def paged_attention(q_TNH, kv, layer, step, page_table_BM, sinks_N, *, scale, window, soft_cap):
    """Compute causal attention of every token to its sequence, as in ``PagedCache.read``.

    Query head n reads KV head n // (N / K). Rows with one token are computed together, in a loop
    over blocks of keys that ends with the longest row. Rows with several tokens are computed tile
    by tile, each over the keys that it sees. So the cost follows the numbers of tokens and keys,
    not the shapes of the arrays.
    """
    num_kv_heads, page_size, H = kv.shape[2], kv.shape[4], kv.shape[5]

    def read(pages_RP):
        # Transposed while the numbers are 16 bits wide: XLA would do it in f32, three times as
        # slow.
        block_2RKPSH = kv[layer, pages_RP].transpose(3, 0, 2, 1, 4, 5)
        kv_2RKSH = block_2RKPSH.reshape(2, pages_RP.shape[0], num_kv_heads, -1, H)
        return tuple(_from_storage(kv_2RKSH, q_TNH.dtype).astype(jnp.float32))

    options = {"sinks_N": sinks_N, "scale": scale, "window": window, "soft_cap": soft_cap}
    pages = Pages(read, page_size, num_kv_heads=num_kv_heads, value_dim=H)
    attend = partial(_attend, pages=pages, **options)
    return _ragged(attend, q_TNH, step, page_table_BM=page_table_BM, value_dim=H)


def write_latent(kv, layer, k_TH, slots_T):
    """Write vectors into their slots of LatentCache.kv; a slot outside it is dropped."""
    page_size = kv.shape[2]
    at = kv.at[layer, slots_T // page_size, slots_T % page_size]
    return at.set(_to_storage(k_TH), mode="drop")


def latent_attention(
    q_TNH, kv, layer, step, page_table_BM, sinks_N, *, latent_dim, scale, window, soft_cap
):
    """Compute attention to a LatentCache: the values are the first numbers of the keys."""
    page_size, H = kv.shape[2:]

    def read(pages_RP):
        keys_RSH = kv[layer, pages_RP].reshape(pages_RP.shape[0], -1, H)
        keys_R1SH = _from_storage(keys_RSH, q_TNH.dtype).astype(jnp.float32)[:, None]
        return keys_R1SH, keys_R1SH[..., :latent_dim]

    options = {"sinks_N": sinks_N, "scale": scale, "window": window, "soft_cap": soft_cap}
    pages = Pages(read, page_size, num_kv_heads=1, value_dim=latent_dim)
    attend = partial(_attend, pages=pages, **options)
    return _ragged(attend, q_TNH, step, page_table_BM=page_table_BM, value_dim=latent_dim)


@dataclasses.dataclass(frozen=True)
class Pages:
    """Pages of one layer. ``read(pages_RP)`` returns keys [R, K, S, H] and values [R, K, S, V]."""

    read: Callable[[Any], tuple[Any, Any]]
    page_size: int
    num_kv_heads: int
    value_dim: int


def _ragged(attend, q_TNH, step, page_table_BM, value_dim: int):
    """Compute attention of all tokens: rows with one token together, the others tile by tile."""
    alone_B = step.counts_B == 1
    tiles = partial(_tiles, attend, q_TNH, step, page_table_BM=page_table_BM, value_dim=value_dim)
    # With few rows the second attention below is not worth its compilation.
    if step.counts_B.shape[0] <= FEW_ROWS:
        return tiles(skip_B=jnp.zeros_like(alone_B)).astype(q_TNH.dtype)
    start_B = jnp.where(alone_B, step.starts_B, q_TNH.shape[0])
    q_B1NH = q_TNH.at[start_B].get(mode="clip")[:, None]
    positions_B1 = step.positions_T.at[start_B].get(mode="clip")[:, None]
    lengths_B = jnp.where(alone_B, step.lengths_B, 0)
    o_BNH = attend(q_B1NH, positions_B1, lengths_B, page_table_RM=page_table_BM)[:, 0]
    out_TNH = tiles(skip_B=alone_B)
    return out_TNH.at[start_B].set(o_BNH, mode="drop").astype(q_TNH.dtype)


def _tiles(attend, q_TNH, step, page_table_BM, value_dim, skip_B):
    """Compute attention of the rows that are not skipped, tile by tile; f32."""
    tokens, tile = q_TNH.shape[0], min(BLOCK_TOKENS, q_TNH.shape[0])
    padded_TNH = jnp.pad(q_TNH, ((0, tile), (0, 0), (0, 0)))
    positions_T = jnp.pad(step.positions_T, (0, tile))
    tiles_B = jnp.where(skip_B, 0, -(-step.counts_B // tile))
    ends_B = jnp.cumsum(tiles_B)

    def one_tile(i, out_TNH):
        row = jnp.sum(ends_B <= i)
        first = (i - ends_B[row] + tiles_B[row]) * tile
        start = step.starts_B[row] + first
        seen = (
            jnp.minimum(first + tile, step.counts_B[row]) + step.lengths_B[row] - step.counts_B[row]
        )
        o_QNH = attend(
            lax.dynamic_slice_in_dim(padded_TNH, start, tile)[None],
            lax.dynamic_slice_in_dim(positions_T, start, tile)[None],
            seen[None],
            page_table_RM=lax.dynamic_slice_in_dim(page_table_BM, row, 1),
        )[0]
        mine_Q = (jnp.arange(tile) + first < step.counts_B[row])[:, None, None]
        old_QNH = lax.dynamic_slice_in_dim(out_TNH, start, tile)
        new_QNH = jnp.where(mine_Q, o_QNH, old_QNH)
        return lax.dynamic_update_slice_in_dim(out_TNH, new_QNH, start, axis=0)

    # f32 in the loop: XLA would widen and narrow a bf16 carry at every turn.
    zeros_TNH = jnp.zeros((*padded_TNH.shape[:2], value_dim), jnp.float32)
    return lax.fori_loop(0, ends_B[-1], one_tile, init_val=zeros_TNH)[:tokens]


def _attend(
    q_RQNH, positions_RQ, lengths_R, page_table_RM, *, pages, sinks_N, scale, window, soft_cap
):
    """Compute attention of R tiles of Q queries, each tile within one sequence; f32.

    An online softmax over blocks of pages: Milakov and Gimelshein, Online normalizer calculation
    for softmax, 2018.
    """
    (R, Q, N, H), (K, page_size, V) = (
        q_RQNH.shape,
        (pages.num_kv_heads, pages.page_size, pages.value_dim),
    )
    G, block_pages = N // K, max(1, (BLOCK_TOKENS if R * Q > 1 else LONE_BLOCK_TOKENS) // page_size)
    block = block_pages * page_size
    page_table_RM = jnp.pad(page_table_RM, ((0, 0), (0, -page_table_RM.shape[1] % block_pages)))
    q_RKGQH = q_RQNH.astype(jnp.float32).reshape(R, Q, K, G, H).transpose(0, 2, 3, 1, 4)
    q_RKXH = q_RKGQH.reshape(R, K, G * Q, H) * scale
    positions_RX = jnp.tile(positions_RQ, (1, G))

    def turn(j, carry):
        peak_RKX, sum_RKX, o_RKXV = carry
        pages_RP = lax.dynamic_slice_in_dim(page_table_RM, j * block_pages, block_pages, axis=1)
        keys_RKSH, values_RKSV = pages.read(pages_RP)
        s_RKXS = jnp.einsum("rkxh,rksh->rkxs", q_RKXH, keys_RKSH)
        if soft_cap is not None:
            s_RKXS = jnp.tanh(s_RKXS / soft_cap) * soft_cap
        at_S = (j * block + jnp.arange(block))[None, None]
        seen_RXS = (at_S <= positions_RX[:, :, None]) & (at_S < lengths_R[:, None, None])
        if window is not None:
            seen_RXS &= at_S > positions_RX[:, :, None] - window
        s_RKXS = jnp.where(seen_RXS[:, None], s_RKXS, MASKED)
        new_RKX = jnp.maximum(peak_RKX, s_RKXS.max(-1))
        p_RKXS = jnp.where(seen_RXS[:, None], jnp.exp(s_RKXS - new_RKX[..., None]), 0.0)
        # Values that no query sees, in slots not written or in pages freed behind the window, may
        # be NaN, and 0 * NaN is NaN.
        written_RS = at_S[:, 0] < lengths_R[:, None]
        if window is not None:
            written_RS &= at_S[:, 0] > positions_RQ[:, :1] - window
        v_RKSV = jnp.where(written_RS[:, None, :, None], values_RKSV, 0.0)
        shrink_RKX = jnp.exp(peak_RKX - new_RKX)
        o_RKXV = o_RKXV * shrink_RKX[..., None] + jnp.einsum("rkxs,rksv->rkxv", p_RKXS, v_RKSV)
        return new_RKX, sum_RKX * shrink_RKX + p_RKXS.sum(-1), o_RKXV

    X = G * Q
    empty = jnp.full((R, K, X), MASKED), jnp.zeros((R, K, X)), jnp.zeros((R, K, X, V))
    if sinks_N is not None:
        sinks_KX = jnp.repeat(sinks_N.astype(jnp.float32).reshape(K, G), Q, axis=1)
        empty = jnp.broadcast_to(sinks_KX, (R, K, X)), jnp.ones((R, K, X)), empty[2]
    first = 0
    if window is not None:
        oldest_R = jnp.where(
            lengths_R > 0, positions_RQ[:, 0] - window + 1, jnp.iinfo(jnp.int32).max
        )
        first = jnp.maximum(0, jnp.min(oldest_R)) // block
    num_turns = -(-jnp.max(lengths_R) // block)
    _, sum_RKX, o_RKXV = lax.fori_loop(first, num_turns, turn, init_val=empty)
    o_RKXV = o_RKXV / jnp.maximum(sum_RKX, 1e-30)[..., None]
    return o_RKXV.reshape(R, K, G, Q, V).transpose(0, 3, 1, 2, 4).reshape(R, Q, N, V)


def _to_storage(x):
    return x if x.dtype.itemsize != 2 else lax.bitcast_convert_type(x, jnp.uint16)


def _from_storage(x, dtype):
    return x if x.dtype != jnp.uint16 else lax.bitcast_convert_type(x, dtype)


def sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B):
    """Draw a token for each row by inversion.

    That is the first token up to which the probability that was kept exceeds the share
    ``uniform_B`` of all that was kept.
    """
    del num_rows  # XLA computes every row
    greedy_B = _argmax(logits_BV)

    def draw():
        # The largest logit becomes 0, so that a tiny temperature overflows to minus infinity only.
        lowered_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        scaled_BV = lowered_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
        filtered = (top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)
        filtered_keep = partial(keep, scaled_BV, top_k_B, top_p_B, min_p_B=min_p_B)
        kept_BV = lax.cond(jnp.any(filtered), filtered_keep, lambda: scaled_BV)
        reached_BV = jnp.cumsum(jnp.exp(kept_BV), axis=-1)
        return _first(reached_BV > reached_BV[:, -1:] * uniform_B[:, None])

    drawn_B = lax.cond(jnp.any(temperature_B > 0), draw, lambda: greedy_B)
    return jnp.where(temperature_B > 0, drawn_B, greedy_B)


def log_normalizer(logits_BV, num_rows):
    """Return the largest logit of each row, and the log of the sum of exp(logit - largest).

    XLA's own reductions add in an order that depends on the number of rows. Here each row is cut
    into runs, and the runs are added one after the other, element by element, so the order is
    always that of the loop. From JAX 0.11 on, exp of the same number on a CPU may differ by an ulp
    between shapes.
    """
    del num_rows  # XLA computes every row
    largest_B = jnp.max(logits_BV, axis=-1)
    lowered_BV = logits_BV - largest_B[:, None]
    missing = -lowered_BV.shape[1] % _NORMALIZER_RUNS[0]
    terms_BX = jnp.exp(jnp.pad(lowered_BV, ((0, 0), (0, missing)), constant_values=DROPPED))
    for size in _NORMALIZER_RUNS:
        terms_BX = _added_runs(terms_BX, size)
    return largest_B, jnp.log(terms_BX[:, 0])


# Numbers that are left of a row after each round of additions.
_NORMALIZER_RUNS = (1024, 32, 1)


def _added_runs(x_BX, size: int):
    """Add the runs of ``size`` numbers of each row, from the first to the last."""

    def add(i, sum_BS):
        return sum_BS + lax.dynamic_slice_in_dim(x_BX, i * size, size, axis=1)

    return lax.fori_loop(1, x_BX.shape[1] // size, add, init_val=x_BX[:, :size])


def keep(logits_BV, top_k_B, top_p_B, min_p_B):
    """Return the logits, with minus infinity for tokens that min_p, then top_k, then top_p drop.

    Of tokens with equal logits, all are dropped or none.
    """
    # With min_p 0 the floor is log(0): nothing is dropped.
    floor_B = jnp.max(logits_BV, axis=-1) + jnp.log(min_p_B)
    logits_BV = jnp.where(logits_BV >= floor_B[:, None], logits_BV, DROPPED)
    wanted_B = jnp.where(top_k_B > 0, top_k_B, logits_BV.shape[1]).astype(jnp.float32)
    logits_BV = _largest(logits_BV, jnp.ones_like(logits_BV), wanted_B)
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    # A top_p that f32 rounds to 0 would drop every token.
    above_0_B = jnp.maximum(top_p_B, jnp.finfo(jnp.float32).tiny)
    return _largest(logits_BV, probs_BV, jnp.where(top_p_B < 1, above_0_B, 2.0))


def _argmax(x_BV):
    """Return the first of the largest numbers of each row.

    XLA vectorizes both passes: a tenth of the time of jnp.argmax on a CPU.
    """
    return _first(x_BV == jnp.max(x_BV, axis=-1, keepdims=True))


def _first(true_BV):
    """Return the index of the first true entry of each row; the last index if there is none."""
    ids_V = jnp.arange(true_BV.shape[1], dtype=jnp.int32)
    return jnp.min(jnp.where(true_BV, ids_V[None], true_BV.shape[1] - 1), axis=-1)


def _largest(x_BV, weight_BV, wanted_B):
    """Keep the largest numbers of each row until their weights sum to ``wanted``; drop the others.

    All are kept if the sum is never reached. Without a sort: 32 halvings of the integers that order
    floats find the threshold, bit by bit.
    """
    bits_BV = lax.bitcast_convert_type(x_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.int32(0x7FFFFFFF), bits_BV)

    def halve(_, bounds):
        # With the threshold at low the weights suffice, at high they do not.
        low_B, high_B = bounds
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        held_B = jnp.sum(jnp.where(order_BV >= middle_B[:, None], weight_BV, 0.0), axis=-1)
        enough_B = held_B >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    limits = jnp.iinfo(jnp.int32)
    ends = (
        jnp.full(x_BV.shape[:1], limits.min, jnp.int32),
        jnp.full(x_BV.shape[:1], limits.max, jnp.int32),
    )
    threshold_B, _ = lax.fori_loop(0, 32, halve, init_val=ends)
    return jnp.where(order_BV >= threshold_B[:, None], x_BV, DROPPED)


BODIES: dict[str, Callable[..., Any]] = {
    "embed": embed,
    "linear": linears,
    "gated_linear": gated_linear,
    "rms_norm": rms_norm,
    "rotate": rotate,
    "route": route,
    "experts": experts,
    "send_rows": row_exchange.by_gather,
    "write_kv": write_kv,
    "paged_attention": paged_attention,
    "write_latent": write_latent,
    "latent_attention": latent_attention,
    "sample": sample,
    "log_normalizer": log_normalizer,
    "zeros": jnp.zeros,
}
