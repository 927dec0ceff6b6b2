"""The classes that vLLM on TPU is given, called as it calls them, with stand-ins for its objects and its kernel.

`slipway bench adapters` does the same with the real ones.
"""

import dataclasses
import sys
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

from slipway.adapters import maxtext, standins
from slipway.adapters import vllm as adapter
from slipway.errors import CheckpointError, InvalidConfig

ROWS, PAGE, PER_ROW = 3, 4, 8


def stand_in_kernel(q_TNH, k_TKH, v_TKH, cache, where, *, scale, window, soft_cap, sinks_N):
    """tpu-inference's ragged paged attention in loops; its cache as [pages, page_size, 2 K, 1, H]."""

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
            keys, values = (np.stack([cache[slot][part::2, 0] for slot in slots]) for part in (0, 1))
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
}


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    """A random model of each architecture: its directory, transformers' own, and vLLM's configuration of it."""
    config = CONFIGS[request.param](
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=request.param == "Qwen2ForCausalLM",
        architectures=[request.param],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    vllm_config = standins.VllmConfig(standins.ModelConfig(str(tmp_path), model.config))
    return request.param, model, vllm_config


def loaded(name, vllm_config, mesh):
    """As tpu-inference makes a model: its shapes first, then its weights, then a graph and arrays."""
    kind = adapter.served(name)
    model = nnx.eval_shape(lambda: kind(vllm_config, jax.random.key(0), mesh))
    model.load_weights(jax.random.key(0))
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    return lambda method, *args: getattr(nnx.merge(graph, jax.tree.unflatten(structure, leaves)), method)(*args)


@pytest.mark.parametrize("devices", [1, 4])
def test_chunks_and_decoding_give_transformers_logits(saved, devices, monkeypatch):
    name, model, vllm_config = saved
    monkeypatch.setattr(adapter, "attention_kernel", lambda: stand_in_kernel)
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "model"))
    call = loaded(name, vllm_config, mesh)
    heads, head_dim = max(2, devices), getattr(model.config, "head_dim", None) or 8
    split = NamedSharding(mesh, P("data", None, "model", None, None))
    caches = [jax.device_put(jnp.zeros((1 + ROWS * PER_ROW, PAGE, 2 * heads, 1, head_dim)), split) for _ in range(2)]
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
        where = standins.AttentionMetadata(
            *(
                jnp.array(x, jnp.int32)
                for x in (positions + padding, 1 + np.arange(ROWS * PER_ROW), lengths, starts, [0, 0, len(chunks)])
            )
        )
        caches, hidden, auxiliary, experts = call("__call__", caches, jnp.array(ids + padding, jnp.int32), where)
        assert auxiliary == [] and experts is None and hidden.shape == (12, 32)
        found, at = np.asarray(call("compute_logits", hidden)), 0
        for row, (first, tokens) in enumerate(chunks):
            with torch.no_grad():
                expected = model(torch.tensor([whole[row][: first + len(tokens)]])).logits[0, first:].numpy()
            np.testing.assert_allclose(found[at : at + len(tokens)], expected, rtol=0, atol=2e-4)
            at += len(tokens)


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
    names = {f"Slipway{name}" for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")}
    assert registered.keys() == names | {"MaxTextForCausalLM"}


def test_without_tpu_inference_the_plugin_does_nothing(caplog):
    caplog.set_level("INFO", adapter.logger.name)
    adapter.register()  # vLLM on a CPU or a GPU calls every plugin, too
    assert "no model is registered" in caplog.text


# MaxText


def a_config(**fields):
    text = types.SimpleNamespace(num_key_value_heads=8, **fields)
    model = standins.ModelConfig("somewhere", text, hf_config_path="somewhere")
    return standins.VllmConfig(model, additional_config={"maxtext_config": {"model_name": "qwen3-8b"}})


@pytest.mark.parametrize(
    ("heads", "shards", "raised"), [(8, 8, 8), (8, 4, 8), (2, 8, 8), (1, 4, 4), (3, 8, 3), (8, 12, 8), (4, 12, 12)]
)
def test_kv_heads_are_raised_to_a_multiple_that_is_the_shards(heads, shards, raised):
    assert maxtext.raised_kv_heads(heads, shards) == raised


@pytest.mark.parametrize(
    ("size", "shards", "padded"),
    [(768, 1, 768), (768, 4, 1024), (512, 4, 1024), (512, 8, 2048), (1536, 2, 1536), (1408, 1, 2048), (100, 1, 256)],
)
def test_experts_are_padded_to_powers_of_two_until_each_shard_is_aligned(size, shards, padded):
    assert maxtext.padded_moe_mlp_dim(size, shards) == padded
    assert (padded // shards) % 256 == 0


def test_overrides_are_the_users_and_what_the_shards_need(caplog):
    config = a_config(num_global_key_value_heads=4, moe_intermediate_size=512)
    config.sharding_config = standins.ShardingConfig(tp_size=4, expert_size=4, attn_dp_size=2)
    assert maxtext.overrides(config) == {
        "model_name": "qwen3-8b", "base_num_kv_heads": 16, "global_num_kv_heads": 16, "padded_base_moe_mlp_dim": 2048,
    }  # fmt: skip
    assert "512 to 2048" in caplog.text
    nested = a_config()
    nested.model_config.hf_config = types.SimpleNamespace(text_config=nested.model_config.hf_config)
    assert maxtext.overrides(nested) == {"model_name": "qwen3-8b"}
    plain = a_config()
    plain.additional_config = None
    assert maxtext.overrides(plain) == {}


def test_dummy_weights_clear_the_load_path_and_say_so(caplog):
    config = a_config()
    given = config.additional_config["maxtext_config"]
    given["load_parameters_path"] = "gs://there"
    assert maxtext.overrides(config)["load_parameters_path"] == "gs://there"
    config.load_config.load_format = "dummy"
    assert maxtext.overrides(config)["load_parameters_path"] is None
    assert "gs://there is not read" in caplog.text
    assert given["load_parameters_path"] == "gs://there", "the caller's options stay the caller's"


def test_an_hf_path_is_required():
    config = a_config()
    config.model_config.hf_config_path = None
    with pytest.raises(ValueError, match="hf_config_path"):
        maxtext.overrides(config)


class Decoder(nnx.Module):
    """What is called of MaxText's."""

    def __init__(self):
        self.token_embedder = Embedder()
        self.decoder = types.SimpleNamespace(apply_output_head=self.head)

    def head(self, embedder, x_T1D, deterministic, mode):
        assert deterministic and mode == "autoregressive" and embedder is self.token_embedder
        return x_T1D @ embedder.embedding[...].T

    def __call__(
        self,
        decoder_input_tokens,
        decoder_input_embeddings,
        decoder_positions,
        kv_caches,
        attention_metadata,
        model_mode,
    ):
        assert decoder_input_tokens.shape == decoder_positions.shape == (5, 1) and model_mode == "autoregressive"
        x_T1D = self.token_embedder(decoder_input_tokens)
        if decoder_input_embeddings is not None:
            x_T1D = decoder_input_embeddings
        return x_T1D * decoder_positions[..., None].astype(x_T1D.dtype), [cache + 1 for cache in kv_caches]


class Embedder(nnx.Module):
    def __init__(self):
        self.embedding = nnx.Param(jax.random.normal(jax.random.key(0), (11, 6)))

    def __call__(self, ids):
        return self.embedding[...][ids]


@pytest.fixture
def fake_maxtext(monkeypatch):
    """MaxText's four functions; what they were called with."""
    calls = []

    def initialize(argv, **overrides):
        calls.append((argv, overrides))
        return types.SimpleNamespace(logical_axis_rules=[("embed", None)], dtype=jnp.float32, load_parameters_path=None)

    def from_pretrained(config, mesh, model_mode, rng_key):
        calls.append("made")
        return Decoder()

    found = maxtext.MaxText(initialize, from_pretrained, Path("/configs"), "autoregressive")
    monkeypatch.setattr(maxtext.MaxText, "load", staticmethod(lambda: found))
    return calls


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
def test_a_maxtext_model_is_called_as_tpu_inference_calls_models(fake_maxtext):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    config = a_config()
    model = maxtext.MaxTextForCausalLM(config, jax.random.key(0), mesh)
    assert fake_maxtext == [(["", "/configs/inference/vllm.yml"], {"model_name": "qwen3-8b"})]
    for use in (model.get_input_embeddings, lambda: model.compute_logits(jnp.zeros((1, 6)))):
        with pytest.raises(RuntimeError, match="no weights yet"):
            use()
    model.load_weights(jax.random.key(0))
    model.load_weights(jax.random.key(0))
    assert fake_maxtext.count("made") == 1
    where = standins.AttentionMetadata(jnp.arange(5), *(jnp.zeros(1, jnp.int32),) * 4)
    ids = jnp.array([1, 2, 3, 4, 5])
    table = np.asarray(model.get_input_embeddings()[...])
    for metadata in (where, {"layer.0": where, "layer.1": where}):
        caches, hidden, auxiliary, experts = model.forward([jnp.zeros(2)], ids, metadata, None, None, ("layer.0", 0))
        np.testing.assert_allclose(hidden, table[1:6] * np.arange(5)[:, None], rtol=1e-6)
        assert (np.asarray(caches[0]) == 1).all() and auxiliary == [] and experts is None
    _, hidden, *_ = model([jnp.zeros(2)], None, where, jnp.ones((5, 6)))
    np.testing.assert_allclose(hidden, np.ones((5, 6)) * np.arange(5)[:, None])
    np.testing.assert_allclose(model.compute_logits(jnp.ones((3, 6))), np.ones((3, 6)) @ table.T, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(model.embed_input_ids(ids)), table[1:6])


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
def test_dummy_weights_are_made_at_once(fake_maxtext):
    config = a_config()
    config.load_config.load_format = "dummy"
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    maxtext.MaxTextForCausalLM(config, jax.random.key(0), mesh)
    assert fake_maxtext[-1] == "made"


def test_without_maxtext_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxtext", None)
    with pytest.raises(InvalidConfig, match="pip install maxtext"):
        maxtext.MaxText.load()


def test_stand_ins_are_small():
    """They say what is read of the real objects; a field more would be one that nobody needs."""
    held = {f.name for kind in (standins.VllmConfig, standins.AttentionMetadata) for f in dataclasses.fields(kind)}
    source = Path(adapter.__file__).read_text() + Path(maxtext.__file__).read_text()
    assert all(name in source for name in held)
