"""Every format that can be read: the same model from each, written by the format's own writer.

Torn files are also read. tests/data/maxtext holds trees that MaxText made from the hf_* directories
beside them.
"""

import json
import shutil
from pathlib import Path

import h5py
import msgpack
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


def write_flax(flat: dict, form: str, path: Path) -> Path:
    """Write a tree as Flax, transformers' Flax classes or EasyLM do."""

    def scaled(factor):
        return nested({name: x * x.dtype.type(factor) for name, x in flat.items()})

    match form:
        case "pairs":
            pairs = [
                (("params", *name.split(".")), serialization.to_bytes(x))
                for name, x in flat.items()
            ]
            path.write_bytes(b"".join(map(msgpack.packb, pairs)))
        case "pairs of paths":
            pairs = [
                (name.replace(".", "/"), serialization.to_bytes(x)) for name, x in flat.items()
            ]
            path.write_bytes(b"".join(map(msgpack.packb, pairs)))
        case "numbered files":
            path.mkdir()
            for step, factor in ((9, 0), (10, 1)):
                held = {
                    "params": scaled(factor),
                    "step": step,
                    "epoch": np.int32(2),
                    "rate": np.float32(0.5),
                }
                (path / f"checkpoint_{step}").write_bytes(serialization.msgpack_serialize(held))
        case "numbered aggregates":
            for step, factor in ((9, 0), (10, 1)):
                (path / f"checkpoint_{step}").mkdir(parents=True)
                file = path / f"checkpoint_{step}" / "checkpoint"
                file.write_bytes(
                    serialization.msgpack_serialize({"params": scaled(factor), "step": step})
                )
        case "aggregate beside arrays":
            large = {name: x for name, x in flat.items() if x.ndim > 1}
            with ocp.Checkpointer(
                ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
            ) as checkpointer:
                checkpointer.save(
                    path.absolute(), {f"params.{name}": x for name, x in large.items()}
                )
            (path / "_METADATA").unlink()
            named = {
                name: f"PLACEHOLDER://params.{name}" if name in large else x
                for name, x in flat.items()
            }
            (path / "checkpoint").write_bytes(
                serialization.msgpack_serialize({"params": nested(named)})
            )
        case "shards":
            write_shards(flat, path)
    return path


def write_shards(flat: dict, path: Path) -> None:
    """Write shards and index as transformers' Flax classes do."""
    path.mkdir()
    files = {name: f"flax_model-{i % 2 + 1:05d}-of-00002.msgpack" for i, name in enumerate(flat)}
    for file in set(files.values()):
        part = {name: x for name, x in flat.items() if files[name] == file}
        (path / file).write_bytes(serialization.to_bytes(nested(part)))
    weight_map = {name.replace(".", "/"): file for name, file in files.items()}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "flax_model.msgpack.index.json").write_text(json.dumps(index))


def nested(arrays: dict) -> dict:
    """Return nested dictionaries of arrays with dotted names."""
    return unflatten_dict({tuple(name.split(".")): x for name, x in arrays.items()})


def write(tree: dict, form: str, folder: Path) -> Path:
    """Write a tree to a file or directory in some format, by the format's own writer."""
    flat = flatten(tree)
    match form:
        case "npz":
            np.savez(folder / "t.npz", **flat)
            return folder / "t.npz"
        case "npz compressed":
            np.savez_compressed(
                folder / "t.npz", **{name.replace(".", "/"): x for name, x in flat.items()}
            )
            return folder / "t.npz"
        case "msgpack":
            (folder / "t.msgpack").write_bytes(serialization.msgpack_serialize({"params": tree}))
            return folder / "t.msgpack"
        case "safetensors":
            shards.write_safetensors(folder / "t.safetensors", flat)
            return folder / "t.safetensors"
        case _ if form.startswith("orbax"):
            return write_orbax(tree, form, folder / "t")
        case _:
            return write_flax(flat, form, folder / "t")


def write_orbax(tree: dict, form: str, path: Path) -> Path:
    """Write a tree by Orbax's own handlers."""
    match form:
        case "orbax scalars":
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                held = {
                    "params": tree,
                    "epoch": np.int32(3),
                    "rate": 0.5,
                    "step": 7,
                    "best": {"loss": np.float32(1.5)},
                }
                checkpointer.save(path.absolute(), held)
        case "orbax standard":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path.absolute(), tree)
        case "orbax without ocdbt":
            with ocp.Checkpointer(
                ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)
            ) as checkpointer:
                checkpointer.save(path.absolute(), tree)
        case "orbax zarr3":
            with ocp.Checkpointer(
                ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
            ) as checkpointer:
                checkpointer.save(path.absolute(), {"params": tree})
        case _:
            with ocp.CheckpointManager(path.absolute()) as manager:
                for step, factor in ((9, 0), (10, 1)):
                    scaled = {
                        name: (x.astype(np.float32) * factor).astype(x.dtype)
                        for name, x in flatten(tree).items()
                    }
                    manager.save(step, args=ocp.args.StandardSave(nested(scaled)))
            (path / "11.orbax-checkpoint-tmp-1").mkdir()
    return path


FORMS = [
    "npz",
    "npz compressed",
    "msgpack",
    "safetensors",
    "orbax standard",
    "orbax without ocdbt",
    "orbax zarr3",
    "orbax manager",
    "orbax scalars",
    "pairs",
    "pairs of paths",
    "numbered files",
    "numbered aggregates",
    "aggregate beside arrays",
    "shards",
]


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
    kernel, bias = (
        rng.standard_normal((3, 5)).astype(np.float32),
        rng.standard_normal(5).astype(np.float32),
    )
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = kernel
        file.create_dataset("layers/dense/vars/1", data=bias, chunks=(5,), compression="gzip")
    (tmp_path / "m.yaml").write_text(
        "rules:\n  - [layers.dense.vars.0, fc.weight, into out -> out into]\n"
        "  - [layers.dense.vars.1, fc.bias, out -> out]\nconfig: {model_type: mine}\n"
    )
    convert(
        open_source(tmp_path / "m.weights.h5"),
        tmp_path / "out",
        ConvertConfig(mapping=str(tmp_path / "m.yaml")),
    )
    assert_same(
        tensors(tmp_path / "out"), {"fc.weight": np.ascontiguousarray(kernel.T), "fc.bias": bias}
    )


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
        convert(
            open_source(tmp_path / "torn"),
            tmp_path / "out",
            ConvertConfig(config=MAXTEXT / "hf_qwen3"),
        )
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
        items = {
            item: ocp.args.PyTreeSave(tree),
            "optimizer_state": ocp.args.PyTreeSave({"m": np.ones(3)}),
        }
        manager.save(1, args=ocp.args.Composite(**items))
    convert(
        open_source(tmp_path / "t"), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3")
    )
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
    flat = {
        "model." + name.replace("norm.scale", "norm.weight"): x for name, x in flatten(tree).items()
    }
    (tmp_path / "t").mkdir()
    if file == "model.npz":
        np.savez(tmp_path / "t" / file, **flat)
    else:
        nested = unflatten_dict({tuple(name.split(".")): x for name, x in flat.items()})
        (tmp_path / "t" / file).write_bytes(serialization.msgpack_serialize(nested))
    convert(
        open_source(tmp_path / "t"), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3")
    )
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


@pytest.mark.parametrize("root", ["", "base.", "model."])
def test_random_number_state_in_a_maxtext_tree_is_left_out(root, tmp_path):
    source = open_source(MAXTEXT / "qwen3_scan_orbax")
    arrays = {}
    for name in source.specs:
        if name.startswith("params.params."):
            with source.open(name) as array:
                arrays[root + name.removeprefix("params.params.")] = np.array(array)
    for name in (
        "dropout.rngs.params.key",
        "layers.dropout.rngs.dropout.count",
        "dropout.rngs.aqt.key",
    ):
        arrays[f"{root}decoder.{name}"] = np.zeros(2, np.uint32)
    convert(MemorySource(arrays), tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3"))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))


PAIR = msgpack.packb((["a"], serialization.to_bytes(np.ones(2))))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (msgpack.packb((["a"], b"")), "not Flax msgpack"),
        (PAIR * 2, "named twice"),
        (
            msgpack.packb((["a"], serialization.to_bytes(np.ones(2)) + b"\x01")),
            "more than one array",
        ),
        (msgpack.packb((["a"], "text")), "no bytes"),
        (PAIR + msgpack.packb(7), "no pair"),
        (PAIR[:-3], "not Flax msgpack"),
    ],
    ids=["empty", "twice", "longer", "text", "no pair", "torn"],
)
def test_a_stream_that_is_torn(content, told, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(errors.CheckpointError, match=told):
        open_source(tmp_path / "t")


def test_parts_that_are_missing_are_named(tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    for form in ("aggregate beside arrays", "shards"):
        folder = tmp_path / form
        folder.mkdir()
        path = write(tree, form, folder)
        if form == "shards":
            (path / "flax_model-00002-of-00002.msgpack").unlink()
            told = "flax_model-00002-of-00002.msgpack: missing"
        else:
            with pytest.raises(
                errors.CheckpointError, match="beside this file: give the directory"
            ):
                open_source(path / "checkpoint")
            shutil.rmtree(path / "params.embed_tokens.embedding")
            told = r"params\.embed_tokens\.embedding: checkpoint names it"
        with pytest.raises(errors.CheckpointError, match=told):
            open_source(path)


def test_shards_and_their_index_hold_the_same_names(tmp_path):
    path = write(flax_tree("hf_qwen3", tmp_path / "flax"), "shards", tmp_path)
    index = json.loads((path / "flax_model.msgpack.index.json").read_text())
    name, file = index["weight_map"].popitem()
    (path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.CheckpointError, match=f"{name.replace('/', '.')}: in a shard"):
        open_source(path)
    index["weight_map"] |= {name: file, "more/kernel": file}
    (path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.CheckpointError, match=r"more\.kernel: .* no shard holds it"):
        open_source(path)
