"""Attention layer against transformers' layers: whole prompts, chunks, windows, split heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import mesh
from slipway.nn.attention import Attention
from slipway.nn.rope import Rope
from slipway.ops import kv_cache
from slipway.ops.kv_cache import CacheSpec
from tests.nn.layers import F32, WHOLE, call, draw, fill, one_sequence

torch = pytest.importorskip("torch")
COUNT, NUM_PAGES, PAGE_SIZE = 13, 8, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Fields of a config.json that a layer reads."""

    hidden_size: int = 24
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 8
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4


SHAPE = Shape()
ROPE = Rope(SHAPE.head_dim, SHAPE.rope_theta)
KINDS = {
    "qwen3": {"qk_norm": "head"},
    "qwen2": {"qkv_bias": True},
    "llama": {},
    "a window of 5": {"window": 5},
}


def expected_of(kind, layer, x_TD):
    """Return the output of transformers' layer of this kind with the same weights."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    attention, config_class = {
        "qwen3": (Qwen3Attention, transformers.Qwen3Config),
        "qwen2": (Qwen2Attention, transformers.Qwen2Config),
    }.get(kind, (LlamaAttention, transformers.LlamaConfig))
    fields = dataclasses.asdict(SHAPE)
    theta = fields.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    config = config_class(**fields, rope_parameters=rope, attn_implementation="eager")
    theirs = attention(config, layer_idx=0).eval()
    count = len(x_TD)
    near = np.tri(count, dtype=bool)
    if layer.cache_spec.window is not None:
        near &= ~np.tri(count, k=-layer.cache_spec.window, dtype=bool)
    mask = torch.tensor(np.where(near, 0.0, -np.inf).astype(np.float32))[None, None]
    with torch.inference_mode():
        for name in PROJECTIONS:
            ours = getattr(layer, name)
            getattr(theirs, name).weight.copy_(torch.tensor(np.array(ours.weight)))
            if ours.bias is not None:
                getattr(theirs, name).bias.copy_(torch.tensor(np.array(ours.bias)))
        if layer.q_norm is not None:
            theirs.q_norm.weight.copy_(torch.tensor(np.array(layer.q_norm.weight)))
            theirs.k_norm.weight.copy_(torch.tensor(np.array(layer.k_norm.weight)))
        x = torch.tensor(x_TD)[None]
        angles = LlamaRotaryEmbedding(config)(x, torch.arange(count)[None])
        y, _ = theirs(x, position_embeddings=angles, attention_mask=mask)
    return y[0].numpy()


def run_chunks(declared, layer, x_TD, chunks, tensor=1):
    """Return the layer's output for one sequence, computed in chunks of these sizes."""
    spec = CacheSpec(num_layers=2, num_kv_heads=SHAPE.num_key_value_heads, head_dim=SHAPE.head_dim)
    sizes = {"platform": "cpu", "page_size": PAGE_SIZE, "dtype": F32, "tensor": tensor}
    (cache,) = kv_cache.allocate([spec], [NUM_PAGES], **sizes)
    cache_specs = jax.tree.map(lambda _: mesh.spec(cache.axes, mesh.make_mesh()), cache)
    specs = {"specs": [cache_specs], "out_specs": (WHOLE, cache_specs)}
    outputs, first = [], 0

    def run(layer, cache, x_TD, step):
        return layer(x_TD, cache, 1, step)

    for count in chunks:
        step = one_sequence(first, count, padding=2, num_pages=NUM_PAGES, rope=ROPE)
        padded_TD = np.pad(x_TD[first : first + count], [(0, 2), (0, 0)])
        operands = cache, padded_TD, step
        y_TD, cache = call(run, declared, layer, *operands, tensor=tensor, **specs)
        outputs.append(np.asarray(y_TD)[:count])
        first += count
    return np.concatenate(outputs)


@pytest.mark.parametrize("chunks", [[COUNT], [6, 1, 6]], ids=["a prompt", "chunks and tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_transformers(kind, chunks):
    rng = np.random.default_rng(0)
    declared = Attention.declare(SHAPE, **KINDS[kind])
    layer = fill(declared, rng)
    x_TD = draw(rng, COUNT, SHAPE.hidden_size)
    expected = expected_of(kind, layer, x_TD)
    found = run_chunks(declared, layer, x_TD, chunks)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tensor", [2, 4])
def test_split_heads_give_the_whole_result(tensor):
    """4 devices hold each of the 2 key-value heads twice."""
    rng = np.random.default_rng(1)
    declared = Attention.declare(SHAPE, qk_norm="head")
    layer = fill(declared, rng)
    x_TD = draw(rng, COUNT, SHAPE.hidden_size)
    expected = run_chunks(declared, layer, x_TD, [6, 7])
    fitted = mesh.fit(declared, mesh.make_mesh(1, tensor))
    k_proj = _repeated(fitted.k_proj, layer.k_proj)
    v_proj = _repeated(fitted.v_proj, layer.v_proj)
    split = dataclasses.replace(layer, k_proj=k_proj, v_proj=v_proj)
    found = run_chunks(fitted, split, x_TD, [6, 7], tensor)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def _repeated(declared, linear):
    """Return a projection with its rows repeated as a mesh needs them."""
    param = declared.weight
    weight = param.read(np.asarray(linear.weight), tuple(map(slice, param.shape)))
    return dataclasses.replace(linear, weight=jnp.asarray(weight))
