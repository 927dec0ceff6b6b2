"""Tests of `--merge-lora` against PEFT's own merge, for every field of adapter_config.json."""

import dataclasses
import json

import numpy as np
import pytest

from slipway import errors
from slipway.checkpoint import files
from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.lora import _INERT, _Config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.numpy")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's, about fields that it ignores
    pytest.mark.xdist_group("peft"),
]
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def qwen2(tied=False):
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    return model


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


MODELS = {"qwen2": qwen2, "tied": lambda: qwen2(True), "gpt2": gpt2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of the base models."""
    root = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
    return root


def train(model, root, **fields):
    """Save a random adapter as PEFT saves it; return the merged model's tensors."""
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**PLAIN | {"task_type": "CAUSAL_LM"} | fields)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(root / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    return {name: tensor.numpy().copy() for name, tensor in merged.items()}


def merged_by_us(base, root):
    convert(open_source(base), root / "out", ConvertConfig(merge_lora=root / "adapter"))
    return safetensors.load_file(root / "out" / "model.safetensors")


def edit(root, **fields):
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(root, change):
    """Replace the adapter's tensors by ``change`` of them."""
    path = root / "adapter" / "adapter_model.safetensors"
    safetensors.save_file(change(safetensors.load_file(path)), path)


def refusal(base, root):
    with pytest.raises(errors.CheckpointError) as caught:
        prepare(open_source(base), ConvertConfig(merge_lora=root / "adapter"))
    return caught.value.problems


HONOURED = {
    "plain": ("qwen2", {}),
    "rslora": ("qwen2", {"use_rslora": True}),
    "a regular expression": (
        "qwen2",
        {"target_modules": r".*\.(0|2)\.(mlp|self_attn)\.(up|q)_proj"},
    ),
    "all linear": ("qwen2", {"target_modules": "all-linear"}),
    "full names": ("qwen2", {"target_modules": ["model.layers.1.mlp.down_proj", "lm_head"]}),
    "excluded": ("qwen2", {"exclude_modules": ["layers.1.self_attn.q_proj", "lm_head"]}),
    "excluded by an expression": ("qwen2", {"exclude_modules": r".*layers\.[01]\..*"}),
    "a layer": ("qwen2", {"layers_to_transform": 1}),
    "layers": ("qwen2", {"layers_to_transform": [0, 2]}),
    "layers of a pattern": ("qwen2", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "layers of patterns": (
        "qwen2",
        {"layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    ),
    "ranks": ("qwen2", {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 8}}),
    "ranks and alphas": (
        "qwen2",
        {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {"v_proj": 3.5}, "use_rslora": True},
    ),
    "a partial name is no pattern": ("qwen2", {"alpha_pattern": {"_proj": 30, "layers.1": 30}}),
    "saved modules": ("qwen2", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved modules with parts": ("qwen2", {"modules_to_save": ["mlp", "norm"]}),
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of adapted modules": ("qwen2", {"bias": "lora_only"}),
    "the embeddings": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gaussian": ("qwen2", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("qwen2", {"init_lora_weights": "orthogonal"}),
    "mica": ("qwen2", {"init_lora_weights": "mica"}),
    "no init": ("qwen2", {"init_lora_weights": False}),
    "dropout": ("qwen2", {"lora_dropout": 0.5}),
    "W stored as (in, out), a square one too": ("gpt2", {"target_modules": ["c_proj", "c_attn"]}),
    "fan_in_fan_out given": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    "a tied model": ("tied", {}),
}


@pytest.mark.parametrize("case", HONOURED)
def test_equal_to_peft(case, bases, tmp_path):
    kind, fields = HONOURED[case]
    wanted = train(MODELS[kind](), tmp_path, **fields)
    ours, base = (
        merged_by_us(bases / kind, tmp_path),
        safetensors.load_file(bases / kind / "model.safetensors"),
    )
    assert ours.keys() == base.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert any(not np.array_equal(array, base[name]) for name, array in ours.items())


def test_fan_in_fan_out_means_nothing_to_a_linear_layer(bases, tmp_path):
    wanted = train(qwen2(), tmp_path)
    edit(tmp_path, fan_in_fan_out=True)
    loaded = (
        peft.PeftModel.from_pretrained(qwen2(), tmp_path / "adapter")
        .merge_and_unload()
        .state_dict()
    )
    ours = merged_by_us(bases / "qwen2", tmp_path)
    for name, array in ours.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(array, loaded[name].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_what_changed_the_base_is_refused_until_it_is_converted(kind, bases, tmp_path):
    model = peft.get_peft_model(qwen2(), peft.LoraConfig(**PLAIN, init_lora_weights=kind))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = kind
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    model.save_pretrained(tmp_path / "adapter")
    [problem] = refusal(bases / "qwen2", tmp_path)
    assert "init_lora_weights" in problem
    assert kind in problem
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    ours = merged_by_us(bases / "qwen2", tmp_path)
    wanted = model.merge_and_unload().state_dict()
    for name, array in ours.items():
        np.testing.assert_allclose(array, wanted[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "OLoRA"},
        {"init_lora_weights": "something newer"},
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["x"]},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 2]]},
        {"megatron_config": {"x": 1}},
        {"use_qalora": True},
        {"use_bdlora": {} | {"x": 1}},
        {"arrow_config": {"x": 1}},
        {"kasa_config": {"beta": 1}},
        {"velora_config": {"x": 1}},
        {"monteclora_config": {"x": 1}},
        {"a_field_of_next_year": "x"},
        {"bias": "some"},
        {"r": "4"},
        {"r": 0},
        {"lora_alpha": [1]},
        {"target_modules": None},
        {"rank_pattern": [1]},
        {"target_modules": "(q_proj"},
        {"peft_type": "ADALORA"},
        {"peft_type": "IA3"},
        {"peft_type": None},
    ],
    ids=str,
)
def test_refused_by_name(fields, bases, tmp_path):
    train(qwen2(), tmp_path)
    edit(tmp_path, **fields)
    field = next(iter(fields))
    told = refusal(bases / "qwen2", tmp_path)
    assert any(
        field in problem or "regular" in problem or "unterminated" in problem for problem in told
    ), told


def test_every_field_of_peft_is_accounted_for(bases, tmp_path):
    """Every field of PEFT's config is read, irrelevant to the merge, or refused if set."""
    train(qwen2(), tmp_path)
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name in _Config.__struct_fields__ or field.name in _INERT:
            continue
        edit(tmp_path, **{field.name: "set"})
        told = refusal(bases / "qwen2", tmp_path)
        assert any(
            problem.startswith(f"adapter_config.json: {field.name}: got 'set'") for problem in told
        ), field.name
        edit(tmp_path, **{field.name: None})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": ["q_proj"]}, "does not name model.layers.0.self_attn.v_proj"),
        ({"exclude_modules": ["v_proj"]}, "does not name model.layers.0.self_attn.v_proj"),
        ({"layers_to_transform": [0]}, "does not name model.layers.1.self_attn.q_proj"),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj"]},
            "target_modules names model.layers.0.self_attn.o_proj",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "lm_head.weight: missing, though modules_to_save names it",
        ),
        ({"r": 8}, "rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 4, but adapter_config.json says 2"),
    ],
    ids=str,
)
def test_a_config_and_tensors_that_disagree(fields, named, bases, tmp_path):
    train(qwen2(), tmp_path)
    edit(tmp_path, **fields)
    assert any(named in problem for problem in refusal(bases / "qwen2", tmp_path))


def test_tensors_that_nothing_names(bases, tmp_path):
    train(qwen2(), tmp_path)
    prefix = "base_model.model.model.layers.0.self_attn."
    more = {
        "base_model.model.model.norm.weight": np.ones(32, np.float32),
        f"{prefix}q_proj.lora_magnitude_vector": np.ones(32, np.float32),
        f"{prefix}k_proj.lora_A.default.weight": np.ones((4, 32), np.float32),
        f"{prefix}o_proj.lora_B.weight": np.ones((32, 4), np.float32),
    }
    rewrite(tmp_path, lambda tensors: tensors | more)
    told = refusal(bases / "qwen2", tmp_path)
    missing = f"{prefix}o_proj.lora_A.weight"
    assert all(
        any(problem.startswith(name) for problem in told) for name in [*list(more)[:3], missing]
    ), told


def test_embeddings_of_a_tied_model(bases, tmp_path):
    train(qwen2(True), tmp_path, target_modules=["embed_tokens", "q_proj"])
    assert any("tie_word_embeddings" in problem for problem in refusal(bases / "tied", tmp_path))
    train(qwen2(True), tmp_path, modules_to_save=["embed_tokens"])
    assert any("tie_word_embeddings" in problem for problem in refusal(bases / "tied", tmp_path))


def test_a_pickled_adapter_and_a_config_that_is_none(bases, tmp_path):
    train(qwen2(), tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    assert "adapter_model.safetensors: missing" in refusal(bases / "qwen2", tmp_path)[0]
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    assert "expected a JSON object" in refusal(bases / "qwen2", tmp_path)[0]


def test_nothing_of_the_base_is_left_out(bases, tmp_path):
    """The merged directory is a whole checkpoint."""
    train(qwen2(), tmp_path, modules_to_save=["lm_head"])
    merged_by_us(bases / "qwen2", tmp_path)
    made, base = files.open_checkpoint(tmp_path / "out"), files.open_checkpoint(bases / "qwen2")
    assert made.tensors.keys() == base.tensors.keys()
