"""slipway.export with an example: reshapes and scans that follow from one run, against
torch twins.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import slipway
from slipway.errors import CheckpointError, InvalidConfig
from tests.convert.torch_twins import assert_twins, exported, images, randomized, rngs


class Net(nnx.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run, **layers):
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def __call__(self, x):
        return self.run(self, x)


class Twin(nn.Module):
    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def conv(into, out, size=3, **options):
    rank = options.pop("rank", 2)
    return nnx.Conv(into, out, (size,) * rank, padding="VALID", rngs=rngs(), **options)


def linear(into, out, **options):
    return nnx.Linear(into, out, rngs=rngs(), **options)


def flat(x):
    return x.reshape(x.shape[0], -1)


def norm(features, **options):
    return nnx.BatchNorm(features, use_running_average=True, epsilon=1e-5, rngs=rngs(), **options)


NETS = {
    "a flatten of a map of one axis": (
        lambda: Net(lambda m, x: m.fc(flat(m.conv(x))), conv=conv(3, 4, rank=1), fc=linear(24, 5)),
        lambda: Twin(
            lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv1d(3, 4, 3), fc=nn.Linear(24, 5)
        ),
        (2, 8, 3),
    ),
    "a flatten of a map of three axes": (
        lambda: Net(
            lambda m, x: m.fc(flat(m.conv(x))),
            conv=conv(2, 3, 2, rank=3),
            fc=linear(2 * 3 * 4 * 3, 5),
        ),
        lambda: Twin(
            lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv3d(2, 3, 2), fc=nn.Linear(72, 5)
        ),
        (2, 3, 4, 5, 2),
    ),
    "a flatten behind a depthwise convolution and a pool": (
        lambda: Net(
            lambda m, x: m.fc(flat(nnx.max_pool(nnx.relu(m.conv(x)), (2, 2), (2, 2)))),
            conv=conv(3, 6, feature_group_count=3),
            fc=linear(2 * 3 * 6, 36),
        ),
        lambda: Twin(
            lambda m, x: m.fc(nn.functional.max_pool2d(m.conv(x).relu(), 2).flatten(1)),
            conv=nn.Conv2d(3, 6, 3, groups=3),
            fc=nn.Linear(36, 36),
        ),
        (2, 6, 8, 3),
    ),
    "a flatten into two heads of its own size, one behind a norm": (
        lambda: Net(
            lambda m, x: m.mean(flat(m.conv(x))) * m.spread(m.norm(flat(m.conv(x)))),
            conv=conv(3, 4),
            mean=linear(32, 32),
            spread=linear(32, 32),
            norm=nnx.LayerNorm(32, epsilon=1e-5, rngs=rngs()),
        ),
        lambda: Twin(
            lambda m, x: m.mean(m.conv(x).flatten(1)) * m.spread(m.norm(m.conv(x).flatten(1))),
            conv=nn.Conv2d(3, 4, 3),
            mean=nn.Linear(32, 32),
            spread=nn.Linear(32, 32),
            norm=nn.LayerNorm(32),
        ),
        (2, 4, 6, 3),
    ),
    "two flattens, of two maps": (
        lambda: Net(
            lambda m, x: m.fc1(flat(m.conv1(x))) + m.fc2(flat(m.conv2(m.conv1(x)))),
            conv1=conv(3, 4),
            conv2=conv(4, 6),
            fc1=linear(4 * 6 * 4, 5),
            fc2=linear(2 * 4 * 6, 5),
        ),
        lambda: Twin(
            lambda m, x: m.fc1(m.conv1(x).flatten(1)) + m.fc2(m.conv2(m.conv1(x)).flatten(1)),
            conv1=nn.Conv2d(3, 4, 3),
            conv2=nn.Conv2d(4, 6, 3),
            fc1=nn.Linear(96, 5),
            fc2=nn.Linear(48, 5),
        ),
        (2, 6, 8, 3),
    ),
    "a flatten of a sum of two branches": (
        lambda: Net(
            lambda m, x: m.fc(flat(m.skip(x) + m.conv2(nnx.relu(m.conv1(x))))),
            conv1=conv(3, 3, 1),
            conv2=conv(3, 4),
            skip=conv(3, 4),
            fc=linear(32, 5),
        ),
        lambda: Twin(
            lambda m, x: m.fc((m.skip(x) + m.conv2(m.conv1(x).relu())).flatten(1)),
            conv1=nn.Conv2d(3, 3, 1),
            conv2=nn.Conv2d(3, 4, 3),
            skip=nn.Conv2d(3, 4, 3),
            fc=nn.Linear(32, 5),
        ),
        (2, 4, 6, 3),
    ),
    "a flattened map beside a vector": (
        lambda: Net(
            lambda m, x: m.fc(jnp.concatenate([m.time(x.mean((1, 2))), flat(m.conv(x))], -1)),
            conv=conv(3, 4),
            time=linear(3, 7),
            fc=linear(39, 5),
        ),
        lambda: Twin(
            lambda m, x: m.fc(torch.cat([m.time(x.mean((2, 3))), m.conv(x).flatten(1)], -1)),
            conv=nn.Conv2d(3, 4, 3),
            time=nn.Linear(3, 7),
            fc=nn.Linear(39, 5),
        ),
        (2, 4, 6, 3),
    ),
    "channels moved first in JAX": (
        lambda: Net(
            lambda m, x: m.fc(flat(jnp.moveaxis(m.conv(x), -1, 1))),
            conv=conv(3, 4),
            fc=linear(32, 5),
        ),
        lambda: Twin(
            lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(32, 5)
        ),
        (2, 4, 6, 3),
    ),
    "columns of a map as steps": (
        lambda: Net(
            lambda m, x: m.fc(m.conv(x).transpose(0, 2, 1, 3).reshape(x.shape[0], 4, 8)).mean(1),
            conv=conv(3, 4),
            fc=linear(8, 5),
        ),
        lambda: Twin(
            lambda m, x: m.fc(m.conv(x).permute(0, 3, 1, 2).reshape(x.shape[0], 4, 8)).mean(1),
            conv=nn.Conv2d(3, 4, 3),
            fc=nn.Linear(8, 5),
        ),
        (2, 4, 6, 3),
    ),
    "a mean over a map that was made tokens": (
        lambda: Net(
            lambda m, x: m.fc(m.conv(x).reshape(x.shape[0], 8, 4).mean(1)),
            conv=conv(3, 4),
            fc=linear(4, 8),
        ),
        lambda: Twin(
            lambda m, x: m.fc(m.conv(x).flatten(2).mean(2)),
            conv=nn.Conv2d(3, 4, 3),
            fc=nn.Linear(4, 8),
        ),
        (2, 4, 6, 3),
    ),
    "an einsum over a whole map": (
        lambda: Net(
            lambda m, x: m.fc(m.conv(x)),
            conv=conv(3, 4),
            fc=nnx.Einsum("bhwc,hwcd->bd", (2, 4, 4, 5), (5,), rngs=rngs()),
        ),
        lambda: Twin(
            lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(32, 5)
        ),
        (2, 4, 6, 3),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_flatten_follows_from_an_example(name, tmp_path):
    net, twin, shape = NETS[name]
    x = images(*shape)
    assert_twins(randomized(net()), twin(), x, tmp_path, True, example=jnp.asarray(x))


def test_a_generator_with_norms_on_both_sides_of_its_reshape(tmp_path):
    def up():
        return nnx.ConvTranspose(6, 3, (2, 2), strides=(2, 2), padding="VALID", rngs=rngs())

    net = Net(
        lambda m, z: m.up(m.norm2(nnx.relu(m.norm1(m.fc(z))).reshape(-1, 2, 3, 6))),
        fc=linear(5, 36),
        norm1=norm(36),
        norm2=norm(6),
        up=up(),
    )
    twin = Twin(
        lambda m, z: m.up(m.norm2(m.norm1(m.fc(z)).relu().view(-1, 6, 2, 3))).permute(0, 2, 3, 1),
        fc=nn.Linear(5, 36),
        norm1=nn.BatchNorm1d(36),
        norm2=nn.BatchNorm2d(6),
        up=nn.ConvTranspose2d(6, 3, 2, 2),
    )
    z = images(4, 5)
    net = randomized(net)
    assert_twins(net, twin, z, tmp_path / "seen", example=z)
    told = {"unflatten": {"fc": (2, 3, 6)}, "flatten": {"norm1": (2, 3, 6)}}
    assert_twins(net, twin, z, tmp_path / "told", **told)
    with pytest.raises(CheckpointError) as caught:
        slipway.export(net, {}, tmp_path / "asked")
    told = "\n".join(caught.value.problems)
    assert "unflatten={'fc': (height, width, channels)}" in told
    assert "norm1: its 36 features" in told


def test_halves_of_a_linear_become_two_maps(tmp_path):
    def run(m, z):
        a, b = jnp.split(m.fc(z), 2, axis=-1)
        return m.conv(a.reshape(-1, 2, 3, 4)) + m.conv(b.reshape(-1, 2, 3, 4))

    def run_twin(m, z):
        a, b = m.fc(z).chunk(2, -1)
        return (m.conv(a.view(-1, 4, 2, 3)) + m.conv(b.view(-1, 4, 2, 3))).permute(0, 2, 3, 1)

    z = images(3, 5)
    net = randomized(Net(run, fc=linear(5, 48), conv=conv(4, 2, 1)))
    assert_twins(
        net, Twin(run_twin, fc=nn.Linear(5, 48), conv=nn.Conv2d(4, 2, 1)), z, tmp_path, example=z
    )


def test_lora_beside_a_flatten_is_reordered_too(tmp_path):
    net = Net(
        lambda m, x: m.fc(flat(m.conv(x))),
        conv=conv(3, 4),
        fc=nnx.LoRALinear(32, 5, lora_rank=2, rngs=rngs()),
    )
    twin = Twin(
        lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(32, 5)
    )
    x, net = images(2, 4, 6, 3), randomized(net)
    assert_twins(net, twin, x, tmp_path / "seen", True, example=x)
    assert_twins(net, twin, x, tmp_path / "told", True, flatten={"fc": (2, 4, 4)})


@pytest.mark.parametrize(
    ("run", "layers", "part"),
    [
        (
            lambda m, x: m.fc(flat(x)),
            lambda: {"fc": linear(72, 5)},
            "axes of the module's input, (4, 6, 3)",
        ),
        (
            lambda m, x: m.fc(m.groups(flat(m.conv(x)))),
            lambda: {
                "conv": conv(3, 4),
                "groups": nnx.GroupNorm(32, 4, rngs=rngs()),
                "fc": linear(32, 5),
            },
            "groups: GroupNorm of a flattened map",
        ),
        (
            lambda m, x: m.fc(flat(m.mix(m.conv(x)))),
            lambda: {"conv": conv(3, 4), "mix": linear(4, 4), "fc": linear(32, 5)},
            "fc: kernel:",
        ),
        (
            lambda m, x: m.fc(flat(m.conv(x).reshape(-1, 8, 4))),
            lambda: {"conv": conv(3, 4), "fc": linear(32, 5)},
            "(tokens, channels)",
        ),
        (
            lambda m, x: m.fc(jnp.sort(flat(m.conv(x)), -1)),
            lambda: {"conv": conv(3, 4), "fc": linear(32, 5)},
            "cannot be followed through the operation sort",
        ),
        (
            lambda m, x: m.fc(flat(m.conv(x))[:, 3:11]),
            lambda: {"conv": conv(3, 4), "fc": linear(8, 5)},
            "cannot be followed through the operation slice",
        ),
        (
            lambda m, x: m.fc(
                m.conv(x).reshape(-1, 1, 2, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2, 16)
            ),
            lambda: {"conv": conv(3, 4), "fc": linear(16, 5)},
            "no whole feature map",
        ),
    ],
)
def test_what_does_not_follow_from_an_example_is_asked(run, layers, part, tmp_path):
    net, x = Net(run, **layers()), images(2, 4, 6, 3)
    with pytest.raises(CheckpointError) as caught:
        slipway.export(net, {}, tmp_path / "out", example=x)
    assert part in "\n".join(caught.value.problems)
    assert not (tmp_path / "out").exists()
    if "flatten=" in "\n".join(caught.value.problems):
        slipway.export(net, {}, tmp_path / "out", example=x, flatten={"fc": None})


def test_a_layer_that_the_example_does_not_use_is_asked_for(tmp_path):
    net = Net(
        lambda m, x: m.fc(flat(m.conv(x))), conv=conv(3, 4), fc=linear(32, 5), other=linear(32, 6)
    )
    with pytest.raises(CheckpointError, match="1 problem\n  - other: its 32 inputs look like"):
        slipway.export(net, {}, tmp_path / "out", example=images(2, 4, 6, 3))
    made = slipway.export(
        net, {}, tmp_path / "out", example=images(2, 4, 6, 3), flatten={"other": None}
    )
    assert "other: not used by the example" in str(made.report)


class Stack(nnx.Module):
    """Linears of one size, run by a scan; kernels and biases are stacked on different axes."""

    def __init__(self, count, axes):
        self.axes = nnx.StateAxes({nnx.PathContains("bias"): axes[1], nnx.Param: axes[0], ...: 0})

        @nnx.vmap(in_axes=0, out_axes=self.axes)
        def make(key):
            return linear(4, 4).__class__(4, 4, rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(jax.random.key(0), count))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        return run(x, self.layers)


def stack_twin(count):
    def run(m, x):
        for layer in m.layers:
            x = torch.tanh(layer(x))
        return x

    return Twin(run, layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(count)))


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (2, 1)])
def test_stacks_on_any_axis(axes, tmp_path):
    x = images(5, 4)
    assert_twins(randomized(Stack(3, axes)), stack_twin(3), x, tmp_path / "by size")
    square = randomized(Stack(4, axes))
    assert_twins(square, stack_twin(4), x, tmp_path / "seen", example=x)
    told = {"stack_axes": {"layers.kernel": axes[0], "layers.bias": axes[1]}}
    assert_twins(square, stack_twin(4), x, tmp_path / "told", **told)
    with pytest.raises(CheckpointError) as caught:
        slipway.export(square, {}, tmp_path / "asked")
    assert "stack_axes={'layers': 0}" in caught.value.problems[0]


def test_a_stack_axis_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        slipway.export(
            Stack(3, (1, 0)), {}, tmp_path / "out", stack_axes={"layers.kernel": 0, "else": 1}
        )
    told = "\n".join(caught.value.problems)
    assert "layers.kernel of shape (4, 3, 4) cannot be stacked on it" in told
    assert "stack_axes: else is no stacked layer" in told


def test_the_report_and_the_example_are_kept(tmp_path):
    x = images(2, 4, 6, 3)
    net = randomized(
        Net(
            lambda m, x: m.fc(nnx.gelu(m.norm(flat(m.conv(x))))),
            conv=conv(3, 4),
            norm=nnx.LayerNorm(32, rngs=rngs()),
            fc=linear(32, 5),
            unused=nnx.RMSNorm(3, rngs=rngs()),
        )
    )
    made = slipway.export(net, {}, tmp_path / "out", example=x)
    assert {entry.name for entry in made} >= {"fc.weight", "norm.bias"}
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text == f"{made.report}\n"
    assert "fc: inputs are a map 2 x 4 x 4 in Flax, 4 x 2 x 4 in torch" in text
    assert "give the twin eps=1e-06: norm" in text
    assert "gelu is the tanh approximation" in text
    assert "RMSNorm" not in text
    assert text.rstrip().splitlines()[-1].startswith("not compared with the original's logits")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "example_input_0.npy"), x)
    np.testing.assert_allclose(
        np.load(tmp_path / "out" / "example_output_0.npy"), net(jnp.asarray(x)), rtol=1e-5
    )
    without = slipway.export(
        net, {}, tmp_path / "plain", flatten={"fc": (2, 4, 4), "norm": (2, 4, 4)}
    )
    assert "not examined without example=" in str(without.report)


def test_arguments_of_an_example(tmp_path):
    net = Net(lambda m, x: m.fc(x[0] + x[1]), fc=linear(3, 2))
    net.__class__ = type(
        "Two",
        (Net,),
        {"__call__": lambda self, a, *, b, double: self.fc(a + b * (2 if double else 1))},
    )
    a, b = images(2, 3), images(2, 3)
    made = slipway.export(net, {}, tmp_path / "out", example={"a": a, "b": b, "double": True})
    np.testing.assert_allclose(
        made.report.outputs[0], np.asarray(net.fc(jnp.asarray(a + 2 * b))), rtol=1e-5, atol=1e-6
    )


def test_a_map_told_for_what_has_no_such_axis_is_refused(tmp_path):
    net = Net(lambda m, x: m.fc(x), fc=linear(3, 2), norm=norm(3))
    with pytest.raises(InvalidConfig, match="unflatten"):
        slipway.export(net, {}, tmp_path / "out", unflatten={"norm": (1, 1, 3)})


def test_an_extra_rule_of_a_flattening_matrix_is_reordered(tmp_path):
    x = images(2, 4, 6, 3)
    net = Net(
        lambda m, x: flat(m.conv(x)) @ m.w[...], conv=conv(3, 4), w=nnx.Param(jnp.zeros((32, 5)))
    )
    rows = [("w", "fc.weight", "i o -> o i")]
    net = randomized(net)
    twin = Twin(
        lambda m, x: m.fc(m.conv(x).flatten(1)),
        conv=nn.Conv2d(3, 4, 3),
        fc=nn.Linear(32, 5, bias=False),
    )
    assert_twins(net, twin, x, tmp_path, True, example=x, extra=rows)
    tensors = exported(net, tmp_path / "plain", extra=rows)
    assert torch.equal(tensors["fc.weight"], torch.from_numpy(np.array(net.w[...]).T))
