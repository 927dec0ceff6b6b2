"""Slipway's architectures inside vLLM on TPU, over tpu-inference's caches and metadata.

The contract is tpu-inference 0.32's (docs/adapters.md). The model classes are nnx modules, which
that engine splits into a graph and arrays. Inside is a Slipway tree, under ``shard_map`` over the
engine's mesh, which has the same axis names as Slipway's. The engine's attention kernel writes and
reads its caches. vLLM imports this module when it loads its plugins.

Not here: MaxText's models (maxtext.py), torch twins (package.py).
"""

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from slipway import models, ops, tree
from slipway.errors import InvalidConfig, UnsupportedModel
from slipway.mesh import DATA, TENSOR, partition
from slipway.runtime import load

logger = logging.getLogger(__name__)
PREFIX = "Slipway"  # tpu-inference uses Hugging Face's names for its own classes
Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def register() -> None:
    """Register the model classes with vLLM; vLLM calls this as a plugin.

    ``--hf-overrides '{"architectures": ["SlipwayQwen3ForCausalLM"]}'`` chooses a class of Slipway,
    ``MaxTextForCausalLM`` MaxText's models. Without tpu-inference, nothing is registered.
    """
    try:
        loader = importlib.import_module("tpu_inference.models.common.model_loader")
    except ImportError as error:
        logger.info("tpu-inference is not installed; no model is registered with vLLM: %s", error)
        return
    from slipway.adapters.maxtext import MaxTextForCausalLM

    for architecture in models.ARCHITECTURES:
        loader.register_model(PREFIX + architecture, served(architecture))
    loader.register_model("MaxTextForCausalLM", MaxTextForCausalLM)


@functools.cache
def served(architecture: str) -> type["Served"]:
    """Return the class for vLLM of one of Slipway's architectures."""
    return type(
        PREFIX + architecture, (Served,), {"architecture": architecture, "__doc__": Served.__doc__}
    )


class Served(nnx.Module):
    """A Slipway model with the interface of tpu-inference's models."""

    architecture = ""
    _self_manages_sharding = True

    def __init__(self, vllm_config: Any, rng_key: jax.Array, mesh: Mesh):
        if wide := {
            axis: n for axis, n in mesh.shape.items() if n > 1 and axis not in (DATA, TENSOR)
        }:
            raise InvalidConfig("sharding_strategy", wide, "only data and tensor parallelism")
        self.mesh = mesh
        self.model_name = vllm_config.model_config.model
        raw = vllm_config.model_config.hf_config.to_dict() | {"architectures": [self.architecture]}
        self.dtype = np.dtype(vllm_config.model_config.dtype)
        declaration = load.on_mesh(models.declare(raw), mesh, self.dtype, layer_form=_unrolled)
        _check(declaration)
        self.declaration = Static(declaration)
        if vllm_config.load_config.load_format == "dummy":
            arrays = jax.tree.leaves(
                load.arrays(self.declaration.value, None, mesh, dtype=self.dtype)
            )
        else:
            arrays = [
                jnp.zeros(leaf.param.shape, leaf.param.held_as(self.dtype))
                for leaf in self._leaves()
            ]
        self.arrays = nnx.List([nnx.Param(array) for array in arrays])
        self.kernel = Static(attention_kernel())

    def load_weights(self, rng: jax.Array) -> None:
        """Read the HF directory; each device reads its own part.

        Raises CheckpointError, listing every mismatch.
        """
        declaration = self.declaration.value
        checkpoint = load.checked(
            declaration,
            load.open_files(self.model_name).checkpoint,
            self.dtype,
            ignored=(*load.IGNORED_TENSORS, *declaration.config.unused_tensors),
        )
        arrays = load.arrays(declaration, checkpoint, self.mesh, dtype=self.dtype)
        self.arrays = nnx.List([nnx.Param(array) for array in jax.tree.leaves(arrays)])

    def __call__(
        self,
        kv_caches: list[jax.Array],
        input_ids: jax.Array,
        attention_metadata: Any,
        inputs_embeds: jax.Array | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[list[jax.Array], jax.Array, list[jax.Array], None]:
        """Run the model on flat tokens [T].

        Return (caches, hidden states [T, embed], no auxiliary states, no experts).
        """
        if inputs_embeds is not None:
            raise InvalidConfig("inputs_embeds", "some", "token ids: this model has no other input")
        one = attention_metadata
        if isinstance(one, Mapping):
            one = next(iter(one.values()))
        kernel = self.kernel.value

        def step(arrays, caches, ids_T, where):
            model = self._model(arrays)
            needed = model.layer_caches
            layers = [
                [i for i, spec in enumerate(needed) if spec == kind]
                for kind in dict.fromkeys(needed)
            ]
            borrowed = [
                ops.BorrowedCache(tuple(caches[i] for i in each), where, kernel) for each in layers
            ]
            x_TD, borrowed = model(step_input(ids_T, where), borrowed)
            written = {
                i: array
                for each, cache in zip(layers, borrowed)
                for i, array in zip(each, cache.caches)
            }
            return [written[i] for i in range(len(caches))], x_TD

        caches = P(DATA, None, TENSOR, None, None)
        rows = jax.tree.map(lambda _: P(DATA), one)
        run = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=(self._specs(), [caches] * len(kv_caches), P(DATA), rows),
            out_specs=([caches] * len(kv_caches), P(DATA)),
            check_vma=False,
        )
        arrays = [array[...] for array in self.arrays]
        arguments = arrays, list(kv_caches), input_ids, one
        kv_caches, x_TD = run(*arguments)
        return kv_caches, x_TD, [], None

    def compute_logits(self, hidden_states: jax.Array) -> jax.Array:
        """Return f32 logits [B, vocab] of hidden states [B, embed]."""

        def head(arrays, x_BD):
            return self._model(arrays).logits(x_BD, x_BD.shape[0])

        run = jax.shard_map(
            head,
            mesh=self.mesh,
            in_specs=(self._specs(), P(DATA)),
            out_specs=P(DATA),
            check_vma=False,
        )
        return run([array[...] for array in self.arrays], hidden_states)

    def embed_input_ids(self, input_ids: jax.Array, *_: Any, **__: Any) -> jax.Array:
        """Raise InvalidConfig: only multimodal and speculative models embed separately."""
        raise InvalidConfig("inputs_embeds", "some", "token ids: this model has no other input")

    def _leaves(self) -> list[tree.Leaf]:
        return list(tree.leaves(self.declaration.value))

    def _model(self, arrays: list[jax.Array]) -> Any:
        return jax.tree.unflatten(
            jax.tree.structure(self.declaration.value, is_leaf=tree.is_param), arrays
        )

    def _specs(self) -> list[P]:
        return [partition(leaf.param, self.mesh) for leaf in self._leaves()]


def _check(declaration: Any) -> None:
    """Raise UnsupportedModel for a model that vLLM's caches or batches do not serve."""
    if any(spec.latent_dim for spec in declaration.cache_specs):
        expected = "keys and values of heads, which vLLM's caches hold"
        raise UnsupportedModel("latent attention", "a cache of latents", expected)
    if any(rope.needs_prompt for rope in declaration.config.ropes):
        expected = "false: vLLM's batches do not have the lengths of prompts"
        raise UnsupportedModel("config.json: use_dynamic_ntk", True, expected)


def _unrolled(declaration: Any, mesh: Mesh, dtype: Any) -> Any:
    """Return the declaration with layers that are traced one after the other."""
    del mesh, dtype
    return tree.separate(declaration, form=tree.Unrolled)


class Static:
    """A value in a module's graph rather than among its arrays; equal only to itself."""

    def __init__(self, value: Any):
        self.value = value


def step_input(ids_T: jax.Array, where: Any) -> ops.StepInput:
    """Return Slipway's input of a step from tpu-inference's AttentionMetadata.

    The pages are left out: the engine's own kernel reads them. input_positions [T], seq_lens [B],
    query_start_loc [B + 1], request_distribution [3]: its last element is the number of sequences;
    elements behind those of the sequences are padding in every array.
    """
    starts, lengths_B, count = where.query_start_loc, where.seq_lens, where.request_distribution[2]
    num_tokens, rows = starts[count].astype(jnp.int32), lengths_B.shape[0]
    tokens_T = jnp.arange(where.input_positions.shape[0], dtype=jnp.int32)
    row_T = jnp.clip(
        jnp.searchsorted(starts[1:], tokens_T, side="right"), 0, jnp.maximum(count - 1, 0)
    )
    is_used_B = jnp.arange(rows, dtype=jnp.int32) < count
    zero = jnp.zeros((), jnp.int32)
    return ops.StepInput(
        num_tokens_1=num_tokens[None],
        ids_T=ids_T,
        positions_T=where.input_positions,
        prompt_lengths_T=lengths_B[row_T],
        row_T=row_T.astype(jnp.int32),
        starts_B=jnp.where(is_used_B, starts[:-1], zero),
        counts_B=jnp.where(is_used_B, starts[1:] - starts[:-1], zero),
        lengths_B=jnp.where(is_used_B, lengths_B, zero),
        pages=(),
        num_samples_1=zero[None],  # tpu-inference chooses the tokens that become logits
        sample_at_B=jnp.zeros(rows, jnp.int32),
    )


def attention_kernel() -> Kernel:
    """Return tpu-inference's ragged paged attention as a kernel for ``ops.BorrowedCache``."""
    interface = importlib.import_module("tpu_inference.layers.common.attention_interface")

    def kernel(q_TNH, k_TKH, v_TKH, *, cache, where, scale, window, soft_cap, sinks_N):
        if sinks_N is not None:
            raise InvalidConfig(
                "attention sinks", "some", "none: this kernel has no place for them"
            )
        lengths, pages = where.seq_lens, where.block_tables
        metadata = cache, lengths, pages, where.query_start_loc, where.request_distribution
        narrow = q_TNH.shape[-1] == 64  # this head size has a separate kernel
        attend = (
            interface.ragged_paged_attention_hd64 if narrow else interface.ragged_paged_attention
        )
        return attend(
            q_TNH,
            k_TKH,
            v_TKH,
            *metadata,
            sm_scale=scale,
            sliding_window=window,
            soft_cap=soft_cap,
        )

    return kernel
