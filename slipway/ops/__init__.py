"""One signature per op, and which body serves it on which backend; knows no parameters, layers or requests.

Every op takes arrays and returns arrays. ``ragged`` says where each of a step's flat tokens belongs; rows past
``ragged.num_tokens`` are padding: a body may skip them, and nobody reads what it leaves there. Arrays are one
device's part: the ops run under shard_map and communicate with nobody.

    embed(ids_T, table_VD) -> x_TD                              rows of the table; an id outside gives zeros
    linear(x_TD, weight, num_tokens, bias, dtype) -> y_TO       weights (out, in) as checkpoints hold them; sums in f32
    gated_linear(x_TD, gate, up, num_tokens, ...) -> y_TO       silu(x @ gate.T) * (x @ up.T)
    rms_norm(x_TD, weight, num_tokens, eps) -> y_TD
    rotate(x_TNH, weight, angles, num_tokens, eps) -> y_TNH         heads normalized, if weight is given, and turned
    write_kv(kv, layer, k_TKH, v_TKH, ragged) -> kv             in place where the caller donates kv
    paged_attention(q_TNH, kv, layer, ragged, scale, window) -> o_TNH
    allocate_kv(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> kv_LPK2SH
    sample(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B) -> token_B

Weights may be Picks: one of several arrays by a traced index. The cache goes to an op whole, with a layer index: a
slice of it would be a copy. What order the S * H numbers of a page have is the body's own affair, so the body that
wrote a cache reads it: both follow from its shape and dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from slipway.ops import cpu, xla
from slipway.tree import module

embed = xla.embed
allocate_kv = xla.allocate_kv


def linear(x_TD, weight, num_tokens, bias=None, dtype=jnp.float32):
    """See above."""
    portable = partial(xla.linear, dtype=dtype)
    if cpu.refuses(x_TD.dtype):
        return portable(x_TD, weight, num_tokens, bias)
    compiled = partial(cpu.linear, dtype=dtype)
    return lax.platform_dependent(x_TD, weight, num_tokens, bias, cpu=compiled, default=portable)


def gated_linear(x_TD, gate, up, num_tokens, gate_bias=None, up_bias=None, dtype=jnp.float32):
    """See above."""
    args, portable = (x_TD, gate, up, num_tokens, gate_bias, up_bias), partial(xla.gated_linear, dtype=dtype)
    if cpu.refuses(x_TD.dtype):
        return portable(*args)
    return lax.platform_dependent(*args, cpu=partial(cpu.gated_linear, dtype=dtype), default=portable)


def rms_norm(x_TD, weight, num_tokens, eps):
    """See above."""
    args, portable = (x_TD, weight, num_tokens), partial(xla.rms_norm, eps=eps)
    if cpu.refuses(x_TD.dtype):
        return portable(*args)
    return lax.platform_dependent(*args, cpu=partial(cpu.rms_norm, eps=eps), default=portable)


def rotate(x_TNH, weight, angles, num_tokens, eps=0.0):
    """See above."""
    args, portable = (x_TNH, weight, angles, num_tokens), partial(xla.rotate, eps=eps)
    if cpu.refuses(x_TNH.dtype):
        return portable(*args)
    return lax.platform_dependent(*args, cpu=partial(cpu.rotate, eps=eps), default=portable)


def sample(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B):
    """See above."""
    args = logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B
    if cpu.refuses(logits_BV.dtype):
        return xla.sample(*args)
    return lax.platform_dependent(*args, cpu=cpu.sample, default=xla.sample)


def write_kv(kv, layer, k_TKH, v_TKH, ragged):
    """See above."""
    args = kv, layer, k_TKH, v_TKH, ragged
    if cpu.refuses_cache(kv, k_TKH.dtype):
        return xla.write_kv(*args)
    return lax.platform_dependent(*args, cpu=cpu.write_kv, default=xla.write_kv)


def paged_attention(q_TNH, kv, layer, ragged, scale, window):
    """See above."""
    args, portable = (q_TNH, kv, layer, ragged), partial(xla.paged_attention, scale=scale, window=window)
    if cpu.refuses_cache(kv, q_TNH.dtype):
        return portable(*args)
    compiled = partial(cpu.paged_attention, scale=scale, window=window)
    return lax.platform_dependent(*args, cpu=compiled, default=portable)


def bodies(platform: str, kv, dtype) -> dict[str, str]:
    """Which body serves each op on ``platform`` with this cache, and why not another; shown at start."""

    def body(why_not: str) -> str:
        return "xla" if platform != "cpu" else f"xla ({why_not})" if why_not else f"c++ {cpu.isa()}"

    dense, cache, logits = (
        body(why) for why in (cpu.refuses(dtype), cpu.refuses_cache(kv, dtype), cpu.refuses(jnp.float32))
    )
    return {
        "embed": "xla", "linear": dense, "gated_linear": dense, "rms_norm": dense, "rotate": dense,
        "write_kv": cache, "paged_attention": cache, "sample": logits,
    }  # fmt: skip


@module
class Ragged:
    """Where the T flat tokens of a step belong; B rows, one per sequence, M pages each at most. All int32.

    Row b owns the ``counts_B[b]`` tokens from ``starts_B[b]`` on; after this step its sequence has ``lengths_B[b]``
    tokens in the cache. An unused row counts 0. A padding token's slot lies outside the cache.
    """

    num_tokens: jax.Array  # []
    positions_T: jax.Array  # of each token in its sequence
    contexts_T: jax.Array  # tokens shown with it: the prompt's length, or position + 1 of a generated one
    slots_T: jax.Array  # page * page_size + offset, where its keys and values go
    starts_B: jax.Array
    counts_B: jax.Array
    lengths_B: jax.Array
    page_table_BM: jax.Array
