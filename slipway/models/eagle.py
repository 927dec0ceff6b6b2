"""EAGLE and EAGLE-3 heads: one layer that drafts from hidden states of the model that it serves.

Not here: prediction layers of a model's own checkpoint (mtp.py).

EAGLE (Li et al., EAGLE: speculative sampling requires rethinking feature uncertainty, 2024) reads
the hidden state behind the final norm. EAGLE-3 (Li et al., EAGLE-3: scaling up inference
acceleration of large language models via training-time test, 2025) reads those before three layers,
and may have a vocabulary that is a part of the target's.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from slipway import ops
from slipway.errors import UnsupportedModel
from slipway.models.llama import LlamaConfig
from slipway.models.mtp import NORMED
from slipway.models.naming import Naming
from slipway.nn.attention import Attention
from slipway.nn.linear import Embedding, Linear
from slipway.nn.mlp import MLP
from slipway.nn.norm import RMSNorm
from slipway.tree import Chain, module, stack, static

# Names in ``architectures`` of config.json: of EAGLE heads, and of EAGLE-3 heads.
EAGLE = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM", "LlamaForCausalLM")
EAGLE3 = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Speculator",
    "Eagle3DraftModel",
    "LlamaForCausalLM",
)
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
# Differences between the tokens of the target and those of the head, and which tokens the head has.
OFFSETS, CHOSEN = "d2t", "t2d"
# Tensors that are not part of the tree below.
UNUSED = (OFFSETS, CHOSEN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleConfig(LlamaConfig):
    """Fields of a head.

    ``norm_before_residual``: the hidden state is normed before it is added, not only before
    attention.
    """

    target_hidden_size: int = 0
    draft_vocab_size: int = 0
    norm_before_residual: bool = False


@module
class EagleLayer:
    """Layer of a head: attention and MLP.

    EAGLE-3 norms the embedding and the hidden state, and attends with both.
    """

    input_layernorm: RMSNorm | None
    hidden_norm: RMSNorm | None
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: MLP


@module
class EagleBody:
    """Tensors below the prefix ``model.``; ``embed_tokens`` None: that of the target."""

    embed_tokens: Embedding | None
    fc: Linear
    layers: Chain
    norm: RMSNorm | None


@module
class EagleHead:
    """Draft model of one head, as engine/drafts/ runs it.

    ``lm_head`` None: that of the target. ``reads``: as in ``CausalLM.run``. ``tokens``: the
    target's token ids of the head's; empty: they are the same.
    """

    model: EagleBody
    lm_head: Embedding | None
    config: EagleConfig = static()
    reads: tuple[int, ...] = static()
    tokens: tuple[int, ...] = static(default=())

    @property
    def cache_specs(self) -> tuple[ops.CacheSpec, ...]:
        """Caches that the layer needs."""
        return (self.model.layers[0].one.self_attn.cache_spec,)

    @property
    def offset(self) -> int:
        """Position of a token in its cache, less that in the sequence."""
        return -1

    def features(self, hidden: tuple[Any, ...], step: ops.StepInput) -> Any:
        """Return what the layer reads beside tokens, from the target's hidden states ``reads``."""
        if self.reads == (NORMED,):
            return hidden[0]
        return self.model.fc(jnp.concatenate(hidden, axis=-1), step)

    def __call__(
        self, target: Any, h_TD: Any, step: ops.StepInput, *, caches: tuple[Any, ...]
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Compute the layer: -> (input of ``logits``, next ``h_TD``, caches).

        ``step.positions_T``: those of the tokens, less one. ``h_TD``: the target's features there,
        or the second result for the draft before.
        """
        angles = tuple(rope(step.positions_T, step.prompt_lengths_T) for rope in self.config.ropes)
        step = dataclasses.replace(step, angles=angles)
        e_TD = (self.model.embed_tokens or target.model.embed_tokens)(step.ids_T, step)

        def apply(layer: EagleLayer, _index: Any, carry: Any) -> Any:
            e_TD, h_TD, kv = carry
            if layer.input_layernorm is None or layer.hidden_norm is None:
                x_TD = self.model.fc(jnp.concatenate((e_TD, h_TD), axis=-1), step)
                joined = x_TD
            else:
                normed_TD = layer.hidden_norm(h_TD, step)
                joined = jnp.concatenate((layer.input_layernorm(e_TD, step), normed_TD), axis=-1)
                x_TD = normed_TD if self.config.norm_before_residual else h_TD
            y_TD, kv = layer.self_attn(joined, kv, layer=0, step=step)
            x_TD = x_TD + y_TD
            y_TD, _ = layer.mlp(layer.post_attention_layernorm(x_TD, step), step)
            return e_TD, x_TD + y_TD, kv

        _, x_TD, kv = self.model.layers.fold(apply, (e_TD, h_TD, caches[0]))
        y_TD = x_TD if self.model.norm is None else self.model.norm(x_TD, step)
        return y_TD, x_TD, (kv,)

    def logits(self, target: Any, y_BD: Any, num_rows: Any) -> Any:
        """Compute f32 logits [B, vocab], in the target's vocabulary, of results of ``__call__``.

        Those of tokens that the head does not have are -inf.
        """
        if self.lm_head is None:
            return target.logits(y_BD, num_rows)
        config = self.config
        own_BV = self.lm_head.logits(y_BD, num_rows, config.draft_vocab_size)
        if not self.tokens:
            return own_BV
        none_BV = jnp.full((len(own_BV), config.vocab_size), -jnp.inf, jnp.float32)
        return none_BV.at[:, np.array(self.tokens)].set(own_BV, unique_indices=True)


def declare(
    raw_config: Mapping[str, Any],
    *,
    is_third: bool,
    target: Any,
    names: Collection[str],
    offsets: Sequence[int] = (),
) -> EagleHead:
    """Declare a head; ``is_third``: an EAGLE-3.

    ``target``: the configuration of the target model. ``names``: of the tensors in its files, none
    if its weights are random; ``offsets``: the values of the tensor ``d2t``. Raises
    UnsupportedModel for a value that is not implemented.
    """
    name, expected = (raw_config.get("architectures") or [None])[0], EAGLE3 if is_third else EAGLE
    if name not in expected:
        raise UnsupportedModel("config.json: architectures", name, " | ".join(expected))
    raw = dict(raw_config.get("transformer_layer_config") or {}) | dict(raw_config)
    config = EagleConfig.read(_own_fields(raw))
    if config.num_hidden_layers != 1:
        raise UnsupportedModel("config.json: num_hidden_layers", config.num_hidden_layers, "1")
    of_target = config.target_hidden_size or target.hidden_size
    config = dataclasses.replace(
        config, draft_vocab_size=config.draft_vocab_size or config.vocab_size
    )
    tokens = tuple((np.arange(len(offsets)) + np.array(offsets, np.int64)).tolist())
    _check_tokens(tokens, config)
    embed, held = config.hidden_size, {name.removeprefix("model.") for name in names}
    bias = config.attention_bias
    attention = Attention.declare(config, qkv_bias=bias, out_bias=bias)
    norm = RMSNorm.declare("embed", embed, config.rms_norm_eps)
    joined = {"embed": embed, "joined": 2 * embed}
    if is_third:
        joined["joined"] = 3 * of_target
        attention = _reading_twice(attention, config)
    layer = EagleLayer(
        input_layernorm=norm if is_third else None,
        hidden_norm=norm if is_third else None,
        self_attn=attention,
        post_attention_layernorm=norm,
        mlp=MLP.declare(embed, config.intermediate_size, config.mlp_bias),
    )
    has_table = "embed_tokens.weight" in held
    body = EagleBody(
        embed_tokens=Embedding.declare(config.vocab_size, embed) if has_table else None,
        fc=Linear.declare("embed", "joined", joined, bias="fc.bias" in held),
        layers=Chain([stack(layer, 1, 0)]),
        norm=norm if is_third else None,
    )
    has_head = "lm_head.weight" in held or (is_third and not names)
    head = Embedding.declare(config.draft_vocab_size, embed) if has_head else None
    reads = _reads(raw, target.num_hidden_layers) if is_third else (NORMED,)
    declared = EagleHead(body, head, config, reads=reads, tokens=tokens)
    is_midlayer = is_third and not any(name.startswith("layers.") for name in held)
    naming = Naming({"model.layers.{}": "model.midlayer"} if is_midlayer else {})
    return naming.apply(declared)


def _own_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of EagleConfig, a Llama's among them, without those of ``_reads``."""
    apart = (AUX_LAYERS, "eagle_config", "transformer_layer_config", "bias")
    fields = {name: value for name, value in raw.items() if name not in apart}
    return fields | {"architectures": ["LlamaForCausalLM"]}


def _reads(raw: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the numbers of layers before the hidden states that an EAGLE-3 head reads.

    SGLang states indices of layers, of which the output is read, in ``eagle_config``; vLLM states
    numbers of layers before, without that.
    """
    nested = raw.get("eagle_config") or {}
    if not nested.get("use_aux_hidden_state", True):
        raise UnsupportedModel("config.json: eagle_config.use_aux_hidden_state", False, "True")
    found: Any = [2, num_layers // 2, num_layers - 3]
    if raw.get(AUX_LAYERS) is not None:
        found = raw[AUX_LAYERS]
    elif nested.get(AUX_LAYERS) is not None:
        found = [index + 1 for index in nested[AUX_LAYERS]]
    allowed = range(num_layers + 1)
    is_list = isinstance(found, list) and len(found) == 3
    if not is_list or not all(type(number) is int and number in allowed for number in found):
        raise UnsupportedModel(
            f"config.json: {AUX_LAYERS}", found, f"three layers of the target's {num_layers}"
        )
    return tuple(found)


def _check_tokens(tokens: Sequence[int], config: EagleConfig) -> None:
    """Raise UnsupportedModel unless each token of the head is another token of the target."""
    size, vocab = config.draft_vocab_size, config.vocab_size
    if not tokens and size != vocab:
        raise UnsupportedModel(
            "config.json: draft_vocab_size", size, f"{vocab}, as there is no tensor {OFFSETS}"
        )
    if tokens and len(tokens) != size:
        raise UnsupportedModel(f"{OFFSETS}: length", len(tokens), f"draft_vocab_size ({size})")
    if len(set(tokens)) != len(tokens) or not all(0 <= token < vocab for token in tokens):
        expected = f"different tokens from 0 to {vocab - 1}"
        raise UnsupportedModel(OFFSETS, f"{min(tokens)} to {max(tokens)}", expected)


def _reading_twice(attention: Attention, config: EagleConfig) -> Attention:
    """Return attention with projections that read an embedding and a hidden state."""
    sizes = {
        "joined": 2 * config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }
    bias = config.attention_bias
    keys = Linear.declare("(kv_heads head_dim)", "joined", sizes, bias=bias)
    queries = Linear.declare("(heads head_dim)", "joined", sizes, bias=bias)
    return dataclasses.replace(attention, q_proj=queries, k_proj=keys, v_proj=keys)
