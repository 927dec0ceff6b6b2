"""Each Flax NNX layer type against the torch layer that it becomes, to 1e-5."""

import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.convert.torch_twins import Holder, Twin, assert_twins, exported, images, randomized, rngs

LAYERS = {
    "Linear": (lambda: nnx.Linear(3, 5, rngs=rngs()), lambda: nn.Linear(3, 5), (2, 3), False),
    "Linear without bias": (
        lambda: nnx.Linear(3, 5, use_bias=False, rngs=rngs()),
        lambda: nn.Linear(3, 5, bias=False),
        (2, 3),
        False,
    ),
    "Conv 1d": (
        lambda: nnx.Conv(3, 8, (3,), padding="VALID", rngs=rngs()),
        lambda: nn.Conv1d(3, 8, 3),
        (2, 9, 3),
        True,
    ),
    "Conv 2d": (
        lambda: nnx.Conv(3, 8, (3, 2), padding="VALID", strides=(2, 1), rngs=rngs()),
        lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 1)),
        (2, 9, 7, 3),
        True,
    ),
    "Conv 3d": (
        lambda: nnx.Conv(3, 4, (2, 3, 2), padding="VALID", rngs=rngs()),
        lambda: nn.Conv3d(3, 4, (2, 3, 2)),
        (2, 5, 6, 4, 3),
        True,
    ),
    "Conv in groups": (
        lambda: nnx.Conv(6, 9, (3, 3), feature_group_count=3, padding="VALID", rngs=rngs()),
        lambda: nn.Conv2d(6, 9, 3, groups=3),
        (2, 7, 7, 6),
        True,
    ),
    "Conv depthwise": (
        lambda: nnx.Conv(6, 6, (3, 3), feature_group_count=6, padding="VALID", rngs=rngs()),
        lambda: nn.Conv2d(6, 6, 3, groups=6),
        (2, 7, 7, 6),
        True,
    ),
    "ConvTranspose": (
        lambda: nnx.ConvTranspose(3, 5, (3, 2), strides=(2, 1), padding="VALID", rngs=rngs()),
        lambda: nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 1)),
        (2, 4, 5, 3),
        True,
    ),
    "ConvTranspose, transpose_kernel": (
        lambda: nnx.ConvTranspose(
            3, 5, (3, 2), strides=(2, 1), padding="VALID", transpose_kernel=True, rngs=rngs()
        ),
        lambda: nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 1)),
        (2, 4, 5, 3),
        True,
    ),
    "BatchNorm": (
        lambda: nnx.BatchNorm(5, use_running_average=True, rngs=rngs()),
        lambda: nn.BatchNorm2d(5),
        (2, 3, 4, 5),
        True,
    ),
    "LayerNorm": (
        lambda: nnx.LayerNorm(5, epsilon=1e-5, rngs=rngs()),
        lambda: nn.LayerNorm(5),
        (2, 5),
        False,
    ),
    "RMSNorm": (
        lambda: nnx.RMSNorm(5, epsilon=1e-5, rngs=rngs()),
        lambda: nn.RMSNorm(5, eps=1e-5),
        (2, 5),
        False,
    ),
    "GroupNorm": (
        lambda: nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=rngs()),
        lambda: nn.GroupNorm(3, 6),
        (2, 4, 3, 6),
        True,
    ),
    "InstanceNorm": (
        lambda: nnx.InstanceNorm(5, epsilon=1e-5, rngs=rngs()),
        lambda: nn.InstanceNorm2d(5, affine=True),
        (2, 4, 3, 5),
        True,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_torch_twin(name, tmp_path):
    layer, twin, shape, channels_last = LAYERS[name]
    assert_twins(randomized(Holder(layer())), Twin(twin()), images(*shape), tmp_path, channels_last)


def test_an_embedding(tmp_path):
    module, twin = randomized(Holder(nnx.Embed(7, 4, rngs=rngs()))), Twin(nn.Embedding(7, 4))
    assert_twins(module, twin, np.array([[0, 6, 3]]), tmp_path)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs()), (7, 2, 3)),
        (lambda: nnx.LinearGeneral(6, (4, 5), rngs=rngs()), (7, 6)),
        (lambda: nnx.Einsum("bnh,nhd->bd", (2, 3, 20), (20,), rngs=rngs()), (7, 2, 3)),
        (lambda: nnx.Einsum("bd,ndh->bnh", (4, 6, 5), rngs=rngs()), (7, 6)),
    ],
)
def test_a_map_of_several_axes_is_one_matrix(layer, x, tmp_path):
    module, x = randomized(Holder(layer())), images(*x)
    tensors = exported(module, tmp_path)
    y = torch.from_numpy(x.reshape(7, -1)) @ tensors["layer.weight"].T + tensors.get(
        "layer.bias", torch.zeros(1)
    )
    np.testing.assert_allclose(np.asarray(module(x)).reshape(7, -1), y, atol=1e-5)


def test_attention(tmp_path):
    attention = nnx.MultiHeadAttention(2, 6, 8, decode=False, normalize_qk=False, rngs=rngs())
    module = randomized(Holder(attention))
    x, tensors = images(1, 5, 6), exported(module, tmp_path)

    def project(name, y):
        return y @ tensors[f"layer.{name}.weight"].T + tensors[f"layer.{name}.bias"]

    q, k, v = (
        project(n, torch.from_numpy(x[0])).view(5, 2, 4).transpose(0, 1)
        for n in ("q_proj", "k_proj", "v_proj")
    )
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(5, 8)
    np.testing.assert_allclose(np.asarray(module(x))[0], project("out_proj", mixed), atol=1e-5)
