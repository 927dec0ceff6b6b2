"""New weights from every kind of source: after the exchange equal to loading them, bit for bit.

Weights that do not fit change nothing.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slipway import mesh as meshes
from slipway import models, tree
from slipway.checkpoint import files, swap, tensor_reader
from slipway.checkpoint.save import hf_tensors
from slipway.checkpoint.shards import write_safetensors
from slipway.checkpoint.swap import Weights
from slipway.convert import weight_sources
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source
from slipway.errors import CheckpointError, InvalidRequest, WeightsLost

DATA = Path(__file__).parents[1] / "data" / "maxtext"


def weights(directory, data=1, tensor=1, stacked=False, dtype=np.float32, dummy=False):
    """Load a model's weights onto a mesh."""
    checkpoint = files.open_checkpoint(directory)
    declaration, mesh = models.declare(checkpoint.config), meshes.make_mesh(data, tensor)
    declaration = meshes.fit(declaration if stacked else tree.separate(declaration), mesh)
    if dummy:
        arrays = tensor_reader.dummy(declaration, mesh, dtype, seed=7)
    else:
        arrays = tensor_reader.load(declaration, checkpoint, mesh, dtype)
    return Weights(declaration, mesh, dtype, arrays, checkpoint.config, {}, ("*.inv_freq",))


def named(directory):
    """Return a directory's tensors in memory."""
    checkpoint = files.open_checkpoint(directory)
    return {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}


def exchange(target, source, version="1", mode="inplace", mapping=None):
    values = weight_sources.values(source, target, mapping)
    values.check(target, mode)
    target.replace(values, version, mode)


def assert_equal(one, other):
    assert one.version != "0" or other.version != "0", "something was exchanged"
    for leaf, a, b in zip(one.leaves, one.arrays, other.arrays, strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype, leaf.keys
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(leaf.keys))


@pytest.mark.parametrize("mode", ["inplace", "atomic"])
@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("stacked", [False, True])
def test_every_source_of_hf_names_gives_what_loading_gives(tiny, mode, tensor, stacked):
    loaded, arrays = weights(tiny, 1, tensor, stacked), named(tiny)
    whole = NamedSharding(meshes.make_mesh(2, 4), PartitionSpec())
    sources = {
        "directory": tiny,
        "text": str(tiny),
        "mapping": arrays,
        "pairs": list(arrays.items()),
        "an iterator": iter(arrays.items()),
        "on one device": {name: jnp.asarray(x) for name, x in arrays.items()},
        "on eight devices": {name: jax.device_put(x, whole) for name, x in arrays.items()},
        "in another dtype": {
            name: x.astype(np.float64).astype(np.float32) for name, x in arrays.items()
        },
    }
    target = weights(tiny, 1, tensor, stacked, dummy=True)
    for version, source in sources.items():
        exchange(target, {name: np.zeros_like(x) for name, x in arrays.items()}, "zeros", mode)
        assert not any(np.asarray(array).any() for array in target.arrays)
        exchange(target, source, version, mode)
        assert target.version == version
        assert_equal(target, loaded)


@pytest.mark.parametrize("stacked", [False, True])
def test_resharding_from_mesh_to_mesh_and_back(tiny, stacked):
    """KV heads are repeated for four devices, and the odd vocabulary padded; back undoes both."""
    before = None
    for data, tensor in [(1, 1), (1, 4), (2, 4), (1, 2), (1, 1)]:
        target = weights(tiny, data, tensor, stacked, dummy=True)
        source = weights(tiny, stacked=stacked) if before is None else before
        exchange(
            target, source if tensor != 2 else jax.tree.unflatten(_structure(source), source.arrays)
        )
        assert_equal(target, weights(tiny, data, tensor, stacked))
        source.delete()  # the caller's to free: nothing of it is used any more
        assert not any(array.is_deleted() for array in target.arrays)
        before = target


def _structure(of):
    return jax.tree.structure(of.declaration, is_leaf=tree.is_param)


@pytest.mark.parametrize("on_devices", [False, True])
@pytest.mark.parametrize(
    ("tree_of", "twin"),
    [
        ("qwen3_scan_orbax", "hf_qwen3"),
        ("qwen3_unscan_orbax", "hf_qwen3"),
        ("llama_scan_orbax", "hf_llama"),
    ],
)
def test_maxtext_trees_give_what_their_conversion_gives(tree_of, twin, on_devices):
    source = open_source(DATA / tree_of / "0" / "items")
    arrays = _arrays(source)
    if on_devices:
        everywhere = NamedSharding(meshes.make_mesh(1, 8), PartitionSpec())
        arrays = {name: jax.device_put(x, everywhere) for name, x in arrays.items()}
    loaded, target = weights(DATA / twin, 1, 2), weights(DATA / twin, 1, 2, dummy=True)
    exchange(target, _nested(arrays), mapping=None if on_devices else "maxtext")
    for leaf, a, b in zip(target.leaves, target.arrays, loaded.arrays, strict=True):
        # MaxText's Llama holds queries scaled by 1/sqrt(head_dim): docs/convert.md
        limit = 2**-22 if twin == "hf_llama" and "q_proj" in leaf.keys[()] else 0
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=limit, atol=0, err_msg=str(leaf.keys)
        )


def _arrays(source):
    """Return all arrays except the optimizer's state."""
    arrays = {}
    for name in source.specs:
        if not name.startswith("opt_state"):
            with source.open(name) as array:
                arrays[name] = np.array(array)
    return arrays


@pytest.mark.parametrize("mapping", [None, "maxtext", "maxtext-halves", "maxtext-interleaved"])
def test_maxtexts_default_rope_is_pushed_by_the_rule_of_its_conversion(mapping, tmp_path):
    source = open_source(DATA / "llama3_default_rope_orbax")
    given = json.loads((DATA / "llama3_default_rope_orbax" / "config.json").read_text())
    halves = mapping != "maxtext-interleaved"
    convert(
        source,
        tmp_path / "hf",
        ConvertConfig(mapping="maxtext-halves" if halves else mapping),
        given,
    )
    loaded, target = weights(tmp_path / "hf"), weights(tmp_path / "hf", dummy=True)
    exchange(target, _nested(_arrays(source)), mapping=mapping)
    assert_equal(loaded, target)


def test_a_rope_that_does_not_tell_maxtexts_rotation_is_asked_for(tmp_path):
    source = open_source(DATA / "llama3_default_rope_orbax")
    given = json.loads((DATA / "llama3_default_rope_orbax" / "config.json").read_text())
    yarn = {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    }
    convert(source, tmp_path / "hf", ConvertConfig(mapping="maxtext-halves"), given | yarn)
    target = weights(tmp_path / "hf", dummy=True)
    with pytest.raises(CheckpointError, match="maxtext-interleaved"):
        exchange(target, _nested(_arrays(source)))
    exchange(target, _nested(_arrays(source)), mapping="maxtext-halves")
    assert_equal(weights(tmp_path / "hf"), target)


def _nested(flat):
    nested = {}
    for name, value in flat.items():
        *folders, last = name.split(".")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    return nested


def test_a_scanned_stack_on_devices_is_transformed_by_one_program(monkeypatch):
    source, arrays, made = open_source(DATA / "qwen3_scan_orbax" / "0" / "items"), {}, []
    everywhere = NamedSharding(meshes.make_mesh(1, 8), PartitionSpec())
    for name in source.specs:
        with source.open(name) as array:
            arrays[name] = jax.device_put(np.array(array), everywhere)
    target = weights(DATA / "hf_qwen3", dummy=True)
    program = weight_sources.ConvertedCheckpoint.convert_together
    monkeypatch.setattr(
        weight_sources.ConvertedCheckpoint,
        "convert_together",
        lambda self, name, then: (made.append(name), program(self, name, then))[1],
    )
    values = weight_sources.values(arrays, target, "maxtext")
    values.check(target)
    checked = len(made)
    target.replace(values, "1", "inplace")
    families = {leaf.keys[()].replace(".0.", ".N.").replace(".1.", ".N.") for leaf in target.leaves}
    assert checked <= len(families)
    assert len(made) - checked <= len(families) < len(target.leaves)
    assert values.tensors.computed == {} and values.tensors.counts == {}, (
        "nothing of it stays on the devices"
    )


def test_an_nnx_module_is_a_source():
    from flax import nnx

    from training.export import model_json
    from training.model import Model, ModelConfig

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        shape = ModelConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16
        )
        one, two = (Model(shape, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    config = model_json(shape)
    declaration, mesh = tree.separate(models.declare(config)), meshes.make_mesh()
    target = Weights(
        declaration, mesh, np.float32, tensor_reader.dummy(declaration, mesh, np.float32), config
    )
    for version, module in (("1", one), ("2", two)):
        exchange(target, module, version)
        held = {
            key: x for leaf, x in zip(target.leaves, target.arrays) for key in leaf.keys.values()
        }
        kernel = np.asarray(module.layers[1].mlp.up_proj.kernel[...])
        np.testing.assert_array_equal(
            np.asarray(held["model.layers.1.mlp.up_proj.weight"]), kernel.T
        )


def test_all_that_does_not_fit_is_one_error_and_changes_nothing(tiny):
    target, arrays = weights(tiny), named(tiny)
    before = [np.array(array) for array in target.arrays]
    wrong = dict(arrays)
    del wrong["model.norm.weight"]
    wrong["model.layers.0.mlp.up_proj.weight"] = arrays[
        "model.layers.0.mlp.up_proj.weight"
    ].T.copy()
    wrong["model.layers.1.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"].astype(
        np.int32
    )
    wrong["lm_head.weight"] = arrays["lm_head.weight"].copy()
    wrong["lm_head.weight"][3, 5] = np.nan
    wrong["extra"] = np.zeros(3, np.float32)
    for source in (wrong, {name: jax.device_put(x, jax.devices()[3]) for name, x in wrong.items()}):
        with pytest.raises(CheckpointError) as error:
            exchange(target, source)
        assert len(error.value.problems) == 5
        for part in (
            "norm.weight: missing",
            "0.mlp.up_proj.weight: shape",
            "1.mlp.up_proj.weight: dtype",
            "extra",
        ):
            assert part in str(error.value)
        assert "lm_head.weight: 1 values are not finite" in str(error.value)
    sharded = NamedSharding(meshes.make_mesh(1, 8), PartitionSpec())
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight: 1 values are not finite as float32"
    ):
        exchange(target, {name: jax.device_put(x, sharded) for name, x in wrong.items()})
    assert target.version == "0"
    assert target.whole
    for array, held in zip(target.arrays, before):
        np.testing.assert_array_equal(np.asarray(array), held)


def test_numbers_that_are_not_finite_roll_back_what_is_made_beside(tiny):
    """The numbers are checked while they are copied; the error is that of the check before."""
    target, arrays = weights(tiny), named(tiny)
    exchange(target, arrays, "1", "atomic")
    wrong = {name: x.copy() for name, x in arrays.items()}
    wrong["model.norm.weight"][3], wrong["lm_head.weight"][2, 1] = np.inf, np.nan
    half = {name: x.astype(np.float64).astype(np.float32) for name, x in wrong.items()}
    for source in (wrong, half, {name: x.astype(np.float16) for name, x in wrong.items()}):
        with pytest.raises(CheckpointError) as error:
            exchange(target, source, "2", "atomic")
        assert len(error.value.problems) == 2
        assert "at (2, 1)" in str(error.value)
        assert target.version == "1"
        assert target.whole
        assert_equal(target, weights(tiny))


def test_arrays_made_beside_go_to_the_memory_of_those_before(tiny):
    target, arrays = weights(tiny), named(tiny)
    places = []
    for version in range(6):
        exchange(
            target,
            {name: x + np.float32(version) for name, x in arrays.items()},
            str(version),
            "atomic",
        )
        places.append([array.unsafe_buffer_pointer() for array in target.arrays])
        assert np.array_equal(
            np.asarray(target.arrays[0]), arrays["model.embed_tokens.weight"] + np.float32(version)
        )
    assert places[0] == places[2] == places[4]
    assert places[1] == places[3] == places[5]
    assert not set(places[0]) & set(places[1])


@pytest.mark.parametrize("source", [3, [1, 2], {}, [("a", 1, 2)], None], ids=repr)
def test_what_is_no_source_is_refused(tiny, source):
    with pytest.raises(InvalidRequest, match="source"):
        exchange(weights(tiny), source)


def test_other_refusals(tiny, tmp_path):
    target = weights(tiny)
    with pytest.raises(CheckpointError, match="more than once"):
        exchange(target, [("a", np.zeros(2)), ("a", np.zeros(2))])
    with pytest.raises(CheckpointError, match=r"lm_head.weight: list, expected"):
        exchange(target, [("lm_head.weight", [1.0])])
    with pytest.raises(CheckpointError, match="no such directory"):
        exchange(target, "./not-there")
    with pytest.raises(InvalidRequest, match="mapping"):
        exchange(target, tiny, mapping="maxtext")
    with pytest.raises(CheckpointError, match="no rule"):
        exchange(target, {"some": {"tree": np.zeros((2, 3), np.float32)}})
    other = weights(tiny)
    other.arrays[0] = jnp.zeros((5, 5))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: shape \(5, 5\)"):
        exchange(target, other)
    assert target.version == "0"


def test_a_directory_of_another_model_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "other")
    config = (tmp_path / "other" / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(
        config.replace("{", '{"rope_theta": 12345.0,', 1)
    )
    with pytest.raises(CheckpointError, match=r"rope_theta: got 12345.0, expected"):
        exchange(weights(tiny), tmp_path / "other")


class _Fails:
    """Values with one leaf that raises an error."""

    def __init__(self, values, at):
        self._values = values
        self._at = at

    def check(self, target, mode="inplace"):
        self._values.check(target, mode)

    def array(self, target, at, memory, faults):
        if at == self._at:
            raise OSError("the disk is gone")
        return self._values.array(target, at, memory, faults)


def test_a_failure_half_way_rolls_back_or_says_so(tiny):
    target, arrays = weights(tiny), named(tiny)
    exchange(target, arrays)
    before = [np.array(array) for array in target.arrays]
    zeros = weight_sources.values({name: np.zeros_like(x) for name, x in arrays.items()}, target)
    with pytest.raises(OSError, match="disk"):
        target.replace(_Fails(zeros, 5), "2", "atomic")
    assert target.whole
    assert target.version == "1"
    for array, held in zip(target.arrays, before):
        np.testing.assert_array_equal(np.asarray(array), held)
    with pytest.raises(WeightsLost, match="disk"):
        target.replace(_Fails(zeros, 5), "2", "inplace")
    assert not target.whole
    exchange(target, arrays, "3")
    assert target.whole
    assert_equal(target, weights(tiny))


def test_what_a_failure_leaves_beside_is_never_served(tiny):
    """Arrays from devices replace spare blocks; after a later error neither is used again."""
    target, arrays = weights(tiny), named(tiny)
    for version in ("1", "2"):
        exchange(target, arrays, version, "atomic")
    everywhere = NamedSharding(meshes.make_mesh(2, 4), PartitionSpec())
    on_devices = weight_sources.values(
        {name: jax.device_put(x * 2, everywhere) for name, x in arrays.items()}, target
    )
    for source in (
        on_devices,
        weight_sources.values({name: x * 3 for name, x in arrays.items()}, target),
    ):
        with pytest.raises(OSError, match="disk"):
            target.replace(_Fails(source, 20), "3", "atomic")
    for version in ("4", "5", "6"):
        more = {name: x + np.float32(version) for name, x in arrays.items()}
        exchange(target, more, version, "atomic")
        back = dict(
            hf_tensors(target.declaration, jax.tree.unflatten(_structure(target), target.arrays))
        )
        assert all(np.array_equal(back[name], x) for name, x in more.items())


def test_the_memory_of_the_old_arrays_holds_the_new_ones(tiny):
    """On a CPU an exchange in place takes no memory.

    The first one leaves the file's mapping, later ones stay.
    """
    target, arrays = weights(tiny), named(tiny)
    exchange(target, arrays)
    places = [array.unsafe_buffer_pointer() for array in target.arrays]
    sources = {x.ctypes.data for x in arrays.values()}
    for version in range(5):
        exchange(
            target, {name: x + np.float32(version) for name, x in arrays.items()}, str(version)
        )
        assert [array.unsafe_buffer_pointer() for array in target.arrays] == places
    assert not sources & set(places), "the caller's arrays stay the caller's"


def test_the_callers_arrays_and_files_may_change_afterwards(tiny, tmp_path):
    loaded, arrays = weights(tiny), named(tiny)
    target = weights(tiny, dummy=True)
    exchange(target, arrays)
    for x in arrays.values():
        x[...] = -1
    assert_equal(target, loaded)
    held = {name: jnp.asarray(x) for name, x in named(tiny).items()}
    exchange(target, held)
    for x in held.values():
        x.delete()
    assert_equal(target, loaded)
    shutil.copytree(tiny, tmp_path / "copy")
    exchange(target, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    with file.open("r+b") as f:  # in place, as no careful writer does
        f.seek(file.stat().st_size // 2)
        f.write(b"\xff" * (file.stat().st_size // 2))
    assert_equal(target, loaded)
    write_safetensors(file, {})
    assert_equal(target, loaded)


def test_tensors_of_a_bare_directory_are_taken_by_name(tiny, tmp_path):
    shutil.copy(tiny / "model.safetensors", tmp_path)
    target = weights(tiny, dummy=True)
    exchange(target, tmp_path)
    assert_equal(target, weights(tiny))


def test_a_tensor_written_back_is_the_tensor_that_came(tiny):
    target, arrays = weights(tiny, 1, 4, dummy=True), named(tiny)
    exchange(target, arrays)
    back = dict(
        hf_tensors(target.declaration, jax.tree.unflatten(_structure(target), target.arrays))
    )
    assert back.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(back[name], x)


def test_arrays_that_leave_the_devices_come_back(tiny):
    target, loaded = weights(tiny, 1, 2), weights(tiny, 1, 2)
    kept = target.to_host()
    target.delete()
    target.from_host(kept)
    target.version = "back"
    assert_equal(target, loaded)


def test_unknown_dtypes_are_refused():
    with pytest.raises(CheckpointError, match="complex64, not a safetensors one"):
        swap.ArrayCheckpoint.of({"a": np.zeros(2, np.complex64)})
