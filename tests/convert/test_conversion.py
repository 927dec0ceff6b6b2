"""Whole conversions: MaxText's checkpoints to Hugging Face and back, nano, options and errors.

tests/data/maxtext holds trees that MaxText made from the hf_* directories beside them.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from slipway import errors
from slipway.checkpoint import shards
from slipway.convert import executor
from slipway.convert.conversion import ConvertConfig, conversion_identity, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.source import MemorySource, flatten
from slipway.convert.transfer import max_ulp
from slipway.convert.verify import explain, report, summary, verify
from slipway.convert.writer import ASIDE
from tests.convert.twins import BF16, MAXTEXT, NANO, assert_same, flax_tree, restored, tensors
from training.model import Model, ModelConfig

pytestmark = pytest.mark.host
PAIRS = [
    ("llama_scan_orbax", "hf_llama", "scanned"),
    ("qwen3_scan_orbax", "hf_qwen3", "scanned"),
    ("qwen3_unscan_orbax", "hf_qwen3", "unscanned"),
    ("qwen3moe_scan_orbax", "hf_qwen3moe", "scanned"),
    ("qwen3moe_unscan_orbax", "hf_qwen3moe", "unscanned"),
]


@pytest.mark.parametrize(("tree", "twin", "_"), PAIRS)
def test_what_maxtext_made_of_a_model_is_that_model_again(tree, twin, _, tmp_path):
    source = open_source(MAXTEXT / tree)
    conversion, written = convert(source, tmp_path / "out", ConvertConfig(config=MAXTEXT / twin))
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / twin))
    assert all(w.lossless for w in written)  # head_dim 16: the queries' factor is a power of two
    compared = verify(conversion, written, tmp_path / "out")
    assert {c.name for c in compared} == source.specs.keys() - {"step"}
    assert not any(c.differing for c in compared)
    made, wanted = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", MAXTEXT / twin)
    )
    assert made == wanted | {k: v for k, v in made.items() if k not in wanted}
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        MAXTEXT / twin / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize(("tree", "twin", "kind"), PAIRS)
def test_the_way_back_gives_orbax_the_identical_tree(tree, twin, kind, tmp_path):
    options = ConvertConfig(to="maxtext", scan_layers=kind == "scanned")
    conversion, written = convert(open_source(MAXTEXT / twin), tmp_path / "out", options)
    made, wanted = (
        restored(tmp_path / "out" / "0" / "items"),
        restored(MAXTEXT / tree / "0" / "items"),
    )
    assert made["step"] == wanted["step"]
    assert made["opt_state"] == wanted["opt_state"] == {}
    assert made.keys() == wanted.keys()
    assert_same(*(flatten_dict(t["params"], sep="/") for t in (made, wanted)))
    verify(conversion, written, tmp_path / "out")
    convert(open_source(tmp_path / "out"), tmp_path / "again", ConvertConfig(config=MAXTEXT / twin))
    assert_same(tensors(tmp_path / "again"), tensors(MAXTEXT / twin))


def test_queries_of_head_dim_128_come_back_within_an_ulp_and_the_report_says_so(tmp_path):
    rng = np.random.default_rng(0)
    config = json.loads((MAXTEXT / "hf_llama" / "config.json").read_text()) | {"head_dim": 128}
    original = {name: np.array(x) for name, x in tensors(MAXTEXT / "hf_llama").items()}
    for i in range(2):
        for name, shape in (("q", (512, 64)), ("k", (256, 64)), ("v", (256, 64)), ("o", (64, 512))):
            original[f"model.layers.{i}.self_attn.{name}_proj.weight"] = rng.standard_normal(
                shape
            ).astype(BF16)
    there, written = convert(
        MemorySource(original), tmp_path / "jax", ConvertConfig(to="maxtext"), given=config
    )
    lossy = [w.name for w in written if not w.lossless]
    assert lossy == ["params.params.decoder.layers.self_attention.query.kernel"]
    assert "back within 1 ulp" in summary(written, verify(there, written, tmp_path / "jax"), None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(
        open_source(tmp_path / "jax"),
        tmp_path / "hf",
        ConvertConfig(config=tmp_path / "config.json"),
    )
    made = tensors(tmp_path / "hf")
    queries = [name for name in made if "q_proj" in name]
    assert_same(*({n: x for n, x in t.items() if n not in queries} for t in (made, original)))
    worst = max(max_ulp(made[name], original[name]) for name in queries)
    assert worst == 1


def test_nano_from_its_training_checkpoint(tmp_path):
    options = ConvertConfig(config=NANO, tokenizer=NANO)
    conversion, written = convert(
        open_source(Path("training/checkpoint")), tmp_path / "out", options
    )
    assert_same(tensors(tmp_path / "out"), tensors(NANO))
    assert not any(c.differing for c in verify(conversion, written, tmp_path / "out"))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (NANO / name).read_bytes()


def test_shards_and_their_index(tmp_path):
    options = ConvertConfig(config=MAXTEXT / "hf_llama", shard_size="60KB")
    convert(open_source(MAXTEXT / "llama_scan_orbax"), tmp_path / "out", options)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_llama"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(dtype, tmp_path):
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", dtype=dtype)
    conversion, written = convert(
        open_source(MAXTEXT / "qwen3_scan_orbax"), tmp_path / "out", options
    )
    wanted = {name: x.astype(dtype) for name, x in tensors(MAXTEXT / "hf_qwen3").items()}
    assert_same(tensors(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    verify(conversion, written, tmp_path / "out")


def test_an_adapter_is_added(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (
        rng.standard_normal((4, 64)).astype(np.float32),
        rng.standard_normal((32, 4)).astype(np.float32),
    )
    key, adapter = "model.layers.1.self_attn.v_proj", tmp_path / "adapter"
    adapter.mkdir()
    shards.write_safetensors(
        adapter / "adapter_model.safetensors",
        {f"base_model.model.{key}.lora_A.weight": a, f"base_model.model.{key}.lora_B.weight": b},
    )
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj"],
        "bias": "none",
    }
    config |= {"layers_to_transform": [1]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", merge_lora=adapter)
    _, written = convert(open_source(MAXTEXT / "qwen3_scan_orbax"), tmp_path / "out", options)
    wanted = tensors(MAXTEXT / "hf_qwen3")
    weight = wanted[f"{key}.weight"]
    wanted[f"{key}.weight"] = (weight.astype(np.float32) + np.float32(2) * (b @ a)).astype(
        weight.dtype
    )
    assert_same(tensors(tmp_path / "out"), wanted)
    assert [w.name for w in written if not w.lossless] == [f"{key}.weight"]
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(errors.CheckpointError, match="use_dora"):
        prepare(open_source(MAXTEXT / "qwen3_scan_orbax"), options)


def problems_of(source, options, given=None) -> str:
    return "\n".join(prepare(source, options, given).problems)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", False),
        ("vocab_size", 1000),
        ("num_hidden_layers", 3),
        ("intermediate_size", 64),
        ("head_dim", 32),
        ("attention_bias", True),
        ("hidden_size", 128),
    ],
)
def test_a_config_that_the_tensors_contradict_is_named(field, value):
    config = json.loads((MAXTEXT / "hf_qwen3" / "config.json").read_text()) | {field: value}
    told = problems_of(open_source(MAXTEXT / "qwen3_scan_orbax"), ConvertConfig(), config)
    assert f"{field}: got {value!r}" in told or (
        field == "vocab_size" and "vocab_size is 1000" in told
    ), told


def test_what_no_tensor_tells_must_be_given():
    told = problems_of(open_source(MAXTEXT / "qwen3_scan_orbax"), ConvertConfig(mapping="maxtext"))
    for field in ("rope_theta", "rms_norm_eps", "max_position_embeddings"):
        assert f"{field}: missing" in told
    given = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    conversion = prepare(
        open_source(MAXTEXT / "qwen3_scan_orbax"), ConvertConfig(mapping="maxtext"), given
    )
    assert not conversion.problems
    assert conversion.config["num_key_value_heads"] == 2


def test_every_problem_in_one_error_and_nothing_left(tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    tree["layers"]["0"]["mlp"]["up_proj"]["kernel"][3, 4] = np.nan
    tree["layers"]["1"]["self_attn"]["k_proj"]["kernel"] = np.zeros((64, 48), BF16)
    tree["adapter"] = {"kernel": np.zeros((2, 2), BF16)}
    del tree["norm"]
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", mapping="nnx")
    with pytest.raises(errors.CheckpointError) as caught:
        convert(MemorySource(flatten(tree)), tmp_path / "out", options)
    told = "\n".join(caught.value.problems)
    for part in (
        "adapter.kernel: no rule",
        "k_proj.kernel: shape (64, 48)",
        "norm.scale: missing",
        "1 values are not finite",
    ):
        assert part in told, told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_none_is_found_while_writing(number, tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    tree["layers"]["0"]["mlp"]["up_proj"]["kernel"][3, 4] = number
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", mapping="nnx")
    with pytest.raises(errors.CheckpointError, match=r"up_proj.weight: 1 values are not finite"):
        convert(MemorySource(flatten(tree)), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_number_that_the_dtype_cannot_hold(tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    tree["norm"]["scale"][0] = 1e30
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", mapping="nnx", dtype="float16")
    with pytest.raises(
        errors.CheckpointError, match=r"model.norm.weight: 1 values are not finite as float16"
    ):
        convert(MemorySource(flatten(tree)), tmp_path / "out", options)


def test_an_nnx_state_in_memory(tmp_path):
    model = Model(
        ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=16), nnx.Rngs(0)
    )
    given = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024}
    convert(
        MemorySource(flatten(nnx.state(model))),
        tmp_path / "out",
        ConvertConfig(mapping="nnx"),
        given,
    )
    kernel = np.asarray(model.layers[1].mlp.up_proj.kernel[...])
    assert np.array_equal(tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], kernel.T)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_tied_head_may_be_there_if_it_is_equal(tmp_path):
    tree = flax_tree("hf_qwen3", tmp_path / "flax")
    tree["lm_head"] = {"kernel": np.ascontiguousarray(tree["embed_tokens"]["embedding"].T)}
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", mapping="nnx")
    conversion, written = convert(MemorySource(flatten(tree)), tmp_path / "out", options)
    assert_same(tensors(tmp_path / "out"), tensors(MAXTEXT / "hf_qwen3"))
    verify(conversion, written, tmp_path / "out")
    tree["lm_head"]["kernel"][1, 2] += 1
    with pytest.raises(
        errors.CheckpointError,
        match=r"lm_head.kernel: 1 numbers differ from embed_tokens.embedding",
    ):
        convert(MemorySource(flatten(tree)), tmp_path / "out2", options)


def test_a_tokenizer_larger_than_the_vocabulary():
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", tokenizer=NANO)
    assert "id 4095, but the vocabulary has 512" in problems_of(
        open_source(MAXTEXT / "qwen3_scan_orbax"), options
    )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mapping": "keras"}, "mapping"),
        ({"mapping": "none.yaml"}, "mapping"),
        ({"shard_size": "5"}, "shard_size"),
        ({"scan_layers": False}, "scan_layers"),
        ({"to": "npz", "tokenizer": NANO}, "tokenizer"),
        ({"to": "npz", "resume": True}, "resume"),
        ({"to": "maxtext", "shard_size": "1GB"}, "shard_size"),
        ({"to": "maxtext", "mapping": "nnx"}, "mapping"),
        ({"config": Path("nowhere.json")}, "config"),
    ],
)
def test_an_option_that_cannot_be_honoured(options, field):
    with pytest.raises(errors.InvalidConfig) as caught:
        prepare(open_source(MAXTEXT / "hf_qwen3"), ConvertConfig(**options))
    assert caught.value.field == field


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_that_holds_files_is_not_written_to(resume, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", resume=resume)
    with pytest.raises(errors.InvalidConfig, match="out_dir"):
        convert(open_source(MAXTEXT / "qwen3_scan_orbax"), tmp_path, options)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_is_full_is_told_and_nothing_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slipway.convert.writer.os.pwrite", full)
    with pytest.raises(errors.CheckpointError, match="No space left"):
        convert(
            open_source(MAXTEXT / "qwen3_scan_orbax"),
            tmp_path / "out",
            ConvertConfig(config=MAXTEXT / "hf_qwen3"),
        )
    assert not (tmp_path / "out").exists()


def test_an_hf_directory_in_another_dtype(tmp_path):
    convert(open_source(MAXTEXT / "hf_qwen3moe"), tmp_path / "out", ConvertConfig(dtype="float32"))
    wanted = {name: x.astype(np.float32) for name, x in tensors(MAXTEXT / "hf_qwen3moe").items()}
    assert_same(tensors(tmp_path / "out"), wanted)
    assert (tmp_path / "out" / "generation_config.json").exists()


class Killed(BaseException):
    """Exception in place of kill -9: nothing is cleaned up after it."""


def test_a_killed_conversion_is_gone_on_with(tmp_path, monkeypatch):
    source, out = open_source(MAXTEXT / "llama_scan_orbax"), tmp_path / "out"
    options = ConvertConfig(config=MAXTEXT / "hf_llama", shard_size="60KB")
    monkeypatch.setattr("slipway.convert.writer.JOURNAL_EVERY_S", 0.0)
    monkeypatch.setattr("slipway.convert.writer.SafetensorsWriter.abandon", lambda self: None)
    monkeypatch.setattr("slipway.convert.conversion.shutil.rmtree", lambda path: None)
    count = 0

    def killing(size: int) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise Killed

    with pytest.raises(Killed):
        convert(source, out, options, progress=killing)
    assert [path.name for path in out.iterdir()] == [ASIDE]  # nothing bears a checkpoint's name
    monkeypatch.undo()
    opened = []
    original = type(source).open
    monkeypatch.setattr(
        type(source), "open", lambda self, name: opened.append(name) or original(self, name)
    )
    conversion, written = convert(source, out, dataclasses.replace(options, resume=True))
    assert 0 < len(set(opened)) < 12  # what was written is not read again
    monkeypatch.undo()
    assert_same(tensors(out), tensors(MAXTEXT / "hf_llama"))
    assert len(written) == 21
    assert not (out / ASIDE).exists()
    verify(conversion, written, out)


def test_another_conversion_is_not_gone_on_with(tmp_path):
    out = tmp_path / "out"
    (out / ASIDE).mkdir(parents=True)
    facts = {"identity": "another", "done": {"model.norm.weight": {}}}
    (out / ASIDE / "journal.json").write_text(json.dumps(facts))
    options = ConvertConfig(config=MAXTEXT / "hf_qwen3", resume=True)
    convert(open_source(MAXTEXT / "qwen3_scan_orbax"), out, options)
    assert_same(tensors(out), tensors(MAXTEXT / "hf_qwen3"))


def test_verification_finds_a_changed_number(tmp_path):
    source = open_source(MAXTEXT / "qwen3_scan_orbax")
    conversion, written = convert(
        source, tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3")
    )
    path = tmp_path / "out" / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-9] ^= 1
    path.write_bytes(changed)
    with pytest.raises(errors.CheckpointError, match="differ after the inverse"):
        verify(conversion, written, tmp_path / "out")


def test_explain_reads_nothing(monkeypatch):
    source = open_source(MAXTEXT / "llama_scan_orbax")
    monkeypatch.setattr(type(source), "open", lambda self, name: pytest.fail("read"))
    text = explain(prepare(source, ConvertConfig(config=MAXTEXT / "hf_llama")))
    assert "model.layers.1.self_attn.q_proj.weight" in text
    assert "* head_dim ** 0.5" in text
    assert "21 tensors" in text
    assert "step: no weight" in text


def test_the_report_is_json(tmp_path):
    source = open_source(MAXTEXT / "qwen3_scan_orbax")
    conversion, written = convert(
        source, tmp_path / "out", ConvertConfig(config=MAXTEXT / "hf_qwen3")
    )
    compared = verify(conversion, written, tmp_path / "out")
    content = json.loads(json.dumps(report(conversion, written, compared, None)))
    assert len(content["tensors"]) == 24
    assert all(tensor["lossless"] for tensor in content["tensors"])
    assert content["mapping"] == "maxtext qwen3, scanned"


def test_the_memory_gate_lets_one_too_large_pass_alone():
    gate = executor.MemoryGate(10)
    gate.enter(25)
    gate.leave(25)
    gate.enter(10)
    gate.leave(10)


def test_what_lies_otherwise_in_its_files_is_not_gone_on_with(monkeypatch):
    source, options = (
        open_source(MAXTEXT / "llama_scan_orbax"),
        ConvertConfig(config=MAXTEXT / "hf_llama"),
    )
    conversion = prepare(source, options)
    before = conversion_identity(conversion, options)
    monkeypatch.setattr(shards, "PAGE", 64)
    assert conversion_identity(conversion, options) != before


BATCH_NORM = """
rules:
  - [bn.scale, bn.weight, f -> f]
  - [bn.bias, bn.bias, f -> f]
hf_constants: {bn.num_batches_tracked: 7}
"""


def test_constants_of_the_hf_side_are_verified_and_left_out_on_the_way_back(tmp_path):
    (tmp_path / "bn.yaml").write_text(BATCH_NORM)
    tree = {"bn.scale": np.ones(4, np.float32), "bn.bias": np.full(4, 2, np.float32)}
    options = ConvertConfig(mapping=str(tmp_path / "bn.yaml"))
    given = {"model_type": "mine", "architectures": ["Mine"]}
    conversion, written = convert(MemorySource(tree), tmp_path / "out", options, given)
    assert {c.name for c in verify(conversion, written, tmp_path / "out")} == tree.keys()
    back = dataclasses.replace(options, to="npz")
    conversion_back, written_back = convert(
        open_source(tmp_path / "out"), tmp_path / "npz", back, given
    )
    verify(conversion_back, written_back, tmp_path / "npz")
    with np.load(tmp_path / "npz" / "params.npz") as archive:
        assert_same({name: archive[name] for name in archive.files}, tree)
    held = {name: np.array(x) for name, x in tensors(tmp_path / "out").items()}
    for count in (3, None):
        held.pop("bn.num_batches_tracked") if count is None else held.update(
            {"bn.num_batches_tracked": np.int64(3)}
        )
        shards.write_safetensors(
            tmp_path / "out" / "model.safetensors", {n: np.asarray(x) for n, x in held.items()}
        )
        with pytest.raises(
            errors.CheckpointError, match=r"bn.num_batches_tracked: (got 3, expected 7|missing)"
        ):
            verify(conversion, written, tmp_path / "out")
