"""`python -m benchmarks.roofline`: how far each op is from what this host's memory and matrix units allow.

Decides the shapes, those of Qwen3-0.6B, and counts each op's bytes and products. An op runs once for each of 28 layers
with weights or pages of its own, as in a step, so that no cache holds them. Knows no engine.
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
EMBED, MLP, LAYERS = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
HEADS, KV_HEADS, HEAD_DIM = (
    SHAPE["num_attention_heads"],
    SHAPE["num_key_value_heads"],
    SHAPE["head_dim"],
)
KINDS = {"bf16": (16, 0), "int8": (8, 0), "int4": (4, 32)}  # bits, group
PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One op: what it computes for a layer, from arrays of that layer, and its bytes and products."""

    name: str
    op: Callable[..., Any]  # of tokens, a layer's tree, its number and what is shared
    layers: Any  # a tree per layer
    bytes: float  # of a layer
    flops: float
    shared: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineBench:
    """Each op's time beside the least that memory and matrix units allow. Needs torch (the test extra)."""

    tokens: tuple[int, ...] = (1, 16, 512)
    """Of a step: decodes of so many sequences, the largest a prompt."""
    context: int = 2048
    """Keys that a decoding token sees; a prompt sees its own."""
    rounds: int = 7

    def run(self) -> None:
        """Measure, and print JSON."""
        threads = len(os.sched_getaffinity(0))
        read, rate = host_limits.read_bandwidth(threads), host_limits.matmul_rate()
        rows = [row for tokens in self.tokens for row in self._rows(tokens, read, rate)]
        print(json.dumps({"read GB/s": round(read, 1), "bf16 GFLOP/s": round(rate), "ops": rows}, indent=2))

    def _rows(self, tokens: int, read: float, rate: float) -> Iterator[dict[str, Any]]:
        for case in [*matrices(tokens), *others(tokens, self.context if tokens < 64 else tokens)]:
            seconds = host_limits.median_s(_folded(case, tokens), self.rounds) / len(case.layers)
            least = max(case.bytes / read / 1e9, case.flops / rate / 1e9)
            yield {
                "op": case.name, "tokens": tokens, "us": round(seconds * 1e6, 1),
                "GB/s": round(case.bytes / seconds / 1e9, 1), "GFLOP/s": round(case.flops / seconds / 1e9, 1),
                "of the limit": round(least / seconds, 3),
            }  # fmt: skip


def _folded(case: Case, tokens: int) -> Callable[[], Any]:
    """The op for every layer in turn, compiled; each waits for the one before, as in a step."""
    import jax
    import jax.numpy as jnp

    from slipway.tree import Separate

    x_TD = jnp.asarray(np.random.default_rng(0).normal(size=(tokens, EMBED)), jnp.bfloat16)

    @jax.jit
    def run(x_TD, layers, shared):
        def step(layer, index, x_TD):
            first = jax.tree.leaves(case.op(x_TD, layer, index, shared))[0]
            return x_TD + first.reshape(-1)[0].astype(x_TD.dtype)

        return Separate(layers).fold(step, x_TD)

    layers = tuple(case.layers)
    return lambda: jax.block_until_ready(run(x_TD, layers, case.shared))


def matrices(tokens: int) -> Iterator[Case]:
    """A layer's projections and the head, by kind of weight."""
    import jax.numpy as jnp

    from slipway import ops

    count, q, kv = jnp.int32(tokens), HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def wide(x_TD, size):  # the input of a projection back
        return jnp.tile(x_TD, (1, size // EMBED))

    parts: dict[str, tuple[list[tuple[int, int]], Callable[..., Any]]] = {
        "qkv": ([(q, EMBED), (kv, EMBED), (kv, EMBED)],
                lambda x, w, *_: ops.linears(x, w, count, (None,) * 3, x.dtype)),
        "o": ([(EMBED, q)], lambda x, w, *_: ops.linear(wide(x, q), w[0], count, None, x.dtype)),
        "gate, up": ([(MLP, EMBED)] * 2, lambda x, w, *_: ops.gated_linear(x, w[0], w[1], count, None, None, x.dtype)),
        "down": ([(EMBED, MLP)], lambda x, w, *_: ops.linear(wide(x, MLP), w[0], count, None, x.dtype)),
    }  # fmt: skip
    for kind in KINDS:
        for name, (shapes, op) in parts.items():
            layers = [[_weight(kind, shape, i) for shape in shapes] for i in range(LAYERS)]
            yield Case(
                f"{name} {kind}",
                op,
                layers,
                _size(layers[0]),
                2 * tokens * sum(a * b for a, b in shapes),
            )
    rows = min(tokens, 16)  # only a sequence's last token meets the head
    for kind in ("bf16", "int8"):
        table = _weight(kind, (SHAPE["vocab_size"], EMBED), 0)
        flops = 2 * rows * SHAPE["vocab_size"] * EMBED
        yield Case(
            f"head {kind}",
            lambda x, w, *_: ops.linear(x[:rows], w, jnp.int32(rows)),
            [table],
            _size(table),
            flops,
        )


def others(tokens: int, context: int) -> Iterator[Case]:
    """Attention over a cache, and a norm."""
    import jax.numpy as jnp

    from slipway import ops
    from slipway.ops import kv_cache

    rows = tokens if tokens < 64 else 1
    each, pages = tokens // rows, -(-context // PAGE_SIZE)
    spec = ops.CacheSpec(LAYERS, KV_HEADS, HEAD_DIM)
    sizes = {"page_size": PAGE_SIZE, "dtype": jnp.bfloat16}
    (cache,) = kv_cache.allocate([spec], [rows * pages], platform="cpu", **sizes)
    first, positions = jnp.arange(rows, dtype=jnp.int32) * each, jnp.arange(context - each, context, dtype=jnp.int32)
    step = ops.StepInput(
        num_tokens_1=jnp.full(1, tokens, jnp.int32),
        ids_T=jnp.zeros(tokens, jnp.int32),
        positions_T=jnp.tile(positions, rows),
        contexts_T=jnp.full(tokens, context, jnp.int32),
        row_T=jnp.arange(rows, dtype=jnp.int32).repeat(each),
        starts_B=first,
        counts_B=jnp.full(rows, each, jnp.int32),
        lengths_B=jnp.full(rows, context, jnp.int32),
        pages=(
            ops.PageMap(
                jnp.arange(tokens, dtype=jnp.int32), jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
            ),
        ),
        num_samples_1=jnp.zeros(1, jnp.int32),
        sample_at_B=jnp.zeros(rows, jnp.int32),
    )

    def attend(x_TD, _, layer, cache):
        q_TNH = jnp.tile(x_TD, (1, HEADS * HEAD_DIM // EMBED)).reshape(tokens, HEADS, HEAD_DIM)
        return cache.read(q_TNH, layer=layer, step=step, scale=HEAD_DIM**-0.5)

    read = rows * context * KV_HEADS * HEAD_DIM * 2 * 2
    seen = rows * sum(context - each + i + 1 for i in range(each))
    layers: list[Any] = [()] * LAYERS
    yield Case(f"attention, context {context}", attend, layers, read, 4 * seen * HEADS * HEAD_DIM, cache)
    weights = [jnp.ones(EMBED, jnp.bfloat16) for _ in range(LAYERS)]
    norm = Case(
        "norm",
        lambda x, w, *_: ops.rms_norm(x, w, jnp.int32(tokens), 1e-6),
        weights,
        2 * tokens * EMBED * 2,
        0,
    )
    yield norm


def _weight(kind: str, shape: tuple[int, int], seed: int) -> Any:
    import jax.numpy as jnp

    from slipway.ops.quantized import Quantized

    bits, group = KINDS[kind]
    if bits == 16:
        return jnp.full(shape, 0.01 + seed, jnp.bfloat16)
    words = jnp.full((shape[0], shape[1] * bits // 32), seed, jnp.int32)
    return Quantized(words, jnp.ones((shape[0], shape[1] // group if group else 1), jnp.bfloat16), bits, group)


def _size(weights: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("roofline", RooflineBench)


if __name__ == "__main__":
    main()
