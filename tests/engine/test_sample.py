"""Filters against a definition by sorting, draws against the softmax.

The token of a row depends on that row only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import ops
from slipway.engine import sample
from slipway.engine.batch import Sampling
from slipway.ops import cpu, xla

V = 37
OPTIONS = cpu.BACKEND.compiler_options
keep = jax.jit(xla.keep, compiler_options=OPTIONS)
draw = jax.jit(sample.sample, compiler_options=OPTIONS)


def definition(logits, top_k, top_p, min_p):
    """Return which tokens of one row are kept, by sorting.

    First min_p, then top_k, then top_p, each over the tokens left; ties are kept or dropped
    together.
    """
    logits = logits.astype(np.float64)
    kept = logits >= logits.max() + (np.log(min_p) if min_p > 0 else -np.inf)
    if 0 < top_k < kept.sum():
        kept &= logits >= np.sort(logits[kept])[::-1][top_k - 1]
    if top_p < 1:
        probs = np.where(kept, np.exp(logits - logits.max()), 0)
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        # The last token that is needed.
        first = np.searchsorted(np.cumsum(probs[order]), top_p - 1e-7)
        kept &= logits >= logits[order[min(first, len(order) - 1)]]
    return kept & (logits > -np.inf)


def random_logits(rng, rows):
    """Return smooth rows, rows with few distinct values, and rows with excluded tokens."""
    logits = rng.normal(size=(rows, V)) * rng.choice([0.1, 1, 5, 30], size=(rows, 1))
    tied = rng.random(rows) < 0.4
    logits[tied] = np.round(logits[tied])
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    logits[:, 0] = np.maximum(logits[:, 0], -5)
    return logits.astype(np.float32) + np.float32(0)  # no -0.0


FILTERS = {
    "none": (0, 1.0, 0.0), "top_k": (5, 1.0, 0.0), "top_k of one": (1, 1.0, 0.0),
    "top_k of all": (V, 1.0, 0.0),
    "top_k beyond all": (10**9, 1.0, 0.0), "top_p": (0, 0.7, 0.0),
    "top_p just below 1": (0, 0.995, 0.0),
    "top_p tiny": (0, 1e-6, 0.0), "top_p below f32": (0, 1e-50, 0.0), "min_p": (0, 1.0, 0.1),
    "min_p of 1": (0, 1.0, 1.0), "all three": (6, 0.8, 0.02),
}  # fmt: skip


def columns(rows, top_k=0, top_p=1.0, min_p=0.0):
    return [
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
    ]


@pytest.mark.parametrize("name", FILTERS)
def test_keep_is_what_sorting_would_keep(name):
    logits = random_logits(np.random.default_rng(0), 64)
    got = np.asarray(keep(logits, *columns(64, *FILTERS[name])))
    for row, (before, after) in enumerate(zip(logits, got)):
        np.testing.assert_array_equal(
            after > -np.inf, definition(before, *FILTERS[name]), err_msg=f"row {row}"
        )
        np.testing.assert_array_equal(after[after > -np.inf], before[after > -np.inf])


def test_filters_are_each_rows_own():
    rng = np.random.default_rng(1)
    logits = random_logits(rng, 64)
    rows = [list(FILTERS.values())[i % len(FILTERS)] for i in range(64)]
    top_k, top_p, min_p = (
        jnp.asarray(np.array(column), d) for column, d in zip(zip(*rows), ("i4", "f4", "f4"))
    )
    got = np.asarray(keep(logits, top_k, top_p, min_p))
    for before, after, row in zip(logits, got, rows):
        np.testing.assert_array_equal(after > -np.inf, definition(before, *row))


def tokens(logits, temperature, seeds, positions, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))
    seeds, positions = jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32)
    filters = columns(rows, top_k, top_p, min_p)
    return np.asarray(draw(jnp.asarray(logits), sampling(temperature, *filters, seeds, positions)))


def sampling(temperature_B, top_k_B, top_p_B, min_p_B, seed_B, position_B):
    rows = len(temperature_B)
    return Sampling(
        num_rows_1=jnp.full(1, rows, jnp.int32),
        temperature_B=temperature_B,
        top_k_B=top_k_B,
        top_p_B=top_p_B,
        min_p_B=min_p_B,
        seed_B=seed_B,
        position_B=position_B,
        given_B=jnp.full(rows, -1),
        last_B=jnp.full(rows, -1),
        wants_logprobs_B=jnp.zeros(rows, bool),
    )


@pytest.mark.parametrize("varied", ["seeds", "positions"])
@pytest.mark.parametrize(
    "temperature, filters", [(1.0, {}), (0.5, {}), (2.0, {"top_k": 6}), (1.0, {"top_p": 0.8})]
)
def test_draws_follow_the_softmax(varied, temperature, filters):
    """Chi-square with a bound that 99.99% of correct runs pass; the seeds are fixed."""
    rows, logits = 4096, np.random.default_rng(2).normal(size=V).astype(np.float32)
    running, fixed = np.arange(rows), np.full(rows, 3)
    seeds, positions = (running, fixed) if varied == "seeds" else (fixed, running)
    drawn = tokens(np.tile(logits, (rows, 1)), temperature, seeds, positions, **filters)
    kept = definition(logits / temperature, filters.get("top_k", 0), filters.get("top_p", 1.0), 0)
    probs = np.where(kept, np.exp(logits / temperature), 0)
    expected = rows * probs / probs.sum()
    counts = np.bincount(drawn, minlength=V)
    assert not counts[~kept].any()
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 6


def test_a_row_draws_the_same_in_any_company_and_bucket():
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 16)
    seeds = rng.integers(0, 2**32, 16)
    positions = rng.integers(0, 500, 16)
    whole = tokens(logits, 0.9, seeds, positions, top_p=0.9)
    order = rng.permutation(16)
    np.testing.assert_array_equal(
        tokens(logits[order], 0.9, seeds[order], positions[order], top_p=0.9), whole[order]
    )
    np.testing.assert_array_equal(
        tokens(logits[:2], 0.9, seeds[:2], positions[:2], top_p=0.9), whole[:2]
    )
    # greedy and unfiltered neighbours choose other branches of the program
    temperatures = jnp.asarray(np.where(np.arange(16) % 2, 0.9, 0), jnp.float32)
    last = jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32)
    mixed = draw(jnp.asarray(logits), sampling(temperatures, *columns(16, top_p=0.9), *last))
    np.testing.assert_array_equal(mixed[1::2], whole[1::2])
    np.testing.assert_array_equal(mixed[::2], logits[::2].argmax(-1))


@pytest.mark.parametrize("name", FILTERS)
def test_every_body_draws_the_same_token_by_the_same_number(name):
    rng, rows = np.random.default_rng(6), 256
    logits, uniform = random_logits(rng, rows), rng.random(rows, np.float32)
    arguments = (
        jnp.full(rows, 0.8, jnp.float32),
        *columns(rows, *FILTERS[name]),
        jnp.asarray(uniform),
    )
    chosen, portable = (
        jax.jit(body.sample)(jnp.asarray(logits), jnp.int32(rows), *arguments)
        for body in (ops, xla)
    )
    np.testing.assert_array_equal(chosen, portable)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}])
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 2e-38, 1e-4])
def test_temperature_towards_0_is_argmax(temperature, filters):
    logits = np.random.default_rng(4).normal(size=(16, V)).astype(np.float32) * 9
    got = tokens(logits, temperature, np.arange(16), np.arange(16), **filters)
    np.testing.assert_array_equal(got, logits.argmax(-1))


def test_logprobs_and_ranks_are_numpys():
    logits = np.random.default_rng(5).normal(size=(8, V)).astype(np.float32) * 3
    chosen = np.arange(8, dtype=np.int32)
    got = sample.logprobs(jnp.asarray(logits), jnp.int32(8), jnp.asarray(chosen), 5)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.logprob_B, expected[np.arange(8), chosen], rtol=1e-5, atol=1e-5)
    order = np.argsort(-expected, axis=-1)
    np.testing.assert_array_equal(got.rank_B, 1 + np.argmax(order == chosen[:, None], axis=-1))
    np.testing.assert_array_equal(got.top_id_BX, order[:, :5])
    np.testing.assert_allclose(
        got.top_logprob_BX, np.take_along_axis(expected, order[:, :5], -1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [37, 1000, 32_000])
def test_log_probabilities_are_the_same_bits_in_any_batch(size):
    """This holds for the portable bodies too."""
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=(64, size)) * rng.uniform(1, 20, size=(64, 1))).astype(np.float32)
    chosen = rng.integers(size, size=64).astype(np.int32)
    found = jax.jit(sample.logprobs, static_argnums=3)
    whole = found(jnp.asarray(logits), jnp.int32(64), jnp.asarray(chosen), 20)
    for count in (1, 2, 3, 5, 8, 16, 33):
        for part in (slice(count), slice(-count, None)):
            got = found(jnp.asarray(logits[part]), jnp.int32(count), jnp.asarray(chosen[part]), 20)
            for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
                np.testing.assert_array_equal(one, other[part], err_msg=str(part))
