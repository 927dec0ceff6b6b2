"""Cosines and sines of positions, and the rotation by them, against transformers.

Not here: frequencies of a model's config.json (tests/models/test_config.py).
"""

import jax.numpy as jnp
import numpy as np
import pytest

from slipway import ops
from slipway.nn.rope import Rope, Scaling
from tests.nn.layers import CLOSE, draw

torch = pytest.importorskip("torch")
HEAD_DIM, THETA = 16, 1e4
SCALINGS = {
    "default": Scaling(),
    "linear": Scaling("linear", factor=4.0),
    "dynamic": Scaling("dynamic", factor=2.0, original_max_position_embeddings=32),
    "yarn": Scaling("yarn", factor=4.0, original_max_position_embeddings=32),
    "llama3": Scaling("llama3", factor=8.0, original_max_position_embeddings=32),
}


def transformers_angles(scaling, positions):
    """Return the cosines and sines [T, head_dim] of transformers for one sequence."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": scaling.rope_type, "rope_theta": THETA}
    if scaling.rope_type != "default":
        parameters["factor"] = scaling.factor
    if scaling.rope_type in ("yarn", "llama3"):
        length = scaling.original_max_position_embeddings
        parameters["original_max_position_embeddings"] = length
    if scaling.rope_type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    is_dynamic = scaling.rope_type == "dynamic"
    config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=32 if is_dynamic else 128,
        rope_parameters=parameters,
    )
    rope = LlamaRotaryEmbedding(config)
    with torch.inference_mode():
        cos, sin = rope(torch.zeros(1), torch.tensor(positions)[None])
    return cos[0].numpy(), sin[0].numpy()


@pytest.mark.parametrize("count", [20, 100])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_transformers(name, count):
    """100 positions are more than the 32 of the original context."""
    positions = np.arange(count, dtype=np.int32)
    contexts = np.full(count, count, np.int32)
    rope = Rope(HEAD_DIM, THETA, SCALINGS[name])
    found = rope(jnp.asarray(positions), jnp.asarray(contexts))
    for ours, theirs in zip(found, transformers_angles(SCALINGS[name], positions), strict=True):
        assert ours.shape == (count, HEAD_DIM // 2)
        # f32 angles of up to 100 radians
        np.testing.assert_allclose(ours, theirs[:, : HEAD_DIM // 2], rtol=0, atol=3e-5)


def test_dynamic_scaling_follows_the_context_not_the_position():
    rope = Rope(HEAD_DIM, THETA, SCALINGS["dynamic"])
    positions = jnp.full(3, 7, jnp.int32)
    cos_TH, _ = rope(positions, jnp.array([8, 32, 64], jnp.int32))
    np.testing.assert_array_equal(cos_TH[0], cos_TH[1])
    assert np.abs(cos_TH[2] - cos_TH[1]).max() > 1e-3


def test_rotation_is_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rng, count = np.random.default_rng(0), 9
    q_TNH, k_TKH = draw(rng, count, 3, HEAD_DIM), draw(rng, count, 1, HEAD_DIM)
    positions = np.arange(5, 5 + count, dtype=np.int32)
    angles = Rope(HEAD_DIM, THETA)(jnp.asarray(positions), jnp.asarray(positions) + 1)
    cos, sin = transformers_angles(Scaling(), positions)
    as_theirs = [torch.tensor(x).transpose(0, 1)[None] for x in (q_TNH, k_TKH)]
    theirs = apply_rotary_pos_emb(*as_theirs, torch.tensor(cos)[None], torch.tensor(sin)[None])
    for x_TNH, expected in zip((q_TNH, k_TKH), theirs, strict=True):
        found = ops.rotate(jnp.asarray(x_TNH), None, angles, num_tokens=jnp.int32(count))
        np.testing.assert_allclose(found, expected[0].transpose(0, 1).numpy(), **CLOSE)
