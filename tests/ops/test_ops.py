"""Every op against its slow oracle on random ragged batches, and the cache written in place."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import ops, tree
from slipway.ops import PageMap, cpu, kv_cache, xla
from slipway.ops.kv_cache import AttentionOptions, CacheSpec, PagedCache
from slipway.tree import Separate, module
from tests.ops import oracles
from tests.ops.ragged import BF16, F32, SHAPES, STEPS, TOKENS, Shape, fitting, make_ragged, slots

# The sums are f32 in any case: f32 differs by their order, bf16 by one rounding of the result (half
# of 2^-8) besides.
BOUNDS = {F32: {"rtol": 1e-5, "atol": 1e-5}, BF16: {"rtol": 2**-8, "atol": 1e-5}}
NUM_LAYERS = 2


def write_kv(body, kv, layer, k_TKH, v_TKH, step):
    """Write with the chosen body (ops) or the portable one (xla)."""
    if body is ops:
        return PagedCache(kv).write(k_TKH, v_TKH, layer=layer, step=step).kv
    return body.write_kv(kv, layer, k_TKH, v_TKH, step.num_tokens, slots(step))


def attention(body, q_TNH, kv, layer, step, *, scale, window, soft_cap=None, sinks_N=None):
    """Attend with the chosen body (ops) or the portable one (xla)."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if body is ops:
        return PagedCache(kv).read(
            q_TNH, layer=layer, step=step, options=AttentionOptions(sinks_N=sinks_N, **options)
        )
    return body.paged_attention(
        q_TNH, kv, layer, step, step.pages[0].page_table_BM, sinks_N, **options
    )


def empty_cache(*, num_layers, num_pages, page_size, num_kv_heads, head_dim, dtype):
    spec = CacheSpec(num_layers, num_kv_heads, head_dim)
    (cache,) = kv_cache.allocate(
        [spec], [num_pages], platform="cpu", page_size=page_size, dtype=dtype
    )
    return cache.kv


def normal(rng, *size, dtype=F32):
    return jnp.asarray(rng.normal(size=size), F32).astype(dtype)


def everything(shape):
    """Return a ragged batch with one token for each slot of the cache, to fill it."""
    slots_T = jnp.arange(shape.num_pages * shape.page_size, dtype=jnp.int32)
    step = make_ragged(np.random.default_rng(0), shape, [])
    pages = (PageMap(slots_T, step.pages[0].page_table_BM),)
    return dataclasses.replace(step, num_tokens_1=slots_T[-1:] + 1, pages=pages)


def filled(body, shape, keys_and_values):
    """Return a cache written by ``body``."""
    kv = empty_cache(
        num_layers=NUM_LAYERS,
        num_pages=shape.num_pages,
        page_size=shape.page_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )
    for layer, (k_TKH, v_TKH) in enumerate(keys_and_values):
        kv = write_kv(body, kv, layer, k_TKH, v_TKH, everything(shape))
    return kv


def random_keys_and_values(rng, shape, layers=NUM_LAYERS):
    size = shape.num_pages * shape.page_size, shape.num_kv_heads, shape.head_dim
    return [tuple(normal(rng, *size, dtype=shape.dtype) for _ in "kv") for _ in range(layers)]


def attention_bound(shape, expected, keys_and_values, q_TNH, ragged, scale):
    """Return the largest error that an output may have.

    That is its own rounding; with a 16-bit cache a body may also round the softmax weights.
    """
    bound = BOUNDS[shape.dtype]["rtol"] * np.abs(expected) + BOUNDS[shape.dtype]["atol"]
    if shape.dtype == F32:
        return bound
    magnitudes = filled(xla, shape, [(k, jnp.abs(v)) for k, v in keys_and_values])
    weighed = oracles.paged_attention(q_TNH, magnitudes, 1, ragged, scale, shape.window)
    return bound + 2**-9 * weighed[: len(expected)]


@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_its_oracle_and_compiles_once(shape, body):
    rng, scale = np.random.default_rng(0), shape.head_dim**-0.5
    attend = functools.partial(attention, body, scale=scale, window=shape.window)
    static = () if shape.traced else (2,)
    attend = jax.jit(attend, static_argnums=static, compiler_options=cpu.BACKEND.compiler_options)
    layer, held = jnp.int32(1) if shape.traced else 1, random_keys_and_values(rng, shape)
    kv, reference = filled(body, shape, held), filled(xla, shape, held)
    for name, rows in fitting(shape).items():
        ragged = make_ragged(rng, shape, rows)
        q_TNH = normal(rng, shape.tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype)
        got, count = attend(q_TNH, kv, layer, ragged), int(ragged.num_tokens)
        expected = oracles.paged_attention(q_TNH, reference, 1, ragged, scale, shape.window)[:count]
        bound = attention_bound(shape, expected, held, q_TNH, ragged, scale)
        assert got.dtype == shape.dtype
        assert np.all(np.abs(np.asarray(got[:count].astype(F32)) - expected) <= bound), name
    assert attend._cache_size() == 1


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4]], ids=str)
def test_attention_of_a_token_is_the_same_bits_alone_in_a_batch_and_in_a_chunk(shape):
    rng = np.random.default_rng(5)
    attend = jax.jit(functools.partial(attention, ops, scale=0.1, window=shape.window))
    if cpu.BACKEND.bodies["write_kv"].unsupported(
        filled(ops, shape, []), 0, jnp.zeros(1, shape.dtype)
    ):
        pytest.skip("the portable body promises equal numbers, not equal bits")
    kv = filled(ops, shape, random_keys_and_values(rng, shape))
    q_TNH = normal(rng, shape.tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    together = make_ragged(np.random.default_rng(6), shape, [(100, 90), (7, 1), (130, 3)])
    chunk = attend(q_TNH, kv, 1, together)
    for t in (0, 1, 47, 89, 90, 91, 93):
        row = int(np.searchsorted(np.cumsum(together.counts_B), t, side="right"))
        fields = {
            "num_tokens_1": [1],
            "positions_T": together.positions_T[t : t + 1],
            "starts_B": [0],
            "counts_B": [1],
        }
        fields |= {"lengths_B": fields["positions_T"] + 1}
        alone = dataclasses.replace(
            together, **{name: jnp.asarray(x, jnp.int32) for name, x in fields.items()}
        )
        table_BM = together.pages[0].page_table_BM[row : row + 1]
        alone = dataclasses.replace(alone, pages=(PageMap(slots(together)[:1], table_BM),))
        np.testing.assert_array_equal(
            attend(q_TNH[t : t + 1], kv, 1, alone)[0], chunk[t], err_msg=str(t)
        )


@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
@pytest.mark.parametrize(("soft_cap", "sinks"), [(2.0, False), (None, True), (30.0, True)])
def test_attention_caps_scores_and_shares_with_sinks(body, soft_cap, sinks):
    shape, rng = Shape(4, 2, 24, window=33), np.random.default_rng(13)
    held, sinks_N = random_keys_and_values(rng, shape), normal(rng, 4) * 3 if sinks else None
    ragged = make_ragged(rng, shape, STEPS["mixed, with empty rows"])
    q_TNH, count = normal(rng, shape.tokens, 4, 24), int(ragged.num_tokens)
    options = {"scale": 0.5, "window": shape.window, "soft_cap": soft_cap, "sinks_N": sinks_N}
    got = attention(body, q_TNH, filled(body, shape, held), 1, ragged, **options)
    expected = oracles.paged_attention(q_TNH, filled(xla, shape, held), 1, ragged, **options)
    np.testing.assert_allclose(got[:count], expected[:count], **BOUNDS[F32])


@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_attention_never_looks_at_slots_that_were_not_written(body, dtype):
    shape, rng = Shape(4, 2, 24, dtype), np.random.default_rng(7)
    poison = jnp.full((shape.num_pages * shape.page_size, 2, 24), jnp.nan, dtype)
    kv = filled(body, shape, [(poison, poison)] * NUM_LAYERS)
    ragged = make_ragged(rng, shape, [(0, 21), (0, 1)])
    q_TNH, k_TKH, v_TKH = (normal(rng, TOKENS, heads, 24, dtype=dtype) for heads in (4, 2, 2))
    kv = write_kv(body, kv, 1, k_TKH, v_TKH, ragged)
    out_TNH = attention(body, q_TNH, kv, 1, ragged, scale=0.2, window=None)
    assert bool(jnp.isfinite(out_TNH[:22].astype(F32)).all())


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_write_kv_equals_its_oracle_and_padding_writes_nothing(shape):
    rng = np.random.default_rng(1)
    write = jax.jit(functools.partial(write_kv, xla))
    for name in ("mixed, with empty rows", "prefills", "nothing"):
        ragged = make_ragged(rng, shape, STEPS[name])
        kv = filled(xla, shape, random_keys_and_values(rng, shape))
        k_TKH, v_TKH = (
            normal(rng, shape.tokens, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
            for _ in "kv"
        )
        got = write(kv, jnp.int32(1), k_TKH, v_TKH, ragged)
        np.testing.assert_array_equal(
            got, oracles.write_kv(kv, 1, k_TKH, v_TKH, ragged), err_msg=name
        )
        changed = np.any(np.asarray(got != kv), axis=(2, 3, 5)).sum()
        assert changed == int(ragged.num_tokens), (
            "one slot of one layer per token, none for padding"
        )


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_the_chosen_write_kv_touches_the_live_slots_of_one_layer_alone(shape):
    rng = np.random.default_rng(1)
    before, after = (random_keys_and_values(rng, shape) for _ in range(2))
    for name in ("mixed, with empty rows", "nothing"):
        ragged = make_ragged(rng, shape, STEPS[name])
        count, live = int(ragged.num_tokens), np.asarray(slots(ragged))
        new = tuple(
            jnp.pad(x[live[:count]], ((0, shape.tokens - count), (0, 0), (0, 0))) for x in after[1]
        )
        got = jax.jit(functools.partial(write_kv, ops))(
            filled(ops, shape, before), jnp.int32(1), *new, ragged
        )
        mixed = tuple(x.at[live[:count]].set(y[live[:count]]) for x, y in zip(before[1], after[1]))
        np.testing.assert_array_equal(got, filled(ops, shape, [before[0], mixed]), err_msg=name)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("rows", "size", "out"),
    [
        (1, 48, 20),
        (2, 96, 32),
        (9, 48, 33),
        (14, 30, 16),
        (70, 600, 40),
        (3, 33, 17),
        (220, 288, 160),
        (530, 96, 40),
    ],
)
@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
def test_linear_equals_its_oracle(body, rows, size, out, dtype):
    rng, count = np.random.default_rng(2), jnp.int32(max(1, rows - 2))
    x_TD, bias = normal(rng, rows, size, dtype=dtype), normal(rng, out, dtype=dtype)
    weight, up = (normal(rng, out, size, dtype=dtype) for _ in range(2))
    got, expected = body.linear(x_TD, weight, count), oracles.linear(x_TD, weight, count)
    assert got.dtype == F32
    assert got.shape == (rows, out)
    np.testing.assert_allclose(got[:count], expected[:count], rtol=1e-5, atol=1e-4)
    biased = body.linear(x_TD, weight, count, bias, dtype=dtype)
    assert biased.dtype == dtype
    expected = expected + bias.astype(F32)[None]
    np.testing.assert_allclose(
        biased[:count].astype(F32), expected[:count], rtol=BOUNDS[dtype]["rtol"], atol=1e-4
    )
    gated = body.gated_linear(x_TD, weight, up, count, bias, bias)
    expected = jax.nn.silu(expected) * (oracles.linear(x_TD, up, count) + bias.astype(F32)[None])
    np.testing.assert_allclose(gated[:count], expected[:count], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [8, 24, 40, 128, 333])
def test_rms_norm_equals_its_definition(size, dtype):
    rng = np.random.default_rng(10)
    x_TD, weight = normal(rng, 7, size, dtype=dtype), normal(rng, size, dtype=dtype)
    wide = np.asarray(x_TD, np.float64)
    expected = (
        wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    )
    for body in (ops, xla):
        got = body.rms_norm(x_TD, weight, jnp.int32(5), 1e-6)
        assert got.dtype == dtype
        rtol = 1e-5 if dtype == F32 else 2**-7  # two roundings
        np.testing.assert_allclose(
            np.asarray(got[:5], np.float64), expected[:5], rtol=rtol, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 128])
@pytest.mark.parametrize("normed", [True, False])
def test_rotate_turns_pairs_as_complex_numbers(normed, head_dim, dtype):
    rng, half = np.random.default_rng(11), head_dim // 2
    x_TNH = normal(rng, 6, 3, head_dim, dtype=dtype)
    weight = normal(rng, head_dim, dtype=dtype) if normed else None
    angles = rng.normal(size=(6, half)).astype(np.float32)
    heads = x_TNH.reshape(18, head_dim)
    heads = heads if weight is None else xla.rms_norm(heads, weight, jnp.int32(18), 1e-6)
    wide = np.asarray(heads, np.float64).reshape(6, 3, head_dim)
    turned = (wide[..., :half] + 1j * wide[..., half:]) * np.exp(1j * angles.astype(np.float64))[
        :, None
    ]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    for body in (ops, xla):
        got = body.rotate(x_TNH, weight, (jnp.cos(angles), jnp.sin(angles)), jnp.int32(5), 1e-6)
        assert got.dtype == dtype
        # in 16 bits the normalized head may round the other way once in a body that sums in another
        # order
        atol = 1e-5 if dtype == F32 else 2**-6
        np.testing.assert_allclose(
            np.asarray(got[:5], np.float64), expected[:5], rtol=2**-8, atol=atol
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear_picks_the_weight_of_a_traced_layer(dtype):
    rng, x_TD = np.random.default_rng(8), jnp.ones((3, 32), dtype)
    weights = tuple(normal(rng, 8, 32, dtype=dtype) for _ in range(3))
    pick = jax.jit(lambda i, weights: ops.linear(x_TD, tree.IndexedArray(weights, i), jnp.int32(3)))
    for i in range(3):
        np.testing.assert_array_equal(pick(i, weights), ops.linear(x_TD, weights[i], jnp.int32(3)))


def test_linear_takes_weights_of_another_dtype():
    rng = np.random.default_rng(12)
    x_TD, weight = normal(rng, 3, 32), normal(rng, 8, 32, dtype=BF16)
    with jax.numpy_dtype_promotion("standard"):
        got, expected = (f(x_TD, weight, jnp.int32(3)) for f in (ops.linear, oracles.linear))
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_linear_gives_a_token_the_same_bits_in_any_batch(dtype):
    if cpu.refuses_dtype(dtype):
        pytest.skip("the portable body promises equal numbers, not equal bits")
    rng = np.random.default_rng(9)
    x_TD, weight = normal(rng, 600, 330, dtype=dtype), normal(rng, 50, 330, dtype=dtype)
    whole = ops.linear(x_TD, weight, jnp.int32(600))
    for count in (1, 2, 4, 5, 8, 9, 16, 17, 31, 48, 49, 97, 128, 129, 200, 513):
        np.testing.assert_array_equal(
            ops.linear(x_TD[:count], weight, jnp.int32(count)), whole[:count], err_msg=str(count)
        )


VOCABULARIES = (1, 3, 37, 1000, 1024, 5001, 151_936)


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
def test_log_normalizer_equals_its_definition_and_is_the_same_bits_in_any_batch(body, size):
    rng = np.random.default_rng(12)
    logits = (rng.normal(size=(33, size)) * rng.uniform(0.1, 30, size=(33, 1))).astype(np.float32)
    logits[0, size // 2] = -np.inf if size > 1 else 0
    normalizer = jax.jit(body.log_normalizer)
    largest_B, log_sum_B = normalizer(jnp.asarray(logits), jnp.int32(33))
    wide = logits.astype(np.float64)
    np.testing.assert_array_equal(largest_B, logits.max(-1))
    expected = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(log_sum_B, expected, rtol=1e-6, atol=1e-6)
    for count in (1, 2, 3, 7, 8, 16, 31):
        for part in (slice(count), slice(-count, None)):
            _, got_B = normalizer(jnp.asarray(logits[part]), jnp.int32(count))
            # Errors of exp: see xla.log_normalizer.
            ulps = 2 if body is xla and jax.__version_info__ >= (0, 11) else 0
            np.testing.assert_array_max_ulp(got_B, log_sum_B[part], ulps)


@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
@pytest.mark.parametrize("at", [0, 5, 1001])
def test_log_normalizer_of_a_row_with_nan_is_nan(body, at):
    logits = np.zeros((2, 1002), np.float32)
    logits[1, at] = np.nan
    _, log_sum_B = body.log_normalizer(jnp.asarray(logits), jnp.int32(2))
    np.testing.assert_array_equal(np.isnan(log_sum_B), [False, True])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
def test_embed_gives_rows_and_zeros_for_ids_held_elsewhere(body, dtype):
    table, zeros = normal(np.random.default_rng(3), 5, 20, dtype=dtype), jnp.zeros(20, dtype)
    got = body.embed(jnp.asarray([4, -1, 0, 5, 2**31 - 1], jnp.int32), table, jnp.int32(5))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jnp.stack([table[4], zeros, table[0], zeros, zeros]))


@module
class Layer:
    """Smallest layer that uses weights and cache."""

    weight: jax.Array

    def __call__(self, index, carry, ragged):
        x_TNH, kv = carry
        flat_TD = x_TNH.reshape(x_TNH.shape[0], -1)
        y_TD = ops.linear(flat_TD, self.weight, ragged.num_tokens)
        x_TNH = y_TD.astype(x_TNH.dtype).reshape(x_TNH.shape)
        kv = write_kv(ops, kv, index, x_TNH, x_TNH, ragged)
        return attention(ops, x_TNH, kv, index, ragged, scale=0.25, window=None), kv


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_donated_cache_is_updated_in_place_unrolled_and_folded(dtype):
    shape, rng = Shape(2, 2, 16, dtype, tokens=8), np.random.default_rng(4)
    kv = empty_cache(
        num_layers=2, num_pages=600, page_size=16, num_kv_heads=2, head_dim=16, dtype=dtype
    )
    bodies = tuple(Layer(normal(rng, 32, 32, dtype=dtype)) for _ in range(2))
    ragged = make_ragged(rng, shape, [(0, 3), (5, 1), (0, 2)])
    x_TNH = normal(rng, 8, 2, 16, dtype=dtype)

    def unrolled(bodies, x, kv):
        for index, body in enumerate(bodies):
            x, kv = body(index, (x, kv), ragged)
        return x, kv

    def folded(bodies, x, kv):
        return Separate(bodies).fold(
            lambda layer, index, carry: layer(index, carry, ragged), (x, kv)
        )

    results = []
    for chain in (unrolled, folded):
        program = (
            jax.jit(chain, donate_argnums=2)
            .lower(bodies, x_TNH, kv)
            .compile(cpu.BACKEND.compiler_options)
        )
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < kv.nbytes / 2, "no copy of the cache, nor of a layer"
        assert memory.alias_size_in_bytes >= kv.nbytes
        out_TNH, updated = program(bodies, x_TNH, kv.copy())
        results.append((out_TNH[: int(ragged.num_tokens)], updated))
    for one, other in zip(*results):
        np.testing.assert_allclose(one.astype(F32), other.astype(F32), **BOUNDS[dtype])


@pytest.mark.parametrize("size", [1, 5_000, 3_000_001])
def test_zeros_are_zeros_in_memory_that_held_something_else(size):
    empty = jax.jit(lambda: ops.zeros((size,), jnp.float32))
    for _ in range(5):
        np.testing.assert_array_equal(empty(), np.zeros(size, np.float32))
        # Memory with other numbers, freed at once.
        np.testing.assert_array_equal(jnp.full(size, 3.0) * 2, np.full(size, 6.0, np.float32))


@pytest.mark.skipif(cpu.isa() is None, reason="the portable body fills memory")
def test_zeros_take_no_memory_until_they_are_written():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    zeros = jax.block_until_ready(jax.jit(lambda: ops.zeros((1 << 28,), jnp.bfloat16))())
    assert resident() - before < zeros.nbytes / 10


def test_matrices_of_which_only_some_have_a_bias():
    rng = np.random.default_rng(8)
    x_TD, weights = normal(rng, 3, 16), [normal(rng, 8, 16), normal(rng, 4, 16)]
    bias, count = normal(rng, 4), jnp.int32(3)
    plain, biased = jax.jit(functools.partial(ops.linears, num_tokens=count))(
        x_TD, weights, biases=(None, bias)
    )
    np.testing.assert_allclose(plain, oracles.linear(x_TD, weights[0], count), **BOUNDS[F32])
    np.testing.assert_allclose(
        biased, oracles.linear(x_TD, weights[1], count) + bias[None], **BOUNDS[F32]
    )
    gated = ops.gated_linear(x_TD, weights[1], weights[1], count, up_bias=bias)
    expected = jax.nn.silu(biased - bias[None]) * biased
    np.testing.assert_allclose(gated, expected, **BOUNDS[F32])
