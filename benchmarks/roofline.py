"""Time of each op beside the least time that this host's memory and matrix units allow.

The shapes are those of Qwen3-0.6B. An op runs once for each of the 28 layers, with weights or pages
of its own as in a step, so that no cache holds them.
Not here: the limits (host_limits.py), a whole step (slipway/bench/engine.py).
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import host_limits, script
from slipway.bench.random_model import QWEN3_SHAPE

SHAPE = QWEN3_SHAPE
EMBED, MLP, VOCAB = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
LAYERS, HEAD_DIM = SHAPE["num_hidden_layers"], SHAPE["head_dim"]
HEADS, KV_HEADS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
# kind of weight -> its bits, and the weights that share a scale (0: a row)
KINDS = {"bf16": (16, 0), "int8": (8, 0), "int4": (4, 32)}
PAGE_SIZE = 16
# A step of fewer tokens decodes a sequence for each; one of more tokens is a prompt.
PROMPT_TOKENS = 64
# Rows of results: of a sequence, only the last token needs logits.
MAX_LOGITS_ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An op, its arguments, and the bytes and floating-point operations of one call.

    ``op`` is called with the tokens [T, D], a layer's arrays, the layer's number, and ``shared``.
    ``layers`` holds the arrays of each layer.
    """

    name: str
    op: Callable[..., Any]
    layers: Any
    bytes: float
    flops: float
    shared: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineBench:
    """Each op's time beside the least that memory and matrix units allow; needs torch."""

    tokens: tuple[int, ...] = (1, 16, 512)
    """Sizes of steps: fewer than 64 tokens are sequences that decode, more are a prompt."""
    context: int = 2048
    """Keys that a decoding token attends to; a token of a prompt attends to its prompt."""
    rounds: int = 7

    def run(self) -> None:
        """Measure, and print JSON."""
        read = host_limits.read_bandwidth(len(os.sched_getaffinity(0)))
        rate = host_limits.matmul_rate()
        rows = [row for tokens in self.tokens for row in self._rows(tokens, read, rate)]
        report = {"read GB/s": round(read, 1), "bf16 GFLOP/s": round(rate), "ops": rows}
        print(json.dumps(report, indent=2))

    def _rows(self, tokens: int, read: float, rate: float) -> Iterator[dict[str, Any]]:
        context = self.context if tokens < PROMPT_TOKENS else tokens
        for case in [*matrices(tokens), attention(tokens, context), norm(tokens)]:
            job = _all_layers(case, tokens)
            seconds = host_limits.median_s(job, self.rounds) / len(case.layers)
            least = max(case.bytes / read / 1e9, case.flops / rate / 1e9)
            yield {
                "op": case.name,
                "tokens": tokens,
                "us": round(seconds * 1e6, 1),
                "GB/s": round(case.bytes / seconds / 1e9, 1),
                "GFLOP/s": round(case.flops / seconds / 1e9, 1),
                "of the limit": round(least / seconds, 3),
            }


def _all_layers(case: Case, tokens: int) -> Callable[[], Any]:
    """Compile a loop over all layers, in which each op waits for the one before, as in a step."""
    import jax
    import jax.numpy as jnp

    from slipway.tree import Separate

    x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(tokens, EMBED)), jnp.bfloat16)

    @jax.jit
    def run(x_TD, layers, shared):
        def step(layer, index, x_TD):
            result = case.op(x_TD, layer, index, shared=shared)
            first = jax.tree.leaves(result)[0]
            return x_TD + first.reshape(-1)[0].astype(x_TD.dtype)

        return Separate(layers).fold(step, x_TD)

    layers = tuple(case.layers)
    return lambda: jax.block_until_ready(run(x_TD, layers, case.shared))


def matrices(tokens: int) -> Iterator[Case]:
    """Yield a layer's projections and the head, with each kind of weight."""
    import jax.numpy as jnp

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "qkv": [(q, EMBED), (kv, EMBED), (kv, EMBED)],
        "o": [(EMBED, q)],
        "gate, up": [(MLP, EMBED)] * 2,
        "down": [(EMBED, MLP)],
    }
    ops = _projections(jnp.int32(tokens))
    for kind in KINDS:
        for name, sizes in shapes.items():
            layers = [[_weight(kind, size, i) for size in sizes] for i in range(LAYERS)]
            yield Case(
                name=f"{name} {kind}",
                op=ops[name],
                layers=layers,
                bytes=_size_bytes(layers[0]),
                flops=2 * tokens * sum(a * b for a, b in sizes),
            )
    rows = min(tokens, MAX_LOGITS_ROWS)
    for kind in ("bf16", "int8"):
        table = _weight(kind, (VOCAB, EMBED), 0)
        yield Case(
            name=f"head {kind}",
            op=_head(rows),
            layers=[table],
            bytes=_size_bytes(table),
            flops=2 * rows * VOCAB * EMBED,
        )


def _projections(num_tokens: Any) -> dict[str, Callable[..., Any]]:
    """Return the ops of a layer's projections by name."""
    import jax.numpy as jnp

    from slipway import ops

    def widened(x_TD, size):
        # the input of a projection back to EMBED
        return jnp.tile(x_TD, (1, size // EMBED))

    def qkv(x_TD, weights, *_, **__):
        return ops.linears(x_TD, weights, num_tokens, biases=(None,) * 3, dtype=x_TD.dtype)

    def o(x_TD, weights, *_, **__):
        x_TQ = widened(x_TD, HEADS * HEAD_DIM)
        return ops.linear(x_TQ, weights[0], num_tokens, dtype=x_TD.dtype)

    def gate_up(x_TD, weights, *_, **__):
        gate, up = weights
        return ops.gated_linear(x_TD, gate, up, num_tokens=num_tokens, dtype=x_TD.dtype)

    def down(x_TD, weights, *_, **__):
        return ops.linear(widened(x_TD, MLP), weights[0], num_tokens, dtype=x_TD.dtype)

    return {"qkv": qkv, "o": o, "gate, up": gate_up, "down": down}


def _head(rows: int) -> Callable[..., Any]:
    import jax.numpy as jnp

    from slipway import ops

    def head(x_TD, table, *_, **__):
        return ops.linear(x_TD[:rows], table, jnp.int32(rows))

    return head


def attention(tokens: int, context: int) -> Case:
    """Return attention over a paged cache: of one prompt, or of sequences that decode."""
    import jax.numpy as jnp

    from slipway import ops
    from slipway.ops import kv_cache

    rows = tokens if tokens < PROMPT_TOKENS else 1
    each, pages = tokens // rows, -(-context // PAGE_SIZE)
    (cache,) = kv_cache.allocate(
        [ops.CacheSpec(LAYERS, KV_HEADS, HEAD_DIM)],
        [rows * pages],
        platform="cpu",
        page_size=PAGE_SIZE,
        dtype=jnp.bfloat16,
    )
    positions = jnp.arange(context - each, context, dtype=jnp.int32)
    numbers = jnp.arange(rows, dtype=jnp.int32)
    slots = jnp.arange(tokens, dtype=jnp.int32)
    tables = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    step = ops.StepInput(
        num_tokens_1=jnp.full(1, tokens, jnp.int32),
        ids_T=jnp.zeros(tokens, jnp.int32),
        positions_T=jnp.tile(positions, rows),
        prompt_lengths_T=jnp.full(tokens, context, jnp.int32),
        row_T=numbers.repeat(each),
        starts_B=numbers * each,
        counts_B=jnp.full(rows, each, jnp.int32),
        lengths_B=jnp.full(rows, context, jnp.int32),
        pages=(ops.PageMap(slots, tables),),
        num_samples_1=jnp.zeros(1, jnp.int32),
        sample_at_B=jnp.zeros(rows, jnp.int32),
    )

    options = kv_cache.AttentionOptions(HEAD_DIM**-0.5)

    def attend(x_TD, _, layer, shared):
        q_TNH = jnp.tile(x_TD, (1, HEADS * HEAD_DIM // EMBED)).reshape(tokens, HEADS, HEAD_DIM)
        return shared.read(q_TNH, layer=layer, step=step, options=options)

    attended = rows * sum(context - each + i + 1 for i in range(each))
    return Case(
        name=f"attention, context {context}",
        op=attend,
        layers=[()] * LAYERS,
        bytes=rows * context * KV_HEADS * HEAD_DIM * 2 * 2,
        flops=4 * attended * HEADS * HEAD_DIM,
        shared=cache,
    )


def norm(tokens: int) -> Case:
    """Return a norm over the embedding."""
    import jax.numpy as jnp

    from slipway import ops

    def rms_norm(x_TD, weight, *_, **__):
        return ops.rms_norm(x_TD, weight, jnp.int32(tokens), eps=1e-6)

    return Case(
        name="norm",
        op=rms_norm,
        layers=[jnp.ones(EMBED, jnp.bfloat16) for _ in range(LAYERS)],
        bytes=2 * tokens * EMBED * 2,
        flops=0,
    )


def _weight(kind: str, shape: tuple[int, int], seed: int) -> Any:
    import jax.numpy as jnp

    from slipway.ops.quantized import Quantized

    bits, group = KINDS[kind]
    if bits == 16:
        return jnp.full(shape, 0.01 + seed, jnp.bfloat16)
    words = jnp.full((shape[0], shape[1] * bits // 32), seed, jnp.int32)
    scale = jnp.ones((shape[0], shape[1] // group if group else 1), jnp.bfloat16)
    return Quantized(words, scale, bits=bits, group=group)


def _size_bytes(weights: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("roofline", RooflineBench)


if __name__ == "__main__":
    main()
