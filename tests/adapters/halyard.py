"""Halyard, an architecture that no engine has, as a user of `slipway adapt` writes its torch twin.

Attention and feed-forward read the same normed input, with a gain per channel for each; squared
ReLU; half of every head is rotated, and the softmax is sharper than usual. With ``num_experts``,
the feed-forward is a mixture of experts.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class HalyardConfig(PreTrainedConfig):
    model_type = "halyard"
    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 2


class HalyardAttention(nn.Module):
    is_causal = True

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 * 1.5
        heads = config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(self, x, angles, **kwargs):
        shape = (*x.shape[:-1], -1, self.head_dim)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in projections)
        q, k = rotate(q, angles), rotate(k, angles)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, _ = attend(self, q, k, v, None, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))


class HalyardMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu() ** 2)


class HalyardExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(HalyardMLP(config) for _ in range(config.num_experts))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(self.chosen)
        shares = torch.zeros(*x.shape[:-1], len(self.experts), dtype=x.dtype, device=x.device)
        shares = shares.scatter(-1, chosen, weights.to(x.dtype))
        return sum(shares[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class HalyardLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.attn = HalyardAttention(config, layer_idx)
        self.mlp = HalyardExperts(config) if config.num_experts else HalyardMLP(config)
        self.gains = nn.Parameter(torch.ones(2, config.hidden_size))

    def forward(self, x, angles, **kwargs):
        y = self.norm(x)
        attended = self.attn(y, angles, **kwargs)
        return x + self.gains[0] * attended + self.gains[1] * self.mlp(y)


class HalyardPreTrainedModel(PreTrainedModel):
    config_class = HalyardConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True


class HalyardModel(HalyardPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HalyardLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        frequencies = 10000.0 ** -torch.linspace(0, 1, config.head_dim // 4)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.post_init()

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **kwargs):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        angles = position_ids[:, None, :, None].float() * self.frequencies
        for unused in ("use_cache", "return_dict", "past_key_values", "attention_mask"):
            kwargs.pop(unused, None)
        for layer in self.layers:
            x = layer(x, angles, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class HalyardForCausalLM(HalyardPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = HalyardModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def rotate(x, angles):
    """Rotate the first half of each head, pair by pair."""
    turned, kept = x.chunk(2, -1)
    a, b = turned.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, kept], -1)
