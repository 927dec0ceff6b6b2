"""What is compiled: a ragged batch in, the cache and a token per row out; knows no scheduler.

Two programs: the forward pass, one per bucket, and the sampler, which depends on the number of rows alone.

Each bucket is compiled ahead of time; calling the step with any other shape is an error, so nothing compiles later.
"""

import functools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway import ops, tree
from slipway.engine import batch as batches
from slipway.engine import sample
from slipway.engine.batch import Batch, Bucket, Sampling
from slipway.engine.request import MAX_LOGPROBS

logger = logging.getLogger(__name__)

# docs/log.md: the step compiles in two thirds of the time and runs as fast; a lower LLVM level costs 20% of a step.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {"cpu": {"xla_cpu_use_fusion_emitters": False}}
KV_SPEC = P(None, meshes.DATA, meshes.TENSOR, None, None, None)  # layers, pages, heads, key and value, slots, head_dim


class Step:
    """The compiled steps of one model on one mesh: a program per bucket, and a sampler per number of rows."""

    def __init__(self, declaration: Any, mesh: Mesh, kv: jax.ShapeDtypeStruct, dtype: Any, table_width: int):
        self.kv, self._mesh, self._table_width = kv, mesh, table_width
        self._vocab_size = declaration.config.vocab_size
        shapes = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.held_as(dtype), sharding=s),
            declaration, meshes.shardings(declaration, mesh), is_leaf=tree.is_param,
        )  # fmt: skip
        self._leaves, structure = jax.tree.flatten(shapes)
        specs, rows = jax.tree.leaves(tree.map_params(meshes.partition, declaration)), P(meshes.DATA)
        sharded = NamedSharding(mesh, rows)
        forward = functools.partial(_forward, structure)
        self._forward = jax.jit(
            jax.shard_map(
                forward, mesh=mesh, in_specs=(specs, KV_SPEC, rows), out_specs=(KV_SPEC, rows), check_vma=False
            ),
            donate_argnums=1, in_shardings=(None, None, sharded),
        )  # fmt: skip
        self._sample = jax.jit(
            jax.shard_map(_sample, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False),
            in_shardings=(sharded, sharded),
        )
        self._options = _compiler_options(mesh.devices.flat[0].platform)
        self._programs: dict[Bucket, Any] = {}
        self._samplers: dict[int, Any] = {}

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs) + len(self._samplers)

    def compile(self, shapes: Sequence[Bucket]) -> None:
        """Compile the buckets that are not yet, and the samplers of their rows, two at a time; says what is left."""
        buckets = [bucket for bucket in shapes if bucket not in self._programs]
        rows = sorted({bucket.num_rows for bucket in buckets} - self._samplers.keys())
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            programs = {pool.submit(self._compile_forward, bucket): bucket for bucket in buckets}
            samplers = {pool.submit(self._compile_sampler, n): n for n in rows}
            for count, _ in enumerate(as_completed([*programs, *samplers]), 1):
                left, seconds = len(buckets) + len(rows) - count, time.perf_counter() - started
                logger.info("compiled %d programs, %d left: about %.1f s", count, left, seconds / count * left)
        self._programs.update({bucket: program.result() for program, bucket in programs.items()})
        self._samplers.update({n: sampler.result() for sampler, n in samplers.items()})

    def temp_bytes(self, bucket: Bucket) -> int:
        """The memory per device that the compiled bucket needs beside weights and cache."""
        analysis = self._programs[bucket].memory_analysis()
        sampler = self._samplers[bucket.num_rows].memory_analysis().temp_size_in_bytes
        logits = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return max(analysis.temp_size_in_bytes, sampler) + logits

    def __call__(
        self, leaves: list[jax.Array], kv: jax.Array, bucket: Bucket, batch: Batch
    ) -> tuple[jax.Array, sample.Sampled]:
        """Run one step; ``kv`` is consumed. ``leaves``: the model's, flat, as flattening a tree takes a millisecond."""
        kv, logits_BV = self._programs[bucket](leaves, kv, batch)
        return kv, self._samplers[bucket.num_rows](logits_BV, batch.sampling)

    def _compile_forward(self, bucket: Bucket) -> Any:
        return self._forward.lower(self._leaves, self.kv, self._shapes(bucket)).compile(self._options)

    def _compile_sampler(self, rows: int) -> Any:
        sampling = self._shapes(Bucket(rows, rows)).sampling
        logits = jax.ShapeDtypeStruct((sampling.seed_B.shape[0], self._vocab_size), np.float32)
        return self._sample.lower(logits, sampling).compile(self._options)

    def _shapes(self, bucket: Bucket) -> Batch:
        """The shapes and dtypes of a batch over every copy of the weights."""
        copies = self._mesh.shape[meshes.DATA]
        one = batches.empty(bucket, 1, 1, self._table_width)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((copies * x.shape[0], *x.shape[1:]), x.dtype), one)


@functools.cache
def _compiler_options(platform: str) -> dict[str, str | bool]:
    """The options that this XLA knows: they come and go (the fusion emitters' is gone in JAX 0.12)."""
    options = COMPILER_OPTIONS.get(platform, {})
    try:
        jax.jit(lambda: jnp.zeros(())).lower().compile(options)
    except jax.errors.JaxRuntimeError:
        logger.info("this XLA has no %s", ", ".join(options))
        return {}
    return options


def _forward(structure: Any, leaves: list[jax.Array], kv: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The forward pass as each device sees it: the cache, and logits of each row's last token."""
    model = jax.tree.unflatten(structure, leaves)
    ragged = ops.Ragged(
        batch.num_tokens_1[0], batch.positions_T, batch.contexts_T, batch.slots_T,
        batch.starts_B, batch.counts_B, batch.lengths_B, batch.page_table_BM,
    )  # fmt: skip
    x_TD, kv = model(batch.ids_T, kv, ragged)
    return kv, model.logits(x_TD[batch.sample_at_B])


def _sample(logits_BV: jax.Array, sampling: Sampling) -> sample.Sampled:
    """A token per row; log probabilities where some row wants them."""
    token_B = sample.sample(
        logits_BV, sampling.temperature_B, sampling.top_k_B, sampling.top_p_B, sampling.min_p_B,
        sampling.seed_B, sampling.position_B,
    )  # fmt: skip
    num_top = min(MAX_LOGPROBS, logits_BV.shape[1])

    def without():
        rows, tops = jnp.zeros(token_B.shape), jnp.zeros((*token_B.shape, num_top))
        return sample.Sampled(token_B, rows, rows.astype(jnp.int32), tops.astype(jnp.int32), tops)

    wanted = jnp.any(sampling.wants_logprobs_B)
    return jax.lax.cond(wanted, lambda: sample.logprobs(logits_BV, token_B, num_top), without)


def host(sampled: sample.Sampled) -> sample.Sampled:
    """The same on the host; waits for the device."""
    return jax.tree.map(np.asarray, sampled)
