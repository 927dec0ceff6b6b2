"""Decoder-only language model: token embedding, layers, final norm and output head.

Not here: the layers of an architecture (llama.py, qwen2.py, qwen3.py), the fields of config.json
(config.py).
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp

from slipway import ops
from slipway.nn.attention import Attention
from slipway.nn.latent_attention import LatentAttention
from slipway.nn.linear import Embedding
from slipway.nn.moe import MoE
from slipway.nn.norm import RMSNorm
from slipway.nn.rope import LongQueries, Rope
from slipway.tree import Chain, module, runs, stack, static


class ModelConfig(Protocol):
    """Fields of a model's configuration that the engine reads."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, before a mesh pads the vocabulary."""

    @property
    def hidden_size(self) -> int:
        """Number of dimensions of a hidden state."""

    @property
    def max_context(self) -> int:
        """Longest sequence in tokens, position scaling included."""

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Glob patterns of tensors that a checkpoint may hold and the model does not use."""

    @property
    def ropes(self) -> Sequence[Rope | LongQueries]:
        """Rotary embeddings of the layers."""


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

    @property
    def load_shape(self) -> tuple[int, int]:
        """Number of layers with experts, and the experts of each; zeros if there are none."""

    def __call__(
        self, step: ops.StepInput, caches: Sequence[ops.KVCache | ops.ExpertLoad]
    ) -> tuple[Any, tuple[ops.KVCache | ops.ExpertLoad, ...]]:
        """Compute the hidden states [T, embed] of a step, and the caches after it.

        ``caches``: of ``cache_specs``, and perhaps an ExpertLoad of ``load_shape`` behind them.
        """

    def run(
        self,
        step: ops.StepInput,
        caches: Sequence[ops.KVCache | ops.ExpertLoad],
        reads: Sequence[int] = (),
    ) -> tuple[Any, tuple[Any, ...], tuple[ops.KVCache | ops.ExpertLoad, ...]]:
        """Compute a step as ``__call__`` does: -> (hidden states, those of ``reads``, caches).

        ``reads``: the number of layers before each of the hidden states; -1: behind the final norm.
        """

    def logits(self, x_BD: Any, num_rows: Any) -> Any:
        """Compute f32 logits [B, vocab] of hidden states; only ``num_rows`` leading rows count."""


class FeedForward(Protocol):
    """Feed-forward layer: [T, embed] -> [T, embed]."""

    def __call__(self, x_TD: Any, step: ops.StepInput) -> tuple[Any, Any]:
        """Compute the rows of ``x_TD`` that are tokens of the step; the other rows are padding.

        The second result is the experts [T, top_k] that computed each token, or None.
        """


@module
class DecoderLayer:
    """Attention and a feed-forward layer, each behind a norm and inside a residual connection."""

    input_layernorm: RMSNorm
    self_attn: Attention | LatentAttention
    post_attention_layernorm: RMSNorm
    mlp: FeedForward

    @staticmethod
    def declare(
        config: Any, attention: Attention | LatentAttention, mlp: FeedForward
    ) -> "DecoderLayer":
        """Declare a layer; its norms take ``hidden_size`` and ``rms_norm_eps`` from ``config``."""
        norm = RMSNorm.declare("embed", config.hidden_size, config.rms_norm_eps)
        return DecoderLayer(
            input_layernorm=norm, self_attn=attention, post_attention_layernorm=norm, mlp=mlp
        )

    def __call__(self, x_TD, kv: ops.KVCache, layer, step: ops.StepInput):
        """Compute a layer: [T, embed] -> ([T, embed], kv, experts as ``FeedForward`` returns them).

        ``layer``: its index in the cache.
        """
        y_TD, kv = self.self_attn(self.input_layernorm(x_TD, step), kv, layer=layer, step=step)
        x_TD = x_TD + y_TD
        y_TD, experts_TK = self.mlp(self.post_attention_layernorm(x_TD, step), step)
        return x_TD + y_TD, kv, experts_TK


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
    def declare(config: Any, declare_layer: Callable[[Any, int], Any]) -> "CausalLM":
        """Declare every tensor of the model.

        ``declare_layer(config, index)`` declares the layer at ``index``; equal neighbours are
        stacked.
        """
        vocab, embed, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        declared = [declare_layer(config, index) for index in range(config.num_hidden_layers)]
        layers = Chain(stack(layer, n, first) for layer, first, n in runs(declared))
        table = Embedding.declare(vocab, embed, alias="lm_head.weight" if tied else "")
        model = Decoder(table, layers, RMSNorm.declare("embed", embed, config.rms_norm_eps))
        return CausalLM(model, None if tied else Embedding.declare(vocab, embed), config)

    @property
    def layer_caches(self) -> tuple[ops.CacheSpec, ...]:
        """Cache that each layer needs."""
        return tuple(
            part.one.self_attn.cache_spec for part in self.model.layers for _ in range(part.n)
        )

    @property
    def cache_specs(self) -> tuple[ops.CacheSpec, ...]:
        """Caches of all layers, in order of their first layer; equal layers share one."""
        counts = collections.Counter(self.layer_caches)
        return tuple(dataclasses.replace(spec, num_layers=n) for spec, n in counts.items())

    @property
    def load_shape(self) -> tuple[int, int]:
        """Number of layers with experts, and the experts of each; zeros if there are none."""
        sparse = [part for part in self.model.layers if isinstance(part.one.mlp, MoE)]
        experts = [part.one.mlp.gate.routing.num_experts for part in sparse]
        return sum(part.n for part in sparse), max(experts, default=0)

    def __call__(self, step: ops.StepInput, caches: Sequence[ops.KVCache | ops.ExpertLoad]):
        """Compute a step: -> (hidden states [T, embed], caches).

        ``caches``: of ``cache_specs``, and perhaps an ExpertLoad of ``load_shape`` behind them.
        """
        x_TD, _, caches = self.run(step, caches)
        return x_TD, caches

    def run(
        self,
        step: ops.StepInput,
        caches: Sequence[ops.KVCache | ops.ExpertLoad],
        reads: Sequence[int] = (),
    ):
        """Compute a step, as described in ``LanguageModel.run``."""
        load = caches[-1] if isinstance(caches[-1], ops.ExpertLoad) else None
        caches = caches if load is None else caches[:-1]
        positions = step.positions_T, step.prompt_lengths_T
        angles = tuple(rope(*positions) for rope in self.config.ropes)
        step = dataclasses.replace(step, angles=angles)
        x_TD = self.model.embed_tokens(step.ids_T, step)
        held = dict(zip(dict.fromkeys(self.layer_caches), caches, strict=True))
        # Number of layers computed so far, for each cache.
        num_done = dict.fromkeys(held, 0)
        num_sparse = 0
        inside = [number for number in reads if 0 <= number < len(self.layer_caches)]
        found = dict.fromkeys(inside, x_TD)
        for part in self.model.layers:
            spec = part.one.self_attn.cache_spec
            firsts = num_done[spec] - part.first, num_sparse - part.first

            def apply(layer, index, carry, firsts=firsts):
                x_TD, kv, load, found = carry
                found = {n: _either(index == n, x_TD, held) for n, held in found.items()}
                x_TD, kv, experts_TK = layer(x_TD, kv, layer=index + firsts[0], step=step)
                if load is not None and experts_TK is not None:
                    load = load.add(index + firsts[1], experts_TK, step.num_tokens)
                return x_TD, kv, load, found

            x_TD, held[spec], load, found = part.fold(apply, (x_TD, held[spec], load, found))
            num_done[spec] += part.n
            num_sparse += part.n if isinstance(part.one.mlp, MoE) else 0
        counted = () if load is None else (load,)
        y_TD = self.model.norm(x_TD, step)
        found |= {len(self.layer_caches): x_TD, -1: y_TD}
        return y_TD, tuple(found[number] for number in reads), (*held.values(), *counted)

    def logits(self, x_BD, num_rows):
        """Compute logits: hidden states [B, embed] -> f32 [B, vocab]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        if self.config.normalizes_head:
            x_BD = head.divided_by_norms(x_BD)
        return head.logits(x_BD, num_rows, self.config.vocab_size)


def _either(is_first, first, second):
    """Return one of two arrays; ``is_first``: a bool, or traced."""
    if isinstance(is_first, bool):
        return first if is_first else second
    return jnp.where(is_first, first, second)
