"""Exported modules and their torch twins: random weights, a strict load, a comparison of
outputs.
"""

import json

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.torch import load_file
from torch import nn

import slipway
from slipway.convert.export import Options, derive
from slipway.convert.plan import inverse
from slipway.convert.tracing import trace_nnx
from tests.convert.memory import moved, planned, specs_of

RNG = np.random.default_rng(0)


def randomized(module: nnx.Module) -> nnx.Module:
    """Return the module with new random weights and statistics.

    Zeros and ones would hide a swap.
    """

    def draw(path, variable):
        if isinstance(variable, nnx.RngState):
            return variable
        x = RNG.standard_normal(variable[...].shape).astype(np.float32) * 0.3
        return variable.replace(jnp.asarray(np.abs(x) + 0.5 if path[-1] in ("var", "scale") else x))

    nnx.update(module, nnx.map_state(draw, nnx.state(module)))
    return module


def exported(module: nnx.Module, folder, **options) -> dict[str, torch.Tensor]:
    slipway.export(module, {"model_type": "mine"}, folder / "out", **options)
    assert json.loads((folder / "out" / "config.json").read_text())["model_type"] == "mine"
    example = options.pop("example", None)
    derived = derive(
        module, Options(**options), None if example is None else trace_nnx(module, example)
    )
    if not derived.adapter.pairs:  # the derived rules lead back, bit for bit
        arrays = {name: np.ascontiguousarray(x) for name, x in derived.arrays.items()}
        plan = planned(derived.mapping, "to_hf", arrays)
        back, _ = moved(inverse(plan, specs_of(moved(plan, arrays)[0])), moved(plan, arrays)[0])
        assert all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)
    return load_file(folder / "out" / "model.safetensors")


def assert_twins(
    module, twin: nn.Module, x: np.ndarray, folder, channels_last: bool = False, **options
) -> None:
    """Check that the twin loads the export strictly and computes the same.

    Images are NHWC in Flax and NCHW in torch.
    """
    twin.load_state_dict(exported(module, folder, **options), strict=True)
    theirs = np.moveaxis(x, -1, 1).copy() if channels_last else x
    with torch.inference_mode():
        wanted = twin.eval()(torch.from_numpy(theirs)).numpy()
    made = np.asarray(module(jnp.asarray(x)))
    if channels_last and made.ndim > 2:
        made = np.moveaxis(made, -1, 1)
    np.testing.assert_allclose(made, wanted, atol=1e-5, rtol=1e-5)


class Holder(nnx.Module):
    """One layer, under its name in a torch twin."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class Twin(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def images(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)
