"""One signature per op, and which body serves it on which backend; knows no parameters, layers or requests.

Every op takes arrays and returns arrays. ``ragged`` says where each of a step's flat tokens belongs; rows past
``ragged.num_tokens`` are padding: a body may skip them, and nobody reads what it leaves there. Arrays are one
device's part: the ops run under shard_map and communicate with nobody.

    embed(ids_T, table_VD) -> x_TD                              rows of the table; an id outside gives zeros
    linear(x_TD, w_OD, num_tokens) -> y_TO                      weights (out, in) as checkpoints hold them; f32 out
    write_kv(kv, layer, k_TKH, v_TKH, ragged) -> kv             in place where the caller donates kv
    paged_attention(q_TNH, kv, layer, ragged, scale, window) -> o_TNH
    allocate_kv(num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype) -> kv_LPS2KH

The cache goes to an op whole, with a layer index: a slice of it would be a copy.
"""

import functools
from pathlib import Path

import jax

from slipway.ops import xla
from slipway.tree import module

embed = xla.embed
write_kv = xla.write_kv
paged_attention = xla.paged_attention
allocate_kv = xla.allocate_kv


def linear(x_TD, w_OD, num_tokens):
    """See above; the body depends on the processor."""
    return (xla.linear_widened if _lacks_bf16() else xla.linear)(x_TD, w_OD, num_tokens)


def bodies() -> dict[str, str]:
    """Which body serves each op here, and why; shown at start."""
    widened = "xla, widened to f32 from 128 rows (this CPU has no bf16 products)"
    return {
        "embed": "xla",
        "linear": widened if _lacks_bf16() else "xla",
        "write_kv": "xla",
        "paged_attention": "xla",
    }


@functools.cache
def _lacks_bf16() -> bool:
    """Whether the backend is a CPU without 16-bit products; where that cannot be told, no."""
    cpuinfo = Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu" or not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text()
    return "flags" in flags and "avx512_bf16" not in flags and "amx_bf16" not in flags


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
