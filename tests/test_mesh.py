"""The mesh: how it splits axes, and which declarations fit it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slipway import mesh
from slipway.errors import InvalidConfig
from slipway.tree import Param

BOTH = ("expert", "model")
SIZES = {"vocab": 10, "heads": 8, "kv_heads": 2, "head_dim": 4, "mlp": 12, "embed": 6}


def fitted(axes, tensor):
    return mesh.fit(Param(axes, SIZES), mesh.make_mesh(1, tensor))


@pytest.mark.parametrize("data, tensor", [(1, 1), (2, 4), (8, 1)])
def test_a_mesh_has_data_rows_of_tensor_devices(data, tensor):
    made = mesh.make_mesh(data, tensor)
    assert dict(made.shape) == {"data": data, "expert": 1, "model": tensor}
    assert len({*made.devices.flat}) == data * tensor


@pytest.mark.parametrize("data, tensor", [(9, 1), (3, 3), (1, 16)])
def test_more_devices_than_there_are_is_refused(data, tensor):
    with pytest.raises(InvalidConfig, match="at most 8 devices"):
        mesh.make_mesh(data, tensor)


@pytest.mark.parametrize(
    "axes, expected",
    [
        ("(heads head_dim) embed", P(BOTH, None)),
        ("embed (heads head_dim)", P(None, BOTH)),
        ("vocab embed", P(BOTH, None)),
        ("(kv_heads head_dim)", P(BOTH)),
        ("embed", P(None)),
        ("", P()),
    ],
)
def test_the_outermost_axis_of_a_group_says_how_it_is_split(axes, expected):
    assert mesh.partition(Param(axes, SIZES), mesh.make_mesh()) == expected


@pytest.mark.parametrize(
    "axes, tensor, shape",
    [
        ("vocab embed", 2, (10, 6)),
        ("vocab embed", 4, (12, 6)),
        ("vocab embed", 8, (16, 6)),
        ("(kv_heads head_dim) embed", 2, (8, 6)),
        ("(kv_heads head_dim) embed", 4, (16, 6)),
        ("(heads head_dim) embed", 8, (32, 6)),
        ("embed", 8, (6,)),
    ],
)
def test_vocabulary_is_padded_and_kv_heads_repeated(axes, tensor, shape):
    param = fitted(axes, tensor)
    assert param.shape == shape
    assert param.hf_shape == Param(axes, SIZES).hf_shape
    # raises where it does not divide
    mesh.shardings(param, mesh.make_mesh(1, tensor)).shard_shape(param.shape)


@pytest.mark.parametrize(
    "axes, tensor, axis",
    [
        ("(heads head_dim)", 3, "heads"),
        ("mlp embed", 5, "mlp"),
        ("(kv_heads head_dim)", 3, "kv_heads"),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_by_name(axes, tensor, axis):
    with pytest.raises(InvalidConfig, match=f"{SIZES[axis]} {axis}") as caught:
        fitted(axes, tensor)
    assert (caught.value.field, caught.value.got) == ("tensor_parallel_size", tensor)


@pytest.mark.parametrize("tensor", [1, 4])
def test_collectives_act_along_split_axes_alone(tensor):
    x = jnp.arange(16, dtype=jnp.float32).reshape(2, 8)

    def local(x):
        first = jnp.full((1, 1), mesh.local_offset("vocab", x.shape[1]), jnp.int32)
        return mesh.psum(x, "heads"), mesh.psum(x, "embed"), mesh.all_gather(x, "vocab"), first

    split = P(None, "model")
    specs = (P(), split, P(), split)
    run = jax.shard_map(
        local,
        mesh=mesh.make_mesh(1, tensor),
        in_specs=split,
        out_specs=specs,
        check_vma=False,
    )
    summed, same, gathered, first = run(x)
    np.testing.assert_array_equal(summed, x.reshape(2, tensor, 8 // tensor).sum(1))
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(gathered, x)
    np.testing.assert_array_equal(first[0], np.arange(tensor) * (8 // tensor))
