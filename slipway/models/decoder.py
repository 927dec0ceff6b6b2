"""Decoder-only language model: token embedding, layers, final norm and output head.

Not here: the layers of an architecture (llama.py, qwen2.py, qwen3.py), the fields of config.json (config.py).
"""

from collections.abc import Callable
from typing import Any, Protocol

from slipway import ops
from slipway.nn.attention import Attention
from slipway.nn.linear import Embedding
from slipway.nn.norm import RMSNorm
from slipway.nn.rope import Rope
from slipway.tree import Chain, module, runs, stack, static


class FeedForward(Protocol):
    """Feed-forward layer: [T, embed] -> [T, embed]."""

    def __call__(self, x_TD: Any, num_tokens: Any) -> Any:
        """Compute the first ``num_tokens`` rows of ``x_TD``; the other rows are padding."""


@module
class DecoderLayer:
    """Attention and a feed-forward layer, each behind a norm and inside a residual connection."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: FeedForward

    @staticmethod
    def declare(config: Any, attention: Attention, mlp: FeedForward) -> "DecoderLayer":
        """Declare a layer whose norms take ``hidden_size`` and ``rms_norm_eps`` from ``config``."""
        norm = RMSNorm.declare("embed", config.hidden_size, config.rms_norm_eps)
        return DecoderLayer(norm, attention, norm, mlp)

    def __call__(self, x_TD, kv, layer, ragged: ops.Ragged, angles):
        """[T, embed] -> ([T, embed], kv); ``layer`` is this layer's index in the cache."""
        y_TD, kv = self.self_attn(self.input_layernorm(x_TD, ragged.num_tokens), kv, layer, ragged, angles)
        x_TD = x_TD + y_TD
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD, ragged.num_tokens), ragged.num_tokens), kv


@module
class Decoder:
    """Everything below the output head."""

    embed_tokens: Embedding
    layers: Chain
    norm: RMSNorm


@module
class CausalLM:
    """Language model: token ids -> hidden states -> logits."""

    model: Decoder
    lm_head: Embedding | None  # None: tied to embed_tokens
    config: Any = static()

    @staticmethod
    def declare(config: Any, declare_layer: Callable[[Any, int | None], Any]) -> "CausalLM":
        """Declare every tensor of the model.

        ``declare_layer(config, window)`` declares one layer; ``window`` is its sliding window in positions, None for
        full attention. Neighbouring layers with the same window are stacked.
        """
        vocab, embed, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        layers = Chain(stack(declare_layer(config, window), n, first) for window, first, n in runs(config.windows))
        table = Embedding.declare(vocab, embed, alias="lm_head.weight" if tied else "")
        model = Decoder(table, layers, RMSNorm.declare("embed", embed, config.rms_norm_eps))
        return CausalLM(model, None if tied else Embedding.declare(vocab, embed), config)

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
