"""Names that trainers give to tensors, from PEFT and torch themselves where these are installed."""

import numpy as np
import pytest
import safetensors.numpy

from slipway.checkpoint import files, names
from slipway.errors import CheckpointError

pytestmark = pytest.mark.host
WANTED = {
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "module.model.layers.0.self_attn.q_proj.weight",
        "_orig_mod.model.layers.0.self_attn.q_proj.weight",
        "module._orig_mod.layers.0.self_attn.q_proj.weight",
        "model.layers.0._orig_mod.self_attn.q_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight",
        "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "_fsdp_wrapped_module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_wrappers_around_a_name(name):
    assert names.plain([name], WANTED) == {name: "model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize(
    "name", ["params.layers.q.kernel", "decoder.norm.scale", "layer.lora_a", "module.other"]
)
def test_other_names_stay(name):
    assert names.plain([name], WANTED) == {name: name}


@pytest.mark.parametrize(
    "part", ["lora_A.default.weight", "lora_B.weight", "lora_embedding_A", "lora_magnitude_vector"]
)
def test_an_adapter_that_is_not_merged_is_refused(part):
    base = "base_model.model.model.layers.0.self_attn.q_proj"
    with pytest.raises(CheckpointError, match="LoRA adapter that is not merged"):
        names.plain([f"{base}.base_layer.weight", f"{base}.{part}"], WANTED)


def test_two_names_of_one_tensor():
    with pytest.raises(CheckpointError) as caught:
        names.plain(["norm.weight", "model.norm.weight"], WANTED)
    assert caught.value.problems == [
        "norm.weight and model.norm.weight: two names of model.norm.weight"
    ]


def test_a_checkpoint_under_plain_names(tmp_path):
    arrays = {
        "embed_tokens.weight": np.ones((2, 3), np.float32),
        "rotary.inv": np.zeros(2, np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / files.SINGLE)
    checkpoint = names.unwrapped(files.open_tensors(tmp_path), WANTED)
    assert set(checkpoint.tensors) == {"model.embed_tokens.weight", "rotary.inv"}
    assert all(checkpoint.tensors[name].name == name for name in checkpoint.tensors)
    np.testing.assert_array_equal(
        checkpoint.array("model.embed_tokens.weight"), arrays["embed_tokens.weight"]
    )
