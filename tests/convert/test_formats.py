"""Every format that is read: the same model from each, by the format's own writer, and each torn.

tests/data/maxtext holds trees that MaxText made from the hf_* directories beside them.
"""

import shutil
from pathlib import Path

import h5py
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.traverse_util import unflatten_dict

from slipway import errors
from slipway.checkpoint import shards
from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource, flatten
from tests.convert.twins import MAXTEXT, assert_same, flax_tree, tensors

pytestmark = pytest.mark.host


def write(tree: dict, form: str, folder: Path) -> Path:
    """The tree in a file or directory of some format, by the format's own writer."""
    flat = flatten(tree)
    match form:
        case "npz":
            np.savez(folder / "t.npz", **flat)
            return folder / "t.npz"
        case "npz compressed":
            np.savez_compressed(folder / "t.npz", **{name.replace(".", "/"): x for name, x in flat.items()})
            return folder / "t.npz"
        case "msgpack":
            (folder / "t.msgpack").write_bytes(serialization.msgpack_serialize({"params": tree}))
            return folder / "t.msgpack"
        case "safetensors":
            shards.write_safetensors(folder / "t.safetensors", flat)
            return folder / "t.safetensors"
        case "orbax standard":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((folder / "t").absolute(), tree)
            return folder / "t"
        case "orbax without ocdbt":
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as checkpointer:
                checkpointer.save((folder / "t").absolute(), tree)
            return folder / "t"
        case "orbax zarr3":
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
                checkpointer.save((folder / "t").absolute(), {"params": tree})
            return folder / "t"
        case _:
            with ocp.CheckpointManager((folder / "t").absolute()) as manager:
                for step, factor in ((9, 0), (10, 1)):
                    scaled = {name: (x.astype(np.float32) * factor).astype(x.dtype) for name, x in flat.items()}
                    nested = unflatten_dict({tuple(name.split(".")): x for name, x in scaled.items()})
                    manager.save(step, args=ocp.args.StandardSave(nested))
            (folder / "t" / "11.orbax-checkpoint-tmp-1").mkdir()
            return folder / "t"


FORMS = [
    "npz", "npz compressed", "msgpack", "safetensors", "orbax standard", "orbax without ocdbt", "orbax zarr3",
    "orbax manager",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_format_holds_the_same_model(form, tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    source = open_source(write(tree, form, tmp_path))
    convert(source, tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


def test_flax_pieces_of_large_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1 << 12)
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    source = open_source(write(tree, "msgpack", tmp_path))
    convert(source, tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


def test_keras_weights(tmp_path):
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = kernel
        file.create_dataset("layers/dense/vars/1", data=bias, chunks=(5,), compression="gzip")
    (tmp_path / "m.yaml").write_text(
        "rules:\n  - [layers.dense.vars.0, fc.weight, into out -> out into]\n"
        "  - [layers.dense.vars.1, fc.bias, out -> out]\nconfig: {model_type: mine}\n"
    )
    convert(open_source(tmp_path / "m.weights.h5"), tmp_path / "out", ConvertConfig(mapping=str(tmp_path / "m.yaml")))
    assert_same(tensors(tmp_path / "out"), {"fc.weight": np.ascontiguousarray(kernel.T), "fc.bias": bias})


def test_orbax_metadata_that_is_no_json(tmp_path):
    shutil.copytree(MAXTEXT / "qwen3_scan_orbax", tmp_path / "torn")
    (tmp_path / "torn" / "0" / "items" / "_METADATA").write_text('{"tree_metadata"')
    with pytest.raises(errors.CheckpointError, match="_METADATA: not readable"):
        open_source(tmp_path / "torn")


@pytest.mark.parametrize("torn", ["truncated", "missing"])
def test_a_torn_orbax_store(torn, tmp_path):
    shutil.copytree(MAXTEXT / "qwen3_scan_orbax", tmp_path / "torn")
    for file in (tmp_path / "torn").rglob("d/*"):
        if torn == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(errors.CheckpointError):
        convert(open_source(tmp_path / "torn"), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["npz", "npz compressed", "msgpack", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_truncated_file(form, share, tmp_path):
    path = write(flax_tree("hf_qwen3", tmp_path / "flax"), form, tmp_path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(errors.CheckpointError):
        convert(open_source(path), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("item", ["model_params", "weights", "train_state", "ema_params"])
def test_a_steps_one_item_is_read_whatever_its_name(item, tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    with ocp.CheckpointManager((tmp_path / "t").absolute()) as manager:
        items = {item: ocp.args.PyTreeSave(tree), "optimizer_state": ocp.args.PyTreeSave({"m": np.ones(3)})}
        manager.save(1, args=ocp.args.Composite(**items))
    convert(open_source(tmp_path / "t"), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


def test_several_items_are_listed_and_one_is_taken_by_its_path(tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    with ocp.CheckpointManager((tmp_path / "t").absolute()) as manager:
        items = {name: ocp.args.PyTreeSave(tree) for name in ("actor", "critic")}
        manager.save(1, args=ocp.args.Composite(**items))
    with pytest.raises(errors.CheckpointError, match="actor, critic"):
        open_source(tmp_path / "t" / "1")
    source = open_source(tmp_path / "t" / "1" / "actor")
    convert(source, tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


@pytest.mark.parametrize("file", ["flax_model.msgpack", "model.npz"])
def test_a_directory_with_one_archive_whose_norms_are_called_weight(file, tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    flat = {"model." + name.replace("norm.scale", "norm.weight"): x for name, x in flatten(tree).items()}
    (tmp_path / "t").mkdir()
    if file == "model.npz":
        np.savez(tmp_path / "t" / file, **flat)
    else:
        nested = unflatten_dict({tuple(name.split(".")): x for name, x in flat.items()})
        (tmp_path / "t" / file).write_bytes(serialization.msgpack_serialize(nested))
    convert(open_source(tmp_path / "t"), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


@pytest.mark.parametrize("root", ["", "base.", "model."])
def test_random_number_state_in_a_maxtext_tree_is_left_out(root, tmp_path):
    source = open_source(MAXTEXT / "qwen3_scan_orbax")
    arrays = {}
    for name in source.specs:
        if name.startswith("params.params."):
            with source.open(name) as array:
                arrays[root + name.removeprefix("params.params.")] = np.array(array)
    for name in ("dropout.rngs.params.key", "layers.dropout.rngs.dropout.count", "dropout.rngs.aqt.key"):
        arrays[f"{root}decoder.{name}"] = np.zeros(2, np.uint32)
    convert(MemorySource(arrays), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))
