"""Every op against its slow oracle on random ragged batches, and the cache written in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import ops, tree
from slipway.engine.step import COMPILER_OPTIONS
from slipway.ops import Ragged, xla
from slipway.tree import Separate, module

F32, BF16 = jnp.float32, jnp.bfloat16
# The sums are f32 in any case: f32 differs by their order, bf16 by one rounding of the result (half of 2^-8) besides.
BOUNDS = {F32: {"rtol": 1e-5, "atol": 1e-5}, BF16: {"rtol": 2**-8, "atol": 1e-5}}
NUM_LAYERS = 2

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
    """A kind of model and how the op is called."""

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
]


def make_ragged(rng, shape, rows):
    """Where the tokens of ``rows`` go: pages in random order, padding outside the cache."""
    width = -(-300 // shape.page_size)
    T, pages = shape.tokens, rng.permutation(shape.num_pages)
    fields = {"positions_T": np.zeros(T, np.int32), "slots_T": np.full(T, shape.num_pages * shape.page_size, np.int32)}
    table, t = np.zeros((shape.rows, width), np.int32), 0
    starts, counts, lengths = np.zeros((3, shape.rows), np.int32)
    for row, (before, count) in enumerate(rows):
        needed = -(-(before + count) // shape.page_size)
        table[row, :needed], pages = pages[:needed], pages[needed:]
        starts[row], counts[row], lengths[row] = t, count, before + count if count else 0
        for position in range(before, before + count):
            page = table[row, position // shape.page_size]
            fields["positions_T"][t], fields["slots_T"][t] = (
                position,
                page * shape.page_size + position % shape.page_size,
            )
            t += 1
    contexts = fields["positions_T"] + 1
    arrays = [np.int32(t), fields["positions_T"], contexts, fields["slots_T"], starts, counts, lengths, table]
    return Ragged(*map(jnp.asarray, arrays))


def normal(rng, *size, dtype=F32):
    return jnp.asarray(rng.normal(size=size), F32).astype(dtype)


def random_kv(rng, shape):
    empty = ops.allocate_kv(
        NUM_LAYERS, shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim, shape.dtype
    )
    return xla._to_storage(normal(rng, *empty.shape, dtype=shape.dtype))


def fits(rows, shape):
    return sum(count for _, count in rows) <= shape.tokens and len(rows) <= shape.rows


def fitting(shape):
    return {name: rows for name, rows in STEPS.items() if fits(rows, shape)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_its_oracle_and_compiles_once(shape):
    rng, scale = np.random.default_rng(0), shape.head_dim**-0.5
    attend = functools.partial(ops.paged_attention, scale=scale, window=shape.window)
    static = () if shape.traced else (2,)
    attend = jax.jit(attend, static_argnums=static, compiler_options=COMPILER_OPTIONS["cpu"])
    layer = jnp.int32(1) if shape.traced else 1
    for name, rows in fitting(shape).items():
        ragged, kv = make_ragged(rng, shape, rows), random_kv(rng, shape)
        q_TNH = normal(rng, shape.tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype)
        got = attend(q_TNH, kv, layer, ragged)
        assert got.dtype == shape.dtype and bool(jnp.isfinite(got.astype(F32)).all())
        count, expected = int(ragged.num_tokens), xla.paged_attention_oracle(q_TNH, kv, 1, ragged, scale, shape.window)
        np.testing.assert_allclose(got[:count].astype(F32), expected[:count], **BOUNDS[shape.dtype], err_msg=name)
    assert attend._cache_size() == 1


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_write_kv_equals_its_oracle_and_padding_writes_nothing(shape):
    rng = np.random.default_rng(1)
    write = jax.jit(ops.write_kv)
    for name in ("mixed, with empty rows", "prefills", "nothing"):
        ragged, kv = make_ragged(rng, shape, STEPS[name]), random_kv(rng, shape)
        k_TKH, v_TKH = (normal(rng, shape.tokens, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype) for _ in "kv")
        got = write(kv, jnp.int32(1), k_TKH, v_TKH, ragged)
        np.testing.assert_array_equal(got, xla.write_kv_oracle(kv, 1, k_TKH, v_TKH, ragged), err_msg=name)
        changed = np.any(np.asarray(got != kv), axis=(3, 4, 5)).sum()
        assert changed == int(ragged.num_tokens), "one slot of one layer per token, none for padding"


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 2, 9, xla.WIDENED_ROWS])
@pytest.mark.parametrize("linear", [ops.linear, xla.linear, xla.linear_widened])
def test_linear_equals_its_oracle(linear, rows, dtype):
    rng, count = np.random.default_rng(2), jnp.int32(max(1, rows - 2))
    x_TD, w_OD = normal(rng, rows, 48, dtype=dtype), normal(rng, 20, 48, dtype=dtype)
    got, expected = linear(x_TD, w_OD, count), xla.linear_oracle(x_TD, w_OD, count)
    assert got.dtype == F32 and got.shape == (rows, 20)
    np.testing.assert_allclose(got[:count], expected[:count], rtol=1e-5, atol=1e-5)


def test_embed_gives_rows_and_zeros_for_ids_held_elsewhere():
    table = normal(np.random.default_rng(3), 5, 4)
    got = ops.embed(jnp.asarray([4, -1, 0, 5, 2**31 - 1], jnp.int32), table)
    np.testing.assert_array_equal(got, [table[4], np.zeros(4), table[0], np.zeros(4), np.zeros(4)])


@module
class Layer:
    """As little of a layer as uses weights and cache."""

    weight: jax.Array

    def __call__(self, index, carry, ragged):
        x_TNH, kv = carry
        flat_TD = x_TNH.reshape(x_TNH.shape[0], -1)
        y_TD = tree.call(lambda w: ops.linear(flat_TD, w, ragged.num_tokens), self.weight)
        x_TNH = y_TD.astype(x_TNH.dtype).reshape(x_TNH.shape)
        kv = ops.write_kv(kv, index, x_TNH, x_TNH, ragged)
        return ops.paged_attention(x_TNH, kv, index, ragged, 0.25, None), kv


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_donated_cache_is_updated_in_place_unrolled_and_folded(dtype):
    shape, rng = Shape(2, 2, 16, dtype, tokens=8), np.random.default_rng(4)
    kv = jnp.zeros((2, 600, 16, 2, 2, 16), xla._storage(dtype))
    bodies = tuple(Layer(normal(rng, 32, 32, dtype=dtype)) for _ in range(2))
    ragged = make_ragged(rng, shape, [(0, 3), (5, 1), (0, 2)])
    x_TNH = normal(rng, 8, 2, 16, dtype=dtype)

    def unrolled(bodies, x, kv):
        for index, body in enumerate(bodies):
            x, kv = body(index, (x, kv), ragged)
        return x, kv

    def folded(bodies, x, kv):
        return Separate(bodies).fold(lambda layer, index, carry: layer(index, carry, ragged), (x, kv))

    results = []
    for chain in (unrolled, folded):
        program = jax.jit(chain, donate_argnums=2).lower(bodies, x_TNH, kv).compile(COMPILER_OPTIONS["cpu"])
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < kv.nbytes / 2, "no copy of the cache, nor of a layer"
        assert memory.alias_size_in_bytes >= kv.nbytes
        results.append(program(bodies, x_TNH, kv.copy()))
    for one, other in zip(*results):
        np.testing.assert_allclose(one.astype(F32), other.astype(F32), **BOUNDS[dtype])
