"""The one compiled function: a ragged batch in, the cache and a token per row out; knows no scheduler.

Each bucket is compiled ahead of time; calling the step with any other shape is an error, so nothing compiles later.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from slipway.engine.batch import Batch, Bucket
from slipway.engine.request import MAX_LOGPROBS

logger = logging.getLogger(__name__)

# docs/log.md: the step compiles in two thirds of the time and runs as fast; a lower LLVM level costs 20% of a step.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {"cpu": {"xla_cpu_use_fusion_emitters": False}}
KV_SPEC = P(None, meshes.DATA, None, None, meshes.TENSOR, None)  # layers, pages, slots, key and value, heads, head_dim


class Step:
    """The compiled steps of one model on one mesh, a program per bucket."""

    def __init__(self, declaration: Any, mesh: Mesh, kv: jax.ShapeDtypeStruct, dtype: Any, table_width: int):
        self.mesh, self.kv, self.table_width = mesh, kv, table_width
        self.params = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s),
            declaration, meshes.shardings(declaration, mesh), is_leaf=tree.is_param,
        )  # fmt: skip
        specs = tree.map_params(meshes.partition, declaration)
        rows = NamedSharding(mesh, P(meshes.DATA))
        self._step = jax.jit(
            jax.shard_map(
                _local_step, mesh=mesh, in_specs=(specs, KV_SPEC, P(meshes.DATA)),
                out_specs=(KV_SPEC, P(meshes.DATA)), check_vma=False,
            ),
            donate_argnums=1,
            in_shardings=(None, None, rows),
        )  # fmt: skip
        self._options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})
        self._programs: dict[Bucket, Any] = {}

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def compile(self, shapes: Sequence[Bucket]) -> None:
        """Compile the buckets, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            self._programs.update(zip(shapes, pool.map(self._compile, shapes)))

    def temp_bytes(self, bucket: Bucket) -> int:
        """The memory per device that the compiled bucket needs beside weights and cache."""
        analysis = self._programs[bucket].memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes

    def __call__(self, params: Any, kv: jax.Array, bucket: Bucket, batch: Batch) -> tuple[jax.Array, sample.Sampled]:
        """Run one step; ``kv`` is consumed."""
        return self._programs[bucket](params, kv, batch)

    def _compile(self, bucket: Bucket) -> Any:
        started = time.perf_counter()
        copies = self.mesh.shape[meshes.DATA]
        shape = batches.empty(bucket, 1, 1, self.table_width)
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((copies * x.shape[0], *x.shape[1:]), x.dtype), shape)
        program = self._step.lower(self.params, self.kv, inputs).compile(self._options)
        logger.info("compiled %s in %.1f s", bucket, time.perf_counter() - started)
        return program


def _local_step(model: Any, kv: jax.Array, batch: Batch) -> tuple[jax.Array, sample.Sampled]:
    """The step as each device sees it."""
    ragged = ops.Ragged(
        batch.num_tokens_1[0], batch.positions_T, batch.contexts_T, batch.slots_T,
        batch.starts_B, batch.counts_B, batch.lengths_B, batch.page_table_BM,
    )  # fmt: skip
    x_TD, kv = model(batch.ids_T, kv, ragged)
    logits_BV = model.logits(x_TD[batch.sample_at_B])
    token_B = sample.sample(
        logits_BV, batch.temperature_B, batch.top_k_B, batch.top_p_B, batch.min_p_B, batch.seed_B, batch.lengths_B
    )
    num_top = min(MAX_LOGPROBS, logits_BV.shape[1])

    def without():
        rows = jnp.zeros(token_B.shape)
        tops = jnp.zeros((*token_B.shape, num_top))
        return sample.Sampled(token_B, rows, rows.astype(jnp.int32), tops.astype(jnp.int32), tops)

    wanted = jnp.any(batch.wants_B >= 2)
    return kv, jax.lax.cond(wanted, lambda: sample.logprobs(logits_BV, token_B, num_top), without)


def host(sampled: sample.Sampled) -> sample.Sampled:
    """The same on the host; waits for the device."""
    return jax.tree.map(np.asarray, sampled)
