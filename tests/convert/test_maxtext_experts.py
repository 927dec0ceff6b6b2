"""MaxText's families with experts, scanned and not, both ways, against MaxText's own logits.

MaxText 0.2.5's converter made the trees in tests/data/maxtext from the hf_* directories beside
them; deepseek3_scan_orbax is a state that its training saved. logits.npy is what MaxText's model
computes in float32 for ids.npy.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from slipway import errors
from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource
from slipway.convert.verify import explain, verify
from tests.convert.twins import MAXTEXT, assert_same, restored, tensors

TREES = [
    ("mixtral_scan_orbax", "hf_mixtral"),
    ("mixtral_unscan_orbax", "hf_mixtral"),
    ("gptoss_scan_orbax", "hf_gptoss"),
    ("gptoss_unscan_orbax", "hf_gptoss"),
    ("deepseek2_scan_orbax", "hf_deepseek2"),
    ("deepseek2_unscan_orbax", "hf_deepseek2"),
    ("deepseek2_no_dense_scan_orbax", "hf_deepseek2_no_dense"),
    ("deepseek3_scan_orbax", "hf_deepseek3"),
    ("deepseek3_unscan_orbax", "hf_deepseek3"),
    ("deepseek3_no_q_rank_scan_orbax", "hf_deepseek3_no_q_rank"),
    ("qwen3moe_unscan_orbax", "hf_qwen3moe"),
]
BIAS = "decoder.moe_layers.DeepSeekMoeBlock_0.MoeBlock_0.gate.bias"
# Fields of config.json that no tensor determines, beside those of every family.
UNTOLD = {
    "mixtral": ("num_experts_per_tok",),
    "qwen3_moe": ("num_experts_per_tok",),
    "gpt_oss": ("num_experts_per_tok", "sliding_window"),
    "deepseek_v2": ("num_experts_per_tok", "routed_scaling_factor"),
    "deepseek_v3": ("num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group"),
}
IN_EVERY_FAMILY = ("rms_norm_eps", "rope_parameters", "max_position_embeddings")


def config_of(twin: str | Path) -> dict:
    return json.loads((MAXTEXT / twin / "config.json").read_text())


def told(tree: str, given: dict) -> str:
    return "\n".join(prepare(open_source(MAXTEXT / tree), ConvertConfig(), given).problems)


@pytest.mark.parametrize(("tree", "twin"), TREES)
def test_maxtexts_tree_is_the_model_that_it_was_made_from(tree, twin, tmp_path):
    options = ConvertConfig(config=MAXTEXT / twin)
    conversion, written = convert(open_source(MAXTEXT / tree), tmp_path / "out", options)
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / twin))
    assert all(w.lossless for w in written)  # head_dim 16: the queries' factor is a power of two
    compared = verify(conversion, written, tmp_path / "out")
    assert compared and not any(c.differing for c in compared)
    made, wanted = config_of(tmp_path / "out"), config_of(twin)
    assert made == wanted | {k: v for k, v in made.items() if k not in wanted}


@pytest.mark.parametrize(("tree", "twin"), TREES)
def test_the_way_back_gives_maxtexts_tree(tree, twin, tmp_path):
    options = ConvertConfig(to="maxtext", scan_layers="unscan" not in tree)
    conversion, written = convert(open_source(MAXTEXT / twin), tmp_path / "out", options)
    assert not any(c.differing for c in verify(conversion, written, tmp_path / "out"))
    made = restored(tmp_path / "out" / "0" / "items")
    assert made["step"] == 0 and made["opt_state"] == {} and set(made["params"]) == {"params"}
    flat = {f"params.{name}": x for name, x in flatten_dict(made["params"], sep=".").items()}
    assert_same(by_name(flat), by_name(arrays_of(MAXTEXT / tree)))
    again = ConvertConfig(config=MAXTEXT / twin)
    convert(open_source(tmp_path / "out"), tmp_path / "again", again)
    assert_same(tensors(tmp_path / "again"), tensors(MAXTEXT / twin))


def by_name(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights, by their names without the collection that holds them."""
    prefixes = ("params.params.", "params.MoEBiasVar.", "nnx_aux.model.")
    weights = {name: x for name, x in arrays.items() if ".rngs." not in name}
    return {
        name.removeprefix(next(p for p in prefixes if name.startswith(p))): x
        for name, x in weights.items()
    }


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint, without scalars."""
    source, arrays = open_source(path), {}
    for name, spec in source.specs.items():
        if spec.shape:
            with source.open(name) as array:
                arrays[name] = np.array(array)
    return arrays


@pytest.mark.parametrize(("tree", "twin"), TREES)
def test_with_the_fields_that_it_asks_for_it_computes_maxtexts_logits(tree, twin, tmp_path):
    """Sizes and the choices that a family fixes in MaxText come from the tree."""
    config = config_of(twin)
    fields = (*IN_EVERY_FAMILY, *UNTOLD[config["model_type"]])
    options = ConvertConfig(mapping="maxtext")
    given = {field: config[field] for field in fields}
    convert(open_source(MAXTEXT / tree), tmp_path / "out", options, given)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    ids = torch.from_numpy(np.load(MAXTEXT / tree / "ids.npy").astype(np.int64))
    with torch.inference_mode():
        logits = model(ids).logits.numpy()
    np.testing.assert_allclose(logits, np.load(MAXTEXT / tree / "logits.npy"), atol=3e-5)


@pytest.mark.parametrize(("tree", "twin"), TREES[::2])
def test_what_no_tensor_of_a_family_tells_must_be_given(tree, twin):
    config = config_of(twin)
    text = told(tree, {"model_type": config["model_type"]})
    missing = {line.split(": ")[1] for line in text.splitlines() if ": missing; " in line}
    rope = {"rope_type"} if config["model_type"] == "gpt_oss" else set()
    common = {"rms_norm_eps", "rope_theta", "max_position_embeddings"}
    assert missing == common | rope | set(UNTOLD[config["model_type"]])


@pytest.mark.parametrize(
    ("tree", "twin", "field", "value"),
    [
        ("deepseek3_scan_orbax", "hf_deepseek3", "first_k_dense_replace", 1),
        ("deepseek3_scan_orbax", "hf_deepseek3", "num_hidden_layers", 5),
        ("deepseek3_scan_orbax", "hf_deepseek3", "n_shared_experts", 2),
        ("deepseek3_scan_orbax", "hf_deepseek3", "n_routed_experts", 16),
        ("deepseek3_scan_orbax", "hf_deepseek3", "qk_rope_head_dim", 16),
        ("deepseek3_scan_orbax", "hf_deepseek3", "qk_nope_head_dim", 8),
        ("deepseek3_scan_orbax", "hf_deepseek3", "v_head_dim", 16),
        ("deepseek3_scan_orbax", "hf_deepseek3", "kv_lora_rank", 32),
        ("deepseek3_scan_orbax", "hf_deepseek3", "q_lora_rank", 32),
        ("deepseek3_scan_orbax", "hf_deepseek3", "norm_topk_prob", False),
        ("deepseek3_scan_orbax", "hf_deepseek3", "scoring_func", "softmax"),
        ("deepseek2_unscan_orbax", "hf_deepseek2", "topk_method", "group_limited_greedy"),
        ("deepseek2_no_dense_scan_orbax", "hf_deepseek2_no_dense", "first_k_dense_replace", 1),
        ("gptoss_scan_orbax", "hf_gptoss", "num_hidden_layers", 6),
        ("gptoss_scan_orbax", "hf_gptoss", "num_local_experts", 8),
        ("gptoss_unscan_orbax", "hf_gptoss", "attention_bias", False),
        ("mixtral_scan_orbax", "hf_mixtral", "intermediate_size", 64),
        ("mixtral_unscan_orbax", "hf_mixtral", "num_hidden_layers", 2),
    ],
)
def test_a_config_that_a_tree_of_experts_contradicts_is_named(tree, twin, field, value):
    assert f"{field}: got {value!r}" in told(tree, config_of(twin) | {field: value})


def test_a_latent_for_queries_that_config_json_excludes_is_no_tensor_of_the_mapping():
    text = told("deepseek3_scan_orbax", config_of("hf_deepseek3") | {"q_lora_rank": None})
    assert "wq_a.kernel: no rule of mapping 'maxtext deepseek_v3 without q_lora_rank" in text


def test_windows_in_another_order_than_maxtexts_are_refused():
    kinds = ["full_attention", "sliding_attention"] * 2
    text = told("gptoss_scan_orbax", config_of("hf_gptoss") | {"layer_types": kinds})
    assert "config.json: layer_types: windows do not alternate" in text


def test_layers_that_are_no_whole_blocks_are_missing():
    tree = {name: x for name, x in tensors(MAXTEXT / "hf_gptoss").items() if ".3." not in name}
    given = config_of("hf_gptoss") | {"num_hidden_layers": 3, "layer_types": None}
    problems = prepare(MemorySource(tree), ConvertConfig(to="maxtext"), given).problems
    text = "\n".join(problems)
    assert "model.layers.3.input_layernorm.weight: missing" in text
    assert "num_hidden_layers: got 3, expected 4 (axis blocks cycle of the tensors)" in text


def test_a_layer_that_predicts_further_tokens_is_not_dropped():
    tree = tensors(MAXTEXT / "hf_deepseek3")
    tree["model.layers.4.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    given = config_of("hf_deepseek3")
    problems = prepare(MemorySource(tree), ConvertConfig(to="maxtext"), given).problems
    assert any("model.layers.4.eh_proj.weight: no rule" in text for text in problems)


@pytest.mark.parametrize("place", ["beside", "by_expert", "in_linen"])
def test_the_routers_bias_is_found_wherever_maxtext_has_it(place, tmp_path):
    source = tree_of("hf_deepseek3", tmp_path / "tree")
    bias = source.pop(f"params.params.{BIAS}")
    assert bias.shape == (2, 8)
    match place:
        case "beside":
            source[f"params.params.{BIAS}"] = bias
        case "by_expert":
            source[f"params.params.{BIAS}"] = np.ascontiguousarray(bias.T)
        case "in_linen":
            source[f"params.MoEBiasVar.{BIAS}"] = bias
    options = ConvertConfig(config=MAXTEXT / "hf_deepseek3")
    convert(MemorySource(source), tmp_path / "out", options)
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_deepseek3"))


def test_a_bias_that_fits_both_ways_is_refused(tmp_path):
    """With as many layers as experts, the shape does not show which axis counts the layers."""
    tree = tensors(MAXTEXT / "hf_deepseek3")
    kept = {name: x for name, x in tree.items() if ".experts." not in name or name_of(name) < 2}
    for name in list(kept):
        if "mlp.gate." in name:
            kept[name] = np.ascontiguousarray(kept[name][:2])
    given = config_of("hf_deepseek3") | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1}
    convert(MemorySource(kept), tmp_path / "tree", ConvertConfig(to="maxtext"), given)
    with pytest.raises(errors.CheckpointError, match="fit alike, but read the tree differently"):
        convert(open_source(tmp_path / "tree"), tmp_path / "out", ConvertConfig(), given)


def name_of(name: str) -> int:
    """Return the number of the expert in a tensor's name."""
    return int(name.split(".experts.")[1].split(".")[0])


def tree_of(twin: str, folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the scanned MaxText tree that the conversion makes of a model."""
    convert(open_source(MAXTEXT / twin), folder, ConvertConfig(to="maxtext"))
    return arrays_of(folder)


def test_deepseeks_rotary_embedding_is_stated():
    source = open_source(MAXTEXT / "deepseek3_scan_orbax")
    config = config_of("hf_deepseek3")
    pairs = "neighbouring pairs, as in MaxText with rope_type: yarn and rope_interleave: true"
    assert pairs in explain(prepare(source, ConvertConfig(), config))
    halves = prepare(source, ConvertConfig(), config | {"rope_interleave": False})
    assert "halves, as in MaxText with rope_type: yarn and rope_interleave: false" in explain(
        halves
    )


@pytest.mark.parametrize("is_v3", [True, False])
def test_another_type_of_deepseeks_rotary_embedding_must_be_named(is_v3, tmp_path):
    """Under MaxText's default one, halves are rotated: pairs gave logits 5.0 apart, of 4.7."""
    name = "deepseek3" if is_v3 else "deepseek2"
    source = open_source(MAXTEXT / f"{name}_scan_orbax")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = config_of(f"hf_{name}") | rope
    config.pop("rope_interleave", None)
    text = told(f"{name}_scan_orbax", config)
    assert "rope_type: 'default' does not determine which rotary embedding" in text
    assert "--mapping maxtext-interleaved" in text and ("maxtext-halves" in text) is is_v3
    pairs = prepare(source, ConvertConfig(mapping="maxtext-interleaved"), config)
    assert not pairs.problems and pairs.config.get("rope_interleave") is (True if is_v3 else None)
    halves = prepare(source, ConvertConfig(mapping="maxtext-halves"), config)
    assert bool(halves.problems) is not is_v3
    if is_v3:
        assert halves.config["rope_interleave"] is False
        stated = config | {"rope_interleave": False}
        assert not prepare(source, ConvertConfig(), stated).problems
        contradicted = prepare(source, ConvertConfig(mapping="maxtext-interleaved"), stated)
        assert any("rope_interleave: got False" in p for p in contradicted.problems)


def test_qwens_weights_of_experts_are_normalized_as_in_maxtext():
    source, config = open_source(MAXTEXT / "qwen3moe_unscan_orbax"), config_of("hf_qwen3moe")
    unlike = prepare(source, ConvertConfig(), config)
    assert unlike.config["norm_topk_prob"] is False
    assert "norm_topk_prob false does not, so the results differ" in explain(unlike)
    del config["norm_topk_prob"]
    made = prepare(source, ConvertConfig(), config)
    assert made.config["norm_topk_prob"] is True and "differ" not in explain(made)


def test_mixtral_has_both_rotary_embeddings_of_llama(tmp_path):
    options = ConvertConfig(to="maxtext", mapping="maxtext-interleaved")
    convert(open_source(MAXTEXT / "hf_mixtral"), tmp_path / "tree", options)
    source = open_source(tmp_path / "tree")
    with source.open("params.params.decoder.layers.self_attention.key.kernel") as array:
        kernel = array[:, 1, 0]  # of layer 1, KV head 0: (embed, head_dim)
    key = tensors(MAXTEXT / "hf_mixtral")["model.layers.1.self_attn.k_proj.weight"][:16].T
    np.testing.assert_array_equal(kernel, key[:, [i // 2 + 8 * (i % 2) for i in range(16)]])
    back = ConvertConfig(mapping="maxtext-interleaved", config=MAXTEXT / "hf_mixtral")
    convert(source, tmp_path / "out", back)
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_mixtral"))
    yarn = config_of("hf_mixtral") | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}
    assert "'yarn' does not determine which rotary" in told("mixtral_scan_orbax", yarn)
