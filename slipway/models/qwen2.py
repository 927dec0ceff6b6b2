"""Qwen2 and Qwen2.5: which layers it is made of and how they follow each other; knows no batch, page or file.

Yang et al., Qwen2 technical report, 2024.
"""

import dataclasses
from typing import ClassVar

from slipway import ops
from slipway.models.config import WindowedConfig
from slipway.nn.attention import Attention
from slipway.nn.linear import Embedding
from slipway.nn.mlp import MLP
from slipway.nn.norm import RMSNorm
from slipway.nn.rope import Rope
from slipway.tree import Chain, module, runs, stack, static


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(WindowedConfig):
    """config.json of a Qwen2: queries, keys and values always have a bias."""


@module
class Layer:
    """Attention and feed-forward, each behind a norm and a residual."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP

    @staticmethod
    def declare(config: Qwen2Config, window: int | None) -> "Layer":
        """One layer."""
        norm = RMSNorm.declare("embed", config.hidden_size, config.rms_norm_eps)
        attention = Attention.declare(config, window, qkv_bias=True)
        return Layer(norm, attention, norm, MLP.declare(config.hidden_size, config.intermediate_size))

    def __call__(self, x_TD, kv, index, ragged: ops.Ragged, angles):
        """[T, embed] -> ([T, embed], kv)."""
        y_TD, kv = self.self_attn(self.input_layernorm(x_TD, ragged.num_tokens), kv, index, ragged, angles)
        x_TD = x_TD + y_TD
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD, ragged.num_tokens), ragged.num_tokens), kv


@module
class Model:
    """Everything below the output head."""

    embed_tokens: Embedding
    layers: Chain
    norm: RMSNorm


@module
class Qwen2ForCausalLM:
    """Token ids to hidden states, hidden states to logits."""

    model: Model
    lm_head: Embedding | None  # None: tied to embed_tokens
    config: Qwen2Config = static()
    Config: ClassVar = Qwen2Config

    @staticmethod
    def declare(config: Qwen2Config) -> "Qwen2ForCausalLM":
        """Every tensor of the model."""
        vocab, embed, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        layers = Chain(stack(Layer.declare(config, window), n, first) for window, first, n in runs(config.windows))
        table = Embedding.declare(vocab, embed, alias="lm_head.weight" if tied else "")
        model = Model(table, layers, RMSNorm.declare("embed", embed, config.rms_norm_eps))
        return Qwen2ForCausalLM(model, None if tied else Embedding.declare(vocab, embed), config)

    def __call__(self, ids_T, kv, ragged: ops.Ragged):
        """Token ids [T] -> (hidden states [T, embed], kv)."""
        rope = Rope(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        angles = rope(ragged.positions_T, ragged.contexts_T)
        x_TD, kv = self.model.layers.fold(
            lambda layer, index, carry: layer(*carry, index, ragged, angles),
            (self.model.embed_tokens(ids_T, ragged.num_tokens), kv),
        )
        return self.model.norm(x_TD, ragged.num_tokens), kv

    def logits(self, x_BD, num_rows):
        """Hidden states [B, embed] -> f32 logits [B, vocab]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.logits(x_BD, num_rows, self.config.vocab_size)
