"""Packed models end to end, against transformers in float32 with the same numbers unpacked."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from slipway import LLM, SamplingParams
from slipway.checkpoint.quantize import FIELD, Scheme
from slipway.convert.quantize_directory import quantize_directory
from slipway.errors import CheckpointError, InvalidConfig
from slipway.ops import cpu
from tests.models.runner import Case, make_checkpoint, prompts

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
SCHEMES = {"int8": Scheme(8, 0), "int4": Scheme(4, 32)}
TOKENS = 12
pytestmark = pytest.mark.xdist_group("quantized")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def floats(request, tmp_path_factory):
    """Random Qwen3 and transformers' model of it."""
    directory = tmp_path_factory.mktemp("floats")
    tied = {"tie_word_embeddings": request.param}
    return directory, make_checkpoint(Case("qwen3", "qwen3", SIZES | tied), directory)


def unpacked(words, scales):
    """Unpack words as the format describes them.

    The number of bits follows from the shapes: groups have 32 numbers, or a whole row.
    """
    bits = 8 if scales.shape[1] == 1 else 4
    stored = (words.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) % 2**bits
    whole = stored.reshape(words.shape[0], -1).astype(np.float32) - 2.0 ** (bits - 1)
    return (
        (whole.reshape(*scales.shape, -1) * scales[..., None])
        .reshape(whole.shape)
        .astype(np.float32)
    )


def by_rows(table):
    """Return a table in 8 bits with one scale for each row."""
    scale = np.abs(table).max(1, keepdims=True) / np.float32(127)
    return np.rint(table / scale) * scale


def answers(llm):
    """Return greedy tokens and their log probabilities."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    outputs = [output.outputs[0] for output in llm.generate(prompts()[:5], params, use_tqdm=False)]
    return [
        (o.token_ids, [entry[t].logprob for t, entry in zip(o.token_ids, o.logprobs)])
        for o in outputs
    ]


def assert_answers_are_of(theirs, ours):
    """Compare ``answers`` with the greedy tokens and log probabilities of transformers' model."""
    for prompt, (tokens, logprobs) in zip(prompts(), ours):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert expected.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(
            logprobs, [row[t] for row, t in zip(expected, tokens)], atol=1e-4
        )


def start(directory: Path, **options) -> LLM:
    return LLM(
        directory,
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=64,
        memory_fraction=0.1,
        **options,
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_files_and_packing_at_load_answer_as_transformers_does_with_the_same_numbers(
    name, floats, tmp_path
):
    directory, theirs = floats[0], copy.deepcopy(floats[1])
    quantize_directory(str(directory), tmp_path / "packed", SCHEMES[name])
    files, state = load_file(tmp_path / "packed" / "model.safetensors"), theirs.state_dict()
    packed = [key.removesuffix("_packed") for key in files if key.endswith("_packed")]
    assert len(packed) == 7 * 3
    for key in packed:
        matrix = unpacked(files[f"{key}_packed"], files[f"{key}_scale"])
        assert files[f"{key}_shape"].tolist() == list(matrix.shape) == list(state[key].shape)
        assert np.abs(matrix - state[key].numpy()).mean() < 0.1 * state[key].abs().mean()
        state[key].copy_(torch.from_numpy(matrix))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in files:
            np.testing.assert_array_equal(
                files[key], state[key].numpy(), err_msg="tables stay floats in the file"
            )
            state[key].copy_(torch.from_numpy(by_rows(files[key])))
    ours = answers(start(tmp_path / "packed"))
    assert answers(start(directory, quantization=name)) == ours
    assert_answers_are_of(theirs, ours)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_experts_answer_as_transformers_does_with_the_same_numbers(name, tmp_path):
    """Experts are packed one by one; transformers holds them stacked."""
    theirs = make_checkpoint(Case("qwen3_moe", "qwen3_moe", SIZES | EXPERTS), tmp_path / "floats")
    quantize_directory(str(tmp_path / "floats"), tmp_path / "packed", SCHEMES[name])
    files, state = load_file(tmp_path / "packed" / "model.safetensors"), theirs.state_dict()
    packed = [key.removesuffix("_packed") for key in files if key.endswith("_packed")]
    assert len(packed) == (4 + 3 * 4) * 3
    for key in packed:
        matrix = torch.from_numpy(unpacked(files[f"{key}_packed"], files[f"{key}_scale"]))
        layer, _, rest = key.partition(".mlp.experts.")
        if not rest:
            state[key].copy_(matrix)
            continue
        number, kind = int(rest.split(".")[0]), rest.split(".")[1].removesuffix("_proj")
        rows = {"gate": slice(0, 64), "up": slice(64, 128), "down": slice(None)}[kind]
        whole = state[f"{layer}.mlp.experts.{'down' if kind == 'down' else 'gate_up'}_proj"]
        whole[number, rows] = matrix
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key].copy_(torch.from_numpy(by_rows(files[key])))
    llm = start(tmp_path / "packed", dtype="bfloat16")
    assert cpu.isa() is None or llm.engine.limits.bodies["experts"].startswith("c++")
    ours = answers(start(tmp_path / "packed"))
    assert answers(start(tmp_path / "floats", quantization=name)) == ours
    assert_answers_are_of(theirs, ours)


def test_matrices_that_lie_transposed_are_not_packed(tmp_path):
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    make_checkpoint(Case("gpt_oss", "gpt_oss", SIZES | fields), tmp_path)
    with pytest.raises(InvalidConfig, match="transposed"):
        start(tmp_path, quantization="int8")


@pytest.mark.parametrize("name", SCHEMES)
def test_devices_share_a_packed_model(name, floats):
    one, two = (
        answers(start(floats[0], quantization=name, tensor_parallel_size=n)) for n in (1, 2)
    )
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in two]


def test_what_does_not_fit_is_refused(floats, tmp_path):
    directory, _ = floats
    quantize_directory(str(directory), tmp_path / "packed", SCHEMES["int4"])
    with pytest.raises(InvalidConfig, match="float weights"):
        quantize_directory(str(tmp_path / "packed"), tmp_path / "again", SCHEMES["int8"])
    with pytest.raises(InvalidConfig, match="4 bits in groups of 32"):
        start(tmp_path / "packed", quantization="int8")
    with pytest.raises(InvalidConfig, match=r"group.*128.*head_dim \(32\)"):
        quantize_directory(str(directory), tmp_path / "wide", Scheme(4, 128))
    with pytest.raises(InvalidConfig, match="quantization"):
        LLM(directory, quantization="int2")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "wide").exists()


def test_torn_packed_files_are_refused_with_all_faults(floats, tmp_path):
    directory, _ = floats
    quantize_directory(str(directory), tmp_path / "packed", SCHEMES["int8"])
    files = load_file(tmp_path / "packed" / "model.safetensors")
    del files["model.layers.1.mlp.up_proj.weight_scale"]
    files["model.layers.0.self_attn.q_proj.weight_packed"] = files[
        "model.layers.0.self_attn.q_proj.weight_packed"
    ][:-1]
    files["model.layers.2.mlp.down_proj.weight_scale"][3] = np.nan
    save_file(files, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        start(tmp_path / "packed")
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    for name in (
        "up_proj.weight_scale: missing",
        "q_proj.weight_packed: shape",
        "down_proj.weight_scale: 1 values",
    ):
        assert name in text


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(floats, tmp_path):
    directory, _ = floats
    shutil.copytree(directory, tmp_path / "bad")
    files = load_file(directory / "model.safetensors")
    files["model.layers.0.mlp.up_proj.weight"][1, 2] = np.inf
    save_file(files, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: 1 values are not finite"):
        quantize_directory(str(tmp_path / "bad"), tmp_path / "out", SCHEMES["int4"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale: 1 values are not finite"):
        start(tmp_path / "bad", quantization="int4")


def test_dummy_weights_are_packed_too(floats):
    llm = start(floats[0], quantization="int4", load_format="dummy")
    assert len({tuple(tokens) for tokens, _ in answers(llm)}) > 1


def test_packed_files_keep_the_rest_of_the_directory(floats, tmp_path):
    directory, _ = floats
    quantize_directory(str(directory), tmp_path / "packed", SCHEMES["int4"], "100KB")
    config = json.loads((tmp_path / "packed" / "config.json").read_bytes())
    assert {k: v for k, v in config.items() if k != FIELD} == json.loads(
        (directory / "config.json").read_bytes()
    )
    assert (tmp_path / "packed" / "generation_config.json").is_file()
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 3
    start(tmp_path / "packed")
