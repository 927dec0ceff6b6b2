"""Directories of safetensors: valid ones open as views of their files.

Every fault is named, all of them in one error.
"""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from slipway.checkpoint.files import (
    DTYPES,
    INDEX,
    MAX_HEADER_BYTES,
    SINGLE,
    open_checkpoint,
    open_tensors,
    open_without_weights,
)
from slipway.convert.formats import open_source
from slipway.errors import CheckpointError

pytestmark = pytest.mark.host


def write_raw(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    """Write a file of these bytes, however wrong.

    ``length``: the header's length that the file states.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(start: int, stop: int, shape=None, dtype="F32") -> dict:
    """Return a header entry; by default of a vector of floats that fits its place."""
    return {
        "dtype": dtype,
        "shape": [(stop - start) // 4] if shape is None else shape,
        "data_offsets": [start, stop],
    }


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    return tmp_path


def problems(directory) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    return caught.value.problems


def index(directory, weight_map) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_what_the_library_writes(directory):
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 2, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16)}
    safetensors.numpy.save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.generation_config == {}
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.array(name).dtype == tensor.dtype
        np.testing.assert_array_equal(checkpoint.array(name), tensor)


def test_arrays_are_read_only_views_that_outlive_the_checkpoint(directory):
    x = np.arange(100_000, dtype=np.float32)
    safetensors.numpy.save_file({"x": x}, directory / SINGLE)
    checkpoint = open_checkpoint(directory)
    one, two = checkpoint.array("x"), checkpoint.array("x")
    assert np.shares_memory(one, two)
    assert not one.flags.writeable
    checkpoint.drop("x")
    del checkpoint, two
    gc.collect()
    np.testing.assert_array_equal(one, x)


def test_shards_are_joined_by_their_index(directory):
    safetensors.numpy.save_file(
        {"a": np.ones(3, np.float32)}, directory / "model-00001-of-00002.safetensors"
    )
    safetensors.numpy.save_file(
        {"b": np.zeros(2, np.float32)}, directory / "model-00002-of-00002.safetensors"
    )
    index(
        directory,
        {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    )
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    checkpoint = open_checkpoint(directory)
    assert checkpoint.array("a").tolist() == [1, 1, 1]
    assert checkpoint.array("b").tolist() == [0, 0]
    assert checkpoint.generation_config == {"eos_token_id": 7}


def test_no_directory(tmp_path):
    (tmp_path / "file").touch()
    assert problems(tmp_path / "absent") == ["no such directory"]
    assert problems(tmp_path / "file") == ["not a directory"]


def test_every_problem_of_a_directory_at_once(tmp_path):
    (tmp_path / "generation_config.json").write_text("[]")
    (tmp_path / "pytorch_model.bin").touch()
    config, generation, weights = problems(tmp_path)
    assert config == "config.json: missing"
    assert generation == "generation_config.json: got list, expected a JSON object"
    assert "only pickles, which are never loaded: pytorch_model.bin" in weights


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_config_that_is_no_object(directory, text):
    write_raw(directory / SINGLE, {}, b"")
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    (problem,) = problems(directory)
    assert problem.startswith("config.json: ")


def test_a_single_file_has_one_name(directory):
    write_raw(directory / "weights.safetensors", {}, b"")
    (problem,) = problems(directory)
    assert "weights.safetensors cannot be used without an index" in problem


FILES = {
    "shorter than its length field": (b"", b"", 0, ""),
    "header longer than the file": (
        {"a": entry(0, 8)},
        bytes(8),
        10**6,
        "claims a header of 1000000 bytes",
    ),
    "header over the limit": ({}, b"", MAX_HEADER_BYTES + 1, "claims a header"),
    "header not JSON": (b"{nonsense", b"", None, "not readable as JSON"),
    "header not text": (b"\xff\xfe\xfd", b"", None, "not readable as JSON"),
    "header not an object": ([1], b"", None, "header is list"),
    "a name twice": (b'{"a": 1, "a": 1}', b"", None, "'a' occurs twice"),
    "entry not an object": ({"a": 3}, b"", None, "a: expected dtype, shape and data_offsets"),
    "entry lacks a field": (
        {"a": {"dtype": "F32", "shape": []}},
        b"",
        None,
        "a: expected dtype, shape and",
    ),
    "unknown dtype": ({"a": entry(0, 8, dtype="F31")}, bytes(8), None, "dtype 'F31'"),
    "dtype not a string": ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), None, "dtype ['F32']"),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, bytes(8), None, "shape [-1, -2]"),
    "fractional shape": ({"a": entry(0, 8, [2.0])}, bytes(8), None, "shape [2.0]"),
    "boolean shape": ({"a": entry(0, 4, [True])}, bytes(4), None, "shape [True]"),
    "offsets reversed": ({"a": entry(8, 0, [2])}, bytes(8), None, "data_offsets [8, 0]"),
    "offsets negative": ({"a": entry(-8, 0, [2])}, bytes(8), None, "data_offsets [-8, 0]"),
    "size and shape differ": (
        {"a": entry(0, 8, [3])},
        bytes(8),
        None,
        "8 bytes, but F32 of shape (3,) takes 12",
    ),
    "truncated": ({"a": entry(0, 8)}, bytes(7), None, "ends at byte 8 of 7"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None, "b overlaps a by 4 bytes"),
    "nested": ({"a": entry(0, 12), "b": entry(4, 8)}, bytes(12), None, "b overlaps a by 8 bytes"),
    "hole in front": (
        {"a": entry(4, 8)},
        bytes(8),
        None,
        "a hole of 4 bytes between the header and a",
    ),
    "hole": (
        {"a": entry(0, 4), "b": entry(8, 12)},
        bytes(12),
        None,
        "a hole of 4 bytes between a and b",
    ),
    "trailing bytes": ({"a": entry(0, 8)}, bytes(9), None, "1 trailing bytes"),
}


@pytest.mark.parametrize("header, data, length, expected", FILES.values(), ids=FILES.keys())
def test_unsound_file(directory, header, data, length, expected):
    write_raw(directory / SINGLE, header, data, length)
    if not expected:
        (directory / SINGLE).write_bytes(b"1234567")
        expected = "truncated"
    (problem,) = problems(directory)
    assert problem.startswith(f"{SINGLE}: ")
    assert expected in problem


def test_every_problem_of_a_file_at_once(directory):
    header = {"a": entry(0, 8, dtype="F31"), "b": entry(0, 8, [-2]), "c": entry(0, 99)}
    write_raw(directory / SINGLE, header, bytes(8))
    assert [problem.split(": ")[1] for problem in problems(directory)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/x.safetensors", "..", "a\\b.safetensors", "model.bin"]
)
def test_index_stays_in_its_directory(directory, name):
    index(directory, {"a": name})
    (problem,) = problems(directory)
    assert repr(name) in problem
    assert "refused" in problem


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": ["x"]}])
def test_index_maps_names_to_files(directory, weight_map):
    index(directory, weight_map)
    (problem,) = problems(directory)
    assert "weight_map must map" in problem


def test_every_disagreement_of_index_and_shards_at_once(directory):
    write_raw(
        directory / "1.safetensors",
        {"a": entry(0, 4), "twice": entry(4, 8), "extra": entry(8, 12)},
        bytes(12),
    )
    write_raw(directory / "2.safetensors", {"twice": entry(0, 4)}, bytes(4))
    index(
        directory,
        {
            "a": "1.safetensors",
            "twice": "1.safetensors",
            "lost": "2.safetensors",
            "gone": "3.safetensors",
        },
    )
    assert problems(directory) == [
        "1.safetensors: holds extra, which the index does not name",
        f"{INDEX}: places lost in 2.safetensors, which does not hold it",
        "2.safetensors: holds twice, which the index places in 1.safetensors",
        "3.safetensors: missing, though the index names it",
    ]


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize(
    "opened", [open_checkpoint, open_tensors, open_without_weights, open_source]
)
def test_an_adapter_given_as_a_model(tmp_path, weights, opened):
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {"base_model.model.x.lora_A.weight": np.ones((1, 1), np.float32)}, tmp_path / weights
    )
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path)
    [problem] = caught.value.problems
    assert "LORA adapter of the model org/base" in problem
    assert f"--merge-lora {tmp_path}" in problem


def test_a_model_beside_an_adapter_is_a_model(directory):
    (directory / "adapter_config.json").write_text("{}")
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, directory / SINGLE)
    assert open_checkpoint(directory).tensors.keys() == {"a"}


def test_index_and_shards_may_differ_in_what_follows_from_the_config(directory):
    inert = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {"a": np.ones(1, np.float32), inert: np.ones(1, np.float32)}
    safetensors.numpy.save_file(tensors, directory / "1.safetensors")
    safetensors.numpy.save_file({"b": np.ones(1, np.float32)}, directory / "2.safetensors")
    other = inert.replace("0", "1")
    index(directory, {"a": "1.safetensors", "b": "2.safetensors", other: "2.safetensors"})
    assert open_checkpoint(directory).tensors.keys() == {"a", "b", inert}
