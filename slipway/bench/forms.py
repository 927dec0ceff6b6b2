"""Scan, loop over separate arrays, or unroll: decides how one model's step is built and timed in each form.

What follows from it stands in docs/adr/003.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from slipway import mesh as meshes
from slipway import models, ops, tree
from slipway.bench.models import QWEN3_SHAPE
from slipway.checkpoint import load
from slipway.engine import batch as batches
from slipway.engine.batch import Bucket, Sizes
from slipway.engine.step import Step

PAGE_SIZE, NUM_PAGES, TABLE_WIDTH = 16, 256, 16


@jax.tree_util.register_pytree_with_keys_class
class Unrolled(tree.Separate):
    """Separate arrays, each layer compiled for itself: the form that lost."""

    def fold(self, step: Callable, carry: Any) -> Any:
        """``carry = step(layer, index, carry)`` in a Python loop."""
        for index, layer in enumerate(self.bodies, self.first):
            carry = step(layer, index, carry)
        return carry


FORMS = {
    "scan over stacked arrays": lambda declaration: declaration,
    "loop over separate arrays": tree.separate,
    "unrolled": lambda declaration: _replace(tree.separate(declaration)),
}


def measure(name: str, dtype_name: str, rows: int, rounds: int, topology: str | None) -> dict[str, float]:
    """Compile time, temporaries for each device and, where the devices are there, median step time of one form."""
    dtype, devices = jnp.dtype(dtype_name), None
    if topology is not None:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = meshes.make_mesh(tensor=1 if devices is None else len(devices), devices=devices)
    declaration = FORMS[name](meshes.fit(models.declare(QWEN3_SHAPE), mesh))
    config = declaration.config
    kv = jax.eval_shape(
        lambda: ops.allocate_kv(
            mesh.devices.flat[0].platform,
            config.num_hidden_layers,
            NUM_PAGES,
            PAGE_SIZE,
            config.num_key_value_heads,
            config.head_dim,
            dtype,
        )
    )
    shape = jax.ShapeDtypeStruct(kv.shape, kv.dtype, sharding=NamedSharding(mesh, meshes.spec(ops.kv_axes(kv))))
    step, bucket = Step(declaration, mesh, shape, dtype, _sizes(config), rows), Bucket(rows, rows)
    started = time.perf_counter()
    step.compile([bucket])
    figures = {
        "compile_s": round(time.perf_counter() - started, 2),
        "temp_mb": round(step.temp_bytes(bucket) / 1e6, 1),
    }
    if topology is not None:
        return figures
    leaves, cache = jax.tree.leaves(load.dummy(declaration, mesh, dtype, seed=0)), jnp.zeros(kv.shape, kv.dtype)
    batch, times = _batch(bucket, rows, _sizes(config)), []
    newest = step.first_newest()
    for _ in range(rounds + 1):
        started = time.perf_counter()
        cache, _, logits = step.forward(leaves, cache, newest, bucket, batch.tokens)
        sampled, newest = step.choose(logits, newest, bucket, batch.sampling, None)
        jax.block_until_ready(sampled)
        times.append(time.perf_counter() - started)
    return figures | {"step_ms": round(statistics.median(times[1:]) * 1e3, 1)}


def _sizes(config: Any) -> Sizes:
    return Sizes(PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, config.vocab_size, TABLE_WIDTH * PAGE_SIZE)


def _batch(bucket: Bucket, rows: int, sizes: Sizes) -> batches.Batch:
    batch = batches.empty(bucket, sizes)
    tokens = batch.tokens
    tokens.num_tokens_1[0] = tokens.num_samples_1[0] = batch.sampling.num_rows_1[0] = rows
    tokens.counts_B[:], tokens.lengths_B[:] = 1, 128
    tokens.positions_T[:], tokens.slots_T[:] = 127, range(rows)
    tokens.starts_B[:] = tokens.sample_at_B[:] = range(rows)
    return batch


def _replace(declaration: Any) -> Any:
    """The declaration with every Separate an Unrolled."""

    def one(node: Any) -> Any:
        return Unrolled(node.bodies, node.first) if isinstance(node, tree.Separate) else node

    return jax.tree.map(one, declaration, is_leaf=lambda node: isinstance(node, tree.Separate) or tree.is_param(node))
