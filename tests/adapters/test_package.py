"""`slipway adapt`: packages that fakes of the engines load, and every refusal of a twin."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from slipway import cli
from slipway.adapters import package
from slipway.adapters.package import adapt
from slipway.checkpoint.files import open_checkpoint
from slipway.checkpoint.shards import write_safetensors
from slipway.errors import CheckpointError, InvalidConfig, UnsupportedModel
from tests.adapters import halyard

TWIN = Path(halyard.__file__)
ENGINES = ("vllm", "sglang")
FAKES = {
    "vllm/__init__.py": """
class ModelRegistry:
    models = {ARCHITECTURES}

    @classmethod
    def register_model(cls, architecture, model):
        cls.models[architecture] = model

    @classmethod
    def get_supported_archs(cls):
        return cls.models.keys()
""",
    "sglang/srt/models/transformers.py": "class TransformersForCausalLM: ...",
}
LOAD = """
import importlib, json, pkgutil, sys
from importlib.metadata import EntryPoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
package, name, value, directory = sys.argv[1:]
for _ in range(2):  # engines may ask twice in a process
    EntryPoint(name, value, "").load()()
config = AutoConfig.from_pretrained(directory)
models = AutoModel.from_config(config), AutoModelForCausalLM.from_config(config)
classes = [type(each) for each in (config, *models)]
found = pkgutil.iter_modules([f"{package}/{name}"])
modules = [importlib.import_module(f"{name}.{module.name}") for module in found]
# hasattr: the modules of configs name no class
found = [module.EntryClass for module in modules if hasattr(module, "EntryClass")]
entries = {kind.__name__: kind.__mro__[1].__module__ for kind in found}
vllm = sys.modules.get("vllm")
registered = dict(vllm.ModelRegistry.models) if vllm else {}
print(json.dumps([[kind.__name__ for kind in classes], entries, registered]))
"""


@pytest.fixture
def saved(tmp_path):
    """A random Halyard, in the form of `slipway convert`."""
    return save(tmp_path / "model")


def save(directory, **config):
    model = halyard.HalyardForCausalLM(
        halyard.HalyardConfig(architectures=["HalyardForCausalLM"], **config)
    )
    model.save_pretrained(directory)
    return directory


def edited(directory, change):
    """Rewrite the tensors of a directory."""
    checkpoint = open_checkpoint(directory)
    tensors = {name: checkpoint.array(name).copy() for name in checkpoint.tensors}
    change(tensors)
    write_safetensors(directory / "model.safetensors", tensors)


def fake(tmp_path, monkeypatch, architectures="{}"):
    """Write fakes of both engines, first on the path of this process and its children."""
    for name, text in FAKES.items():
        path = tmp_path / "fakes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{ARCHITECTURES}", architectures))
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_package_registers_the_twin(tmp_path, monkeypatch, capsys, saved, engine):
    out = tmp_path / "package"
    monkeypatch.setattr(
        sys,
        "argv",
        ["slipway", "adapt", str(saved), "--for", engine, "--twin", str(TWIN), "--out", str(out)],
    )
    cli.main()
    said = capsys.readouterr().out
    assert "22 tensors, each with a parameter in the twin" in said
    assert f"{engine} is not installed here" in said
    assert f"pip install --no-deps {out}" in said
    name = f"halyard_for_{engine}"
    points = tomllib.loads((out / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {package.GROUPS[engine]: {name: f"{name}:register"}}

    fake(tmp_path, monkeypatch)
    environment = os.environ | {"PYTHONPATH": f"{out}:{tmp_path / 'fakes'}"}
    words = [sys.executable, "-P", "-c", LOAD, str(out), name, f"{name}:register", str(saved)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    classes, entries, registered = json.loads(done.stdout)
    assert classes == ["HalyardConfig", "HalyardModel", "HalyardForCausalLM"]
    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    assert registered == ({"HalyardForCausalLM": backend} if engine == "vllm" else {})
    assert entries == (
        {} if engine == "vllm" else {"HalyardForCausalLM": "sglang.srt.models.transformers"}
    )
    assert (out / name / "twin.py").read_text() == TWIN.read_text()


def test_every_misfit_is_in_one_error_and_nothing_is_written(tmp_path, monkeypatch, capsys, saved):
    def change(tensors):
        del tensors["model.layers.1.gains"]
        tensors["model.layers.0.gate.weight"] = np.zeros((3, 4), np.float32)
        tensors["model.layers.0.mlp.up.weight"] = tensors["model.layers.0.mlp.up.weight"].T.copy()

    edited(saved, change)
    out = tmp_path / "package"
    words = [
        "slipway",
        "adapt",
        str(saved),
        "--for",
        "vllm",
        "--twin",
        f"{TWIN}:HalyardForCausalLM",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "3 problems" in err
    assert not out.exists()
    assert "model.layers.0.gate.weight: the twin has no parameter for this tensor (3, 4)" in err
    assert "model.layers.0.mlp.up.weight: got (128, 192), the twin has (192, 128)" in err
    assert "model.layers.1.gains: no tensor for the twin's (2, 128)" in err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_twin_with_experts(tmp_path, engine):
    saved = save(tmp_path / "model", num_experts=4)
    assert adapt(str(saved), str(TWIN), engine, tmp_path / "package").num_tensors == 36


def test_an_expert_without_a_tensor_is_refused(tmp_path):
    saved = save(tmp_path / "model", num_experts=4)
    name = "model.layers.1.mlp.experts.3.down.weight"
    edited(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{name}: no tensor for the twin's"):
        adapt(str(saved), str(TWIN), "vllm", tmp_path / "package")


def test_tied_tables(tmp_path):
    saved = save(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(saved).tensors
    assert adapt(str(saved), str(TWIN), "sglang", tmp_path / "absent").num_tensors == 21

    def present(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edited(saved, present)
    assert adapt(str(saved), str(TWIN), "sglang", tmp_path / "equal").num_tensors == 22

    def another(tensors):
        tensors["lm_head.weight"][3, 4] += 1

    edited(saved, another)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight: differs from model.embed_tokens.weight"
    ):
        adapt(str(saved), str(TWIN), "sglang", tmp_path / "differs")


def test_a_tie_that_only_one_side_knows(tmp_path):
    saved = save(tmp_path / "model", tie_word_embeddings=True)
    twin = twin_with(tmp_path, ("_tied_weights_keys: ClassVar", "_other: ClassVar"))
    with pytest.raises(CheckpointError) as raised:
        adapt(str(saved), twin, "vllm", tmp_path / "package")
    assert raised.value.problems == [
        "lm_head.weight: no tensor for the twin's (256, 128)",
        "config.json: tie_word_embeddings: got True, but the twin does not tie lm_head.weight",
    ]


HEADS = "q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in projections)"
CALL = "attend(self, q, k, v, None, scaling=self.scaling, **kwargs)"
REPEATED = f"{HEADS}; k, v = (y.repeat_interleave(self.num_key_value_groups, 1) for y in (k, v))"
LAYER_NORM = "self.norm = nn.LayerNorm(config.hidden_size, bias=False)"
ROTATE = "\n\ndef rotate("
RMS_NORM = """

class OddRMSNorm(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * 2
"""
NUMBERS = "self.layer_idx = layer_idx"
OWN = "out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)"
NEW_HEAD = "self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)"
# What is changed in Halyard's file, the engines that would then compute something else, the error.
UNLIKE = {
    "attention of its own": (
        [(f"out, _ = {CALL}", OWN)],
        ENGINES,
        "attention: layers [] called ALL_ATTENTION_FUNCTIONS",
    ),
    "a mask": (
        [(CALL, CALL.replace("None", "angles"))],
        ENGINES,
        "layer 1: attention_mask: got a mask of the twin's own",
    ),
    "keys repeated for every head": (
        [(HEADS, REPEATED)],
        ENGINES,
        "layer 0: key: got (1, 4, 5, 64)",
    ),
    "no causal attention": (
        [("is_causal = True", "is_causal = False")],
        ENGINES,
        "layer 0: is_causal: got False",
    ),
    "a window that config.json does not have": (
        [(CALL, CALL.replace("None,", "None, sliding_window=8,"))],
        ENGINES,
        "layer 0: sliding_window: got 8",
    ),
    "a cap on the scores": (
        [(CALL, CALL.replace("None,", "None, softcap=30.0,"))],
        ENGINES,
        "layer 0: softcap: got 30.0",
    ),
    "layers without numbers": (
        [(NUMBERS, "self.number = layer_idx")],
        ENGINES,
        "attention: layers [None, None]",
    ),
    "a scale that vLLM does not see": (
        [(CALL, CALL.replace("scaling=self.scaling", '**{"scaling": self.scaling}'))],
        ("vllm",),
        "layer 0: scaling: vLLM reads it in forward's source",
    ),
    "keywords that end in the model": (
        [("x = layer(x, angles, **kwargs)", "x = layer(x, angles)")],
        ("sglang",),
        "layer 0: **kwargs: forward's must reach",
    ),
    "no position_ids": (
        [("position_ids=None, ", "")],
        ENGINES,
        "HalyardModel.forward: position_ids: no such",
    ),
    "two results first": (
        [("last_hidden_state=self.norm(x))", "last_hidden_state=self.norm(x)[0])")],
        ENGINES,
        "HalyardModel.forward: got (5, 128) first, expected (1, 5, 128)",
    ),
    "an embedding of its own": (
        [("nn.Embedding(", "Table("), (ROTATE, f"\n\nclass Table(nn.Embedding): ...\n{ROTATE}")],
        ENGINES,
        "input embedding: got Table, expected nn.Embedding",
    ),
    "logits made smaller": (
        [("logits=self", "logits=0.5 * self")],
        ENGINES,
        "logits: expected lm_head's",
    ),
    "something in front of the head": (
        [("lm_head(hidden)", "lm_head(hidden.relu())")],
        ENGINES,
        "lm_head: expected to be called once, with what `model`",
    ),
    "an RMSNorm by name": (
        [(LAYER_NORM, "self.norm = OddRMSNorm(config.hidden_size)"), (ROTATE, RMS_NORM + ROTATE)],
        ("sglang",),
        "OddRMSNorm: SGLang takes it by its name for an RMSNorm",
    ),
    "a look at the token before": (
        [("for layer in self.layers:", "x = x + x.roll(1, 1)\n        for layer in self.layers:")],
        ENGINES,
        "layers: outside of attention a token's result depends on its neighbours",
    ),
    "positions of its own": (
        [("if position_ids is None:", "if True:")],
        ENGINES,
        "layers: outside of attention a token's result depends on its neighbours, "
        "or not on its position_ids",
    ),
    "a bias of the head": (
        [(NEW_HEAD, NEW_HEAD.replace("False", "True"))],
        ("sglang",),
        "lm_head.bias: sglang loads only tensors in",
    ),
}


def twin_with(tmp_path, *changes):
    """Write Halyard's file with changes."""
    text = TWIN.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = tmp_path / "twin.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", UNLIKE)
def test_what_an_engine_would_compute_otherwise_is_refused(tmp_path, saved, name, engine):
    changes, engines, expected = UNLIKE[name]
    twin = twin_with(tmp_path, *changes)
    if name == "a bias of the head":
        edited(saved, lambda tensors: tensors.update({"lm_head.bias": np.zeros(256, np.float32)}))
    if engine not in engines:
        adapt(str(saved), twin, engine, tmp_path / "package")
        return
    with pytest.raises(CheckpointError) as raised:
        adapt(str(saved), twin, engine, tmp_path / "package")
    assert expected in "\n".join(raised.value.problems)
    assert not (tmp_path / "package").exists()


NO_TWINS = {  # what is changed, and the field that the error names
    "not transformers'": (
        [("PreTrainedModel(PreTrainedModel)", "PreTrainedModel(nn.Module)")],
        "twin",
    ),
    "another prefix": (
        [('_prefix = "model"', '_prefix = "trunk"')],
        "HalyardForCausalLM.base_model_prefix",
    ),
    "no head": ([(NEW_HEAD, "self.lm_head = nn.Identity()")], "HalyardForCausalLM.lm_head"),
    "another model_type": ([('"halyard"', '"halyards"')], "HalyardConfig.model_type"),
    "a field that config.json lacks": ([("config.intermediate_size", "config.mlp_size")], "twin"),
    "a field of another type": (
        [
            ("class HalyardConfig", "@strict\nclass HalyardConfig"),
            ("head_dim: int = 64", "head_dim: str = 'x'"),
            ("import torch\n", "import torch\nfrom huggingface_hub.dataclasses import strict\n"),
        ],
        "twin",
    ),
    "a module that is not here": ([("import torch\n", "import torch\nimport not_here\n")], "twin"),
    "no Python": ([("import torch\n", "import torch\nthis is\n")], "twin"),
    "a value that is read": (
        [("x = self.embed_tokens", "int(input_ids[0, 0]); x = self.embed_tokens")],
        "twin",
    ),
    "another class": ([("HalyardForCausalLM", "SomethingForCausalLM")], "twin"),
}


@pytest.mark.parametrize("name", NO_TWINS)
def test_what_is_no_twin_is_refused(tmp_path, saved, name):
    changes, field = NO_TWINS[name]
    with pytest.raises(InvalidConfig) as raised:
        adapt(str(saved), twin_with(tmp_path, *changes), "vllm", tmp_path / "package")
    assert raised.value.field == field
    assert not (tmp_path / "package").exists()


def test_the_line_of_the_twin_that_failed_is_named(tmp_path, saved):
    twin = twin_with(tmp_path, ("config.intermediate_size", "config.mlp_size"))
    line = next(
        i
        for i, text in enumerate(Path(twin).read_text().splitlines(), 1)
        if "config.mlp_size" in text
    )
    with pytest.raises(InvalidConfig, match=f"twin.py:{line}'.*mlp_size"):
        adapt(str(saved), twin, "vllm", tmp_path / "package")


CONFIGS = {
    "two architectures": ({"architectures": ["A", "B"]}, "architectures"),
    "no name of a class": ({"architectures": ["a b"]}, "architectures"),
    "no model_type": ({"model_type": None}, "model_type"),
    "a name that would not do in a file": ({"model_type": 'a"; import os'}, "model_type"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_config_json_must_say(tmp_path, saved, name):
    change, field = CONFIGS[name]
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedModel) as raised:
        adapt(str(saved), str(TWIN), "vllm", tmp_path / "package")
    assert raised.value.field == field


def test_a_model_type_of_transformers_is_not_taken_over(tmp_path, saved):
    twin = twin_with(tmp_path, ('"halyard"', '"llama"'))
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    with pytest.raises(UnsupportedModel, match="transformers has a model of this model_type"):
        adapt(str(saved), twin, "vllm", tmp_path / "package")


def test_an_installed_engine_is_asked(tmp_path, monkeypatch, saved):
    fake(tmp_path, monkeypatch, "{'LlamaForCausalLM': ''}")
    assert (
        "lacks HalyardForCausalLM" in adapt(str(saved), str(TWIN), "vllm", tmp_path / "lacks").asked
    )
    assert "could not be asked" in adapt(str(saved), str(TWIN), "sglang", tmp_path / "broken").asked
    fake(tmp_path, monkeypatch, "{'HalyardForCausalLM': ''}")
    with pytest.raises(UnsupportedModel, match=r"architectures.*lacks"):
        adapt(str(saved), str(TWIN), "vllm", tmp_path / "has")
    assert not (tmp_path / "has").exists()


def test_a_directory_in_use_is_left_alone(tmp_path, saved):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine").write_text("x")
    with pytest.raises(InvalidConfig, match="a new or an empty directory"):
        adapt(str(saved), str(TWIN), "vllm", tmp_path / "package")
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["mine"]


def test_transformers_is_left_as_it_was(tmp_path, saved):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = set(ALL_ATTENTION_FUNCTIONS.valid_keys()), torch.get_default_device()
    adapt(str(saved), str(TWIN), "vllm", tmp_path / "package")
    assert (set(ALL_ATTENTION_FUNCTIONS.valid_keys()), torch.get_default_device()) == before


def convert(tmp_path, monkeypatch, tensors, *flags):
    """Run the command `slipway convert` on a tree; return the exit code."""
    np.savez(tmp_path / "tree.npz", **tensors)
    words = [
        "convert",
        str(tmp_path / "tree.npz"),
        str(tmp_path / "out"),
        "--config",
        str(tmp_path / "model"),
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["slipway", *words])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_conversion_keeps_names_that_the_twin_loads(tmp_path, monkeypatch, capsys, saved):
    checkpoint = open_checkpoint(saved)
    tensors = {name: np.array(checkpoint.array(name)) for name in checkpoint.tensors}
    assert convert(tmp_path, monkeypatch, tensors) == 2, "nothing knows a Halyard"
    assert "HalyardForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    renamed = {name.replace("gains", "gain"): array for name, array in tensors.items()}
    assert convert(tmp_path, monkeypatch, renamed, "--twin", str(TWIN)) == 2
    assert "gain: the twin HalyardForCausalLM has no such tensor" in capsys.readouterr().err
    for flags in (["--mapping", "nnx"], ["--allow-unknown-names"], ["--to", "maxtext"]):
        assert convert(tmp_path, monkeypatch, tensors, "--twin", str(TWIN), *flags) == 2
        assert "twin: got" in capsys.readouterr().err
    wrapped = {f"module.{name}": array for name, array in tensors.items()}
    for tree in (wrapped, tensors):
        assert convert(tmp_path, monkeypatch, tree, "--twin", str(TWIN)) == 0
        assert "names that the twin HalyardForCausalLM loads" in capsys.readouterr().out
        made = open_checkpoint(tmp_path / "out")
        assert all(np.array_equal(made.array(name), array) for name, array in tensors.items())
        shutil.rmtree(tmp_path / "out")
