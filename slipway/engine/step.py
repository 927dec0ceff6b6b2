"""What is compiled: a ragged batch in, the cache and a token per row out; knows no scheduler.

A step's tokens stay on the device, where the next step finds them: it can be dispatched before the host has seen them.
Two programs: the forward pass, one per bucket, and the sampler, which depends on the number of rows alone. A third, for
small models, does both several times over for rows that only decode.

Each bucket is compiled ahead of time; calling the step with any other shape is an error, so nothing compiles later.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
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
from slipway.engine import edits as editing
from slipway.engine import sample
from slipway.engine.batch import Batch, Bucket, Repeat, Sampling, Sizes, Tokens
from slipway.engine.edits import Edits
from slipway.engine.memory import Populating

logger = logging.getLogger(__name__)

COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    # docs/log.md: the step compiles in two thirds of the time and runs as fast; a lower LLVM level costs 20% of a step.
    # From JAX 0.11 on XLA refuses to be asked.
    "cpu": {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {},
    # else TPU7x copies every weight into other tiles at every step: 7.8 GB a device for 32 B parameters on 8
    "tpu": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"},
}


class Step:
    """The compiled steps of one model on one mesh: a program per bucket, and a sampler per number of rows.

    ``repeats``: where one call may make several decode steps.
    """

    def __init__(
        self, declaration: Any, mesh: Mesh, kv: jax.ShapeDtypeStruct, dtype: Any, sizes: Sizes, max_rows: int,
        repeats: Repeat | None = None,
    ):  # fmt: skip
        self.kv, self.repeats, self._mesh, self._sizes = kv, repeats, mesh, sizes
        shapes = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.held_as(dtype), sharding=s),
            declaration, meshes.shardings(declaration, mesh), is_leaf=tree.is_param,
        )  # fmt: skip
        self._leaves, structure = jax.tree.flatten(shapes)
        cache = meshes.spec(ops.kv_axes(kv))
        specs, rows = jax.tree.leaves(tree.map_params(meshes.partition, declaration)), P(meshes.DATA)
        self._by_rows = sharded = NamedSharding(mesh, rows)
        # the first process pools the hidden states of all copies, so it needs those of other processes here
        apart = len({device.process_index for device in mesh.devices[:, 0]}) > 1
        forward, choose = (
            functools.partial(_forward, structure, apart),
            functools.partial(_sample, max_rows, sizes.num_logprobs),
        )
        self._forward = jax.jit(
            jax.shard_map(
                forward, mesh=mesh, in_specs=(specs, cache, rows, rows),
                out_specs=(cache, P() if apart else rows, rows),
                check_vma=False,
            ),
            donate_argnums=1, in_shardings=(None, None, sharded, sharded),
        )  # fmt: skip
        self._sample = jax.jit(
            jax.shard_map(choose, mesh=mesh, in_specs=(rows,) * 4, out_specs=(P(), rows), check_vma=False),
            in_shardings=(sharded,) * 4,
        )
        repeat = functools.partial(_repeat, structure, sizes, max_rows, repeats.num_steps if repeats else 0)
        self._repeat = jax.jit(
            jax.shard_map(
                repeat, mesh=mesh, in_specs=(specs, cache, rows, rows, rows), out_specs=(cache, P(), rows),
                check_vma=False,
            ),
            donate_argnums=1, in_shardings=(None, None, *(sharded,) * 3),
        )  # fmt: skip
        self._no_edits: dict[int, Edits] = {}
        self.newest = jax.ShapeDtypeStruct((self._copies * max_rows,), np.int32, sharding=sharded)
        self._options = _compiler_options(mesh)
        self._programs: dict[Bucket, Any] = {}
        self._samplers: dict[int, Any] = {}
        self._repeater: Any = None
        self._populating: Populating | None = None

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs) + len(self._samplers) + (self._repeater is not None)

    def compile(self, shapes: Sequence[Bucket]) -> None:
        """Compile the buckets that are not yet, and what goes with them, two at a time; says what is left."""
        buckets = [bucket for bucket in shapes if bucket not in self._programs]
        rows = sorted({bucket.num_rows for bucket in buckets} - self._samplers.keys())
        repeats = self._repeater is None and self.repeats is not None and self.repeats.bucket in buckets
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            programs = {pool.submit(self.program, bucket): bucket for bucket in buckets}
            samplers = {pool.submit(self._compile_sampler, n): n for n in rows}
            repeater = [pool.submit(self._compile_repeater)] if repeats else []
            each = [*programs, *samplers, *repeater]
            for count, _ in enumerate(as_completed(each), 1):
                left, seconds = len(each) - count, time.perf_counter() - started
                logger.info("compiled %d programs, %d left: about %.1f s", count, left, seconds / count * left)
        self._programs.update({bucket: program.result() for program, bucket in programs.items()})
        self._samplers.update({n: sampler.result() for sampler, n in samplers.items()})
        if repeater:
            self._repeater = repeater[0].result()

    def temp_bytes(self, bucket: Bucket) -> int:
        """The memory per device that the compiled bucket needs beside weights and cache."""
        analysis = self._programs[bucket].memory_analysis()
        sampler = self._samplers[bucket.num_rows].memory_analysis().temp_size_in_bytes
        logits = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        repeater = 0 if self._repeater is None else self._repeater.memory_analysis().temp_size_in_bytes
        return max(analysis.temp_size_in_bytes, sampler, repeater) + logits

    def forward(
        self, leaves: list[jax.Array], kv: jax.Array, newest: jax.Array, bucket: Bucket, tokens: Tokens
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Start the first half of a step: the cache, hidden states [T, embed], logits of the rows of results.

        Does not wait for the device. ``kv`` is consumed. ``leaves``: the model's, flat, as flattening a tree takes a
        millisecond. ``newest``: tokens of the last step.
        """
        return self._programs[bucket](leaves, kv, newest, tokens)

    def choose(
        self, logits_BV: jax.Array, newest: jax.Array, bucket: Bucket, sampling: Sampling, edits: Edits | None
    ) -> tuple[sample.Sampled, jax.Array]:
        """Start the second half: a token per row for the host, and for the next step. ``edits``: None where none is."""
        edits = self._edits(bucket.num_rows) if edits is None else edits
        return self._samplers[bucket.num_rows](logits_BV, newest, sampling, edits)

    def repeat(
        self, leaves: list[jax.Array], kv: jax.Array, newest: jax.Array, batch: Batch, num_steps: int
    ) -> tuple[jax.Array, sample.Sampled, jax.Array]:
        """Start ``num_steps`` decode steps, each with the tokens of the one before: the cache, results, newest tokens.

        ``batch``: of the first step, in the bucket of ``repeats``; one token a row, each samples, without edits. The
        rows' pages hold the tokens of all steps. Results: the rows of the first step, then of the second, and so on.
        """
        return self._repeater(leaves, kv, newest, batch, np.full(self._copies, num_steps, np.int32))

    def no_edits(self, bucket: Bucket) -> Edits:
        """Edits of no row, on the host, to be filled in."""
        rows = self._copies * bucket.num_rows
        nothing = editing.empty(rows, self._sizes.vocab_size, self._sizes.max_model_len)
        return dataclasses.replace(nothing, any_1=np.zeros(self._copies, np.bool_))

    def first_newest(self) -> jax.Array:
        """What the first step reads as the tokens of the one before."""
        return jax.jit(lambda: jnp.zeros(self.newest.shape, jnp.int32), out_shardings=self.newest.sharding)()

    def empty_kv(self) -> jax.Array:
        """A cache that holds nothing."""
        sharding = self.kv.sharding
        empty = functools.partial(ops.zeros, sharding.shard_shape(self.kv.shape), self.kv.dtype)
        kv = jax.jit(jax.shard_map(empty, mesh=self._mesh, in_specs=(), out_specs=sharding.spec, check_vma=False))()
        self._populating = Populating(kv)
        return kv

    def free_kv(self, kv: jax.Array) -> None:
        """Give back the memory of ``kv``: the cache as the last step left it."""
        if self._populating is not None:
            self._populating.end()
        kv.delete()

    def close(self) -> None:
        """Nothing is held here."""

    @property
    def _copies(self) -> int:
        return self._mesh.shape[meshes.DATA]

    def _edits(self, num_rows: int) -> Edits:
        """None, on the device: nothing to make or to send."""
        if num_rows not in self._no_edits:
            self._no_edits[num_rows] = jax.tree.map(self._put, self.no_edits(Bucket(num_rows, num_rows)))
        return self._no_edits[num_rows]

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._by_rows, lambda index: array[index])

    def program(self, bucket: Bucket) -> Any:
        """The forward pass of one bucket, compiled."""
        with jax.set_mesh(self._mesh):  # Pallas asks it what kind of TPU this is
            lowered = self._forward.lower(self._leaves, self.kv, self.newest, self._shapes(bucket).tokens)
        return lowered.compile(self._options)

    def _compile_repeater(self) -> Any:
        assert self.repeats is not None
        steps = jax.ShapeDtypeStruct((self._copies,), np.int32)
        with jax.set_mesh(self._mesh):
            lowered = self._repeat.lower(
                self._leaves, self.kv, self.newest, self._shapes(self.repeats.bucket), steps
            )  # fmt: skip
        return lowered.compile(self._options)

    def _compile_sampler(self, rows: int) -> Any:
        bucket = Bucket(rows, rows)
        logits = jax.ShapeDtypeStruct((self._copies * rows, self._sizes.vocab_size), np.float32)
        edits = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.no_edits(bucket))
        return self._sample.lower(logits, self.newest, self._shapes(bucket).sampling, edits).compile(self._options)

    def _shapes(self, bucket: Bucket) -> Batch:
        """The shapes and dtypes of a batch over every copy of the weights."""
        one = batches.empty(bucket, self._sizes)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self._copies * x.shape[0], *x.shape[1:]), x.dtype), one)


@functools.cache
def _compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """The options that this XLA knows: they come and go (the fusion emitters' is gone in JAX 0.12)."""
    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})
    try:
        jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, P())).lower().compile(options)
    except jax.errors.JaxRuntimeError:
        logger.info("this XLA has no %s", ", ".join(options))
        return {}
    return options


def _forward(
    structure: Any, apart: bool, leaves: list[jax.Array], kv: jax.Array, newest_R: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The forward pass as each device sees it: the cache, hidden states, and logits of the rows of results.

    ``apart``: hidden states of all copies of the weights, on every device.
    """
    model = jax.tree.unflatten(structure, leaves)
    ragged = ops.Ragged(
        tokens.num_tokens_1[0], tokens.positions_T, tokens.contexts_T, tokens.slots_T,
        tokens.starts_B, tokens.counts_B, tokens.lengths_B, tokens.page_table_BM,
    )  # fmt: skip
    ids_T = jnp.where(tokens.ids_T < 0, newest_R[jnp.maximum(-1 - tokens.ids_T, 0)], tokens.ids_T)
    x_TD, kv = model(ids_T, kv, ragged)
    logits_BV = model.logits(x_TD[tokens.sample_at_B], tokens.num_samples_1[0])
    return kv, meshes.all_rows(x_TD) if apart else x_TD, logits_BV


def _sample(
    max_rows: int,
    num_logprobs: int,
    logits_BV: jax.Array,
    newest_R: jax.Array,
    sampling: Sampling,
    edits: Edits | None,
) -> tuple[sample.Sampled, jax.Array]:
    """A token per row, and the same as the next step reads it; log probabilities where some row wants them."""

    def draw(logits_BV: jax.Array) -> jax.Array:
        return sample.sample(
            logits_BV, sampling.num_rows_1[0], sampling.temperature_B, sampling.top_k_B, sampling.top_p_B,
            sampling.min_p_B, sampling.seed_B, sampling.position_B,
        )  # fmt: skip

    token_B = draw(logits_BV) if edits is None else _edited(draw, logits_BV, newest_R, sampling, edits)
    newest_R = jnp.zeros(max_rows, jnp.int32).at[: token_B.shape[0]].set(token_B)
    token_B = jnp.where(sampling.given_B < 0, token_B, sampling.given_B)
    num_top = min(num_logprobs, logits_BV.shape[1])
    sampled = jax.lax.cond(
        jnp.any(sampling.wants_logprobs_B),
        lambda: sample.logprobs(logits_BV, sampling.num_rows_1[0], token_B, num_top),
        lambda: sample.without_logprobs(token_B, num_top),
    )
    return jax.tree.map(lambda array: meshes.all_rows(array), sampled), newest_R


def _edited(
    draw: Callable[[jax.Array], jax.Array], logits_BV: jax.Array, newest_R: jax.Array, sampling: Sampling, edits: Edits
) -> jax.Array:
    """Tokens drawn from logits that may be changed before."""
    newest_B = jnp.where(sampling.last_B < 0, jnp.int32(-1), newest_R[jnp.maximum(sampling.last_B, 0)])
    # drawn in both branches: logits that come out of a branch unchanged are copied, 2 ms for 16 rows
    return jax.lax.cond(
        edits.any_1[0],
        lambda: draw(sample.edit(logits_BV, edits, sampling.position_B, newest_B)),
        lambda: draw(logits_BV),
    )


def _repeat(
    structure: Any, sizes: Sizes, max_rows: int, max_steps: int, leaves: list[jax.Array], kv: jax.Array,
    newest_R: jax.Array, batch: Batch, num_steps_1: jax.Array,
) -> tuple[jax.Array, sample.Sampled, jax.Array]:  # fmt: skip
    """Decode steps one after the other: the cache, the results of each, and the newest tokens."""
    num_rows = jax.lax.axis_size(meshes.DATA) * len(batch.sampling.seed_B)

    def body(step: jax.Array, carry: Any) -> Any:
        kv, newest_R, found = carry
        kv, _, logits_BV = _forward(structure, False, leaves, kv, newest_R, _advanced(batch.tokens, step, sizes))
        sampling = dataclasses.replace(batch.sampling, position_B=batch.sampling.position_B + step)
        sampled, newest_R = _sample(max_rows, sizes.num_logprobs, logits_BV, newest_R, sampling, None)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step * num_rows, axis=0)
        return kv, newest_R, jax.tree.map(lambda found_B, sampled_B: put(found_B, sampled_B), found, sampled)

    tokens_B = jnp.zeros(max_steps * num_rows, jnp.int32)
    found = sample.without_logprobs(tokens_B, min(sizes.num_logprobs, sizes.vocab_size))
    kv, newest_R, found = jax.lax.fori_loop(jnp.int32(0), num_steps_1[0], body, (kv, newest_R, found))
    return kv, found, newest_R


def _advanced(tokens: Tokens, step: jax.Array, sizes: Sizes) -> Tokens:
    """The batch of a decode step, ``step`` steps later: each row one token further, which is the last step's."""
    T, B = len(tokens.ids_T), len(tokens.lengths_B)
    row_T = jnp.minimum(jnp.arange(T, dtype=jnp.int32), B - 1)  # token t is row t's, and the rest is padding
    is_used_T = jnp.arange(T, dtype=jnp.int32) < tokens.num_tokens_1[0]
    positions_T = tokens.positions_T + jnp.where(is_used_T, step, 0)
    page_T = tokens.page_table_BM[row_T, positions_T // sizes.page_size]
    slots_T = page_T * sizes.page_size + positions_T % sizes.page_size
    return dataclasses.replace(
        tokens,
        ids_T=jnp.where(step == 0, tokens.ids_T, -1 - row_T),
        positions_T=positions_T,
        contexts_T=jnp.maximum(tokens.contexts_T, positions_T + 1),
        slots_T=jnp.where(is_used_T, slots_T, tokens.slots_T),
        lengths_B=tokens.lengths_B + jnp.where(tokens.counts_B > 0, step, 0),
    )
