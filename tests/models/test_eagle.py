"""EAGLE and EAGLE-3 heads: drafts of torch, from the hidden states of transformers' model.

The layer of a head is made from transformers' attention, MLP and norms; what is around it is
written here from the papers (slipway/models/eagle.py).
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama

from slipway.checkpoint import files
from slipway.errors import CheckpointError, InvalidConfig, UnsupportedModel
from slipway.llm import LLM
from tests.models.runner import Case, make_checkpoint
from tests.models.test_mtp import OPTIONS, drafts_of

pytestmark = pytest.mark.xdist_group("eagle")
TARGET = Case("target", "qwen3", {"num_hidden_layers": 5, "head_dim": 16})
SIZE, VOCAB, KEPT = 64, 128, 90
FIELDS = {
    "hidden_size": SIZE,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Directory of the target, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("target")
    return directory, make_checkpoint(TARGET, directory).eval()


class Head(torch.nn.Module):
    """Head in torch; ``reads``: numbers of layers before the hidden states that it reads."""

    def __init__(self, reads, *, size=SIZE, is_third=True, vocab=VOCAB, residual="raw"):
        super().__init__()
        config = modeling_llama.LlamaConfig(**(FIELDS | {"hidden_size": size}))
        config._attn_implementation = "eager"
        layer = modeling_llama.LlamaDecoderLayer(config, 0)
        self.fc = torch.nn.Linear((3 if is_third else 2) * SIZE, size, bias=False)
        self.is_third = is_third
        self.reads = reads
        self.residual = residual
        if is_third:
            for name in ("q_proj", "k_proj", "v_proj"):
                rows = getattr(layer.self_attn, name).out_features
                setattr(layer.self_attn, name, torch.nn.Linear(2 * size, rows, bias=False))
            layer.hidden_norm = modeling_llama.LlamaRMSNorm(size, 1e-5)
            self.norm = modeling_llama.LlamaRMSNorm(size, 1e-5)
            self.lm_head = torch.nn.Linear(size, vocab, bias=False)
        else:
            del layer.input_layernorm
        self.midlayer = layer
        self.rotary = modeling_llama.LlamaRotaryEmbedding(config)
        generator = torch.Generator().manual_seed(3)
        for name, value in self.named_parameters():
            value.data = torch.randn(value.shape, generator=generator) * 0.1 + ("norm" in name)

    def apply_layer(self, embeds, hidden):
        """Compute the hidden states [T, D] of the layer."""
        layer, T = self.midlayer, len(embeds)
        if self.is_third:
            normed = layer.hidden_norm(hidden)
            x = normed if self.residual == "normed" else hidden
            joined = torch.cat([layer.input_layernorm(embeds), normed], -1)
        else:
            joined = x = self.fc(torch.cat([embeds, hidden], -1))
        rotation = self.rotary(joined[None], torch.arange(T)[None])
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        y, _ = layer.self_attn(joined[None], position_embeddings=rotation, attention_mask=mask)
        x = x + y[0]
        return x + layer.mlp(layer.post_attention_layernorm(x))

    @torch.inference_mode()
    def chain(self, model, ids, drafts, embed=None):
        """Return the logits of each of ``drafts`` after ``ids``."""
        states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        if self.is_third:
            hidden = self.fc(torch.cat([states[n][0, :-1] for n in self.reads], -1))
        else:
            hidden = states[-1][0, :-1]
        tokens, found = ids[1:], []
        table = model.model.embed_tokens.weight if embed is None else embed
        for draft in drafts:
            x = self.apply_layer(table[tokens], hidden)
            y = self.lm_head(self.norm(x[-1])) if self.is_third else model.lm_head(x[-1])
            found.append(y)
            hidden, tokens = torch.cat([hidden, x[-1:]]), [*tokens, draft]
        return found

    def write(self, directory, method, prefix="", **more):
        """Write the files of the head; ``more``: tensors, and fields of config.json."""
        tensors = {
            name if "lm_head" in name else prefix + name: value.detach().clone()
            for name, value in self.named_parameters()
        }
        tensors |= {name: more.pop(name) for name in list(more) if torch.is_tensor(more[name])}
        if not self.is_third:
            tensors = {key.replace("midlayer", "layers.0"): t for key, t in tensors.items()}
        name = "LlamaForCausalLMEagle3" if method == "eagle3" else "LlamaForCausalLMEagle"
        directory.mkdir(exist_ok=True)
        config = FIELDS | {"architectures": [name], "torch_dtype": "float32"} | more
        (directory / "config.json").write_text(json.dumps(config))
        save_file(tensors, directory / files.SINGLE)


def compare(directory, model, head, method, path, tokens=None, embed=None):
    """Compare the engine's drafts with those of torch, but for rounding.

    ``tokens``: the target's tokens of the head's.
    """
    found = drafts_of(directory, method=method, model=str(path), num_speculative_tokens=3)
    assert len(found) > 8
    number = {token: n for n, token in enumerate(tokens or range(VOCAB))}
    for ids, drafts in found:
        for draft, logits in zip(drafts, head.chain(model, ids, drafts, embed)):
            assert logits.max() - logits[number[draft]] < 1e-3


def test_eagle(target, tmp_path):
    directory, model = target
    head = Head((), is_third=False)
    head.write(tmp_path, "eagle")
    compare(directory, model, head, "eagle", tmp_path)


@pytest.mark.parametrize("form", ["sglang", "vllm", "default"])
def test_eagle3(target, tmp_path, form):
    """Layers that it reads are stated in two ways; its vocabulary is a part of the target's."""
    directory, model = target
    tokens = np.sort(np.random.default_rng(0).choice(VOCAB, KEPT, replace=False))
    offsets = torch.from_numpy(tokens - np.arange(KEPT))
    more = {"d2t": offsets, "t2d": torch.ones(VOCAB, dtype=torch.bool), "draft_vocab_size": KEPT}
    if form == "sglang":
        reads, prefix = (1, 3, 4), ""
        more |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}}
    elif form == "vllm":
        reads, prefix = (4, 0, 1), "model."
        more |= {"eagle_aux_hidden_state_layer_ids": [4, 0, 1], "norm_before_residual": True}
    else:
        reads, prefix = (2, 2, 2), ""
        # As the speculators library writes what is not stated.
        more |= {"eagle_aux_hidden_state_layer_ids": None}
    head = Head(reads, vocab=KEPT, residual="normed" if form == "vllm" else "raw")
    head.write(tmp_path, "eagle3", prefix, **more)
    compare(directory, model, head, "eagle3", tmp_path, tokens.tolist())


def test_eagle3_with_an_embedding_and_a_size_of_its_own(target, tmp_path):
    directory, model = target
    head = Head((2, 2, 2), size=48)
    embed = torch.randn(VOCAB, 48, generator=torch.Generator().manual_seed(5))
    fields = {"hidden_size": 48, "target_hidden_size": SIZE, "embed_tokens.weight": embed}
    head.write(tmp_path, "eagle3", **fields)
    compare(directory, model, head, "eagle3", tmp_path, embed=embed)


def refused(directory, path, method="eagle3"):
    config = {"method": method, "model": str(path), "num_speculative_tokens": 2}
    LLM(directory, speculative_config=config, **OPTIONS)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"vocab_size": 99}, InvalidConfig, "model: vocab_size: got 99, expected 128"),
        ({"target_hidden_size": 32}, InvalidConfig, "target_hidden_size: got 32, expected 64"),
        ({"num_hidden_layers": 2}, UnsupportedModel, "num_hidden_layers: got 2"),
        ({"draft_vocab_size": 90}, UnsupportedModel, "draft_vocab_size: got 90"),
        ({"architectures": ["Qwen3ForCausalLM"]}, UnsupportedModel, "architectures"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, UnsupportedModel, "layer_ids: got"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}, UnsupportedModel, "layer_ids: got"),
        ({"eagle_aux_hidden_state_layer_ids": "0,1"}, UnsupportedModel, "layer_ids: got '0,1'"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, UnsupportedModel, "use_aux"),
        ({"d2t": torch.zeros(5, dtype=torch.int64)}, UnsupportedModel, "d2t: length: got 5"),
        ({"d2t": -torch.arange(VOCAB)}, UnsupportedModel, "d2t: got"),
        ({"surplus.weight": torch.ones(3)}, CheckpointError, "surplus.weight: unexpected"),
    ],
)
def test_heads_that_do_not_fit_are_refused(target, tmp_path, more, error, message):
    Head((2, 2, 2)).write(tmp_path, "eagle3", **more)
    with pytest.raises(error, match=message):
        refused(target[0], tmp_path)


def test_a_head_needs_files(target):
    with pytest.raises(InvalidConfig, match="speculative_config: model: got 'nothing'"):
        refused(target[0], "")
