"""Decoder-only language model: token embedding, layers, final norm and output head.

Not here: the layers of an architecture (llama.py, qwen2.py, qwen3.py), the fields of config.json
(config.py).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slipway import ops
from slipway.nn.attention import Attention
from slipway.nn.linear import Embedding
from slipway.nn.norm import RMSNorm
from slipway.nn.rope import Rope, Scaling
from slipway.tree import Chain, module, runs, stack, static


class ModelConfig(Protocol):
    """Fields of a model's configuration that the engine reads."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, before a mesh pads the vocabulary."""

    @property
    def max_context(self) -> int:
        """Longest sequence in tokens, position scaling included."""

    @property
    def rope_scaling(self) -> Scaling | None:
        """Scaling of rotary positions."""


class LanguageModel(Protocol):
    """Model that the engine runs: a tree of declared tensors, or the same tree with arrays.

    ``__call__`` and ``logits`` are traced under shard_map, on a tree with arrays.
    """

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model, as typed fields."""

    @property
    def cache_specs(self) -> tuple[ops.CacheSpec, ...]:
        """Caches that the layers need, in the order in which ``__call__`` takes them."""

    def __call__(
        self, step: ops.StepInput, caches: Sequence[ops.KVCache]
    ) -> tuple[Any, tuple[ops.KVCache, ...]]:
        """Compute the hidden states [T, embed] of a step, and the caches after it."""

    def logits(self, x_BD: Any, num_rows: Any) -> Any:
        """Compute f32 logits [B, vocab] of hidden states; only ``num_rows`` leading rows count."""


class FeedForward(Protocol):
    """Feed-forward layer: [T, embed] -> [T, embed]."""

    def __call__(self, x_TD: Any, step: ops.StepInput) -> Any:
        """Compute the rows of ``x_TD`` that are tokens of the step; the other rows are padding."""


@module
class DecoderLayer:
    """Attention and a feed-forward layer, each behind a norm and inside a residual connection."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: FeedForward

    @staticmethod
    def declare(config: Any, attention: Attention, mlp: FeedForward) -> "DecoderLayer":
        """Declare a layer; its norms take ``hidden_size`` and ``rms_norm_eps`` from ``config``."""
        norm = RMSNorm.declare("embed", config.hidden_size, config.rms_norm_eps)
        return DecoderLayer(
            input_layernorm=norm, self_attn=attention, post_attention_layernorm=norm, mlp=mlp
        )

    def __call__(self, x_TD, kv: ops.KVCache, layer, step: ops.StepInput):
        """Compute a layer: [T, embed] -> ([T, embed], kv); ``layer``: its index in the cache."""
        y_TD, kv = self.self_attn(self.input_layernorm(x_TD, step), kv, layer=layer, step=step)
        x_TD = x_TD + y_TD
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD, step), step), kv


@module
class Decoder:
    """Token embedding, layers and final norm: everything below the output head."""

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

        ``declare_layer(config, window)`` declares one layer; ``window`` is its sliding window in
        positions, None for full attention. Neighbouring layers with the same window are stacked.
        """
        vocab, embed, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        layers = Chain(
            stack(declare_layer(config, window), n, first)
            for window, first, n in runs(config.windows)
        )
        table = Embedding.declare(vocab, embed, alias="lm_head.weight" if tied else "")
        model = Decoder(table, layers, RMSNorm.declare("embed", embed, config.rms_norm_eps))
        return CausalLM(model, None if tied else Embedding.declare(vocab, embed), config)

    @property
    def cache_specs(self) -> tuple[ops.CacheSpec, ...]:
        """One cache for each window of the layers, in order of their first layer."""
        windows, config = self.config.windows, self.config
        heads = {"num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        return tuple(
            ops.CacheSpec(windows.count(window), window=window, **heads)
            for window in dict.fromkeys(windows)
        )

    def __call__(self, step: ops.StepInput, caches: Sequence[ops.KVCache]):
        """Compute a step: -> (hidden states [T, embed], caches); ``caches``: of ``cache_specs``."""
        rope = Rope(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        step = dataclasses.replace(step, angles=(rope(step.positions_T, step.contexts_T),))
        x_TD = self.model.embed_tokens(step.ids_T, step)
        held = {spec.window: cache for spec, cache in zip(self.cache_specs, caches, strict=True)}
        # Number of layers computed so far, for each cache.
        num_done = dict.fromkeys(held, 0)
        for part, (window, first, n) in zip(
            self.model.layers, runs(self.config.windows), strict=True
        ):

            def apply(layer, index, carry, first_in_cache=num_done[window] - first):
                return layer(*carry, layer=index + first_in_cache, step=step)

            x_TD, held[window] = part.fold(apply, (x_TD, held[window]))
            num_done[window] += n
        return self.model.norm(x_TD, step), tuple(held.values())

    def logits(self, x_BD, num_rows):
        """Compute logits: hidden states [B, embed] -> f32 [B, vocab]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.logits(x_BD, num_rows, self.config.vocab_size)
