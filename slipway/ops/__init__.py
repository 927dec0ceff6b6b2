"""Ops: the computations of a model on one device's arrays, with one signature on every platform.

Not here: the choice of the body that computes an op (backend.py), attention over cached keys and
values (kv_cache.py).

``num_tokens`` or ``num_rows`` is the number of leading rows that count. The other rows are padding:
a body may skip them, and their results are undefined. A weight may be an IndexedArray: one of
several arrays, chosen by a traced index. A matrix may be Quantized. The ops run under shard_map;
``send_rows`` alone communicates between devices.
"""

import jax.numpy as jnp

from slipway.ops import backend, cpu, tpu, xla
from slipway.ops.addresses import Addresses
from slipway.ops.kv_cache import BorrowedCache, CacheSpec, KVCache
from slipway.ops.quantized import dequantized
from slipway.ops.routing import ExpertLoad, ExpertMatrices, Routing
from slipway.ops.step_input import PageMap, StepInput

__all__ = [
    "Addresses",
    "BorrowedCache",
    "CacheSpec",
    "ExpertLoad",
    "ExpertMatrices",
    "KVCache",
    "PageMap",
    "Routing",
    "StepInput",
    "dequantized",
    "embed",
    "experts",
    "gated_linear",
    "linear",
    "linears",
    "log_normalizer",
    "rms_norm",
    "rotate",
    "route",
    "sample",
    "send_rows",
    "zeros",
]

backend.register_portable(xla.BODIES)
backend.register(cpu.BACKEND)
backend.register(tpu.BACKEND)


def embed(ids_T, table_VD, num_tokens):
    """Look up rows of a table: [T] -> [T, D]; an id outside the table gives zeros."""
    return backend.call("embed", ids_T, table_VD, num_tokens)


def linear(x_TD, weight, num_tokens, bias=None, dtype=jnp.float32):
    """Multiply by a matrix: [T, in] -> [T, out], with sums in f32.

    The weight is (out, in), as in checkpoints.
    """
    return linears(x_TD, (weight,), num_tokens, biases=(bias,), dtype=dtype)[0]


def linears(x_TD, weights, num_tokens, biases, dtype=jnp.float32):
    """Multiply the same tokens by several matrices: [T, in] -> a tuple of [T, out].

    Either all matrices are packed in the same way, or none is.
    """
    return backend.call("linear", x_TD, weights, num_tokens, biases, dtype=dtype)


def gated_linear(x_TD, gate, up, num_tokens, gate_bias=None, up_bias=None, dtype=jnp.float32):
    """Compute silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias): [T, in] -> [T, out]."""
    return backend.call("gated_linear", x_TD, gate, up, num_tokens, gate_bias, up_bias, dtype=dtype)


def route(logits_TE, bias_E, num_tokens, rule):
    """Choose the experts of each token: f32 [T, E] -> int32 [T, K], and their weights, f32 [T, K].

    ``rule``: a Routing. ``bias_E``: added to the scores for the choice, or None. The best comes
    first; of equals, the one with the lower index.
    """
    return backend.call("route", logits_TE, bias_E, num_tokens, rule=rule)


def experts(x_TD, experts_TK, weights_TK, matrices, num_tokens, num_experts):
    """Compute the sum of each token's experts, times their weights: [T, D] -> f32 [T, D].

    An expert e is down[e] @ (silu(gate[e] @ x) * (up[e] @ x)), unless ``matrices``, its
    ExpertMatrices, state biases or a clamp. ``num_experts``: of this device; experts outside 0 to
    num_experts - 1 are those of other devices, and add nothing.
    """
    routed = x_TD, experts_TK, weights_TK, matrices, num_tokens
    return backend.call("experts", *routed, num_experts=num_experts)


def send_rows(rows_RD, counts_NN, *, capacity, axis):
    """Send rows to the other devices of a mesh axis: [R, D] -> the rows received, [capacity, D].

    ``counts_NN``: of each device, int32, the number of rows that it sends to each; the same on all.
    The rows of a device lie in the order of their destinations, and its received rows in the order
    of their sources. Rows behind these are undefined.
    """
    return backend.call("send_rows", rows_RD, counts_NN, capacity=capacity, axis=axis)


def rms_norm(x_TD, weight, num_tokens, eps):
    """Divide each row by its root mean square and multiply by a weight: [T, D] -> [T, D].

    The division is in f32.
    """
    return backend.call("rms_norm", x_TD, weight, num_tokens, eps=eps)


def rotate(x_TNH, weight, angles, num_tokens, eps=0.0):
    """Rotate each pair (i, i + R) of every head by its angle: [T, N, H] -> [T, N, H].

    ``angles``: cosines and sines, [T, R] each; dimensions from 2 R on are not rotated. With a
    weight [H] the heads are normalized first, as in ``rms_norm``.
    """
    return backend.call("rotate", x_TNH, weight, angles, num_tokens, eps=eps)


def sample(logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B):
    """Draw a token for each row: [B, V] -> [B]; temperature 0 takes the likeliest.

    ``uniform_B``: a random number in [0, 1) for each row.
    """
    return backend.call(
        "sample", logits_BV, num_rows, temperature_B, top_k_B, top_p_B, min_p_B, uniform_B
    )


def log_normalizer(logits_BV, num_rows):
    """Return the largest logit of each row, and the log of the sum of exp(logit - largest).

    log p = logit - largest - log_sum, with the same bits in every batch.
    """
    return backend.call("log_normalizer", logits_BV, num_rows)


def zeros(shape, dtype):
    """Return an array of zeros; a CPU's memory for it is provided when it is first written."""
    return backend.call("zeros", shape=shape, dtype=dtype)
