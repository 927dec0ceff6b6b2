"""Families without a class in transformers: logits and tokens of their authors' own code.

tests/data/families holds tiny random models, with logits and greedy tokens that this code computed.
Models of other shapes are compared with tests/models/published.py, which is checked against the
same data.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipway.checkpoint import files
from slipway.checkpoint.quantize import Scheme
from slipway.convert.quantize_directory import quantize_directory
from slipway.errors import CheckpointError, UnsupportedModel
from tests.models import published
from tests.models.runner import Forward, engine_of, greedy, our_tokens

FAMILIES = Path(__file__).parents[1] / "data" / "families"
NAMES = ("qwen1", "ling1", "ling2", "mimo")
LOGITS = 1e-4


def torch_logits(directory, ids, prompt_length=None):
    """Return the logits [T, V] of tests/models/published.py."""
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / files.SINGLE)
    with torch.inference_mode():
        if config["architectures"] == ["QWenLMHeadModel"]:
            length = len(ids) if prompt_length is None else prompt_length
            return published.qwen_logits(weights, config, ids, length).numpy()
        if config["architectures"] == ["MiMoForCausalLM"]:
            return published.mimo_logits(weights, config, ids)[0].numpy()
        return published.bailing_logits(weights, config, ids).numpy()


def torch_tokens(directory, prompt, count):
    """Return the greedy continuation of tests/models/published.py."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(torch_logits(directory, ids, len(prompt))[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(params=NAMES)
def family(request):
    """Directory of one model, and its reference."""
    directory = FAMILIES / request.param
    return directory, np.load(directory / "ref.npz")


def test_logits_are_those_of_the_authors_code(family):
    directory, reference = family
    ids, expected = reference["long"].tolist(), reference["long_logits"][0]
    np.testing.assert_allclose(torch_logits(directory, ids), expected, atol=LOGITS, rtol=0)
    forward = Forward(directory)
    for chunks in (None, [11, 1, 23]):
        np.testing.assert_allclose(forward(ids, chunks), expected, atol=LOGITS, rtol=0)
    stacked = Forward(directory, separate=False)
    np.testing.assert_allclose(stacked(ids), expected, atol=LOGITS, rtol=0)


def test_greedy_tokens_are_those_of_the_authors_code(family):
    directory, reference = family
    tokens = our_tokens(directory, [reference["ids"].tolist()], len(reference["tokens"]))
    assert tokens == [reference["tokens"].tolist()]


@pytest.mark.parametrize("tensor, expert", [(2, 1), (4, 2), (4, 4)])
def test_split_over_devices(family, tensor, expert):
    directory, reference = family
    forward = Forward(directory, tensor=tensor, expert=expert)
    expected = reference["long_logits"][0]
    found = forward(reference["long"].tolist())
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)


def test_round_trip_is_exact(family):
    checkpoint = files.open_checkpoint(family[0])
    for forward in (Forward(family[0]), Forward(family[0], tensor=4, separate=False)):
        saved = forward.saved()
        mtp = {name for name in checkpoint.tensors if "mtp_layers" in name}
        assert saved.keys() | mtp == checkpoint.tensors.keys()
        for name, array in saved.items():
            np.testing.assert_array_equal(array, checkpoint.array(name), err_msg=name)


@pytest.mark.parametrize("name, bits", [("qwen1", 8), ("ling1", 4), ("ling2", 8)])
def test_packed_directories_have_the_names_of_the_family(tmp_path, name, bits):
    """A fused tensor is packed as one; the directory answers as packing at load does."""
    scheme = Scheme(bits, 32 if bits == 4 else 0)
    quantize_directory(str(FAMILIES / name), tmp_path / "packed", scheme)
    floats, packed = (load_file(d / files.SINGLE) for d in (FAMILIES / name, tmp_path / "packed"))
    suffixes = ("_packed", "_scale", "_shape")
    for key in packed:
        plain = next((key.removesuffix(s) for s in suffixes if key.endswith(s)), key)
        assert plain in floats
    fused = {"qwen1": "transformer.h.0.attn.c_attn"}.get(
        name, "model.layers.0.attention.query_key_value"
    )
    rows, columns = floats[f"{fused}.weight"].shape
    assert packed[f"{fused}.weight_packed"].shape == (rows, columns * bits // 32)
    assert packed[f"{fused}.weight_shape"].tolist() == [rows, columns]
    prompts = [[5, 17, 99, 3, 250]]
    expected = our_tokens(FAMILIES / name, prompts, 8, quantization=f"int{bits}")
    assert our_tokens(tmp_path / "packed", prompts, 8) == expected


def variant(name, directory, seed=0, **fields):
    """Write a model of the family with other fields and random weights that fit them."""
    config = json.loads((FAMILIES / name / "config.json").read_text()) | fields
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, tensor in load_file(FAMILIES / name / files.SINGLE).items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.1
        tensors[key] = noise + (1.0 if tensor.ndim == 1 and "norm" in key else 0.0)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return config, tensors


def write(directory, tensors):
    save_file(tensors, directory / files.SINGLE)


def test_a_running_engine_takes_new_weights(family, tmp_path):
    directory, reference = family
    _, tensors = variant(directory.name, tmp_path)
    write(tmp_path, tensors)
    llm, asked, count = engine_of(tmp_path), [reference["ids"].tolist()], len(reference["tokens"])
    expected = [reference["tokens"].tolist()]
    assert greedy(llm, asked, count) != expected
    new = load_file(directory / files.SINGLE)
    llm.update_weights({name: tensor.numpy() for name, tensor in new.items()})
    assert greedy(llm, asked, count) == expected


def draw(rows, size=None, seed=1):
    shape = (rows,) if size is None else (rows, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("dynamic, logn", [(True, True), (True, False), (False, True)])
def test_qwen_beyond_the_length_of_its_training(tmp_path, dynamic, logn):
    """The prompt sets the base of rotation, for the tokens that follow it, too."""
    fields = {"seq_length": 16, "use_dynamic_ntk": dynamic, "use_logn_attn": logn}
    _, tensors = variant("qwen1", tmp_path, **fields)
    write(tmp_path, tensors)
    rng = np.random.default_rng(0)
    forward, prompts = Forward(tmp_path), []
    for length in (15, 16, 17, 32, 33, 64, 65, 100):
        ids = rng.integers(0, 512, length).tolist()
        prompts.append(ids)
        expected = torch_logits(tmp_path, ids)
        np.testing.assert_allclose(forward(ids), expected, atol=LOGITS, rtol=0)
        np.testing.assert_allclose(forward(ids, [7, length - 7]), expected, atol=LOGITS, rtol=0)
    expected = [torch_tokens(tmp_path, prompt, 20) for prompt in prompts]
    assert our_tokens(tmp_path, prompts, 20) == expected


LING1 = {
    "normalized head": {"norm_head": True},
    "plain weights": {"norm_topk_prob": False},
    "one expert": {"num_experts_per_tok": 1},
    "many experts": {"num_experts_per_tok": 5},
    "partly rotated": {"partial_rotary_factor": 0.25},
}
LING2 = {
    "no bias of the choice": {"moe_router_enable_expert_bias": False},
    "one group": {"n_group": 1, "topk_group": 1},
    "two groups": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    "rotary_dim": {"partial_rotary_factor": 0.25, "rotary_dim": 8},
}


@pytest.mark.parametrize(
    "name, fields",
    [("ling1", fields) for fields in LING1.values()] + [("ling2", f) for f in LING2.values()],
    ids=[*LING1, *LING2],
)
def test_variants_of_ling(tmp_path, name, fields):
    config, tensors = variant(name, tmp_path, **fields)
    if not config.get("moe_router_enable_expert_bias", True):
        tensors = {key: x for key, x in tensors.items() if not key.endswith("expert_bias")}
    write(tmp_path, tensors)
    ids = np.random.default_rng(0).integers(0, 512, 40).tolist()
    expected = torch_logits(tmp_path, ids)
    np.testing.assert_allclose(Forward(tmp_path)(ids), expected, atol=LOGITS, rtol=0)
    assert our_tokens(tmp_path, [ids], 12) == [torch_tokens(tmp_path, ids, 12)]


def test_ling_with_biases_and_three_shared_experts(tmp_path):
    fields = {"use_qkv_bias": True, "use_bias": True, "num_shared_experts": 3}
    config, tensors = variant("ling1", tmp_path, **fields)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        tensors[f"{layer}.attention.query_key_value.bias"] = draw(256)
        tensors[f"{layer}.attention.dense.bias"] = draw(128)
        for part, shape in (("gate", (96, 128)), ("up", (96, 128)), ("down", (128, 96))):
            tensors[f"{layer}.mlp.shared_experts.{part}_proj.weight"] = draw(*shape)
    write(tmp_path, tensors)
    ids = list(range(30))
    np.testing.assert_allclose(
        Forward(tmp_path, tensor=2)(ids), torch_logits(tmp_path, ids), atol=LOGITS, rtol=0
    )


def test_the_third_spelling_of_ling(tmp_path):
    _, tensors = variant("ling1", tmp_path, architectures=["BailingMoEForCausalLM"])
    write(tmp_path, tensors)
    ids = list(range(20))
    np.testing.assert_allclose(
        Forward(tmp_path)(ids), torch_logits(tmp_path, ids), atol=LOGITS, rtol=0
    )


def test_layers_that_draft_tokens_are_left_out(tmp_path):
    _, tensors = variant("ling2", tmp_path, num_nextn_predict_layers=1)
    extra = {"model.layers.3.eh_proj.weight": draw(128, 256)}
    write(tmp_path, tensors | extra)
    assert len(our_tokens(tmp_path, [[1, 2, 3]], 4)[0]) == 4
    write(tmp_path, tensors | {"model.layers.4.eh_proj.weight": draw(128, 256)})
    with pytest.raises(CheckpointError, match=r"layers\.4\.eh_proj\.weight: unexpected"):
        our_tokens(tmp_path, [[1, 2, 3]], 4)


@pytest.mark.parametrize(
    "name, fields, field",
    [
        ("qwen1", {"rotary_pct": 0.5}, "rotary_pct"),
        ("qwen1", {"no_bias": False}, "no_bias"),
        ("qwen1", {"kv_channels": 8, "head_dim": 16}, "kv_channels"),
        ("ling1", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("ling1", {"use_sliding_window": True}, "use_sliding_window"),
        ("ling2", {"n_group": 3}, "n_group"),
        ("ling2", {"topk_group": 5}, "topk_group"),
        ("ling2", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("ling2", {"score_function": "softmax"}, "score_function"),
        ("ling2", {"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
    ],
)
def test_values_that_are_not_implemented_are_refused_by_name(tmp_path, name, fields, field):
    _, tensors = variant(name, tmp_path, **fields)
    write(tmp_path, tensors)
    with pytest.raises(UnsupportedModel, match=f"config.json: {field}"):
        our_tokens(tmp_path, [[1, 2, 3]], 1)


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda t: t.pop(EXPERT), f"{EXPERT}: missing"),
        (lambda t: t.update({EXPERT: draw(31, 128)}), f"{EXPERT}: shape"),
        (
            lambda t: t.update({EXPERT.replace(".3.", ".8."): draw(32, 128)}),
            "experts.8.up_proj.weight: unexpected",
        ),
        (
            lambda t: t.pop("model.layers.1.attention.query_key_value.weight"),
            "layers.1.attention.query_key_value.weight: missing",
        ),
    ],
    ids=["missing", "misshapen", "too many", "fused missing"],
)
def test_an_expert_that_does_not_fit_is_one_problem(tmp_path, change, problem):
    _, tensors = variant("ling1", tmp_path)
    change(tensors)
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        our_tokens(tmp_path, [[1, 2, 3]], 1)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]
