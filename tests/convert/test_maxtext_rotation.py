"""Rotary embeddings of MaxText's Llama: pairs or halves, by config.json or by name.

Both directions are compared with logits. tests/data/maxtext/llama3_default_rope_orbax was written
by MaxText itself (model_name llama3-8b, cut down), with its logits; llama_scan_orbax by MaxText's
converter for llama3.1.
"""

import json

import numpy as np
import pytest
import torch
import transformers

from slipway import errors
from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.verify import explain, report, verify
from tests.convert.twins import MAXTEXT, assert_same, tensors

HALVES = MAXTEXT / "llama3_default_rope_orbax"
GIVEN = json.loads((HALVES / "config.json").read_text())
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(directory) -> np.ndarray:
    """Return the converted directory's logits in transformers, for MaxText's ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model.eval()(
            torch.from_numpy(np.load(HALVES / "ids.npy").astype(np.int64))
        ).logits.numpy()


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {
            "rope_scaling": {"rope_type": "default"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ],
    ids=["nothing", "null", "rope_parameters", "both"],
)
def test_maxtexts_default_rope_gives_maxtexts_logits(rope, tmp_path):
    conversion, written = convert(
        open_source(HALVES), tmp_path / "out", ConvertConfig(), GIVEN | rope
    )
    np.testing.assert_allclose(logits(tmp_path / "out"), np.load(HALVES / "logits.npy"), atol=2e-5)
    told = "rotary embedding: halves, as in MaxText for config.json's rope_type 'default'"
    assert told in explain(conversion)
    assert (
        told
        in report(conversion, written, verify(conversion, written, tmp_path / "out"), None)["note"]
    )


def test_interleaved_is_taken_by_name_and_then_the_logits_are_others(tmp_path):
    options = ConvertConfig(mapping="maxtext-interleaved")
    conversion, _ = convert(open_source(HALVES), tmp_path / "out", options, GIVEN)
    assert np.abs(logits(tmp_path / "out") - np.load(HALVES / "logits.npy")).max() > 1
    assert "interleaved, as --mapping maxtext-interleaved says" in explain(conversion)
    convert(
        open_source(HALVES), tmp_path / "halves", ConvertConfig(mapping="maxtext-halves"), GIVEN
    )
    np.testing.assert_allclose(
        logits(tmp_path / "halves"), np.load(HALVES / "logits.npy"), atol=2e-5
    )


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "is_interleaved"),
    [({}, False), ({"rope_type": "linear", "factor": 2.0}, False), (LLAMA_31, True)],
    ids=["default", "linear", "llama3"],
)
def test_the_way_to_maxtext_follows_config_json(rope, is_interleaved, field, scan_layers, tmp_path):
    """Computed by hand: for head_dim 16 and rotated adjacent pairs, row 1 of a head holds the
    second number of pair (0, 8).
    """
    convert(open_source(HALVES), tmp_path / "hf", ConvertConfig(), GIVEN)
    given = GIVEN | {field: rope}
    conversion, _ = convert(
        open_source(tmp_path / "hf"),
        tmp_path / "back",
        ConvertConfig(to="maxtext", scan_layers=scan_layers),
        given,
    )
    source = open_source(tmp_path / "back")
    layer = "layers." if scan_layers else "layers_1."
    with source.open(f"params.params.decoder.{layer}self_attention.key.kernel") as array:
        kernel = (array[:, 1] if scan_layers else array)[:, 0]  # of one KV head: (embed, head_dim)
    key = tensors(tmp_path / "hf")["model.layers.1.self_attn.k_proj.weight"][:16].T
    order = [i // 2 + 8 * (i % 2) for i in range(16)] if is_interleaved else list(range(16))
    np.testing.assert_array_equal(kernel, key[:, order])
    assert ("interleaved" in conversion.plan.mapping.name) is is_interleaved
    convert(source, tmp_path / "again", ConvertConfig(), given)
    assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "hf"))


def test_rope_scaling_counts_before_rope_parameters():
    given = GIVEN | {"rope_scaling": LLAMA_31, "rope_parameters": {"rope_type": "default"}}
    assert "interleaved" in prepare(open_source(HALVES), ConvertConfig(), given).plan.mapping.name


@pytest.mark.parametrize("rope_type", ["yarn", "longrope"])
def test_where_config_json_does_not_tell_the_user_is_asked(rope_type, tmp_path):
    given = GIVEN | {"rope_scaling": {"type": rope_type, "factor": 4.0}}
    with pytest.raises(
        errors.CheckpointError,
        match=f"'{rope_type}' does not determine.*maxtext-interleaved.*halves",
    ):
        convert(open_source(HALVES), tmp_path / "out", ConvertConfig(), given)
    assert not (tmp_path / "out").exists()
    assert not prepare(open_source(HALVES), ConvertConfig(mapping="maxtext-halves"), given).problems


def test_an_hf_tree_of_any_rope_type_is_not_asked_for_maxtexts(tmp_path):
    convert(open_source(HALVES), tmp_path / "hf", ConvertConfig(), GIVEN)
    given = GIVEN | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert not prepare(open_source(tmp_path / "hf"), ConvertConfig(), given).problems


def test_qwen3_has_no_other_rotation_and_refuses_the_name():
    options = ConvertConfig(mapping="maxtext-interleaved", config=MAXTEXT / "hf_qwen3")
    told = "\n".join(prepare(open_source(MAXTEXT / "qwen3_scan_orbax"), options).problems)
    assert "model_type: got 'qwen3'" in told


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_other_families_go_to_maxtext_and_back(model_type, scan_layers, tmp_path):
    torch.manual_seed(0)
    shape = {
        name: GIVEN[name]
        for name in GIVEN
        if name not in ("architectures", "model_type", "rope_theta")
    }
    if model_type == "qwen2":
        shape |= {"hidden_size": 64}  # head_dim is hidden_size / heads
    config = transformers.AutoConfig.for_model(model_type, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "hf")
    options = ConvertConfig(to="maxtext", scan_layers=scan_layers)
    convert(open_source(tmp_path / "hf"), tmp_path / "back", options)
    specs = open_source(tmp_path / "back").specs
    if scan_layers and model_type == "qwen2":
        assert specs["params.params.decoder.layers.self_attention.query.bias"].shape == (4, 2, 16)
    convert(
        open_source(tmp_path / "back"), tmp_path / "again", ConvertConfig(config=tmp_path / "hf")
    )
    assert_same(tensors(tmp_path / "again"), tensors(tmp_path / "hf"))
