"""Prediction layers of DeepSeek-V3, GLM-4.5, Qwen3 and Ling 2: drafts of torch modules.

transformers has no prediction layers. But their decoder layer is one more layer of the model, so
the reference takes it from a model of transformers with a layer more. Norms, projection and head
around it are written here from the published formulas.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from slipway import SamplingParams
from slipway.checkpoint import files
from slipway.errors import CheckpointError, InvalidConfig
from slipway.llm import LLM
from tests.models import published
from tests.models.runner import make_checkpoint
from tests.models.test_families import variant
from tests.models.test_models import CASES

pytestmark = pytest.mark.xdist_group("mtp")
OPTIONS = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "memory_fraction": 0.1,
    "decode_steps": 2,
    "page_size": 16,
}


def drafts_of(directory, **config):
    """Return (tokens, drafts after them) of a greedy run in which every draft is verified."""
    given = {"method": "mtp", "num_speculative_tokens": 2} | config
    prompts = [np.random.default_rng(n).integers(0, 120, n).tolist() for n in (1, 9, 40)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(directory, **OPTIONS) as llm:
        plain = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    found = []
    with LLM(directory, speculative_config=given, **OPTIONS) as llm:
        speculation = llm.engine._speculation
        put = speculation.on_device.put

        def recorded(sequence, drafts):
            room = len(sequence.pages) * OPTIONS["page_size"] - sequence.num_tokens
            # A draft behind the pages of a sequence is a guess.
            found.append((sequence.tokens[: sequence.num_tokens].tolist(), drafts[: room + 1]))
            put(sequence, drafts)

        speculation.on_device.put = recorded
        speculation.lengths.choose = lambda rates, most: most
        got = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    assert got == plain
    return found


def compare(found, draft_logits):
    """Check that each draft is the likeliest token of the reference, but for rounding."""
    assert len(found) > 8
    for tokens, (draft, *_) in found:
        logits = draft_logits(tokens)
        assert logits.max() - logits[draft] < 1e-3


class Reference:
    """Draft logits with a decoder layer of transformers."""

    def __init__(self, model, extra, *, skips_first, head):
        self.model = model.eval()
        self.extra = extra
        self.skips_first = skips_first
        self.head = head

    def __call__(self, ids):
        base, eps = self.model.model, self.model.config.rms_norm_eps
        *layers, last = base.layers
        with torch.inference_mode():
            embeds = base.embed_tokens(torch.tensor(ids[1:]))
            base.layers = torch.nn.ModuleList(layers)
            hidden = base(torch.tensor([ids])).last_hidden_state[0, :-1]
            base.layers = torch.nn.ModuleList([*layers, last])
            if self.skips_first:
                embeds[0] = 0
            joined = [
                published.rms_norm(embeds, self.extra["enorm"], eps),
                published.rms_norm(hidden, self.extra["hnorm"], eps),
            ]
            x = F.linear(torch.cat(joined, -1), self.extra["eh_proj"])[None]
            rotation = base.rotary_emb(x, torch.arange(x.shape[1])[None])
            mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)[None, None]
            y = last(x, attention_mask=mask, position_embeddings=rotation)
            y = (y[0] if isinstance(y, tuple) else y)[0, -1]
            y = published.rms_norm(y, self.extra["shared_head.norm"], eps)
            return F.linear(y, self.head)


def with_layer(name, directory, names, prefix, own_head):
    """Write a model with a prediction layer; return transformers' model with that layer last."""
    case = next(case for case in CASES if case.name == name)
    fields = case.fields | {"num_hidden_layers": 3}
    model = make_checkpoint(type(case)(name, case.model_type, fields), directory)
    config = json.loads((directory / "config.json").read_text())
    size, generator = config["hidden_size"], torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    extra = {
        "enorm": 1 + draw(size),
        "hnorm": 1 + draw(size),
        "eh_proj": draw(size, 2 * size),
        "shared_head.norm": 1 + draw(size),
    }
    tensors = load_file(directory / files.SINGLE)
    moved = {
        key.replace("model.layers.2.", prefix): value.contiguous() for key, value in tensors.items()
    }
    moved |= {names[key]: value for key, value in extra.items()}
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    if own_head:
        head = draw(*head.shape)
        moved["model.layers.2.shared_head.head.weight"] = head
    save_file(moved, directory / files.SINGLE)
    config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    if "mlp_layer_types" in config:
        config["mlp_layer_types"] = config["mlp_layer_types"][:2]
    (directory / "config.json").write_text(json.dumps(config))
    return Reference(model, extra, skips_first=own_head, head=head)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe"])
def test_layers_with_experts(name, tmp_path):
    prefix = "model.layers.2."
    names = {
        key: f"{prefix}{key}.weight" for key in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    }
    reference = with_layer(name, tmp_path, names, prefix, own_head=True)
    compare(drafts_of(tmp_path), reference)


QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding.weight",
    "hnorm": "mtp.pre_fc_norm_hidden.weight",
    "eh_proj": "mtp.fc.weight",
    "shared_head.norm": "mtp.norm.weight",
}


def test_qwens_names_and_a_directory_of_its_own(tmp_path):
    reference = with_layer("qwen3-tied", tmp_path, QWEN, "mtp.layers.0.", own_head=False)
    compare(drafts_of(tmp_path), reference)
    apart = tmp_path / "layer"
    apart.mkdir()
    tensors = load_file(tmp_path / files.SINGLE)
    own = {key: value for key, value in tensors.items() if key.startswith("mtp.")}
    save_file(own, apart / files.SINGLE)
    (apart / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(
        {key: value for key, value in tensors.items() if key not in own}, tmp_path / files.SINGLE
    )
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight: missing"):
        drafts_of(tmp_path)
    compare(drafts_of(tmp_path, model=str(apart)), reference)
    apart = apart.rename(tmp_path / "mtp")
    compare(drafts_of(tmp_path), reference)
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    with pytest.raises(InvalidConfig, match="speculative_config: model: vocab_size"):
        drafts_of(tmp_path)


def test_ling_2(tmp_path):
    config, tensors = variant("ling2", tmp_path, num_nextn_predict_layers=1)
    count, size = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{count - 1}.", f"model.layers.{count}."
    extra = {k.replace(last, new): v + 0.02 for k, v in tensors.items() if k.startswith(last)}
    generator = torch.Generator().manual_seed(3)
    for name in ("enorm", "hnorm", "final_layernorm"):
        extra[f"{new}{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
    noise = torch.randn((size, 2 * size), generator=generator)
    extra[f"{new}eh_proj.weight"] = 0.1 * noise
    save_file(tensors | extra, tmp_path / files.SINGLE)

    def draft_logits(ids):
        with torch.inference_mode():
            return published.bailing_draft_logits(tensors | extra, config, ids)[-1]

    compare(drafts_of(tmp_path), draft_logits)


def test_more_drafts_than_the_context_are_refused(tmp_path):
    with_layer("qwen3-tied", tmp_path, QWEN, "mtp.layers.0.", own_head=False)
    given = {"method": "mtp", "num_speculative_tokens": 40}
    with pytest.raises(InvalidConfig, match=r"num_speculative_tokens.*less than max_model_len"):
        LLM(tmp_path, speculative_config=given, **OPTIONS | {"max_model_len": 40})
