"""slipway.export of Flax Linen modules: CNNs, attention, decoders, stacks and refusals.

The reference is a torch twin.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen
from safetensors.torch import load_file
from torch import nn

import slipway
from slipway.errors import CheckpointError, InvalidConfig
from tests.convert.torch_twins import RNG, images


class Twin(nn.Module):
    """Layers under Linen's names, and a function that runs them."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, *x):
        return self.run(self, *x)


def drawn(module, *args, **kwargs):
    """Return the module's variables with new random weights and statistics.

    Zeros and ones would hide a swap.
    """

    def draw(path, x):
        x = RNG.standard_normal(np.shape(x)).astype(np.float32) * 0.3
        return np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x

    variables = flax.core.unfreeze(module.init(jax.random.key(0), *args, **kwargs))
    return jax.tree_util.tree_map_with_path(draw, variables)


def assert_twin(module, twin, x, folder, *, kwargs=None, **options):
    """Check that the twin loads the export strictly and computes the same.

    Maps are NHWC in Flax, NCHW in torch.
    """
    kwargs = kwargs or {}
    variables = drawn(module, x, **kwargs)
    example = (x, *kwargs.values()) if kwargs else x
    made = slipway.export(
        module, {}, folder / "out", variables=variables, example=example, **options
    )
    twin.load_state_dict(load_file(folder / "out" / "model.safetensors"), strict=True)
    theirs = np.moveaxis(x, -1, 1).copy() if x.ndim == 4 else x
    with torch.inference_mode():
        wanted = twin.eval()(torch.from_numpy(theirs)).numpy()
    ours = np.asarray(module.apply(variables, jnp.asarray(x), **kwargs))
    ours = np.moveaxis(ours, -1, 1) if ours.ndim == 4 else ours
    np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)
    return made


def refused(module, x, folder, variables=None, **options) -> str:
    variables = drawn(module, x) if variables is None else variables
    with pytest.raises(CheckpointError) as caught:
        slipway.export(module, {}, folder / "out", variables=variables, example=x, **options)
    assert not (folder / "out").exists()
    return str(caught.value)


class Cnn(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), padding="VALID", use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Conv(8, (3, 3), padding="VALID", feature_group_count=4)(linen.relu(x))
        x = linen.GroupNorm(2, epsilon=1e-5)(x)
        x = linen.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = linen.LayerNorm(epsilon=1e-5)(x)
        return linen.Dense(5, name="head")(linen.Dropout(0.5, deterministic=not train)(x))


def cnn_twin():
    def run(m, x):
        x = m.Conv_1(m.BatchNorm_0(m.Conv_0(x)).relu())
        return m.head(m.LayerNorm_0(nn.functional.max_pool2d(m.GroupNorm_0(x), 2).flatten(1)))

    return Twin(
        run,
        Conv_0=nn.Conv2d(3, 4, 3, bias=False),
        BatchNorm_0=nn.BatchNorm2d(4),
        Conv_1=nn.Conv2d(4, 8, 3, groups=4),
        GroupNorm_0=nn.GroupNorm(2, 8),
        LayerNorm_0=nn.LayerNorm(48),
        head=nn.Linear(48, 5),
    )


def test_an_mlp_under_other_names(tmp_path):
    module = linen.Sequential([linen.Dense(7), linen.relu, linen.Dense(3, use_bias=False)])
    twin = Twin(
        lambda m, x: m.last(m.first(x).relu()),
        first=nn.Linear(4, 7),
        last=nn.Linear(7, 3, bias=False),
    )
    renames = {"layers_0": "first", "layers_2": "last"}
    assert_twin(module, twin, images(2, 4), tmp_path, renames=renames)


def test_a_cnn_with_a_flatten_and_running_averages(tmp_path):
    made = assert_twin(Cnn(), cnn_twin(), images(2, 8, 10, 3), tmp_path, kwargs={"train": False})
    assert "head: inputs are a map 2 x 3 x 2 x 4 in Flax, 2 x 4 x 2 x 3 in torch" in str(
        made.report
    )
    assert "momentum 0.99" in str(made.report)


def test_statistics_of_the_batch_are_refused(tmp_path):
    x = images(2, 8, 10, 3)
    variables = drawn(Cnn(), x, train=False)
    with pytest.raises(InvalidConfig, match="BatchNorm_0 computes the statistics of the batch"):
        slipway.export(
            Cnn(), {}, tmp_path / "out", variables=variables, example={"x": x, "train": True}
        )


class Block(linen.Module):
    """A transformer block; each path of a residual has its own norm."""

    @linen.compact
    def __call__(self, x):
        mask = linen.make_causal_mask(x[..., 0])
        x = x + linen.MultiHeadDotProductAttention(2, name="attn")(
            linen.RMSNorm(name="norm1")(x), mask=mask
        )
        y = linen.Dense(16, name="up")(linen.LayerNorm(epsilon=1e-5, name="norm2")(x))
        return x + linen.Dense(8, name="down")(linen.gelu(y))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def block_twin():
    def run(m, x):
        x = x + m.attn(m.norm1(x))
        return x + m.down(nn.functional.gelu(m.up(m.norm2(x)), approximate="tanh"))

    return Twin(
        run,
        attn=Attention(),
        norm1=nn.RMSNorm(8, eps=1e-6),
        norm2=nn.LayerNorm(8),
        up=nn.Linear(8, 16),
        down=nn.Linear(16, 8),
    )


@pytest.mark.parametrize("lift", [lambda kind: kind, linen.remat, linen.jit])
def test_a_transformer_block(lift, tmp_path):
    class Model(linen.Module):
        def setup(self):
            self.block = lift(Block)()

        def __call__(self, x):
            return self.block(self.block(x))  # shared

    twin = Twin(lambda m, x: m.block(m.block(x)), block=block_twin())
    assert_twin(Model(), twin, images(2, 5, 8), tmp_path)


def test_a_tied_embedding(tmp_path):
    class Tied(linen.Module):
        @linen.compact
        def __call__(self, ids):
            table = linen.Embed(11, 4, name="table")
            return table.attend(linen.Dense(4, name="fc")(table(ids)))

    twin = Twin(
        lambda m, x: m.fc(m.table(x)) @ m.table.weight.T,
        table=nn.Embedding(11, 4),
        fc=nn.Linear(4, 4),
    )
    assert_twin(Tied(), twin, RNG.integers(0, 11, (2, 5)), tmp_path)


@pytest.mark.parametrize("turned", [False, True])
def test_a_decoder_from_a_vector_to_a_map(turned, tmp_path):
    class Decoder(linen.Module):
        @linen.compact
        def __call__(self, z):
            x = linen.relu(linen.Dense(2 * 3 * 4, name="fc")(z)).reshape(-1, 2, 3, 4)
            x = linen.ConvTranspose(5, (3, 3), (2, 2), "VALID", transpose_kernel=turned, name="up")(
                x
            )
            return linen.Conv(3, (1, 1), name="out")(x)

    def run(m, z):
        return m.out(m.up(m.fc(z).relu().unflatten(1, (4, 2, 3))))

    twin = Twin(run, fc=nn.Linear(6, 24), up=nn.ConvTranspose2d(4, 5, 3, 2), out=nn.Conv2d(5, 3, 1))
    assert_twin(Decoder(), twin, images(2, 6), tmp_path)


def test_matrices_over_several_axes(tmp_path):
    class Heads(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.DenseGeneral((2, 3), name="split")(x)
            return linen.DenseGeneral(5, axis=(-2, -1), use_bias=False, name="join")(jnp.tanh(x))

    twin = Twin(
        lambda m, x: m.join(m.split(x).tanh()),
        split=nn.Linear(4, 6),
        join=nn.Linear(6, 5, bias=False),
    )
    assert_twin(Heads(), twin, images(2, 4), tmp_path)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_convolution_of_one_or_three_axes(rank, tmp_path):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(4, (2,) * rank, padding="VALID", name="conv")(x)
            return linen.Dense(5, name="fc")(x.reshape(x.shape[0], -1))

    kind = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
    x = images(2, 3, 4, 5, 2) if rank == 3 else images(2, 5, 2)
    outputs = 4 * int(np.prod([size - 1 for size in x.shape[1:-1]]))
    twin = Twin(
        lambda m, x: m.fc(m.conv(x.movedim(-1, 1)).flatten(1)),
        conv=kind(2, 4, 2),
        fc=nn.Linear(outputs, 5),
    )
    assert_twin(Net(), twin, x, tmp_path)


class Step(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(
            linen.Dense(x.shape[-1], name="fc")(linen.LayerNorm(epsilon=1e-5, name="norm")(x))
        ), None


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("lift", [lambda kind: kind, linen.remat])
def test_a_scanned_stack(axis, lift, tmp_path):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            axes = {"params": axis}
            x, _ = linen.scan(lift(Step), axes, split_rngs={"params": True}, length=4)(
                name="layers"
            )(x, None)
            return linen.Dense(3, name="head")(x)

    def run(m, x):
        for layer in m.layers:
            x = layer.fc(layer.norm(x)).tanh()
        return m.head(x)

    steps = nn.ModuleList(Twin(None, norm=nn.LayerNorm(4), fc=nn.Linear(4, 4)) for _ in range(4))
    assert_twin(Model(), Twin(run, layers=steps, head=nn.Linear(4, 3)), images(2, 4), tmp_path)


def test_a_stack_whose_axis_the_run_does_not_tell_is_asked_for(tmp_path):
    class Experts(linen.Module):
        @linen.compact
        def __call__(self, x):
            axes = {"params": 1}
            kind = linen.vmap(
                linen.Dense, variable_axes=axes, split_rngs={"params": True}, in_axes=0, out_axes=0
            )
            return kind(4, name="experts")(x)

    x = images(4, 2, 4)
    assert "may be stacked on axis 0 or 1 or 2" in refused(Experts(), x, tmp_path)

    def run(m, x):
        return torch.stack([expert(part) for expert, part in zip(m.experts, x)])

    twin = Twin(run, experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(4)))
    assert_twin(Experts(), twin, x, tmp_path, stack_axes={"experts": 1})


class Offset(linen.Module):
    """A parameter that no layer holds."""

    @linen.compact
    def __call__(self, x):
        return (
            linen.Dense(4, name="fc")(x)
            + self.param("offset", linen.initializers.zeros, (4,))[None]
        )


def test_a_parameter_of_a_module_is_refused_and_extra_takes_it(tmp_path):
    assert "offset: a variable of no known layer" in refused(Offset(), images(2, 4), tmp_path)
    twin = Twin(lambda m, x: m.fc(x) + m.shift, fc=nn.Linear(4, 4))
    twin.shift = nn.Parameter(torch.zeros(4))
    assert_twin(
        Offset(), twin, images(2, 4), tmp_path, extra=[("offset", "shift", "features -> features")]
    )


class Doubled(linen.Dense):
    @linen.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Square(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(x)


class Mapped(linen.Module):
    """Layer with a transformed variable: it sees twice the stored array."""

    @linen.compact
    def __call__(self, x):
        double = lambda tree: jax.tree.map(lambda a: a * 2, tree)  # noqa: E731
        return linen.map_variables(Square, "params", trans_in_fn=double, init=True)(name="twice")(x)


class Lookup(linen.Embed):
    def logits(self, x):
        return x @ self.embedding.T * 2


class Output(linen.Module):
    @linen.compact
    def __call__(self, x):
        return Lookup(5, x.shape[-1], name="table").logits(x)


class Around(linen.Module):
    """One layer, made by a function."""

    make: object

    @linen.compact
    def __call__(self, x):
        return self.make()(x)


REFUSED = {
    "a call of its own": (
        lambda: Doubled(4, name="fc"),
        "fc: Doubled: Doubled computes in a __call__ of its own",
    ),
    "another product": (
        lambda: linen.Dense(
            4, name="fc", dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k) * 2
        ),
        "dot_general=",
    ),
    "a method of its own": (Output, "table: Lookup: computes in a method of its own, logits"),
    "a mask": (
        lambda: linen.Conv(4, (1,), mask=jnp.ones((1, 4, 4)), name="conv"),
        "mask: the kernel is multiplied",
    ),
    "normed weights": (
        lambda: linen.WeightNorm(linen.Dense(4)),
        "WeightNorm: computes another kernel",
    ),
    "mapped variables": (
        Mapped,
        "twice.Dense_0: Dense: its arrays are computed from the variables",
    ),
    "a matrix for each index": (
        lambda: linen.DenseGeneral(4, batch_dims=(0,), name="fc"),
        "batch_dims=(0,)",
    ),
    "a norm over two axes": (
        lambda: linen.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), name="n"),
        "torch's norms have the last axis",
    ),
    "no counterpart": (
        lambda: linen.ConvLocal(4, (1,), name="local"),
        "local.kernel: a variable of no known layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case, tmp_path):
    make, reason = REFUSED[case]
    assert reason in " ".join(refused(Around(make), images(2, 3, 4), tmp_path).split())


def test_a_class_of_ones_own_is_told(tmp_path):
    module = Around(lambda: Doubled(4, name="fc"))
    twin = Twin(lambda m, x: 2 * m.fc(x), fc=nn.Linear(4, 4))
    assert_twin(module, twin, images(2, 4), tmp_path, layers={Doubled: linen.Dense})
    rows = [("kernel", "weight", "into out -> out into"), ("bias", "bias", "out -> out")]
    assert_twin(module, twin, images(2, 4), tmp_path / "rows", layers={Doubled: rows})


def test_variables_that_the_run_does_not_reach_are_refused(tmp_path):
    variables = drawn(Square(), images(2, 4))
    variables["params"]["unused"] = {"kernel": images(4, 4)}
    assert "unused.kernel: a variable of no known layer" in refused(
        Square(), images(2, 4), tmp_path, variables
    )


def test_what_a_linen_module_needs(tmp_path):
    x = images(2, 4)
    variables = drawn(Square(), x)
    with pytest.raises(InvalidConfig, match=r"example.*known only once it runs"):
        slipway.export(Square(), {}, tmp_path / "out", variables=variables)
    with pytest.raises(InvalidConfig, match="variables"):
        slipway.export(Square(), {}, tmp_path / "out", example=x)
    with pytest.raises(InvalidConfig, match="variables"):
        slipway.export(Square(), {}, tmp_path / "out", variables=variables["params"], example=x)
    with pytest.raises(InvalidConfig, match="example"):
        slipway.export(Square(), {}, tmp_path / "out", variables=variables, example=images(2, 5))


def test_variables_in_boxes_of_a_mesh(tmp_path):
    class Sharded(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
            return linen.Dense(3, kernel_init=init, name="fc")(x)

    x = images(2, 4)
    variables = Sharded().init(jax.random.key(0), x)
    slipway.export(Sharded(), {}, tmp_path / "out", variables=variables, example=x)
    kernel = np.asarray(variables["params"]["fc"]["kernel"].value)
    held = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(held["fc.weight"].numpy(), kernel.T)
