"""MaxText's models for vLLM on TPU, with fakes of MaxText.

`python -m benchmarks.adapters --maxtext` does the same with the real one.
"""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from slipway.adapters import maxtext
from slipway.errors import InvalidConfig
from tests.adapters import fakes


def a_config(**fields):
    text = types.SimpleNamespace(
        num_key_value_heads=8, hidden_size=6, num_hidden_layers=2, **fields
    )
    model = fakes.ModelConfig("somewhere", text, hf_config_path="somewhere")
    return fakes.VllmConfig(model, additional_config={"maxtext_config": {"model_name": "qwen3-8b"}})


@pytest.mark.parametrize(
    ("heads", "shards", "raised"),
    [(8, 8, 8), (8, 4, 8), (2, 8, 8), (1, 4, 4), (3, 8, 3), (8, 12, 8), (4, 12, 12)],
)
def test_kv_heads_are_raised_to_a_multiple_that_is_the_shards(heads, shards, raised):
    assert maxtext.raised_kv_heads(heads, shards) == raised


@pytest.mark.parametrize(
    ("size", "shards", "padded"),
    [
        (768, 1, 768),
        (768, 4, 1024),
        (512, 4, 1024),
        (512, 8, 2048),
        (1536, 2, 1536),
        (1408, 1, 2048),
        (100, 1, 256),
    ],
)
def test_experts_are_padded_to_powers_of_two_until_each_shard_is_aligned(size, shards, padded):
    assert maxtext.padded_moe_mlp_dim(size, shards) == padded
    assert (padded // shards) % 256 == 0


def test_overrides_are_the_users_and_what_the_shards_need(caplog):
    config = a_config(num_global_key_value_heads=4, moe_intermediate_size=512)
    config.sharding_config = fakes.ShardingConfig(tp_size=4, expert_size=4, attn_dp_size=2)
    assert maxtext.overrides(config) == {
        "model_name": "qwen3-8b",
        "base_num_kv_heads": 16,
        "global_num_kv_heads": 16,
        "padded_base_moe_mlp_dim": 2048,
    }
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
    assert maxtext.overrides(config) == {"model_name": "qwen3-8b"}, "MaxText refuses None"
    assert "gs://there is not read" in caplog.text
    assert given["load_parameters_path"] == "gs://there", "the caller's options stay the caller's"


def test_an_hf_path_is_required():
    config = a_config()
    config.model_config.hf_config_path = None
    with pytest.raises(ValueError, match="hf_config_path"):
        maxtext.overrides(config)


def one_device():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


class Decoder(nnx.Module):
    """The part of MaxText's decoder that is called."""

    def __init__(self):
        self.token_embedder = Embedder()
        self.decoder = types.SimpleNamespace(apply_output_head=self.head)

    def head(self, embedder, x_T1D, deterministic, mode):
        assert deterministic
        assert mode == "autoregressive"
        assert embedder is self.token_embedder
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
        for layer in range(len(kv_caches)):
            kv_caches[layer] = kv_caches[layer] + 10**layer
        assert decoder_input_tokens.shape == decoder_positions.shape == (5, 1)
        assert model_mode == "autoregressive"
        x_T1D = self.token_embedder(decoder_input_tokens)
        if decoder_input_embeddings is not None:
            x_T1D = decoder_input_embeddings
        return x_T1D * decoder_positions[..., None].astype(x_T1D.dtype), kv_caches


class Embedder(nnx.Module):
    def __init__(self):
        self.embedding = nnx.Param(jax.random.normal(jax.random.key(0), (11, 6)))

    def __call__(self, ids):
        return self.embedding[...][ids]


def made_configuration(load_parameters_path="", model_name="default", rope_type="default", **sizes):
    """Return the part of MaxText's configuration that is read.

    Its path is text, empty where there is none.
    """
    return types.SimpleNamespace(
        logical_axis_rules=[("embed", None)],
        dtype=jnp.float32,
        load_parameters_path=load_parameters_path,
        mesh_axes=["data", "model"],
        emb_dim=6,
        num_decoder_layers=2,
        model_name=model_name,
        rope_type=rope_type,
    )


@pytest.fixture
def fake_maxtext(monkeypatch):
    """Fakes of MaxText's four functions; the value is their arguments."""
    calls = []

    def initialize(argv, **overrides):
        calls.append((argv, overrides))
        return made_configuration(**overrides)

    def from_pretrained(config, mesh, model_mode, rng_key):
        calls.append("made")
        return Decoder()

    found = maxtext.MaxText(initialize, from_pretrained, Path("/configs"), "autoregressive")
    monkeypatch.setattr(maxtext.MaxText, "load", staticmethod(lambda: found))
    return calls


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
def test_a_maxtext_model_is_called_as_tpu_inference_calls_models(fake_maxtext):
    mesh = one_device()
    config = a_config()
    model = maxtext.MaxTextForCausalLM(config, jax.random.key(0), mesh)
    assert fake_maxtext == [(["", "/configs/inference/vllm.yml"], {"model_name": "qwen3-8b"})]
    for use in (model.get_input_embeddings, lambda: model.compute_logits(jnp.zeros((1, 6)))):
        with pytest.raises(RuntimeError, match="no weights yet"):
            use()
    model.load_weights(jax.random.key(0))
    model.load_weights(jax.random.key(0))
    assert fake_maxtext.count("made") == 1
    where = fakes.AttentionMetadata(jnp.arange(5), *(jnp.zeros(1, jnp.int32),) * 4)
    ids = jnp.array([1, 2, 3, 4, 5])
    table = np.asarray(model.get_input_embeddings()[...])
    for metadata in (where, {"layer.0": where, "layer.1": where}):
        caches, hidden, auxiliary, experts = model.forward(
            [jnp.zeros(2)], ids, metadata, None, None, (("layer.0", 0),)
        )
        np.testing.assert_allclose(hidden, table[1:6] * np.arange(5)[:, None], rtol=1e-6)
        assert (np.asarray(caches[0]) == 1).all()
        assert auxiliary == []
        assert experts is None
    _, hidden, *_ = model([jnp.zeros(2)], None, where, jnp.ones((5, 6)))
    np.testing.assert_allclose(hidden, np.ones((5, 6)) * np.arange(5)[:, None])
    np.testing.assert_allclose(
        model.compute_logits(jnp.ones((3, 6))), np.ones((3, 6)) @ table.T, rtol=1e-5
    )
    np.testing.assert_array_equal(np.asarray(model.embed_input_ids(ids)), table[1:6])


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
@pytest.mark.parametrize(
    ("places", "left"),
    [((), [1, 10, 100]), ((2, 0, 1), [10, 100, 1]), ((0, 1, 0), [101, 10])],
    ids=["as they come", "in another order", "two layers in one"],
)
def test_every_layer_has_the_cache_that_its_name_leads_to(fake_maxtext, places, left):
    model = maxtext.MaxTextForCausalLM(a_config(), jax.random.key(0), one_device())
    model.load_weights(jax.random.key(0))
    names = (
        *((f"layer.{layer}", place) for layer, place in enumerate(places)),
        ("layer.0.state", 5),
    )
    where = fakes.AttentionMetadata(jnp.arange(5), *(jnp.zeros(1, jnp.int32),) * 4)
    caches, *_ = model(
        [jnp.zeros((), jnp.int32) for _ in left], jnp.arange(5), where, None, None, names
    )
    assert [int(cache) for cache in caches] == left


def test_a_decoder_that_drops_a_cache_is_refused():
    """MaxText's Llama returns None for a cache where a checkpoint's layers are scanned.

    It skips attention at None.
    """
    caches = maxtext.ByLayer([jnp.zeros(2)], {0: 0})
    with pytest.raises(InvalidConfig, match="scan_layers=False"):
        caches[0] = None


def test_what_does_not_go_together_is_refused_before_anything_is_made(fake_maxtext):
    flat = Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.raises(InvalidConfig, match="NEW_MODEL_DESIGN=1"):
        maxtext.MaxTextForCausalLM(a_config(), jax.random.key(0), flat)
    for field, name in (("hidden_size", "emb_dim"), ("num_hidden_layers", "num_decoder_layers")):
        config = a_config()
        setattr(config.model_config.hf_config, field, 7)
        with pytest.raises(InvalidConfig, match=f"{name}.*{field}"):
            maxtext.MaxTextForCausalLM(config, jax.random.key(0), one_device())
    assert "made" not in fake_maxtext


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("model_name", "rope_type", "hf", "is_right"),
    [
        ("llama3-8b", "default", {}, True),
        ("llama3-8b", "default", {"rope_scaling": {"rope_type": "llama3"}}, False),
        ("llama3.1-8b", "default", {"rope_scaling": {"rope_type": "llama3"}}, True),
        ("llama3.2-1b", "LLAMA3.1", {"rope_parameters": {"rope_type": "llama3"}}, True),
        ("llama3.2-1b", "llama3.1", {"rope_parameters": {"rope_type": "default"}}, False),
        ("llama2-7b", "yarn", {"rope_scaling": {"type": "yarn"}}, True),
        ("llama2-7b", "yarn", {}, False),
    ],
)
def test_maxtexts_rotary_embedding_is_the_one_that_a_conversion_follows(
    model_type, model_name, rope_type, hf, is_right
):
    config = made_configuration(model_name=model_name, rope_type=rope_type)
    described = types.SimpleNamespace(
        hidden_size=6, num_hidden_layers=2, model_type=model_type, **hf
    )
    if is_right:
        maxtext.check(config, described, one_device())
        return
    with pytest.raises(InvalidConfig, match="rope_type of maxtext_config"):
        maxtext.check(config, described, one_device())


def test_other_families_have_one_rotary_embedding():
    described = types.SimpleNamespace(
        hidden_size=6, num_hidden_layers=2, model_type="qwen3", rope_scaling={"rope_type": "llama3"}
    )
    maxtext.check(made_configuration(), described, one_device())


@pytest.mark.parametrize("ends", [True, False], ids=["it ends the process", "it raises"])
def test_options_that_maxtext_refuses_are_an_error(ends):
    def initialize(argv, **overrides):
        try:
            raise ValueError("no model of that name")
        except ValueError:
            if ends:
                sys.exit(2)  # as MaxText does outside of pytest
            raise

    with pytest.raises(InvalidConfig, match=r"maxtext_config.*qwen3-8b.*no model of that name"):
        maxtext.configuration(a_config(), maxtext.MaxText(initialize, None, Path("/configs"), None))


def test_without_a_path_it_says_that_the_weights_are_random(fake_maxtext, caplog):
    maxtext.MaxTextForCausalLM(a_config(), jax.random.key(0), one_device())
    assert "weights will be random" in caplog.text


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
def test_dummy_weights_are_made_at_once(fake_maxtext):
    config = a_config()
    config.load_config.load_format = "dummy"
    mesh = one_device()
    maxtext.MaxTextForCausalLM(config, jax.random.key(0), mesh)
    assert fake_maxtext[-1] == "made"


def test_without_maxtext_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxtext", None)
    with pytest.raises(InvalidConfig, match="pip install maxtext"):
        maxtext.MaxText.load()
