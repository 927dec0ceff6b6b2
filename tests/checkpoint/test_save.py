"""Saved checkpoints: equal to the loaded ones bit for bit.

The safetensors library and transformers accept the files.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slipway import tree
from slipway.checkpoint.files import DTYPES, INDEX, SINGLE, open_checkpoint
from slipway.checkpoint.save import hf_tensors, save
from slipway.checkpoint.shards import write_safetensors
from slipway.checkpoint.tensor_reader import load
from slipway.errors import CheckpointError
from slipway.mesh import fit, make_mesh

BF16 = np.dtype(ml_dtypes.bfloat16)


def same_bits(one: np.ndarray, two: np.ndarray) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())


@pytest.fixture
def source(tmp_path, tensors):
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": 10}')
    write_safetensors(directory / SINGLE, tensors)
    return open_checkpoint(directory)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("shard_size_bytes", [10**9, 200])
def test_saving_inverts_loading(declaration, tensors, source, tmp_path, tensor, shard_size_bytes):
    mesh = make_mesh(1, tensor)
    grown = fit(declaration, mesh)
    save(grown, load(grown, source, mesh, BF16), source.config, tmp_path / "copy", shard_size_bytes)
    copy = open_checkpoint(tmp_path / "copy")
    assert copy.config == source.config
    assert copy.tensors.keys() == tensors.keys()
    assert all(same_bits(copy.array(key), tensor) for key, tensor in tensors.items())


def test_shards_hold_what_fits_and_the_index_names_them(declaration, source, tmp_path):
    save(
        declaration,
        load(declaration, source, make_mesh(), BF16),
        {},
        tmp_path / "copy",
        shard_size_bytes=300,
    )
    index = json.loads((tmp_path / "copy" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "copy").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = [safetensors.numpy.load_file(tmp_path / "copy" / file) for file in files]
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in held]
    assert all(size <= 300 or len(tensors) == 1 for size, tensors in zip(sizes, held))
    assert index["metadata"]["total_size"] == sum(sizes)


def test_saving_again_leaves_no_file_of_the_former_checkpoint(declaration, source, tmp_path):
    directory = tmp_path / "copy"
    arrays = load(declaration, source, make_mesh(), BF16)
    (directory).mkdir()
    (directory / "tokenizer.json").touch()
    for shard_size_bytes in (300, 500, 10**9, 300, 10**9):
        save(declaration, arrays, {}, directory, shard_size_bytes)
        assert open_checkpoint(directory).tensors.keys() == source.tensors.keys()
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        SINGLE,
        "tokenizer.json",
    ]


def test_a_checkpoint_may_be_saved_over_the_one_in_use(declaration, tensors, source):
    arrays = load(declaration, source, make_mesh(), BF16)
    save(declaration, arrays, {}, source.directory)
    assert all(same_bits(x, tensors[key]) for key, x in hf_tensors(declaration, arrays))


def test_hf_tensors_takes_numpy_arrays_too(declaration, tensors):
    arrays = tree.map_params(lambda p: np.ones(p.shape, BF16), declaration)
    held = dict(hf_tensors(declaration, arrays))
    assert {key: x.shape for key, x in held.items()} == {key: x.shape for key, x in tensors.items()}


ARRAYS = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(np.uint8, hnp.array_shapes(min_dims=0, min_side=0, max_side=9)).map(
        lambda bits: (bits % 2).astype(dtype)
    )
)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"), ARRAYS, max_size=6
    )
)
def test_the_library_reads_what_we_write(tmp_path_factory, tensors):
    directory = tmp_path_factory.mktemp("any")
    (directory / "config.json").write_text("{}")
    write_safetensors(directory / SINGLE, tensors)
    theirs = dict(safetensors.deserialize((directory / SINGLE).read_bytes()))
    ours = open_checkpoint(directory)
    assert theirs.keys() == ours.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(ours.array(name), tensor)
        assert (tuple(theirs[name]["shape"]), bytes(theirs[name]["data"])) == (
            tensor.shape,
            tensor.tobytes(),
        )
    with safetensors.safe_open(directory / SINGLE, "np") as f:
        assert f.metadata() == {"format": "pt"}  # transformers refuses a file without it


@given(tensors=st.dictionaries(st.text("abc", min_size=1), ARRAYS, max_size=6))
def test_tensors_start_on_a_cache_line_where_sizes_allow_it(tmp_path_factory, tensors):
    directory = tmp_path_factory.mktemp("any")
    (directory / "config.json").write_text("{}")
    write_safetensors(directory / SINGLE, tensors)
    for tensor in open_checkpoint(directory).tensors.values():
        if (tensor.stop - tensor.start) % 64 == 0:
            assert tensor.start % 64 == 0
        assert tensor.start % DTYPES[tensor.dtype].itemsize == 0


def test_tensors_may_be_strided_and_put_in_any_order(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "x.safetensors", {"turned": x.T, "every": x[:, ::2]})
    held = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(held["turned"], x.T)
    np.testing.assert_array_equal(held["every"], x[:, ::2])


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="z: no safetensors dtype is complex64"):
        write_safetensors(tmp_path / "x.safetensors", {"z": np.zeros(2, np.complex64)})
    assert not list(tmp_path.iterdir())


class FullDisk(Exception):
    pass


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    class Failing(dict):
        def items(self):
            # The first pass plans the header; the second one writes.
            if self.pop("armed", None) is None:
                raise FullDisk
            return super().items()

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FullDisk):
        write_safetensors(path, Failing(armed=np.zeros(2, np.float32), x=np.zeros(2, np.float32)))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
