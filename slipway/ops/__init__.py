"""One signature per op, and which body serves it on which backend; knows no parameters, layers or requests.

Every op takes arrays and returns arrays. ``ragged`` says where each of a step's flat tokens belongs; rows past
``ragged.num_tokens`` are padding: a body may skip them, and nobody reads what it leaves there. Arrays are one
device's part: the ops run under shard_map and communicate with nobody.

    embed(ids_T, table_VD, num_tokens) -> x_TD                  rows of the table; an id outside gives zeros
    linear(x_TD, weight, num_tokens, bias, dtype) -> y_TO       weights (out, in) as checkpoints hold them; sums in f32
    linears(x_TD, weights, num_tokens, biases, dtype) -> (y_TO, ...)    of the same tokens, all packed alike or none
    gated_linear(x_TD, gate, up, num_tokens, ...) -> y_TO       silu(x @ gate.T) * (x @ up.T)
    rms_norm(x_TD, weight, num_tokens, eps) -> y_TD
    rotate(x_TNH, weight, angles, num_tokens, eps) -> y_TNH         heads normalized, if weight is given, and turned
    write_kv(kv, layer, k_TKH, v_TKH, ragged) -> kv             in place where the caller donates kv
    paged_attention(q_TNH, kv, layer, ragged, scale, window, soft_cap, sinks_N) -> o_TNH
    attend(q_TNH, k_TKH, v_TKH, kv, layer, ragged, scale, window, ...) -> (o_TNH, kv)    both, one after the other
    allocate_kv(platform, num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> kv
    zeros(shape, dtype) -> array                                on a CPU, of memory that is taken where it is written
    sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B) -> token_B
    log_normalizer(logits_BV, num_rows) -> (largest_B, log_sum_B)   log p = logit - largest - log_sum, as each row alone

Weights may be Picks: one of several arrays by a traced index; matrices may be Quantized. The cache goes to an op whole,
with a layer index: a slice of it would be a copy. Its layout is the body's own affair: kv_LPK2SH, with the numbers of a
page in any order, or ops/tpu.py's. The body that wrote a cache reads it: both follow from its shape and dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from slipway.errors import UnsupportedModel
from slipway.ops import cpu, tpu, xla
from slipway.tree import module, static


def allocate_kv(platform, num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype):
    """See above; ``platform``: what the step is lowered for."""
    body = xla if tpu.refuses_heads(platform, head_dim) else tpu
    return body.allocate_kv(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype)


def kv_axes(kv) -> tuple[str | None, ...]:
    """The logical axes of a cache that a mesh may split: its pages over copies of the weights, its heads."""
    return (None, "pages", None, "kv_heads", None) if tpu.is_mine(kv) else (None, "pages", "kv_heads", None, None, None)


def embed(ids_T, table_VD, num_tokens):
    """See above."""
    return _serve(cpu.refuses_table(table_VD), cpu.embed, xla.embed, ids_T, table_VD, num_tokens)


def linear(x_TD, weight, num_tokens, bias=None, dtype=jnp.float32):
    """See above."""
    return linears(x_TD, (weight,), num_tokens, (bias,), dtype)[0]


def linears(x_TD, weights, num_tokens, biases, dtype=jnp.float32):
    """See above."""
    why_not = cpu.refuses(x_TD, *weights, *biases) or cpu.refuses_row(x_TD)
    return _serve(why_not, cpu.linears, xla.linears, x_TD, weights, num_tokens, biases, dtype=dtype)


def gated_linear(x_TD, gate, up, num_tokens, gate_bias=None, up_bias=None, dtype=jnp.float32):
    """See above."""
    why_not = cpu.refuses(x_TD, gate, up, gate_bias, up_bias) or cpu.refuses_row(x_TD)
    args = x_TD, gate, up, num_tokens, gate_bias, up_bias
    return _serve(why_not, cpu.gated_linear, xla.gated_linear, *args, dtype=dtype)


def rms_norm(x_TD, weight, num_tokens, eps):
    """See above."""
    return _serve(cpu.refuses(x_TD, weight), cpu.rms_norm, xla.rms_norm, x_TD, weight, num_tokens, eps=eps)


def rotate(x_TNH, weight, angles, num_tokens, eps=0.0):
    """See above."""
    return _serve(cpu.refuses(x_TNH, weight), cpu.rotate, xla.rotate, x_TNH, weight, angles, num_tokens, eps=eps)


def sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B):
    """See above."""
    args = logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B
    return _serve(cpu.refuses(logits_BV), cpu.sample, xla.sample, *args)


def log_normalizer(logits_BV, num_rows):
    """See above."""
    return _serve(cpu.refuses(logits_BV), cpu.log_normalizer, xla.log_normalizer, logits_BV, num_rows)


def write_kv(kv, layer, k_TKH, v_TKH, ragged):
    """See above."""
    if tpu.is_mine(kv):
        return tpu.write_kv(kv, layer, k_TKH, v_TKH, ragged)
    return _serve(cpu.refuses_cache(kv, k_TKH.dtype), cpu.write_kv, xla.write_kv, kv, layer, k_TKH, v_TKH, ragged)


def paged_attention(q_TNH, kv, layer, ragged, scale, window, soft_cap=None, sinks_N=None):
    """See above."""
    static = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if tpu.is_mine(kv):
        if sinks_N is not None:
            raise UnsupportedModel("attention sinks", "some", "none: the TPU kernel has no place for them")
        return tpu.paged_attention(q_TNH, kv, layer, ragged, **static)
    why_not = cpu.refuses_cache(kv, q_TNH.dtype)
    return _serve(why_not, cpu.paged_attention, xla.paged_attention, q_TNH, kv, layer, ragged, sinks_N, **static)


def attend(q_TNH, k_TKH, v_TKH, kv, layer, ragged, scale, window, soft_cap=None, sinks_N=None):
    """See above; a borrowed cache is its owner's to write and to read."""
    if isinstance(kv, Borrowed):
        return kv.attend(q_TNH, k_TKH, v_TKH, layer, scale=scale, window=window, soft_cap=soft_cap, sinks_N=sinks_N)
    kv = write_kv(kv, layer, k_TKH, v_TKH, ragged)
    return paged_attention(q_TNH, kv, layer, ragged, scale, window, soft_cap, sinks_N), kv


def zeros(shape, dtype):
    """See above."""
    return _serve(cpu.refuses_dtype(jnp.float32), cpu.zeros, jnp.zeros, shape=shape, dtype=dtype)


def _serve(why_not: str, compiled: Callable, portable: Callable, *args, **static):
    """Call the portable body, or the compiled one where the step is lowered for a CPU and nothing speaks against it."""
    if why_not:
        return portable(*args, **static)
    bodies = {"cpu": partial(compiled, **static), "default": partial(portable, **static)}
    return lax.platform_dependent(*args, **bodies)


def bodies(platform: str, kv, dtype) -> dict[str, str]:
    """Which body serves each op on ``platform`` with this cache, and why not another; shown at start."""
    if tpu.is_mine(kv):
        return dict.fromkeys(("write_kv", "paged_attention"), "pallas (ops/tpu.py)") | {"others": "xla"}

    def body(why_not: str) -> str:
        return "xla" if platform != "cpu" else f"xla ({why_not})" if why_not else f"c++ {cpu.isa()}"

    dense, cache, logits = (
        body(why) for why in (cpu.refuses_dtype(dtype), cpu.refuses_cache(kv, dtype), cpu.refuses_dtype(jnp.float32))
    )
    return {
        "embed": dense, "linear": dense, "gated_linear": dense, "rms_norm": dense, "rotate": dense,
        "write_kv": cache, "paged_attention": cache, "sample": logits, "log_normalizer": logits,
    }  # fmt: skip


@module
class Borrowed:
    """The cache of another engine: an array for each layer, written and read by that engine's kernel.

    ``kernel(q_TNH, k_TKH, v_TKH, cache, where, **options) -> (o_TNH, cache)``; ``where`` is the engine's own account of
    which tokens lie in which pages.
    """

    caches: tuple[Any, ...]
    where: Any
    kernel: Callable = static()

    def attend(self, q_TNH, k_TKH, v_TKH, layer: int, **options):
        """As ops.attend; ``layer`` is not traced: layers follow each other in Python."""
        o_TNH, cache = self.kernel(q_TNH, k_TKH, v_TKH, self.caches[layer], self.where, **options)
        caches = (*self.caches[:layer], cache, *self.caches[layer + 1 :])
        return o_TNH, Borrowed(caches, self.where, self.kernel)


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
