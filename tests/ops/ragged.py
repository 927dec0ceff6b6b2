"""Ragged steps for the tests of the ops: shapes of models, rows of tokens, and their pages.

Not here: the tests (test_ops.py), the oracles (oracles.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from slipway.ops import PageMap, StepInput

F32, BF16 = jnp.float32, jnp.bfloat16

# Rows of (tokens in the cache before, tokens of this step); the number says what the step is like.
STEPS = {
    "prefills": [(0, 5), (0, 17), (0, 2)],
    "continuations": [(3, 9), (130, 3), (16, 16)],
    "decodes": [(0, 1), (4, 1), (31, 1), (250, 1)],
    "mixed, with empty rows": [(9, 1), (0, 0), (0, 12), (140, 1), (0, 0), (7, 3)],
    "more than one tile": [(2, 1), (100, 150), (5, 2)],
    "two rows": [(7, 5), (140, 1)],
    "nothing": [],
}
TOKENS, ROWS = 160, 6


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model, and the way in which the op is called."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: type = F32
    window: int | None = None
    page_size: int = 16
    tokens: int = TOKENS
    traced: bool = False
    rows: int = ROWS

    @property
    def num_pages(self):
        return 640 // self.page_size


SHAPES = [
    Shape(4, 2, 8),
    Shape(4, 4, 16, window=7, traced=True),
    Shape(6, 1, 32, BF16, page_size=4, traced=True),
    Shape(2, 2, 64, BF16, window=129),
    Shape(4, 2, 128, page_size=32),
    Shape(2, 1, 16, window=1, page_size=1, traced=True),
    Shape(4, 2, 8, tokens=24, rows=2),
    Shape(8, 2, 8, tokens=24, page_size=160),  # a tile smaller than a block, a page larger than one
    Shape(8, 1, 24, BF16, window=40),
    Shape(3, 3, 80, BF16, page_size=32),
]


def make_ragged(rng, shape, rows):
    """Return a step with the tokens of ``rows``.

    Pages are in random order, and padding lies outside the cache.
    """
    width = -(-300 // shape.page_size)
    T, pages = shape.tokens, rng.permutation(shape.num_pages)
    fields = {
        "positions_T": np.zeros(T, np.int32),
        "slots_T": np.full(T, shape.num_pages * shape.page_size, np.int32),
    }
    table, t = np.zeros((shape.rows, width), np.int32), 0
    starts, counts, lengths = np.zeros((3, shape.rows), np.int32)
    for row, (before, count) in enumerate(rows):
        needed = -(-(before + count) // shape.page_size)
        table[row, :needed], pages = pages[:needed], pages[needed:]
        starts[row], counts[row], lengths[row] = t, count, before + count if count else 0
        for position in range(before, before + count):
            page = table[row, position // shape.page_size]
            fields["positions_T"][t] = position
            fields["slots_T"][t] = page * shape.page_size + position % shape.page_size
            t += 1
    contexts = fields["positions_T"] + 1
    rows_T = np.repeat(np.arange(shape.rows, dtype=np.int32), counts)
    step = StepInput(
        num_tokens_1=np.array([t], np.int32),
        ids_T=np.zeros(T, np.int32),
        positions_T=fields["positions_T"],
        prompt_lengths_T=contexts,
        row_T=np.pad(rows_T, (0, T - t)),
        starts_B=starts,
        counts_B=counts,
        lengths_B=lengths,
        pages=(PageMap(fields["slots_T"], table),),
        num_samples_1=np.zeros(1, np.int32),
        sample_at_B=np.zeros(shape.rows, np.int32),
    )
    return jax.tree.map(jnp.asarray, step)


def slots(step):
    return step.pages[0].slots_T


def fits(rows, shape):
    return sum(count for _, count in rows) <= shape.tokens and len(rows) <= shape.rows


def fitting(shape):
    return {name: rows for name, rows in STEPS.items() if fits(rows, shape)}
