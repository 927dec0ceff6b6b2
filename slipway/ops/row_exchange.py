"""Rows sent between the devices of a mesh axis: bodies of ``ops.send_rows``.

Not here: which rows an expert layer sends (slipway/nn/expert_exchange.py).
"""

import jax.numpy as jnp
from jax import lax


def by_gather(rows_RD, counts_NN, *, capacity, axis):
    """Send all rows to all devices, and keep those that are meant for this one."""
    me = lax.axis_index(axis)
    rows_NRD = lax.all_gather(rows_RD, axis)
    ends_N = jnp.cumsum(counts_NN[:, me])
    places = jnp.arange(capacity)
    sources = jnp.minimum(jnp.searchsorted(ends_N, places, side="right"), len(ends_N) - 1)
    within = places - (ends_N - counts_NN[:, me])[sources]
    rows = rows_NRD[sources, _starts(counts_NN)[sources, me] + within]
    return jnp.where((places < ends_N[-1])[:, None], rows, 0)


def ragged(rows_RD, counts_NN, *, capacity, axis):
    """Send each device the rows that are meant for it, and no others."""
    me = lax.axis_index(axis)
    return lax.ragged_all_to_all(
        rows_RD,
        jnp.zeros((capacity, rows_RD.shape[1]), rows_RD.dtype),
        input_offsets=_starts(counts_NN)[me],
        send_sizes=counts_NN[me],
        output_offsets=_starts(counts_NN.T).T[me],
        recv_sizes=counts_NN[:, me],
        axis_name=axis,
    )


def _starts(counts_NN):
    """Return the place of the first row of each pair, among the rows of its first device."""
    return jnp.cumsum(counts_NN, axis=1) - counts_NN
