"""Loading of a tree that is no language model: two convolutions, onto one device and onto two."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from slipway import mesh as meshes
from slipway.checkpoint import files
from slipway.checkpoint.quantize import Scheme
from slipway.errors import CheckpointError, InvalidConfig
from slipway.models import declare
from slipway.runtime import load
from slipway.tree import Param, Tensor, module

SIZE = 8  # channels between the two


@module
class Conv:
    """Convolution; the weight is (out, in, height, width), as torch holds it."""

    weight: Tensor
    bias: Tensor

    @staticmethod
    def declare(out: str, into: str, sizes: dict[str, int]) -> "Conv":
        return Conv(Param(f"{out} {into} h w", sizes | {"h": 3, "w": 3}), Param(out, sizes))

    def __call__(self, x_NCHW):
        y_NCHW = jax.lax.conv(x_NCHW, self.weight, (1, 1), "SAME")
        return y_NCHW + self.bias[None, :, None, None]


@module
class Net:
    """Tree of two convolutions."""

    first: Conv
    second: Conv

    def __call__(self, x_NCHW):
        return self.second(jax.nn.relu(self.first(x_NCHW)))


def declared() -> Net:
    sizes = {"image": 3, "mlp": SIZE}  # "mlp" is an axis that the mesh splits
    return Net(Conv.declare("mlp", "image", sizes), Conv.declare("image", "mlp", sizes))


@pytest.fixture
def twin(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, SIZE, 3, padding=1), nn.ReLU(), nn.Conv2d(SIZE, 3, 3, padding=1)
    ).eval()
    names = {"0": "first", "2": "second"}
    tensors = {f"{names[key[0]]}{key[1:]}": x.numpy() for key, x in net.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return net


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_convolutions_on_a_mesh(twin, tensor, tmp_path):
    mesh = meshes.make_mesh(1, tensor)
    declaration = load.on_mesh(declared(), mesh, np.float32)
    checkpoint = load.checked(declaration, files.open_tensors(tmp_path), np.float32)
    net = load.arrays(declaration, checkpoint, mesh, np.float32)
    assert net.first.weight.addressable_shards[0].data.shape == (SIZE // tensor, 3, 3, 3)
    x = np.random.default_rng(0).normal(size=(1, 3, 5, 7)).astype(np.float32)
    with torch.inference_mode():
        expected = twin(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(jax.jit(lambda net, x: net(x))(net, x), expected, atol=1e-5)


def test_what_does_not_fit_is_listed_before_anything_is_loaded(twin, tmp_path):
    checkpoint = files.open_tensors(tmp_path)
    arrays = {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}
    del arrays["first.bias"]
    arrays["second.weight"] = arrays["second.weight"][:, 1:].copy()
    arrays["third.weight"] = np.ones(2, np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load.checked(declared(), files.open_tensors(tmp_path), np.float32)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "first.bias",
        "second.weight",
        "third.weight",
    ]


def test_random_weights_need_no_files():
    mesh = meshes.make_mesh(1, 1)
    net = load.arrays(load.on_mesh(declared(), mesh, np.float32), None, mesh, np.float32, seed=3)
    again = load.arrays(load.on_mesh(declared(), mesh, np.float32), None, mesh, np.float32, seed=3)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(again), strict=True)
    )
    assert np.std(net.first.weight) > 0


def test_a_scheme_that_does_not_divide_a_row_is_refused():
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 24,
     "intermediate_size": 40,
           "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
    with pytest.raises(InvalidConfig, match="quantization"):
        load.on_mesh(declare(raw), meshes.make_mesh(1, 1), np.float32, scheme=Scheme(4, 32))
