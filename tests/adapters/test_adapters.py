"""Slipway's classes for vLLM on TPU, called as vLLM calls them, with fakes of its objects and
kernel.

`python -m benchmarks.adapters` does the same with the real ones.
"""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from slipway import models
from slipway.adapters import maxtext
from slipway.adapters import vllm as adapter
from slipway.adapters.engine_fields import FIELDS
from slipway.errors import CheckpointError, InvalidConfig, UnsupportedModel
from tests.adapters import fakes

ROWS, PAGE, PER_ROW = 3, 4, 8


def stand_in_kernel(q_TNH, k_TKH, v_TKH, cache, where, *, scale, window, soft_cap, sinks_N):
    """tpu-inference's ragged paged attention in loops.

    The cache is [pages, page_size, 2 K, 1, H].
    """

    def on_host(*arrays):
        q, k, v, cache, tables, lengths, starts, counts = map(np.asarray, arrays)
        cache, out = cache.copy(), np.zeros_like(q)
        tables = tables.reshape(len(lengths), -1)
        for row in range(counts[2]):
            ids = slice(starts[row], starts[row + 1])
            first = lengths[row] - (starts[row + 1] - starts[row])
            slots = [(tables[row, t // PAGE], t % PAGE) for t in range(lengths[row])]
            for slot, key, value in zip(slots[first:], k[ids], v[ids]):
                cache[slot][0::2, 0], cache[slot][1::2, 0] = key, value
            keys, values = (
                np.stack([cache[slot][part::2, 0] for slot in slots]) for part in (0, 1)
            )
            keys, values = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (keys, values))
            scores = np.einsum("tnh,snh->nts", q[ids], keys) * scale
            seen = np.arange(lengths[row])[None] <= np.arange(first, lengths[row])[:, None]
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[ids] = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), values)
        return out, cache

    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_TNH, cache))
    arrays = where.block_tables, where.seq_lens, where.query_start_loc, where.request_distribution
    return jax.pure_callback(on_host, shapes, q_TNH, k_TKH, v_TKH, cache, *arrays)


CONFIGS = {
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "LlamaForCausalLM": transformers.LlamaConfig,
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "MixtralForCausalLM": transformers.MixtralConfig,
}
EXPERTS = {
    "Qwen3MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    """A random model of each architecture: directory, transformers' model, vLLM's configuration."""
    config = CONFIGS[request.param](
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=request.param == "Qwen2ForCausalLM",
        architectures=[request.param],
        **EXPERTS.get(request.param, {}),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    vllm_config = fakes.VllmConfig(fakes.ModelConfig(str(tmp_path), model.config))
    return request.param, model, vllm_config


def loaded(name, vllm_config, mesh):
    """Make a model as tpu-inference does: shapes first, then weights, then a graph and arrays."""
    kind = adapter.served(name)
    model = nnx.eval_shape(lambda: kind(vllm_config, jax.random.key(0), mesh))
    model.load_weights(jax.random.key(0))
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    return lambda method, *args: getattr(
        nnx.merge(graph, jax.tree.unflatten(structure, leaves)), method
    )(*args)


@pytest.mark.parametrize("devices", [1, 4])
def test_chunks_and_decoding_give_transformers_logits(saved, devices, monkeypatch):
    name, model, vllm_config = saved
    monkeypatch.setattr(adapter, "attention_kernel", lambda: stand_in_kernel)
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "model"))
    call = loaded(name, vllm_config, mesh)
    heads, head_dim = max(2, devices), getattr(model.config, "head_dim", None) or 8
    split = NamedSharding(mesh, P("data", None, "model", None, None))
    caches = [
        jax.device_put(jnp.zeros((1 + ROWS * PER_ROW, PAGE, 2 * heads, 1, head_dim)), split)
        for _ in range(2)
    ]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 67, n).tolist() for n in (11, 3)]
    for chunks in (
        [(0, prompts[0][:6]), (0, prompts[1])],
        [(6, prompts[0][6:])],
        [(11, [5]), (3, [9])],
    ):
        whole = [prompts[0] + [5], prompts[1] + [9]]
        ids = [token for _, tokens in chunks for token in tokens]
        positions = [at for first, tokens in chunks for at in range(first, first + len(tokens))]
        starts = np.ones(ROWS + 1, np.int32)  # what lies behind the last is anything
        starts[: len(chunks) + 1] = np.cumsum([0] + [len(tokens) for _, tokens in chunks])
        lengths = np.zeros(ROWS, np.int32)
        lengths[: len(chunks)] = [first + len(tokens) for first, tokens in chunks]
        padding = [0] * (12 - len(ids))
        where = fakes.AttentionMetadata(
            *(
                jnp.array(x, jnp.int32)
                for x in (
                    positions + padding,
                    1 + np.arange(ROWS * PER_ROW),
                    lengths,
                    starts,
                    [0, 0, len(chunks)],
                )
            )
        )
        caches, hidden, auxiliary, experts = call(
            "__call__", caches, jnp.array(ids + padding, jnp.int32), where
        )
        assert auxiliary == []
        assert experts is None
        assert hidden.shape == (12, 32)
        found, at = np.asarray(call("compute_logits", hidden)), 0
        for row, (first, tokens) in enumerate(chunks):
            with torch.no_grad():
                expected = (
                    model(torch.tensor([whole[row][: first + len(tokens)]]))
                    .logits[0, first:]
                    .numpy()
                )
            np.testing.assert_allclose(found[at : at + len(tokens)], expected, rtol=0, atol=2e-4)
            at += len(tokens)


def test_names_of_trainers_are_read(saved, monkeypatch):
    name, _, vllm_config = saved
    monkeypatch.setattr(adapter, "attention_kernel", lambda: stand_in_kernel)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))

    def arrays():
        made = adapter.served(name)(vllm_config, jax.random.key(0), mesh)
        made.load_weights(jax.random.key(0))
        return [np.asarray(array[...]) for array in made.arrays]

    plain, file = arrays(), Path(vllm_config.model_config.model) / "model.safetensors"
    save_file({f"module.{key}": x for key, x in load_file(file).items()}, file)
    assert all(np.array_equal(one, other) for one, other in zip(plain, arrays(), strict=True))


def test_dummy_weights_need_no_files(saved, monkeypatch):
    name, _, vllm_config = saved
    monkeypatch.setattr(adapter, "attention_kernel", lambda: stand_in_kernel)
    vllm_config.load_config.load_format = "dummy"
    vllm_config.model_config.model = "/not/there"
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    model = adapter.served(name)(vllm_config, jax.random.key(0), mesh)
    assert all(np.isfinite(np.asarray(array[...])).all() for array in model.arrays)
    assert adapter.served(name)._self_manages_sharding is True


def test_refusals(saved, monkeypatch, tmp_path):
    name, _, vllm_config = saved
    monkeypatch.setattr(adapter, "attention_kernel", lambda: stand_in_kernel)
    wide = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "model", "expert"))
    with pytest.raises(InvalidConfig, match="expert"):
        adapter.served(name)(vllm_config, jax.random.key(0), wide)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    vllm_config.model_config.model = str(tmp_path / "nothing")
    (tmp_path / "nothing").mkdir()
    model = nnx.eval_shape(lambda: adapter.served(name)(vllm_config, jax.random.key(0), mesh))
    with pytest.raises(CheckpointError):
        model.load_weights(jax.random.key(0))
    with pytest.raises(InvalidConfig, match="inputs_embeds"):
        model([], None, None, jnp.zeros((2, 32)))


def test_the_plugin_registers_every_architecture_and_maxtext(monkeypatch):
    registered = {}
    loader = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setattr(adapter.importlib, "import_module", lambda name: loader)
    adapter.register()
    names = {f"Slipway{name}" for name in models.ARCHITECTURES}
    assert registered.keys() == names | {"MaxTextForCausalLM"}


def test_without_tpu_inference_the_plugin_does_nothing(caplog):
    caplog.set_level("INFO", adapter.logger.name)
    adapter.register()  # vLLM on a CPU or a GPU calls every plugin, too
    assert "no model is registered" in caplog.text


@pytest.mark.parametrize("kind", FIELDS)
def test_fakes_have_the_fields_that_the_adapters_read(kind):
    assert tuple(field.name for field in dataclasses.fields(getattr(fakes, kind))) == FIELDS[kind]


@pytest.mark.parametrize("kind", FIELDS)
def test_adapters_read_every_declared_field(kind):
    """Fields that no adapter reads need no check by the adapters benchmark."""
    source = Path(adapter.__file__).read_text() + Path(maxtext.__file__).read_text()
    assert not [field for field in FIELDS[kind] if field not in source]


@pytest.mark.parametrize(
    "name, raw, field",
    [
        (
            "DeepseekV3ForCausalLM",
            {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "n_group": 2, "topk_group": 1, "num_hidden_layers": 1},
            "latent attention",
        ),
        ("QWenLMHeadModel", {"num_hidden_layers": 1}, "use_dynamic_ntk"),
    ],
)  # fmt: skip
def test_what_vllms_caches_and_batches_lack_is_refused(name, raw, field):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = types.SimpleNamespace(to_dict=lambda: sizes | raw)
    vllm_config = fakes.VllmConfig(fakes.ModelConfig("nowhere", config))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    with pytest.raises(UnsupportedModel, match=field):
        adapter.served(name)(vllm_config, jax.random.key(0), mesh)
