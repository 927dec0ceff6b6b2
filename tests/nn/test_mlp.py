"""Gated feed-forward layer against transformers' Llama, on one device and split over several."""

import numpy as np
import pytest

from slipway.nn.mlp import MLP
from tests.nn.layers import call, draw, fill, one_sequence

torch = pytest.importorskip("torch")
# f32; values of up to 50 after two sums
BOUNDS = {"rtol": 1e-5, "atol": 1e-4}
NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_llamas(tensor, bias):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    rng = np.random.default_rng(0)
    declared = MLP.declare(12, 20, bias)
    layer = fill(declared, rng)
    x_TD = draw(rng, 7, 12)

    def run(layer, x_TD, step):
        return layer(x_TD, step)[0]

    step = one_sequence(0, 5, padding=2)
    y_TD = call(run, declared, layer, x_TD, step, tensor=tensor)
    theirs = LlamaMLP(
        LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2, mlp_bias=bias)
    )
    with torch.inference_mode():
        for name in NAMES:
            ours = getattr(layer, name)
            getattr(theirs, name).weight.copy_(torch.tensor(np.array(ours.weight)))
            if bias:
                getattr(theirs, name).bias.copy_(torch.tensor(np.array(ours.bias)))
        expected = theirs(torch.tensor(x_TD)).numpy()
    np.testing.assert_allclose(y_TD[:5], expected[:5], **BOUNDS)
