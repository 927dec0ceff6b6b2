"""Parts of tensors: fused rows and stacked matrices are read as parts and written as one tensor."""

import jax
import numpy as np
import pytest

from slipway import tree
from slipway.checkpoint import files, parts
from slipway.checkpoint.save import hf_tensors
from slipway.checkpoint.swap import ArrayCheckpoint
from slipway.errors import CheckpointError
from slipway.models.naming import Naming
from slipway.tree import Param, module, stack

pytestmark = pytest.mark.host
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 3, "embed": 5}


@module
class Attention:
    q_proj: Param
    k_proj: Param
    v_proj: Param
    o_proj: Param


@module
class Model:
    layers: tree.Stack


QUERIES, KEYS = (Param(f"({axis} head_dim) embed", SIZES) for axis in ("heads", "kv_heads"))
DECLARED = Model(
    stack(
        Attention(
            q_proj=QUERIES, k_proj=KEYS, v_proj=KEYS, o_proj=Param("embed (heads head_dim)", SIZES)
        ),
        2,
    )
)
NAMING = Naming(
    {"layers": "h", "o_proj": "dense"}, {"query_key_value": ("q_proj", "k_proj", "v_proj")}
)


def names(declaration):
    return [key for leaf in tree.leaves(declaration) for key in leaf.names()]


def write(directory, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, directory / files.SINGLE)
    return files.open_tensors(directory)


def test_fused_layers_are_named_by_their_rows():
    assert names(NAMING.apply(DECLARED)) == [
        *(f"h.{i}.query_key_value[0:12]" for i in range(2)),
        *(f"h.{i}.query_key_value[12:18]" for i in range(2)),
        *(f"h.{i}.query_key_value[18:24]" for i in range(2)),
        *(f"h.{i}.dense" for i in range(2)),
    ]


@pytest.mark.parametrize("form", [lambda declared: declared, tree.separate], ids=["stack", "apart"])
def test_names_do_not_depend_on_the_form_of_the_layers(form):
    assert sorted(names(form(NAMING.apply(DECLARED)))) == sorted(names(NAMING.apply(DECLARED)))


def fused(rng):
    shapes = {"query_key_value": (24, 5), "dense": (5, 12)}
    return {
        f"h.{i}.{name}": rng.normal(size=shape).astype(np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("kind", ["file", "arrays"])
def test_a_fused_tensor_is_split_and_joined(kind, tmp_path):
    tensors = fused(np.random.default_rng(0))
    checkpoint = write(tmp_path, tensors) if kind == "file" else ArrayCheckpoint.of(tensors)
    declared = NAMING.apply(DECLARED)
    held = parts.split(checkpoint, names(declared))
    whole = tensors["h.1.query_key_value"]
    for key, rows in (("0:12", slice(12)), ("12:18", slice(12, 18)), ("18:24", slice(18, 24))):
        name = f"h.1.query_key_value[{key}]"
        np.testing.assert_array_equal(held.array(name), whole[rows])
        assert held.tensors[name].shape == whole[rows].shape
        copied = np.empty_like(whole[rows])
        held.copy(name, copied)
        np.testing.assert_array_equal(copied, whole[rows])
    assert "h.1.query_key_value" not in held.tensors
    leaves = [
        np.stack([held.array(key).reshape(leaf.param.hf_shape) for key in leaf.keys.values()])
        for leaf in tree.leaves(declared)
    ]
    structure = jax.tree.structure(declared, is_leaf=tree.is_param)
    written = dict(hf_tensors(declared, jax.tree.unflatten(structure, leaves)))
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_rows_that_are_missing_or_left_over_are_refused(tmp_path):
    tensors = fused(np.random.default_rng(0))
    tensors["h.0.query_key_value"] = tensors["h.0.query_key_value"][:-1]
    tensors["h.1.query_key_value"] = np.zeros((25, 5), np.float32)
    with pytest.raises(CheckpointError) as caught:
        parts.split(write(tmp_path, tensors), names(NAMING.apply(DECLARED)))
    assert caught.value.problems == [
        "h.0.query_key_value: shape (23, 5) in the file, 24 rows declared",
        "h.1.query_key_value: shape (25, 5) in the file, 24 rows declared",
    ]


def test_one_of_several_matrices_and_rows_of_it(tmp_path):
    stacked = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    keys = [f"up[{e}][{rows}]" for e in range(3) for rows in ("0:1", "1:4")]
    held = parts.split(write(tmp_path, {"up": stacked}), keys)
    np.testing.assert_array_equal(held.array("up[2][1:4]"), stacked[2, 1:4])
    joined = parts.joined({key: held.array(key) for key in keys})
    np.testing.assert_array_equal(joined, stacked)
