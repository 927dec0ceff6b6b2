"""Built-in mappings against transformers: every naming in both directions.

Gemma's logits are computed from its Linen tree.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import unflatten_dict

from slipway.convert.conversion import ConvertConfig, convert, prepare
from slipway.convert.formats import open_source
from slipway.convert.mappings import BUILT_IN, find
from slipway.convert.source import MemorySource
from slipway.errors import InvalidConfig
from tests.convert.twins import assert_same, tensors

SHAPE = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)
QWEN_OR_LLAMA = [
    ("llama", {"tie_word_embeddings": False}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False}),
]


def made(model_type: str, folder: Path, **fields) -> Path:
    """Save a random model with transformers."""
    torch.manual_seed(0)
    shape = SHAPE | fields
    if model_type == "qwen2":
        shape.pop("head_dim")
    config = transformers.AutoConfig.for_model(model_type, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def flax_tree(directory: Path, folder: Path, mapping: str) -> dict[str, np.ndarray]:
    convert(open_source(directory), folder, ConvertConfig(to="npz", mapping=mapping))
    with np.load(folder / "params.npz") as archive:
        return {name: archive[name] for name in archive.files}


def original(directory: Path) -> dict[str, np.ndarray]:
    """Return the directory's tensors; transformers may have left a tied head in it."""
    return {name: x for name, x in tensors(directory).items()}


@pytest.mark.parametrize(("model_type", "fields"), QWEN_OR_LLAMA)
@pytest.mark.parametrize("mapping", ["nnx", "linen"])
def test_decoders_with_hugging_face_names(model_type, fields, mapping, tmp_path):
    directory = made(model_type, tmp_path / "hf", **fields)
    tree = flax_tree(directory, tmp_path / "npz", mapping)
    assert tree["layers.1.mlp.down_proj.kernel"].shape == (40, 24)
    for prefix in ("", "params.", "params.params."):
        out = tmp_path / f"out{len(prefix)}"
        source = MemorySource({prefix + name: x for name, x in tree.items()})
        convert(source, out, ConvertConfig(config=directory, mapping=mapping))
        assert_same(tensors(out), original(directory))


@pytest.mark.parametrize("inside", ["", "model."])
def test_layers_stacked_as_scan_leaves_them(inside, tmp_path):
    directory = made("qwen3", tmp_path / "hf")
    tree = flax_tree(directory, tmp_path / "npz", "nnx")
    stacked = {name: x for name, x in tree.items() if not name.startswith("layers.")}
    for name in {name.split(".", 2)[2] for name in tree if name.startswith("layers.")}:
        stacked[f"layers.{name}"] = np.stack([tree[f"layers.{i}.{name}"] for i in range(2)])
    named = {
        name if name.startswith("lm_head") else inside + name: x for name, x in stacked.items()
    }
    convert(MemorySource(named), tmp_path / "out", ConvertConfig(config=directory))
    assert_same(tensors(tmp_path / "out"), original(directory))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mapping", ["nnx", "linen"])
@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
def test_gemma_in_the_naming_of_flax(model_type, mapping, kv_heads, tmp_path):
    directory = made(model_type, tmp_path / "hf", num_key_value_heads=kv_heads)
    tree = flax_tree(directory, tmp_path / "npz", mapping)
    layer = "layers.0" if mapping == "nnx" else "layer_0"
    if kv_heads == 4:
        assert tree[f"{layer}.attn.qkv_einsum.w"].shape == (3, 4, 24, 6)
    else:
        assert tree[f"{layer}.attn.kv_einsum.w"].shape == (2, 2, 24, 6)
    if mapping == "linen":
        assert tree[f"{layer}.mlp.gating_einsum"].shape == (2, 24, 40)
    wrapped = {f"transformer.{name}": x for name, x in tree.items()}
    convert(MemorySource(wrapped), tmp_path / "out", ConvertConfig(config=directory))
    assert_same(tensors(tmp_path / "out"), original(directory))


def gemma_logits(tree: dict, ids: np.ndarray) -> np.ndarray:
    """Compute Gemma 1 as Flax's example does (einsums over its own layouts), in float64."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + scale)

    def rotated(x):
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None, None] / 10000.0 ** (np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ],
            -1,
        )

    table = tree["embedder"]["input_embedding"].astype(np.float64)
    x = table[ids] * np.sqrt(table.shape[1])
    for i in range(2):
        layer = tree[f"layer_{i}"]
        y = norm(x, layer["pre_attention_norm"]["scale"])
        q = np.einsum("td,ndh->tnh", y, layer["attn"]["q_einsum"]["w"])
        k, v = np.einsum("sd,ckdh->cskh", y, layer["attn"]["kv_einsum"]["w"])
        k, v = (np.repeat(part, 2, axis=1) for part in (rotated(k), v))
        scores = np.einsum("tnh,snh->nts", rotated(q) * q.shape[-1] ** -0.5, k)
        scores = np.where(np.tri(len(ids)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("tnh,nhd->td", mixed, layer["attn"]["attn_vec_einsum"]["w"])
        y = norm(x, layer["pre_ffw_norm"]["scale"])
        gate, up = np.einsum("td,cdf->ctf", y, layer["mlp"]["gating_einsum"])
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gelu * up) @ layer["mlp"]["linear"]
    return norm(x, tree["final_norm"]["scale"]) @ table.T


def test_gemma_computes_the_same_from_its_linen_tree(tmp_path):
    directory = made("gemma", tmp_path / "hf")
    flat = flax_tree(directory, tmp_path / "npz", "linen")
    ids = np.random.default_rng(0).integers(0, 48, 12)
    twin = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = twin(torch.from_numpy(ids)[None]).logits[0].numpy()
    tree = unflatten_dict({tuple(name.split(".")): x for name, x in flat.items()})
    np.testing.assert_allclose(gemma_logits(tree, ids), wanted, atol=1e-4)


def test_names_of_hugging_face_are_themselves(tmp_path):
    directory = made("qwen3", tmp_path / "hf")
    tree = {f"params.{name}": x for name, x in tensors(directory).items()}
    convert(MemorySource(tree), tmp_path / "out", ConvertConfig(config=directory))
    assert_same(tensors(tmp_path / "out"), tensors(directory))
    conversion = prepare(
        MemorySource(tree | {"params.more": np.zeros(3, np.float32)}),
        ConvertConfig(config=directory),
    )
    assert len(conversion.problems) == 1
    assert conversion.problems[0].startswith("params.more: no rule")


YAML = """
rules:
  - [embed.table, model.embed_tokens.weight, vocab embed -> vocab embed]
  - [blocks.attn.qkv,
     "model.layers.{layers}.self_attn.{qkv}_proj.weight",
     layers embed qkv head_dim -> layers (qkv head_dim) embed]
  - [blocks.attn.out,
     "model.layers.{layers}.self_attn.o_proj.weight",
     layers heads head_dim embed -> layers embed (heads head_dim)]
  - [blocks.norm1, "model.layers.{layers}.input_layernorm.weight", layers embed -> layers embed]
  - [blocks.norm2,
     "model.layers.{layers}.post_attention_layernorm.weight",
     layers embed -> layers embed]
  - [blocks.mlp.gate_up,
     "model.layers.{layers}.mlp.{gate_up}_proj.weight",
     layers embed gate_up mlp -> layers gate_up mlp embed]
  - [blocks.mlp.down,
     "model.layers.{layers}.mlp.down_proj.weight",
     layers mlp embed -> layers embed mlp]
  - [norm, model.norm.weight, embed -> embed]
  - ["head?", lm_head.weight, embed vocab -> vocab embed]
parts:
  qkv: {q: heads, k: kv_heads, v: kv_heads}
  gate_up: {gate: 1, up: 1}
fields: {vocab: vocab_size, embed: hidden_size, layers: num_hidden_layers,
         heads: num_attention_heads, kv_heads: num_key_value_heads, head_dim: head_dim,
         mlp: intermediate_size}
config: {model_type: llama, architectures: [LlamaForCausalLM], hidden_act: silu}
required: [rms_norm_eps, rope_theta, max_position_embeddings]
tied: {lm_head.weight: model.embed_tokens.weight}
roots: ["params.", ""]
"""


def test_a_mapping_of_ones_own(tmp_path):
    """The worked example of docs/convert.md, by hand against transformers' Llama."""
    assert (
        "\n".join(f"    {line}" for line in YAML.strip().splitlines()[1:18])
        in Path("docs/convert.md").read_text()
    )
    directory = made("llama", tmp_path / "hf", tie_word_embeddings=False)
    hf = tensors(directory)

    def stack(f):
        return np.stack([f(f"model.layers.{i}") for i in range(2)])

    def qkv(layer):
        parts = [hf[f"{layer}.self_attn.{n}_proj.weight"].reshape(-1, 6, 24) for n in "qkv"]
        return np.concatenate(parts).transpose(2, 0, 1)

    tree = {
        "embed.table": hf["model.embed_tokens.weight"],
        "norm": hf["model.norm.weight"],
        "head": hf["lm_head.weight"].T,
        "blocks.attn.qkv": stack(qkv),
        "blocks.attn.out": stack(lambda p: hf[f"{p}.self_attn.o_proj.weight"].T.reshape(4, 6, 24)),
        "blocks.norm1": stack(lambda p: hf[f"{p}.input_layernorm.weight"]),
        "blocks.norm2": stack(lambda p: hf[f"{p}.post_attention_layernorm.weight"]),
        "blocks.mlp.gate_up": stack(
            lambda p: np.stack([hf[f"{p}.mlp.{n}_proj.weight"].T for n in ("gate", "up")], axis=1)
        ),
        "blocks.mlp.down": stack(lambda p: hf[f"{p}.mlp.down_proj.weight"].T),
    }
    (tmp_path / "mine.yaml").write_text(YAML)
    source = MemorySource({f"params.{name}": np.ascontiguousarray(x) for name, x in tree.items()})
    convert(
        source,
        tmp_path / "out",
        ConvertConfig(config=directory, mapping=str(tmp_path / "mine.yaml")),
    )
    assert_same(tensors(tmp_path / "out"), hf)


@pytest.mark.host
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("rules: 3", "list of rules"),
        ("rules: [[a, b]]", "[JAX name, HF key, pattern]"),
        ("rules: [[a, b, 'x -> (x']]", "unmatched parenthesis"),
        ("rules: []\nsize: {a: 3}", "size"),
        ("rules: [", "YAML"),
    ],
)
def test_a_mapping_file_that_cannot_be_read(content, told, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(InvalidConfig) as caught:
        find(str(tmp_path / "mine.yaml"), {})
    assert told in str(caught.value)


@pytest.mark.host
def test_a_mapping_in_python(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from slipway.convert.rules import TreeMapping, rules\n"
        "MAPPING = TreeMapping(name='mine', rules=rules([('a', 'b', 'x y -> y x')]))\n"
    )
    assert find(str(tmp_path / "mine.py"), {})[0].rules[0].hf == "b"
    (tmp_path / "mine.py").write_text("MAPPING = 3")
    with pytest.raises(InvalidConfig, match="MAPPING"):
        find(str(tmp_path / "mine.py"), {})


@pytest.mark.host
def test_every_built_in_rule_can_be_read_and_names_are_unique():
    for group in BUILT_IN.values():
        assert len({mapping.name for mapping in group}) == len(group)
        for mapping in group:
            for rule, ours, theirs in mapping.sides():
                assert set(ours.indices) - mapping.parts.keys() <= set(theirs.indices), rule
                json.dumps([rule.jax, rule.hf, rule.axes])
