"""Results of experts on different devices, joined: one sum of all rows, or only the rows computed.

Every device has all tokens, so no token travels to its experts. What travels are results: each
device has a row for each token that chose one of its experts, and zeros for all other tokens. A sum
over the devices moves the zeros too. An exchange sends each row to one device, which adds the rows
of its part of the tokens; then every device gets the sums.

Not here: the experts of a device (moe.py), the collectives (mesh.py, ops.send_rows).
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from slipway import mesh, ops

# How the results of experts are joined; auto: by ``moves_less``.
Exchange = Literal["auto", "sum", "all-to-all"]
# Fewer bytes are worth the latency of more collectives from here on. Not measured: the order of
# what the link of a TPU moves while a collective starts (100 GB/s, 10 microseconds).
MIN_BYTES_SAVED = 1 << 20
SUM_BYTES = 4  # of a number of a result, which is f32


def moves_less(
    num_tokens: int, size: int, itemsize: int, *, top_k: int, groups: int, parts: int, shared: bool
) -> bool:
    """Return whether an exchange of rows moves MIN_BYTES_SAVED fewer bytes of a device than a sum.

    ``size`` and ``itemsize``: numbers of a row, and bytes of one in the layer's result. ``groups``:
    devices with different experts; ``parts``: those that split one expert; ``shared``: whether
    there is a shared MLP. Bytes are those that one device sends in a layer, and a sum over n
    devices is a scatter and a gather of (n - 1) / n of the rows each.
    """
    rows = num_tokens * size

    def part(devices: int) -> float:
        return (devices - 1) / devices

    summed = 2 * SUM_BYTES * part(groups * parts)
    sent = SUM_BYTES * min(top_k, groups) / groups * part(groups)
    sent += shared * SUM_BYTES * part(groups)
    sent += 2 * SUM_BYTES / groups * part(parts) + itemsize * part(groups)
    return rows * (summed - sent) >= MIN_BYTES_SAVED


def by_sending(
    partial_TD: Any, shared_TD: Any, experts_TK: Any, *, num_local: int, num_tokens: Any, dtype: Any
) -> Any:
    """Join the results of experts by an exchange of rows: f32 [T, D] -> [T, D] of ``dtype``.

    ``partial_TD``: of this device's experts; ``shared_TD``: its part of the shared MLP, or None.
    ``num_local``: experts of each group of devices. T must be divisible by the number of groups.
    """
    (axis,) = mesh.split_over("experts")
    groups, me = lax.axis_size(axis), lax.axis_index(axis)
    num_rows, top_k = experts_TK.shape
    slice_rows = num_rows // groups
    # G: groups of devices with different experts; S: the tokens of which this one adds the rows.
    is_live = (jnp.arange(num_rows) < num_tokens)[:, None, None]
    of_group = experts_TK[..., None] // num_local == jnp.arange(groups)[None, None]
    has_row_TG = jnp.any(of_group & is_live, axis=1)
    counts_GG = jnp.sum(has_row_TG.reshape(groups, slice_rows, groups), axis=1).T.astype(jnp.int32)
    mine_R = jnp.nonzero(has_row_TG[:, me], size=num_rows, fill_value=0)[0]
    most = min(top_k, groups)
    rows_RD = ops.send_rows(partial_TD[mine_R], counts_GG, capacity=slice_rows * most, axis=axis)
    has_row_SG = lax.dynamic_slice_in_dim(has_row_TG, me * slice_rows, slice_rows)
    places_SG = jnp.cumsum(has_row_SG, axis=0) - 1
    received_G = jnp.sum(has_row_SG, axis=0)
    places_SG += (jnp.cumsum(received_G) - received_G)[None]
    # The groups of each token in their order, so that its sum does not depend on other tokens.
    order_SG = jnp.where(has_row_SG, groups - jnp.arange(groups)[None], 0)
    ranks_SM, groups_SM = lax.top_k(order_SG, most)
    sums_SD = jnp.zeros((slice_rows, partial_TD.shape[1]), partial_TD.dtype)
    for i in range(most):
        places_S = jnp.take_along_axis(places_SG, groups_SM[:, i : i + 1], axis=1)[:, 0]
        sums_SD += jnp.where(ranks_SM[:, i : i + 1] > 0, rows_RD[places_S], 0)
    if shared_TD is not None:
        sums_SD += lax.psum_scatter(shared_TD, axis, scatter_dimension=0, tiled=True)
    sums_SD = mesh.psum(sums_SD, "expert_mlp").astype(dtype)
    return lax.all_gather(sums_SD, axis, axis=0, tiled=True)
