"""Table of the fields that transformers reads, compared with the installed transformers."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from slipway import models

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
TABLE = json.loads((Path(models.__file__).parent / "reference.json").read_text())
# Where Slipway's default is another value that means the same: 0 stands for "derived from other
# fields".
DERIVED = {
    "num_key_value_heads", "head_dim", "layer_types", "rope_scaling", "rope_theta",
    "partial_rotary_factor",
}  # fmt: skip


# Fields that some architectures read, with their defaults.
OF_ONE_FAMILY = {
    "LlamaForCausalLM": {"mlp_bias": False, "hidden_size": 4096, "sliding_window": None},
    "MixtralForCausalLM": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": {"max_window_layers": 28, "sliding_window": 4096},
    "Qwen2MoeForCausalLM": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 5632},
    "Qwen3ForCausalLM": {"max_window_layers": 28, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"num_experts": 128, "norm_topk_prob": False},
}


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location(
        "config_fields", ROOT / "tools" / "config_fields.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return json.loads(json.dumps(tool.table()))


def test_the_table_covers_the_installed_transformers(generated):
    if generated["transformers"] == TABLE["transformers"]:
        assert generated == TABLE, "run tools/config_fields.py"
    assert generated["architectures"].keys() == TABLE["architectures"].keys()
    for name, fields in generated["architectures"].items():
        assert fields["read"].keys() <= TABLE["architectures"][name]["read"].keys()
    for rope_type, members in generated["rope"].items():
        assert members.keys() <= TABLE["rope"][rope_type].keys()


@pytest.mark.parametrize("name", TABLE["architectures"])
def test_the_walk_finds_what_is_known_to_be_read(name, generated):
    """Reads of each kind: attributes, getattr with a default, pops.

    In base classes, masks, caches and loading too.
    """
    read = generated["architectures"][name]["read"]
    expected = {
        "attention_chunk_size": None, "quantization_config": None,
        "rope_scaling": None, "per_layer_config": None, "original_max_position_embeddings": None,
    }  # fmt: skip
    assert expected.items() <= read.items()
    assert {"hidden_size", "rms_norm_eps", "tie_word_embeddings", "vocab_size"} <= read.keys()
    assert OF_ONE_FAMILY.get(name, {}).items() <= read.items()
    assert not {"unk_token_id", "auto_map", "tokenizer_class", "max_length"} & read.keys()


@pytest.mark.parametrize("name", TABLE["architectures"])
def test_a_field_that_is_left_out_means_what_it_means_to_transformers(name):
    fields = {
        field.name: field for field in dataclasses.fields(models.ARCHITECTURES[name].config_class)
    }
    read = TABLE["architectures"][name]["read"]
    defaults = {field: read[field] for field in fields.keys() & read.keys() - DERIVED}
    for field, default in defaults.items():
        if fields[field].default is not dataclasses.MISSING:
            # An empty list stands for None.
            assert fields[field].default in (default, () if default is None else default), field


@pytest.mark.parametrize("name", TABLE["architectures"])
def test_the_default_base_of_rotation_is_that_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")
    expected = getattr(theirs, "default_theta", 10000.0)
    assert models.ARCHITECTURES[name].config_class.rope_theta == expected
