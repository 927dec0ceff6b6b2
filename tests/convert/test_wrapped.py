"""Tensor names with wrappers of torch and PEFT: read as Hugging Face's names, or refused.

Both directions are tested.
"""

import numpy as np
import pytest
from safetensors.numpy import save_file

from slipway import errors
from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource
from slipway.convert.verify import explain, verify
from tests.convert.test_mappings import made
from tests.convert.test_unknown_names import saved
from tests.convert.twins import assert_same, tensors

WRAPPED = [
    "module.{}",
    "_orig_mod.{}",
    "module._orig_mod.{}",
    "_fsdp_wrapped_module.{}",
    "base_model.model.{}",
    "{}_checkpoint_wrapped_module",
]


def put(name: str, wrapper: str) -> str:
    if wrapper.startswith("{}"):  # around the last module
        path, _, leaf = name.rpartition(".")
        return f"{path}.{wrapper[2:]}.{leaf}"
    return wrapper.format(name)


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_declared_decoder_below_its_wrappers(wrapper, tied, tmp_path):
    directory = made("llama", tmp_path / "hf", tie_word_embeddings=tied)
    tree = {put(name, wrapper): x for name, x in tensors(directory).items()}
    conversion, written = convert(
        MemorySource(tree), tmp_path / "out", ConvertConfig(config=directory)
    )
    verify(conversion, written, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(directory))
    assert put("model.norm.weight", wrapper).split(".")[0] in explain(conversion)
    assert "without the wrappers of training code" in explain(conversion)


def test_a_base_model_that_was_saved_alone(tmp_path):
    directory = made("qwen3", tmp_path / "hf", tie_word_embeddings=True)
    tree = {name.removeprefix("model."): x for name, x in tensors(directory).items()}
    convert(MemorySource(tree), tmp_path / "out", ConvertConfig(config=directory))
    assert_same(tensors(tmp_path / "out"), tensors(directory))


@pytest.mark.parametrize("to", ["npz", "orbax", "maxtext"])
def test_a_wrapped_directory_on_its_way_to_jax(to, tmp_path):
    directory = made("qwen3", tmp_path / "hf")
    plain = tensors(directory)
    (tmp_path / "wrapped").mkdir()
    save_file(
        {f"module.{name}": x for name, x in plain.items()},
        tmp_path / "wrapped" / "model.safetensors",
    )
    (tmp_path / "wrapped" / "config.json").write_text((directory / "config.json").read_text())
    trees = {}
    for source in ("hf", "wrapped"):
        out = tmp_path / f"{source}_{to}"
        convert(open_source(tmp_path / source), out, ConvertConfig(to=to))
        opened = open_source(out / "params.npz" if to == "npz" else out)
        trees[source] = {}
        for name in opened.specs:
            with opened.open(name) as array:
                trees[source][name] = np.array(array)
    assert_same(trees["wrapped"], trees["hf"])


def test_names_that_transformers_class_loads_without_their_wrapper(tmp_path):
    directory = saved("BertForMaskedLM", tmp_path / "hf")
    tree = {f"module.{name}": x for name, x in tensors(directory).items()}
    conversion, _ = convert(MemorySource(tree), tmp_path / "out", ConvertConfig(config=directory))
    assert_same(tensors(tmp_path / "out"), tensors(directory))
    assert "BertForMaskedLM" in explain(conversion)
    assert "module." in explain(conversion)


def test_an_adapter_beside_its_base_and_two_names_of_one_tensor_are_refused(tmp_path):
    directory = made("llama", tmp_path / "hf", tie_word_embeddings=False)
    tree = {f"base_model.model.{name}": x for name, x in tensors(directory).items()}
    adapted = tree | {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": np.zeros(
            (2, 24), "f4"
        )
    }
    with pytest.raises(errors.CheckpointError, match="LoRA adapter that is not merged"):
        convert(MemorySource(adapted), tmp_path / "out", ConvertConfig(config=directory))
    twice = tree | {"model.norm.weight": np.ones(24, "f4")}
    with pytest.raises(errors.CheckpointError, match=r"two names of model\.norm\.weight"):
        convert(MemorySource(twice), tmp_path / "out", ConvertConfig(config=directory))
    assert not (tmp_path / "out").exists()


def test_a_head_under_a_name_that_is_not_known_does_not_count_as_missing(tmp_path):
    directory = made("llama", tmp_path / "hf", tie_word_embeddings=False)
    tree = {f"net.{name}": x for name, x in tensors(directory).items()}
    problems = prepare(MemorySource(tree), ConvertConfig(config=directory)).problems
    assert any("net." in problem for problem in problems)
    assert not any("tie_word_embeddings" in problem for problem in problems)
