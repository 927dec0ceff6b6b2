"""Trees without a mapping: names are kept only if they are those of the architecture.

Otherwise nothing is written. transformers is the reference for names.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from slipway import errors
from slipway.convert import hf_classes
from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource
from tests.convert.twins import MAXTEXT, assert_same, tensors

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
CLASSES = {
    "BertForMaskedLM": {**SMALL, "intermediate_size": 40, "max_position_embeddings": 32},
    "BertModel": {**SMALL, "intermediate_size": 40, "max_position_embeddings": 32},
    "T5ForConditionalGeneration": {
        "vocab_size": 48,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
    },
    "GPT2LMHeadModel": {
        "vocab_size": 48,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "MistralForCausalLM": {
        **SMALL,
        "intermediate_size": 40,
        "num_key_value_heads": 2,
        "head_dim": 6,
    },
    "OlmoForCausalLM": {**SMALL, "intermediate_size": 40, "eos_token_id": 2},
    "Olmo2ForCausalLM": {**SMALL, "intermediate_size": 40, "eos_token_id": 2},
    "LlamaForSequenceClassification": {
        **SMALL,
        "intermediate_size": 40,
        "num_labels": 3,
        "pad_token_id": 0,
    },
    "MixtralForCausalLM": {
        **SMALL,
        "intermediate_size": 40,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
    },
    "ViTForImageClassification": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "image_size": 16,
        "patch_size": 8,
    },
}


def saved(name, folder):
    """Save a random model of a transformers class with save_pretrained."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model_class(model_class.config_class(**CLASSES[name])).save_pretrained(folder)
    return folder


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


FOREIGN = {
    "embedder.input_embedding": numbers(48, 24),
    "layers.0.attn.q_einsum.w": numbers(4, 24, 6),
    "layers.0.mlp.gate_proj.kernel": numbers(24, 40),
    **{f"layers.{i}.mlp.odd_proj.kernel": numbers(24, 40) for i in range(20)},
    "final_norm.scale": numbers(24),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_directory_of_an_architecture_that_transformers_knows_stays_itself(name, tmp_path):
    directory = saved(name, tmp_path / "hf")
    conversion, _ = convert(open_source(directory), tmp_path / "out", ConvertConfig())
    assert_same(tensors(tmp_path / "out"), tensors(directory))
    assert name in conversion.plan.mapping.note
    convert(open_source(directory), tmp_path / "npz", ConvertConfig(to="npz"))
    with np.load(tmp_path / "npz" / "params.npz") as archive:
        assert_same({key: archive[key] for key in archive.files}, tensors(directory))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("to", ["hf", "npz", "orbax"])
def test_a_tensor_that_is_missing_or_new_or_of_another_shape_is_named(name, to, tmp_path):
    tree = dict(tensors(saved(name, tmp_path / "hf")))
    names = sorted(key for key in tree if tree[key].ndim == 2 and "layer" in key)
    gone, bent = names[0], names[-1]
    del tree[gone]
    tree[bent] = np.ascontiguousarray(tree[bent].T)
    tree["extra.weight"] = numbers(3)
    with pytest.raises(errors.CheckpointError) as caught:
        options = ConvertConfig(config=tmp_path / "hf", to=to)
        convert(MemorySource(tree), tmp_path / "out", options)
    told = "\n".join(caught.value.problems)
    assert "extra.weight" in told
    assert name in told
    if name == "BertForMaskedLM":  # Mixtral's experts are stacked by the loader: it names the stack
        assert f"{gone}: missing" in told
        assert f"{bent}: got shape" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("mapping", [None, "hf"])
def test_a_foreign_tree_is_refused_with_the_nearest_mapping_and_three_differences(
    name, mapping, tmp_path
):
    model_class = getattr(transformers, name)
    given = model_class.config_class(**CLASSES[name]).to_dict() | {"architectures": [name]}
    with pytest.raises(errors.CheckpointError, match="the nearest is ") as caught:
        convert(
            MemorySource(FOREIGN),
            tmp_path / "out",
            ConvertConfig(mapping=mapping),
            json.loads(json.dumps(given)),
        )
    told = str(caught.value)
    assert sum(key in told for key in FOREIGN) <= 3
    assert not (tmp_path / "out").exists()


def test_a_tree_in_jax_names_of_a_declared_architecture_names_three_differences_too(tmp_path):
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3")
    with pytest.raises(errors.CheckpointError, match=r"the nearest is '.*qwen3") as caught:
        convert(MemorySource(FOREIGN), tmp_path / "out", options)
    assert sum(key in str(caught.value) for key in FOREIGN) <= 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "architectures: got None"),
        ({"model_type": "mine"}, "architectures: got None"),
        (
            {"model_type": "mine", "architectures": ["MineForCausalLM"]},
            "has no class MineForCausalLM",
        ),
        ({"architectures": ["pipeline"]}, "has no class pipeline"),
        ({"architectures": ["BertModel", "BertForMaskedLM"]}, "the name of one class"),
        ({"architectures": "BertModel"}, "the name of one class"),
        (
            {"architectures": ["BertModel"], "hidden_size": 25, "num_attention_heads": 4},
            "cannot make BertModel",
        ),
    ],
)
@pytest.mark.parametrize("to", ["hf", "npz", "orbax"])
def test_an_architecture_that_nothing_knows_is_refused_without_the_flag(given, told, to, tmp_path):
    tree = {"decoder.kernel": numbers(2, 3), "decoder.bias": numbers(3)}
    with pytest.raises(errors.CheckpointError, match=told) as caught:
        convert(MemorySource(tree), tmp_path / "out", ConvertConfig(to=to), given)
    assert "--allow-unknown-names" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mapping", [None, "hf"])
def test_the_flag_takes_names_as_they_are_and_the_report_says_so(mapping, tmp_path):
    tree = {"decoder.kernel": numbers(2, 3), "decoder.bias": numbers(3)}
    options = ConvertConfig(mapping=mapping, allow_unknown_names=True)
    given = {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    conversion, _ = convert(
        MemorySource({f"params.{k}": x for k, x in tree.items()}), tmp_path / "out", options, given
    )
    assert_same(tensors(tmp_path / "out"), tree)
    assert "unchecked" in conversion.plan.mapping.note


@pytest.mark.parametrize("other", [{"mapping": "nnx"}, {"mapping": "maxtext"}, {"to": "maxtext"}])
def test_the_flag_is_refused_where_it_would_do_nothing(other):
    options = ConvertConfig(allow_unknown_names=True, **other)
    with pytest.raises(errors.InvalidConfig, match="allow_unknown_names"):
        prepare(MemorySource(FOREIGN), options, {})


def test_the_flag_does_not_keep_a_mapping_from_being_taken():
    options = ConvertConfig(allow_unknown_names=True, config=MAXTEXT / "hf_qwen3")
    assert (
        prepare(open_source(MAXTEXT / "qwen3_scan_orbax"), options).plan.mapping.name
        == "maxtext qwen3, scanned"
    )


@pytest.mark.parametrize("package", hf_classes.NEEDED)
def test_without_transformers_the_error_says_what_is_not_installed(package, monkeypatch, tmp_path):
    directory = saved("BertModel", tmp_path / "hf")
    find = hf_classes.importlib.util.find_spec
    monkeypatch.setattr(
        hf_classes.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(
        errors.CheckpointError, match=f"BertModel are not known here: {package} not installed"
    ):
        convert(open_source(directory), tmp_path / "out", ConvertConfig())
    convert(open_source(directory), tmp_path / "out", ConvertConfig(allow_unknown_names=True))
    assert_same(tensors(tmp_path / "out"), tensors(directory))


@pytest.mark.parametrize("root", ["params.", "params.params."])
def test_scalars_beside_the_weights_are_left_out(root, tmp_path):
    directory = saved("BertForMaskedLM", tmp_path / "hf")
    tree = {root + name: x for name, x in tensors(directory).items()}
    beside = {"epoch": np.int32(3), "best.loss": np.float32(0.5)}
    conversion, _ = convert(
        MemorySource(tree | beside), tmp_path / "out", ConvertConfig(config=directory)
    )
    assert_same(tensors(tmp_path / "out"), tensors(directory))
    assert {"epoch", "best.loss"} <= set(conversion.plan.ignored)
    with pytest.raises(errors.CheckpointError, match=r"best\.loss"):
        convert(
            MemorySource(tree | {"best.loss": numbers(2)}),
            tmp_path / "more",
            ConvertConfig(config=directory),
        )


def test_a_comparison_leaves_torchs_meta_device_whole():
    """Torch lists the constructors that obey torch.device at its first use, for good."""
    script = (
        "import torch, transformers\n"
        "from slipway.convert import hf_classes\n"
        "config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1).to_dict()\n"
        "hf_classes.compare(config | {'architectures': ['GPT2LMHeadModel']}, {})\n"
        "with torch.device('meta'):\n"
        "    print(torch.linspace(0, 1, 3).device)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "meta"
