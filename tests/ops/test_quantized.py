"""Packed weights: the meaning of the words, every body against it, and equal bits in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import ops, tree
from slipway.ops import cpu, xla
from slipway.ops.quantized import Quantized, dequantized
from tests.ops import oracles

F32, BF16 = jnp.float32, jnp.bfloat16
KINDS = [(8, 0), (4, 32), (4, 64), (4, 128), (4, 0), (8, 32), (8, 16)]  # bits, group
IN = 384  # a multiple of every group, and of no vector's 16 x 8 weights times a power of two


def packed(rng, out, size, bits, group, dtype):
    """Return a weight of random words and scales."""
    words = rng.integers(-(2**31), 2**31, size=(out, size * bits // 32)).astype(np.int32)
    scale = rng.uniform(0.5, 1.5, size=(out, size // group if group else 1)) / 2**bits
    return Quantized(jnp.asarray(words), jnp.asarray(scale, dtype), bits, group)


def normal(rng, *size, dtype):
    return jnp.asarray(rng.normal(size=size), dtype)


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_a_word_holds_neighbours_from_the_lowest_bits_on(bits, group):
    rng, size = np.random.default_rng(1), 128
    stored = rng.integers(0, 2**bits, size=(3, size))
    words = [
        [
            sum(int(v) << (bits * i) for i, v in enumerate(row[at : at + 32 // bits]))
            for at in range(0, size, 32 // bits)
        ]
        for row in stored
    ]
    scale = rng.uniform(1, 2, size=(3, size // group if group else 1)).astype(np.float32)
    weight = Quantized(
        jnp.asarray(np.array(words, np.uint32).view(np.int32)), jnp.asarray(scale), bits, group
    )
    expected = (stored - 2.0 ** (bits - 1)) * np.repeat(scale, size // scale.shape[1], axis=1)
    np.testing.assert_array_equal(dequantized(weight), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
def test_linear_with_packed_weights_equals_its_oracle(body, bits, group, dtype):
    rng = np.random.default_rng(2)
    for rows, out, size in ((1, 20, IN), (2, 33, 128), (5, 16, IN), (17, 40, IN), (40, 7, 1280)):
        count = jnp.int32(rows)
        x_TD = normal(rng, rows, size, dtype=dtype)
        bias = normal(rng, out, dtype=dtype)
        weight, up = (packed(rng, out, size, bits, group, dtype) for _ in range(2))
        plain, second = (oracles.linear(x_TD, w, count) for w in (weight, up))
        close = {
            "rtol": 1e-4,
            "atol": 1e-4,
        }  # f32 sums of numbers near 1, each less an offset 36 times as large
        np.testing.assert_allclose(body.linear(x_TD, weight, count), plain, **close)
        np.testing.assert_allclose(
            body.linear(x_TD, weight, count, bias), plain + bias.astype(F32)[None], **close
        )
        gated = body.gated_linear(x_TD, weight, up, count, bias, bias)
        expected = jax.nn.silu(plain + bias.astype(F32)[None]) * (second + bias.astype(F32)[None])
        np.testing.assert_allclose(gated, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_linear_with_packed_weights_gives_a_token_the_same_bits_in_any_batch(bits, group, dtype):
    if cpu.refuses_dtype(dtype):
        pytest.skip("the portable body promises equal numbers, not equal bits")
    rng = np.random.default_rng(3)
    x_TD, weight = normal(rng, 530, IN, dtype=dtype), packed(rng, 50, IN, bits, group, dtype)
    whole = ops.linear(x_TD, weight, jnp.int32(530))
    for count in (1, 2, 3, 4, 15, 16, 17, 33, 50):
        got = ops.linear(x_TD[:count], weight, jnp.int32(count))
        np.testing.assert_array_equal(got, whole[:count], err_msg=str(count))
        last = ops.linear(x_TD[-count:], weight, jnp.int32(count))
        np.testing.assert_array_equal(last, whole[-count:], err_msg=f"the last {count}")


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_an_outlier_costs_precision_in_its_own_eight_columns_only(bits, group):
    """A body that multiplies integers may round numbers beside a large one, by 2^-15 of it."""
    rng = np.random.default_rng(6)
    x_TD, weight = np.array(normal(rng, 3, IN, dtype=F32)), packed(rng, 50, IN, bits, group, BF16)
    x_TD[1, 133] = 1024.0
    x_TD = np.asarray(jnp.asarray(x_TD, BF16).astype(F32))
    w_OD = np.asarray(dequantized(weight), np.float64)
    got = np.asarray(ops.linear(jnp.asarray(x_TD, BF16), weight, jnp.int32(3)), np.float64)
    beside_O = np.abs(w_OD[:, 128:136]).sum(-1)
    bound = 1e-4 + 1e-6 * np.abs(x_TD) @ np.abs(w_OD).T
    bound[1] += 1024.0 * 2.0**-15 * beside_O
    assert (np.abs(got - x_TD.astype(np.float64) @ w_OD.T) <= bound).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_a_token_with_nan_gives_nan_and_leaves_the_others_alone(bits, group, dtype):
    rng = np.random.default_rng(7)
    x_TD, weight = normal(rng, 5, IN, dtype=dtype), packed(rng, 20, IN, bits, group, dtype)
    got = np.asarray(ops.linear(x_TD.at[3, 77].set(np.nan), weight, jnp.int32(5)))
    plain = np.asarray(ops.linear(x_TD, weight, jnp.int32(5)))
    assert np.isnan(got[3]).all()
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(plain, 3, 0))


@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
def test_linear_picks_the_packed_weight_of_a_traced_layer(body):
    rng = np.random.default_rng(4)
    layers = [packed(rng, 8, 64, 4, 32, F32) for _ in range(3)]
    x_TD = normal(rng, 3, 64, dtype=F32)

    @jax.jit
    def pick(i, layers):
        picked = jax.tree.map(lambda *arrays: tree.IndexedArray(arrays, i), *layers)
        return body.linear(x_TD, picked, jnp.int32(3))

    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(
            pick(jnp.int32(i), layers), body.linear(x_TD, layer, jnp.int32(3))
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("body", [ops, xla], ids=["chosen", "xla"])
def test_embed_gives_rows_of_a_packed_table(body, bits, group, dtype):
    table = packed(np.random.default_rng(5), 5, 128, bits, group, dtype)
    rows, zeros = dequantized(table).astype(dtype), jnp.zeros(128, dtype)
    got = body.embed(jnp.asarray([4, -1, 0, 5], jnp.int32), table, jnp.int32(4))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jnp.stack([rows[4], zeros, rows[0], zeros]))
