"""Results of experts joined over devices: an exchange of rows equals a sum, and its rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway.nn import expert_exchange
from slipway.ops import row_exchange

TOKENS, SIZE = 16, 4


@pytest.mark.parametrize("groups, parts", [(2, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, TOKENS])
@pytest.mark.parametrize("shared", [False, True])
def test_an_exchange_equals_a_sum(groups, parts, num_tokens, shared):
    rng = np.random.default_rng(groups + num_tokens)
    top_k = 3
    experts_TK = np.argsort(rng.random((TOKENS, 8)), axis=1)[:, :top_k].astype(np.int32)
    experts_TK[: TOKENS // 2] %= 3  # most groups compute nothing for the first tokens
    num_local = 8 // groups
    # What each device would have computed: a row of zeros for tokens without an expert there.
    is_here = (experts_TK[None] // num_local == np.arange(groups)[:, None, None]).any(-1)
    partial = rng.standard_normal((groups, parts, TOKENS, SIZE)) * is_here[:, None, :, None]
    added = rng.standard_normal((groups, parts, TOKENS, SIZE)) * shared
    expected = (partial + added).sum((0, 1))[:num_tokens]
    # Rows of padding hold anything, and not the same on all devices.
    partial[:, :, num_tokens:] = np.nan

    def joined(partial, added, experts_TK):
        return expert_exchange.by_sending(
            partial[0, 0],
            added[0, 0] if shared else None,
            experts_TK,
            num_local=num_local,
            num_tokens=num_tokens,
            dtype=jnp.float32,
        )

    mesh = meshes.make_mesh(tensor=groups * parts, expert=groups)
    device = P(meshes.EXPERT, meshes.TENSOR)
    specs = {"in_specs": (device, device, P()), "out_specs": P(), "check_vma": False}
    run = jax.jit(jax.shard_map(joined, mesh=mesh, **specs))
    found = run(jnp.float32(partial), jnp.float32(added), experts_TK)
    np.testing.assert_allclose(found[:num_tokens], expected, atol=1e-5, rtol=0)


def _documented(operand, output, *offsets_and_sizes, axis_name, **named):
    """Compute ``lax.ragged_all_to_all``, which a CPU does not have, from its documentation."""
    input_offsets, send_sizes, output_offsets = (
        jax.lax.all_gather(named[name], axis_name)
        for name in ("input_offsets", "send_sizes", "output_offsets")
    )
    assert not offsets_and_sizes
    operands, me = jax.lax.all_gather(operand, axis_name), jax.lax.axis_index(axis_name)
    places = jnp.arange(operand.shape[0])
    for source in range(operands.shape[0]):
        size = send_sizes[source, me]
        rows = operands[source][input_offsets[source, me] + places]
        at = jnp.where(places < size, output_offsets[source, me] + places, len(output))
        output = output.at[at].set(rows, mode="drop")
    return output


@pytest.mark.parametrize("seed", range(4))
def test_both_bodies_receive_the_same_rows(seed, monkeypatch):
    monkeypatch.setattr(row_exchange.lax, "ragged_all_to_all", _documented)
    rng, devices, rows = np.random.default_rng(seed), 4, 12
    counts = rng.integers(0, rows // devices + 1, (devices, devices)).astype(np.int32)
    counts[seed] = 0
    sent = rng.standard_normal((devices, rows, SIZE)).astype(np.float32)
    starts = np.cumsum(counts, axis=1) - counts
    expected = np.zeros((devices, rows, SIZE), np.float32)
    for receiver in range(devices):
        blocks = [
            sent[source, starts[source, receiver] :][: counts[source, receiver]]
            for source in range(devices)
        ]
        received = np.concatenate(blocks)
        expected[receiver, : len(received)] = received
    mesh = meshes.make_mesh(tensor=devices, expert=devices)
    for body in (row_exchange.by_gather, row_exchange.ragged):
        send = functools.partial(body, capacity=rows, axis=meshes.EXPERT)
        run = jax.shard_map(
            lambda rows, counts, send=send: send(rows[0], counts)[None],
            mesh=mesh,
            in_specs=(P(meshes.EXPERT), P()),
            out_specs=P(meshes.EXPERT),
            check_vma=False,
        )
        np.testing.assert_array_equal(jax.jit(run)(sent, counts), expected)


@pytest.mark.parametrize(
    "tokens, change, expected",
    [
        (2048, {}, True),
        (64, {}, False),  # too few bytes
        (2048, {"groups": 1, "parts": 8}, False),
        (2048, {"shared": True}, False),  # the sum of the shared MLP is needed in any case
        (2048, {"shared": True, "groups": 64}, True),
    ],
)
def test_the_rule_compares_bytes(tokens, change, expected):
    sizes = {"top_k": 8, "groups": 8, "parts": 1, "shared": False} | change
    assert expert_exchange.moves_less(tokens, 2048, 2, **sizes) == expected
