"""Root mean square norm against transformers' Llama."""

import jax.numpy as jnp
import numpy as np
import pytest

from slipway.nn.norm import RMSNorm
from tests.nn.layers import CLOSE, call, draw, fill, one_sequence

torch = pytest.importorskip("torch")
EPS = 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [5, 16, 100])
def test_rms_norm_is_llamas(size, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    rng = np.random.default_rng(size)
    declared = RMSNorm.declare("embed", size, EPS)
    layer = fill(declared, rng)
    layer = RMSNorm(layer.weight.astype(dtype), EPS)
    x_TD = 3 * draw(rng, 4, size)

    def run(layer, x_TD, step):
        return layer(x_TD, step)

    y_TD = call(run, declared, layer, jnp.asarray(x_TD, dtype), one_sequence(0, 4))
    theirs = LlamaRMSNorm(size, eps=EPS).to(getattr(torch, dtype))
    weight = np.array(layer.weight.astype(jnp.float32))
    with torch.inference_mode():
        theirs.weight.copy_(torch.tensor(weight))
        expected = theirs(torch.tensor(x_TD).to(getattr(torch, dtype))).float().numpy()
    assert y_TD.dtype == dtype
    bounds = CLOSE if dtype == "float32" else {"rtol": 2**-7, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(y_TD.astype(jnp.float32)), expected, **bounds)
