"""Values of config.json: both forms of rope fields, nulls, windows, errors that name the field."""

import copy
import dataclasses

import numpy as np
import pytest

from slipway.errors import UnsupportedModel
from slipway.models import reference
from slipway.models.llama import LlamaConfig
from slipway.models.qwen2 import Qwen2Config
from slipway.nn.rope import Rope, Scaling

pytestmark = pytest.mark.host
BASE = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}


def read(kind=LlamaConfig, **fields):
    return kind.read(BASE | fields)


def test_derived_fields():
    config = read()
    assert (config.num_key_value_heads, config.head_dim, config.windows) == (
        4,
        4,
        (None, None, None),
    )


def test_null_key_value_heads_are_as_many_as_the_attention_heads():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Grouped(LlamaConfig):
        num_key_value_heads: int = 2

    assert read(Grouped, num_key_value_heads=None).num_key_value_heads == 4
    assert read(Grouped).num_key_value_heads == 2


def test_a_base_of_rotation_that_is_left_out_is_that_of_the_family():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Far(LlamaConfig):
        rope_theta: float = 5e6

    assert read(Far).rope_theta == 5e6
    assert read(Far, rope_theta=1e4).rope_theta == 1e4


@pytest.mark.parametrize(
    "fields, theta, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, Scaling()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, Scaling()),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, Scaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, Scaling("linear", 2.0, 64)),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, 1e4,
         Scaling("yarn", 4.0, 64)),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, 1e4,
         Scaling("yarn", 4.0, 16)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0,
           "original_max_position_embeddings": 9}}, 1e4,
         Scaling("dynamic", 2.0, 64)),
    ],
)  # fmt: skip
def test_rope(fields, theta, scaling):
    config = read(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "fields, windows",
    [
        ({"sliding_window": 16}, (None, None, None)),
        ({"sliding_window": 0}, (None, None, None)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
         (None, None, 16)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, (16, 16, 16)),
        ({"use_sliding_window": True, "max_window_layers": 1}, (None, 4096, 4096)),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
         (None, None, None)),
        ({"use_sliding_window": True, "sliding_window": 16,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
         (16, None, 16)),
    ],
)  # fmt: skip
def test_windows(fields, windows):
    assert read(Qwen2Config, **fields).windows == windows


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
         "rope_scaling.full_attention"),
        ({"rope_scaling": YARN | {"finetuned": {"x": 1}}}, "rope_scaling.finetuned"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_chunk_size": 8}, "attention_chunk_size"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"per_layer_config": {"0": {"hidden_size": 4}}}, "per_layer_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": "16"},
         "rope_scaling.original_max_position_embeddings"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, "rope_theta"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields, field):
    with pytest.raises(UnsupportedModel) as caught:
        read(**fields)
    assert caught.value.field == f"config.json: {field}"
    assert "hf_overrides" not in str(caught.value)


# As files on the hub have them: no code of transformers reads any of these for a Llama.
UNREAD = {
    "unk_token_id": 0, "is_llama_config": True, "rope_interleaved": False,
    "transformers.js_config": {"dtype": "q4"},
    "auto_map": {"AutoConfig": "configuration_x.XConfig"}, "tokenizer_class": "LlamaTokenizer",
    "prefix": "x",
    "neftune_noise_alpha": 5.0, "finetuning_task": "x", "unsloth_version": "2025.1",
    "decoder_start_token_id": 1,
    "use_sliding_window": True, "max_window_layers": 1, "use_mrope": False, "mup": 0,
    "pruned_heads": {},
}  # fmt: skip
# Read or declared by transformers, and without a part in the logits.
WITHOUT_EFFECT = {
    "quantization_config": None, "sep_token_id": 2, "pad_token_id": 0, "num_labels": 2,
    "attn_implementation": "sdpa",
    "output_scores": True, "suppress_tokens": [1], "temperature": 0.6, "forced_bos_token_id": 3,
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 4, "use_cache": False, "attention_dropout": 0.5,
    "initializer_range": 1.0,
    "id2label": {"0": "x"}, "problem_type": None, "_name_or_path": "x", "torch_dtype": "bfloat16",
    "is_causal": True,
    "layer_types": ["full_attention"] * 3, "sliding_window": None, "partial_rotary_factor": 1.0,
}  # fmt: skip


def test_a_field_that_nothing_reads_is_a_warning_once(caplog):
    reference.warn_unread.cache_clear()
    for _ in range(2):
        assert read(architectures=["LlamaForCausalLM"], **UNREAD | WITHOUT_EFFECT) == read()
    [line] = caplog.messages
    assert all(field in line for field in UNREAD)
    assert not any(f" {field}" in line for field in WITHOUT_EFFECT)


def test_a_field_of_another_architecture():
    """Qwen2 always has biases and does not read attention_bias; Llama reads it."""
    assert read(Qwen2Config, architectures=["Qwen2ForCausalLM"], attention_bias=False)
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        read(architectures=["LlamaForCausalLM"], sliding_window=16)
    assert read(Qwen2Config, architectures=["Qwen2ForCausalLM"], sliding_window=16)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": YARN, "original_max_position_embeddings": 16},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 32},
         "original_max_position_embeddings": 16},
        {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2,
          "finetuned": True}},
        {"rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 2.0, "truncate": False,
          "type": "yarn"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 3.0, "mscale": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
         "original_max_position_embeddings": 16},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 32, "beta_fast": 1}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0},
         "original_max_position_embeddings": 16, "rope_theta": 5e5},
        {"rope_parameters": YARN | {"rope_theta": 5e5, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_rope_as_transformers_computes_it(fields):
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    raw = BASE | {"hidden_size": 64, "num_attention_heads": 4} | fields
    theirs = transformers.LlamaConfig(**copy.deepcopy(raw))
    wanted, factor = rope_utils.ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](
        theirs, "cpu"
    )
    config = LlamaConfig.read(raw)
    rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(rope.frequencies(), wanted.numpy(), rtol=1e-6)
    assert rope.attention_factor() == pytest.approx(factor)
