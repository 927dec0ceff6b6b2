"""Trees in memory: dotted names, wrapped leaves, random-number state."""

import flax.serialization
import h5py
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource, flatten
from slipway.errors import CheckpointError

X = np.arange(6, dtype=np.float32).reshape(2, 3)
ATTENTION = {"attn": {"query": X, "key": X + 1, "value": X + 2}, "critic": {"value": X + 3}}


def write_npz(directory):
    np.savez(
        directory / "tree.npz",
        **{f"{a}/{b}": x for a, leaves in ATTENTION.items() for b, x in leaves.items()},
    )
    return directory / "tree.npz"


def write_msgpack(directory):
    (directory / "tree.msgpack").write_bytes(flax.serialization.to_bytes(ATTENTION))
    return directory / "tree.msgpack"


def write_h5(directory):
    with h5py.File(directory / "tree.h5", "w") as file:
        for module, leaves in ATTENTION.items():
            for leaf, x in leaves.items():
                file[f"{module}/{leaf}"] = x
    return directory / "tree.h5"


def test_value_is_a_name_like_any_other_where_leaves_are_not_wrapped():
    flat = flatten(ATTENTION)
    assert set(flat) == {"attn.query", "attn.key", "attn.value", "critic.value"}
    assert flat["attn.value"][0, 0] == 2


@pytest.mark.parametrize("wrapper", ["value", "raw_value"])
def test_a_tree_that_wraps_every_leaf_loses_the_wrappers(wrapper):
    tree = {"attn": {"value": {"kernel": {wrapper: X}}, "bias": {wrapper: X}}, "step": np.int32(3)}
    assert set(flatten(tree)) == {"attn.value.kernel", "attn.bias", "step"}


def test_a_wrapped_state_may_lie_beside_plain_leaves():
    state = {f"layer{i}": {"kernel": {"value": X}, "bias": {"value": X}} for i in range(3)}
    flat = flatten({"model": state, "schedule": {"rate": np.float32(1)}})
    assert set(flat) == {
        f"model.layer{i}.{leaf}" for i in range(3) for leaf in ("kernel", "bias")
    } | {"schedule.rate"}


@pytest.mark.parametrize("write", [write_npz, write_msgpack, write_h5])
def test_archives_keep_a_leaf_that_is_called_value(tmp_path, write):
    source = open_source(write(tmp_path))
    assert set(source.specs) == {"attn.query", "attn.key", "attn.value", "critic.value"}
    with source.open("attn.value") as array:
        assert np.array_equal(array, X + 2)


def test_value_beside_raw_value_keeps_both():
    flat = flatten({"a": {"value": np.ones(2), "raw_value": np.zeros(2)}})
    assert {name: x[0] for name, x in flat.items()} == {"a.value": 1, "a.raw_value": 0}


def test_two_leaves_of_one_dotted_name_are_refused():
    with pytest.raises(CheckpointError, match=r"a\.b: a\.b and a/b have this name"):
        flatten({"a.b": X, "a": {"b": X}})


def test_an_orbax_tree_keeps_a_leaf_that_is_called_value(tmp_path):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "tree", ATTENTION)
    checkpointer.wait_until_finished()
    source = open_source(tmp_path / "tree")
    assert set(source.specs) == {"attn.query", "attn.key", "attn.value", "critic.value"}
    with source.open("attn.value") as array:
        assert np.array_equal(array, X + 2)


@pytest.mark.parametrize("pure", [False, True])
def test_random_number_state_is_no_array_of_a_source(pure):
    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    state = nnx.state(Net())
    specs = MemorySource(flatten(nnx.to_pure_dict(state) if pure else state)).specs
    assert "drop.rngs.key" not in specs
    assert {"fc.kernel", "fc.bias"} <= set(specs)
    # A pure dictionary holds a plain integer: only its name would show that it is a count.
    assert ("drop.rngs.count" in specs) == pure
