"""Multi-token prediction: a layer of a checkpoint that drafts the token after the next.

Not here: how drafts are verified (engine/drafts/), the layer of a family (glm4_moe.py, ...).

The layer gets, at each position, the target model's hidden state and the embedding of the next
token (DeepSeek-AI, DeepSeek-V3 technical report, 2024, section 2.2). It has a cache of its own, in
the pages of the sequence. Embedding and, in some families, the output head are the target's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from slipway import ops
from slipway.models.decoder import CausalLM, DecoderLayer
from slipway.models.naming import Naming
from slipway.nn.linear import Embedding, Linear
from slipway.nn.norm import RMSNorm
from slipway.tree import Chain, module, stack, static

# Index of the hidden states behind the final norm, among those that a draft model reads.
NORMED = -1


@module
class SharedHead:
    """Norm and output head of a prediction layer; ``head`` None: that of the target model."""

    norm: RMSNorm
    head: Embedding | None


@module
class PredictionLayer(DecoderLayer):
    """Decoder layer of an embedding and a hidden state, each normed, then projected together."""

    enorm: RMSNorm
    hnorm: RMSNorm
    eh_proj: Linear
    shared_head: SharedHead


@module
class PredictionLayers:
    """Layers below the prefix ``model.`` of a checkpoint."""

    layers: Chain


@dataclasses.dataclass(frozen=True)
class Mtp:
    """Form of the prediction layer of a family.

    ``is_numbered_apart``: its index is 0, not that after the last layer. ``has_head``: it has an
    output head of its own. ``embeds_first``: the projection's input is the embedding, then the
    hidden state. ``skips_first``: the embedding counts as zero at position 0. ``reads_normed``: the
    hidden state is that behind the target's final norm. ``chains_normed``: for the draft after the
    next, the hidden state is that behind the layer's own norm.
    """

    naming: Naming = Naming()
    is_numbered_apart: bool = False
    has_head: bool = True
    embeds_first: bool = True
    skips_first: bool = True
    reads_normed: bool = True
    chains_normed: bool = False

    def declare(self, config: Any, declare_layer: Callable[[Any, int], DecoderLayer]) -> "MtpModel":
        """Declare the first prediction layer of a model with this ``config``."""
        last, embed = config.num_hidden_layers - 1, config.hidden_size
        norm = RMSNorm.declare("embed", embed, config.rms_norm_eps)
        head = Embedding.declare(config.vocab_size, embed) if self.has_head else None
        own = declare_layer(config, last)
        layer = PredictionLayer(
            input_layernorm=own.input_layernorm,
            self_attn=own.self_attn,
            post_attention_layernorm=own.post_attention_layernorm,
            mlp=own.mlp,
            enorm=norm,
            hnorm=norm,
            eh_proj=Linear.declare("embed", "joined", {"embed": embed, "joined": 2 * embed}),
            shared_head=SharedHead(norm, head),
        )
        first = 0 if self.is_numbered_apart else last + 1
        layers = PredictionLayers(Chain([stack(layer, 1, first)]))
        return self.naming.apply(MtpModel(layers, config, self))


@module
class MtpModel:
    """Draft model of one prediction layer, as engine/drafts/ runs it."""

    model: PredictionLayers
    config: Any = static()
    form: Mtp = static()

    @property
    def cache_specs(self) -> tuple[ops.CacheSpec, ...]:
        """Caches that the layer needs."""
        return (self.model.layers[0].one.self_attn.cache_spec,)

    @property
    def reads(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads: as in ``CausalLM.run``."""
        return (NORMED if self.form.reads_normed else self.config.num_hidden_layers,)

    @property
    def offset(self) -> int:
        """Position of a token in its cache, less that in the sequence."""
        return -1

    def features(self, hidden: tuple[Any, ...], step: ops.StepInput) -> Any:
        """Return what the layer reads beside tokens, from the target's hidden states ``reads``."""
        del step
        return hidden[0]

    def __call__(
        self, target: CausalLM, h_TD: Any, step: ops.StepInput, *, caches: tuple[Any, ...]
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Compute the layer: -> (input of ``logits``, next ``h_TD``, caches).

        ``step.positions_T``: those of the tokens, less one. ``h_TD``: the target's features there,
        or the second result for the draft before.
        """
        form = self.form
        angles = tuple(rope(step.positions_T, step.prompt_lengths_T) for rope in self.config.ropes)
        step = dataclasses.replace(step, angles=angles)
        e_TD = target.model.embed_tokens(step.ids_T, step)
        if form.skips_first:
            e_TD = jnp.where(step.positions_T[:, None] == 0, jnp.zeros_like(e_TD), e_TD)

        def apply(layer: PredictionLayer, _index: Any, carry: Any) -> Any:
            e_TD, h_TD, kv = carry
            parts = layer.enorm(e_TD, step), layer.hnorm(h_TD, step)
            joined = jnp.concatenate(parts if form.embeds_first else parts[::-1], axis=-1)
            x_TD = layer.eh_proj(joined, step)
            x_TD, kv, _ = DecoderLayer.__call__(layer, x_TD, kv, layer=0, step=step)
            y_TD = layer.shared_head.norm(x_TD, step)
            return y_TD, (y_TD if form.chains_normed else x_TD), kv

        y_TD, h_TD, kv = self.model.layers.fold(apply, (e_TD, h_TD, caches[0]))
        return y_TD, h_TD, (kv,)

    def logits(self, target: CausalLM, y_BD: Any, num_rows: Any) -> Any:
        """Compute f32 logits [B, vocab] of results of ``__call__``."""
        head = self.model.layers[0].one.shared_head.head
        if head is None:
            return target.logits(y_BD, num_rows)
        return head.logits(y_BD, num_rows, self.config.vocab_size)
