"""Loading on 1, 2 and 4 devices, without needless copies.

Every mismatch of a checkpoint is in one error.
"""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from slipway import tree
from slipway.checkpoint.files import SINGLE, open_checkpoint
from slipway.checkpoint.shards import write_safetensors
from slipway.checkpoint.tensor_reader import DUMMY_STD, check, dummy, load
from slipway.errors import CheckpointError
from slipway.mesh import fit, make_mesh
from slipway.tree import Chain, Param, module, separate, stack

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def put(tmp_path):
    """Function that writes tensors as a checkpoint and opens it."""

    def write(tensors):
        (tmp_path / "config.json").write_text("{}")
        write_safetensors(tmp_path / SINGLE, tensors)
        return open_checkpoint(tmp_path)

    return write


def host(array) -> np.ndarray:
    """Return the whole array, from the devices' parts, which must agree where they overlap."""
    out, seen = np.zeros(array.shape, array.dtype), np.zeros(array.shape, bool)
    for shard in array.addressable_shards:
        part, known = np.asarray(shard.data), seen[shard.index]
        np.testing.assert_array_equal(out[shard.index][known], part[known])
        out[shard.index], seen[shard.index] = part, True
    assert seen.all()
    return out


def expected(tensors, tp: int):
    """Return the expected value of each leaf, written out without slipway.tree."""
    t, repeat = tensors, max(1, tp // 2)
    vocab = -(-10 // tp) * tp
    for layers in ([0, 1], [2]):
        at = [f"layers.{i}." for i in layers]
        yield np.stack([t[f"{key}attn.q_proj"] for key in at])
        k = np.stack([t[f"{key}attn.k_proj"] for key in at]).reshape(-1, 2, 4, 8)
        yield np.repeat(k, repeat, axis=1).reshape(-1, 2 * repeat * 4, 8)
        bias = np.stack([t[f"{key}attn.k_bias"] for key in at]).reshape(-1, 2, 4)
        yield np.repeat(bias, repeat, axis=1)
        yield np.stack([t[f"{key}norm"] for key in at])
    yield np.concatenate([t["embed_tokens"], np.zeros((vocab - 10, 8), BF16)])
    yield t["down"]
    yield np.concatenate([t["head"].T, np.zeros((8, vocab - 10), BF16)], axis=1)
    yield t["scale"]


@pytest.mark.parametrize("data, tensor", [(1, 1), (1, 2), (1, 4), (2, 4)])
def test_every_device_holds_its_part(declaration, tensors, put, data, tensor):
    mesh = make_mesh(data, tensor)
    arrays = load(fit(declaration, mesh), put(tensors), mesh, BF16)
    held = jax.tree.leaves(
        (arrays.layers, arrays.embed_tokens, arrays.down, arrays.head, arrays.scale)
    )
    for array, whole in zip(held, expected(tensors, tensor), strict=True):
        np.testing.assert_array_equal(host(array), whole)
    assert {len(array.sharding.device_set) for array in held} == {data * tensor}


@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, BF16])
def test_dtypes_convert(declaration, tensors, put, stored, wanted):
    tensors = {key: tensor.astype(stored) for key, tensor in tensors.items()}
    arrays = load(declaration, put(tensors), make_mesh(), wanted)
    assert arrays.down.dtype == wanted
    np.testing.assert_array_equal(np.asarray(arrays.down), tensors["down"].astype(wanted))
    np.testing.assert_array_equal(np.asarray(arrays.head), tensors["head"].T.astype(wanted))


def test_large_tensors_arrive_in_pieces(put):
    # 24 MB each: three pieces as they lie, and the transposed one through the same path.
    matrix = {"mlp": 4096 * 3, "embed": 1024}
    weights = (
        np.random.default_rng(0).standard_normal((4096 * 3, 1024), np.float32).astype(np.float16)
    )
    declaration = Two(Param("mlp embed", matrix), Param("embed mlp", matrix, hf="mlp embed"))
    arrays = load(declaration, put({"one": weights, "two": weights}), make_mesh(1, 2), BF16)
    np.testing.assert_array_equal(host(arrays.one), weights.astype(BF16))
    np.testing.assert_array_equal(host(arrays.two), weights.T.astype(BF16))


@module
class Two:
    one: Param
    two: Param


VECTOR = Param("embed", {"embed": 4096})


def address(shard) -> int:
    return shard.data.unsafe_buffer_pointer()


@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
def test_a_float32_parameter_is_made_from_any_float(put, stored):
    """Convert, for instance, the bias of a router's choice in a bf16 model."""
    values = np.random.default_rng(0).standard_normal(4096, np.float32).astype(stored)
    bias = Param("embed", {"embed": 4096}, dtype="float32")
    arrays = load(Two(bias, VECTOR), put({"one": values, "two": values}), make_mesh(), BF16)
    assert arrays.one.dtype == np.float32
    np.testing.assert_array_equal(host(arrays.one), values.astype(np.float32))


def test_a_parameter_of_integers_is_made_from_integers_only(put):
    words = Param("embed", {"embed": 4096}, dtype="int32")
    tensors = {"one": np.zeros(4096, np.float32), "two": np.zeros(4096, BF16)}
    with pytest.raises(CheckpointError, match="one: dtype F32, expected one of I32"):
        load(Two(words, VECTOR), put(tensors), make_mesh(), BF16)


@pytest.mark.parametrize("tensor", [1, 2])
def test_aligned_tensors_are_the_file_itself(put, tensor):
    rows = Param("mlp embed", {"mlp": 8, "embed": 64})
    checkpoint = put({"one": np.ones((8, 64), BF16), "two": np.arange(4096).astype(BF16)})
    arrays = load(Two(rows, VECTOR), checkpoint, make_mesh(1, tensor), BF16)
    start = checkpoint.array("one").ctypes.data
    step = 8 * 64 * 2 // tensor
    assert [address(shard) for shard in arrays.one.addressable_shards] == [
        start + step * i for i in range(tensor)
    ]
    # The vector is not split: every device uses the same memory.
    assert {address(shard) for shard in arrays.two.addressable_shards} == {
        checkpoint.array("two").ctypes.data
    }


def test_the_file_stays_mapped_as_long_as_an_array_uses_it(put):
    checkpoint = put({"one": np.ones(4096, BF16), "two": np.full(4096, 2, BF16)})
    arrays = load(Two(VECTOR, VECTOR), checkpoint, make_mesh(), BF16)
    (checkpoint.directory / SINGLE).unlink()
    one = arrays.one
    del checkpoint, arrays
    gc.collect()
    np.testing.assert_array_equal(np.asarray(one + one), np.full(4096, 2, BF16))


def test_misaligned_tensors_are_copied(tmp_path):
    tensors = {"one": np.ones(4096, BF16), "two": np.arange(4096).astype(BF16)}
    write_misaligned(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.array("one").ctypes.data % 2 == 1
    arrays = load(Two(VECTOR, VECTOR), checkpoint, make_mesh(), BF16)
    np.testing.assert_array_equal(np.asarray(arrays.two), tensors["two"])
    assert arrays.two.unsafe_buffer_pointer() % 64 == 0


def write_misaligned(directory, tensors):
    """Write a checkpoint with data that begins on an odd address."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        dtype = {BF16: "BF16", np.dtype(np.float32): "F32"}[tensor.dtype]
        header[name] = {
            "dtype": dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64 + 1)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    with (directory / SINGLE).open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(tensor.view(np.uint8))


PEAK = """
import pathlib, sys
import jax
from slipway.checkpoint.files import open_checkpoint
from slipway.checkpoint.tensor_reader import load
from slipway.mesh import make_mesh
from slipway.tree import Param, module, stack

@module
class Model:
    layers: object
    table: Param
    turned: Param

def peak():
    # Not ru_maxrss, which a process inherits from its parent.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def load_model(width):
    layer = Param("mlp embed", {"mlp": width, "embed": width})
    table = Param("vocab embed", {"vocab": 16 * width, "embed": width})
    turned = Param("embed mlp", {"embed": width, "mlp": 2 * width}, hf="mlp embed")
    checkpoint = open_checkpoint(pathlib.Path(sys.argv[1], str(width)))
    model = Model(stack(layer, 32), table, turned)
    return jax.tree.leaves(load(model, checkpoint, make_mesh(), sys.argv[2]))

load_model(64)  # code and threads take memory of their own, the first time
before = peak()
print(sum(array.nbytes for array in load_model(1024)), peak() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak"
)
@pytest.mark.parametrize("stored, wanted", [(np.float32, "bfloat16"), (BF16, "bfloat16")])
def test_host_memory_stays_within_a_tenth_of_the_weights(tmp_path, stored, wanted):
    for width in (64, 1024):
        tensors = {f"layers.{i}": np.full((width, width), i, stored) for i in range(32)}
        tensors |= {
            "table": np.ones((16 * width, width), stored),
            "turned": np.ones((2 * width, width), stored),
        }
        write_misaligned(tmp_path / str(width), tensors)
    command = [sys.executable, "-W", "ignore", "-c", PEAK, tmp_path, wanted]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path)
    weights, peak = map(int, ran.stdout.split())
    assert weights == 50 * 2**20 * 2
    assert peak <= 1.1 * weights, f"{peak / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights"


def misfits(declaration, checkpoint, dtype=BF16, ignore=()) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        check(declaration, checkpoint, dtype, ignore)
    return caught.value.problems


def test_every_misfit_at_once(declaration, tensors, put):
    tensors |= {
        "layers.0.norm": np.zeros((3, 4), BF16),
        "layers.1.norm": np.zeros(8, np.int8),
        "down": np.where(np.eye(8), np.nan, tensors["down"].astype(np.float32)),
        "lm_head.weight": tensors["embed_tokens"] + BF16.type(1),
        "layers.0.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "stray": np.zeros(2, np.float32),
    }
    tensors["down"] = tensors["down"].astype(BF16)
    del tensors["layers.2.attn.q_proj"]
    checkpoint = put(tensors)
    everything = [
        "layers.0.norm: shape (3, 4) in the file, (8,) declared",
        "layers.1.norm: dtype I8, expected one of BF16, F16, F32",
        "layers.2.attn.q_proj: missing",
        "down: 8 values are not finite as bfloat16, the first nan at (0, 0)",
        "lm_head.weight: differs from embed_tokens",
        "stray: unexpected",
    ]
    assert misfits(declaration, checkpoint, ignore=["*rotary_emb.inv_freq"]) == everything
    with pytest.raises(CheckpointError) as caught:
        load(declaration, checkpoint, make_mesh(), BF16)
    assert sorted(caught.value.problems) == sorted(
        [*everything, "layers.0.rotary_emb.inv_freq: unexpected"]
    )


def test_an_equal_alias_is_no_misfit(declaration, tensors, put):
    checkpoint = put(tensors | {"lm_head.weight": tensors["embed_tokens"]})
    check(declaration, checkpoint, BF16)


def test_an_alias_of_another_dtype_differs(declaration, tensors, put):
    checkpoint = put(tensors | {"lm_head.weight": tensors["embed_tokens"].astype(np.float32)})
    assert misfits(declaration, checkpoint) == ["lm_head.weight: differs from embed_tokens"]


@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, BF16])
def test_values_must_be_finite_as_the_dtype_that_they_become(put, stored, wanted):
    stored = np.dtype(stored)
    largest = min(float(ml_dtypes.finfo(stored).max), float(ml_dtypes.finfo(wanted).max))
    x = np.zeros(300_000, stored)
    x[7] = -largest * 0.99
    check(Single(Param("embed", {"embed": x.size})), put({"x": x}), wanted)
    x[200_001], x[299_999] = -np.inf, np.nan
    (problem,) = misfits(Single(Param("embed", {"embed": x.size})), put({"x": x}), wanted)
    assert (
        problem == f"x: 2 values are not finite as {np.dtype(wanted)}, the first -inf at (200001,)"
    )


def test_values_above_the_dtypes_largest_are_refused(put):
    x = np.array([65504.0, -70000.0], np.float32)
    check(Single(Param("embed", {"embed": 2})), put({"x": x}), BF16)
    (problem,) = misfits(Single(Param("embed", {"embed": 2})), put({"x": x}), np.float16)
    assert problem == "x: 1 values are not finite as float16, the first -70000.0 at (1,)"


@module
class Single:
    x: Param


def test_dummy_weights_do_not_depend_on_the_mesh_or_on_stacking(declaration):
    one = jax.tree.map(host, dummy(declaration, make_mesh(), BF16, seed=3))
    # The checkpoint's own values, before any growth, are what a file would hold.
    tensors = {
        key: np.asarray(leaf.param.write(array[at]))
        for leaf, array in zip(tree.leaves(declaration), jax.tree.leaves(one))
        for at, key in leaf.keys.items()
    }
    mesh = make_mesh(2, 4)
    four = dummy(fit(declaration, mesh), mesh, BF16, seed=3)
    held = jax.tree.leaves((four.layers, four.embed_tokens, four.down, four.head, four.scale))
    for array, whole in zip(held, expected(tensors, 4), strict=True):
        np.testing.assert_array_equal(host(array), whole)
    apart = separate(declaration)
    for leaf, array in zip(
        tree.leaves(apart), jax.tree.leaves(dummy(apart, make_mesh(), BF16, seed=3))
    ):
        np.testing.assert_array_equal(leaf.param.write(host(array)), tensors[leaf.keys[()]])


def test_dummy_weights_are_uniform_and_differ_by_tensor_and_seed():
    square = Param("mlp embed", {"mlp": 512, "embed": 512})
    declaration = Chain([stack(Two(square, square), 2)])
    leaves = jax.tree.leaves(dummy(declaration, make_mesh(), np.float32, seed=0))
    draws = [np.asarray(array[i]) for array in leaves for i in range(2)]
    draws.append(
        np.asarray(jax.tree.leaves(dummy(declaration, make_mesh(), np.float32, seed=1))[0][0])
    )
    for x in draws:
        assert abs(x.mean()) < 4 * DUMMY_STD / 512
        assert abs(x.std() / DUMMY_STD - 1) < 0.01
        assert abs(x).max() <= DUMMY_STD * 3**0.5
        lines = [
            np.corrcoef(x[:-1].ravel(), x[1:].ravel()),
            np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel()),
        ]
        assert all(abs(line[0, 1]) < 0.01 for line in lines)
    correlations = np.corrcoef([x.ravel() for x in draws])
    assert abs(correlations - np.eye(len(draws))).max() < 0.01


def test_dummy_norms_are_ones_and_padding_is_zero(declaration):
    mesh = make_mesh(1, 4)
    arrays = dummy(fit(declaration, mesh), mesh, BF16)
    assert (host(arrays.layers[0].body.norm) == 1).all()
    assert host(arrays.scale) == 0
    assert (host(arrays.embed_tokens)[10:] == 0).all()
    assert host(arrays.embed_tokens)[:10].any()
