"""Tests of slipway.export: CNNs, LoRA, stacks and a transformer against torch twins, and
refusals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from transformers import AutoModelForCausalLM

import slipway
from slipway.errors import CheckpointError, InvalidConfig
from tests.convert.torch_twins import (
    RNG,
    Holder,
    Twin,
    assert_twins,
    exported,
    images,
    randomized,
    rngs,
)
from training.model import Embed, Linear, Model, ModelConfig, RMSNorm


class VGG(nnx.Module):
    """Convolutions, a pool, a flatten, two Linears."""

    def __init__(self):
        r = rngs()
        self.features = nnx.List(
            [nnx.Conv(3, 8, (3, 3), padding=1, rngs=r), nnx.Conv(8, 6, (3, 3), padding=1, rngs=r)]
        )
        # A plain dict.
        self.norms = nnx.data({"0": nnx.BatchNorm(8, use_running_average=True, rngs=r)})
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=r)
        self.fc1 = nnx.Linear(4 * 5 * 6, 10, rngs=r)
        self.fc2 = nnx.Linear(10, 4, rngs=r)

    def __call__(self, x):
        x = nnx.relu(self.norms["0"](self.features[0](x)))
        x = nnx.max_pool(nnx.relu(self.features[1](x)), (2, 2), (2, 2))
        return self.fc2(nnx.relu(self.fc1(self.drop(x.reshape(x.shape[0], -1)))))


class VGGTwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)]
        )
        self.norms = nn.ModuleDict({"0": nn.BatchNorm2d(8)})
        self.fc1 = nn.Linear(120, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x):
        x = self.norms["0"](self.features[0](x)).relu()
        x = nn.functional.max_pool2d(self.features[1](x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def test_a_vgg_like_network(tmp_path):
    assert_twins(
        randomized(VGG()),
        VGGTwin(),
        images(2, 8, 10, 3),
        tmp_path,
        True,
        flatten={"fc1": (4, 5, 6)},
    )


class Block(nnx.Module):
    """Two convolutions beside a projection."""

    def __init__(self, into: int, out: int, stride: int):
        r = rngs()
        self.conv1 = nnx.Conv(into, out, (3, 3), strides=stride, padding=1, use_bias=False, rngs=r)
        self.bn1 = nnx.BatchNorm(out, use_running_average=True, rngs=r)
        self.conv2 = nnx.Conv(out, out, (3, 3), padding=1, use_bias=False, rngs=r)
        self.bn2 = nnx.BatchNorm(out, use_running_average=True, rngs=r)
        self.down = nnx.Conv(into, out, (1, 1), strides=stride, padding=0, use_bias=False, rngs=r)

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + self.down(x))


class ResNet(nnx.Module):
    def __init__(self):
        self.stem = nnx.Conv(3, 4, (3, 3), padding=1, use_bias=False, rngs=rngs())
        self.blocks = nnx.List([Block(4, 6, 1), Block(6, 8, 2)])
        self.head = nnx.Linear(8, 5, rngs=rngs())

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class BlockTwin(nn.Module):
    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.downsample = nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()


class ResNetTwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.layer = nn.ModuleList([BlockTwin(4, 6, 1), BlockTwin(6, 8, 2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.layer:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_a_resnet_like_network(tmp_path):
    renames = {
        "blocks": "layer",
        "blocks.0.down": "layer.0.downsample",
        "blocks.1.down": "layer.1.downsample",
    }
    assert_twins(
        randomized(ResNet()), ResNetTwin(), images(2, 9, 8, 3), tmp_path, True, renames=renames
    )


@pytest.mark.parametrize("kind", ["around", "inside"])
def test_lora_is_merged(kind, tmp_path):
    base = nnx.Linear(3, 5, rngs=rngs())
    lora = nnx.LoRA(3, 2, 5, base_module=base, rngs=rngs())
    layer = lora if kind == "around" else nnx.LoRALinear(3, 5, lora_rank=2, rngs=rngs())
    assert_twins(randomized(Holder(layer)), Twin(nn.Linear(3, 5)), images(4, 3), tmp_path)


class Scanned(nnx.Module):
    """Equal blocks with arrays stacked in front."""

    def __init__(self, n: int, rank: int = 0):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return MLPBlock(nnx.Rngs(key), rank)

        self.blocks = make(jax.random.split(jax.random.key(0), n))
        self.head = nnx.Linear(4, 2, rngs=rngs())

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.head(run(x, self.blocks))


class MLPBlock(nnx.Module):
    def __init__(self, r, rank: int):
        self.norm = nnx.LayerNorm(4, epsilon=1e-5, rngs=r)
        self.fc = nnx.LoRALinear(4, 4, lora_rank=rank, rngs=r) if rank else nnx.Linear(4, 4, rngs=r)

    def __call__(self, x):
        return x + nnx.relu(self.fc(self.norm(x)))


class ScannedTwin(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)}) for _ in range(n)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["fc"](block["norm"](x)).relu()
        return self.head(x)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_scanned_stack(rank, tmp_path):
    assert_twins(randomized(Scanned(3, rank)), ScannedTwin(3), images(5, 4), tmp_path)


def test_layers_of_ones_own_and_a_transformer(tmp_path):
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16
    )
    model = randomized(Model(config, nnx.Rngs(0)))
    own = {
        Linear: [("kernel", "weight", "into out -> out into")],
        RMSNorm: [("scale", "weight", "features -> features")],
        Embed: [("embedding", "weight", "vocab embed -> vocab embed")],
    }
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 32,
        "head_dim": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
    }
    slipway.export(model, fields, tmp_path / "out", layers=own, renames={"": "model"})
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = RNG.integers(0, 64, (2, 20))
    with torch.inference_mode():
        wanted = twin(torch.from_numpy(ids)).logits.numpy()
    # The user's code, which need not follow the strict settings of the tests.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        made = np.asarray(model(ids))
    np.testing.assert_allclose(made, wanted, atol=1e-4)


class Odd(nnx.Module):
    """Module with parts that cannot be exported as they are."""

    def __init__(self):
        self.token = nnx.Param(jnp.ones(3))
        self.per_head = nnx.LinearGeneral(3, 4, batch_axis={0: 2}, rngs=rngs())
        self.outer = nnx.Einsum("bi,bj->bij", (2, 3), rngs=rngs())
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs())
        self.fc = nnx.Linear(8 * 4, 2, rngs=rngs())
        self.adapter = nnx.LoRA(3, 2, 4, rngs=rngs())


def test_all_that_is_not_understood_is_listed(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        slipway.export(Odd(), {}, tmp_path / "out")
    told = "\n".join(caught.value.problems)
    for part in (
        "token: a variable of no known layer",
        "per_head: LinearGeneral: batch_axis",
        "outer: Einsum: einsum",
        "fc: its 32 inputs look like a flattened feature map",
        "adapter: LoRA without a layer",
    ):
        assert part in told, told
    assert not (tmp_path / "out").exists()


def test_a_bare_variable_with_a_rule_of_its_own(tmp_path):
    class WithToken(nnx.Module):
        def __init__(self):
            self.token = nnx.Param(jnp.arange(6.0).reshape(2, 3))

    tensors = exported(WithToken(), tmp_path, extra=[("token", "cls_token", "a b -> b a")])
    assert tensors["cls_token"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("shape", [(4, 5, 7), (120,)])
def test_a_flatten_that_does_not_fit_is_refused(shape, tmp_path):
    if shape == (120,):
        # One axis: nothing to permute.
        slipway.export(VGG(), {}, tmp_path / "out", flatten={"fc1": shape})
        return
    with pytest.raises(InvalidConfig, match="flatten") as caught:
        slipway.export(VGG(), {}, tmp_path / "out", flatten={"fc1": shape})
    assert "120" in caught.value.expected


def test_no_flatten_may_be_said(tmp_path):
    slipway.export(VGG(), {}, tmp_path / "out", flatten={"fc1": None})
    with pytest.raises(CheckpointError, match="flatten: fc9 is no layer"):
        slipway.export(VGG(), {}, tmp_path / "out2", flatten={"fc1": None, "fc9": (1, 2)})
