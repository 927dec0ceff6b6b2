"""Programs of a language model: forward pass, sampler, and several decode steps in one call.

Not here: how programs are compiled and called (runtime/runner.py), and which sequences run
(scheduler.py).

The tokens that a step samples stay on the device, where the next step reads them, so the next step
can be dispatched before the host has them. The forward pass is compiled for each bucket, the
sampler for each number of rows. The third program, for small models, runs both several times, for
rows that only decode.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway import tree
from slipway.checkpoint.swap import Weights
from slipway.engine import batch, logit_rules, sample
from slipway.engine.batch import Bucket, Repeat, Sampling, Sizes
from slipway.engine.logit_rules import Edits
from slipway.models.decoder import LanguageModel
from slipway.ops import KVCache, PageMap, StepInput
from slipway.ops.addresses import by_address
from slipway.runtime.runner import Program, Runner, Shapes

FORWARD, SAMPLE, REPEAT = "forward", "sample", "repeat"
# Names of device state: the model's arrays as a flat list, its caches, and of the last step the
# sampled tokens, the logits, and what a draft model reads: token ids and hidden states.
WEIGHTS, CACHES = "weights", "caches"
NEWEST, LOGITS, SEEN = "newest", "logits", "seen"


def runner(
    declaration: LanguageModel,
    mesh: Mesh,
    caches: tuple[KVCache, ...],
    *,
    dtype: Any,
    sizes: Sizes,
    max_rows: int,
    repeats: Repeat | None,
    reads: tuple[int, ...] | None = None,
    further: Sequence[Program] = (),
    further_shapes: Mapping[str, Shapes] | None = None,
) -> Runner:
    """Return the runner of a model's programs; no program is compiled yet.

    ``caches``: the shapes of the model's caches, with shardings. ``max_rows``: the most rows of any
    bucket. ``repeats``: set if one call may make several decode steps. ``reads``: the hidden states
    that the ``further`` programs read, as in ``CausalLM.run``, None without such programs;
    ``further_shapes``: those of their own device state.
    """
    leaves, structure = operand_shapes(declaration, mesh, dtype)
    rows, copies = NamedSharding(mesh, P(meshes.DATA)), mesh.shape[meshes.DATA]
    newest = jax.ShapeDtypeStruct((copies * max_rows,), np.int32, sharding=rows)

    def logits(key: Bucket | int) -> jax.ShapeDtypeStruct:
        num_rows = key if isinstance(key, int) else key.num_rows
        return jax.ShapeDtypeStruct(
            (copies * num_rows, sizes.vocab_size), np.float32, sharding=rows
        )

    def seen(key: Bucket) -> tuple[jax.ShapeDtypeStruct, ...]:
        if reads is None:
            return ()
        num_tokens = copies * key.num_tokens
        ids = jax.ShapeDtypeStruct((num_tokens,), np.int32, sharding=rows)
        shape = (num_tokens, declaration.config.hidden_size)
        return ids, *[jax.ShapeDtypeStruct(shape, dtype, sharding=rows)] * len(reads)

    shapes: dict[str, Shapes] = {
        WEIGHTS: lambda _: leaves,
        CACHES: lambda _: caches,
        NEWEST: lambda _: newest,
        LOGITS: logits,
        SEEN: seen,
        **(further_shapes or {}),
    }
    programs = [
        *further,
        _forward_program(
            structure, mesh, reads, inputs=functools.partial(_step_input, copies, sizes)
        ),
        _sample_program(max_rows, sizes, copies),
    ]
    if repeats is not None:
        programs.append(
            _repeat_program(
                structure, sizes, copies, max_rows=max_rows, max_steps=repeats.num_steps
            )
        )
    return Runner(mesh, shapes, programs)


def operand_shapes(declaration: Any, mesh: Mesh, dtype: Any) -> tuple[list[Any], Any]:
    """Return the shapes of a model's arrays as its programs take them, and their tree structure."""
    weights = jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.held_as(dtype), sharding=sharding),
        declaration,
        meshes.shardings(declaration, mesh),
        is_leaf=tree.is_param,
    )
    return jax.tree.flatten(by_address(weights, mesh))


def operands(weights: Weights) -> list[jax.Array]:
    """Return the arrays of a model as its programs take them.

    Without separate experts these are ``weights.arrays`` themselves.
    """
    structure = jax.tree.structure(weights.declaration, is_leaf=tree.is_param)
    held = jax.tree.unflatten(structure, weights.arrays)
    return jax.tree.leaves(by_address(held, weights.mesh))


def wanted(
    buckets: Sequence[Bucket],
    repeats: Repeat | None,
    further: Sequence[str] = (),
    others: Sequence[tuple[str, Bucket]] = (),
) -> list[tuple[str, Bucket | int]]:
    """Return (name, key) of every program that steps of these buckets call.

    ``further``: programs that are called for each bucket, as the forward pass is. ``others``: names
    and keys of programs with a bucket of their own.
    """
    programs: list[tuple[str, Bucket | int]] = [
        (name, bucket) for name in (FORWARD, *further) for bucket in buckets
    ]
    programs += [(SAMPLE, num_rows) for num_rows in sorted({bucket.num_rows for bucket in buckets})]
    if repeats is not None and repeats.bucket in buckets:
        programs.append((REPEAT, repeats.bucket))
    return [*programs, *others]


def call_once(
    runner: Runner, buckets: Sequence[Bucket], wanted: Sequence[tuple[str, Bucket | int]]
) -> None:
    """Call each wanted program once with empty input, and wait: first calls take longer.

    Programs that read what a forward pass leaves follow one of the same bucket.
    """

    def call(name: str, key: Bucket | int) -> None:
        runner.call(name, key, *runner.inputs(name, key))

    for bucket in buckets:
        for name, key in ((FORWARD, bucket), (SAMPLE, bucket.num_rows)):
            call(name, key)
        for name, key in wanted:
            if key == bucket and name != FORWARD:
                call(name, key)
    for name, key in wanted:
        if isinstance(key, Bucket) and key not in buckets:
            call(name, key)
    jax.block_until_ready(list(runner.state.values()))


def _forward_program(
    structure: Any,
    mesh: Mesh,
    reads: tuple[int, ...] | None,
    inputs: Callable[[Bucket], tuple[StepInput]],
) -> Program:
    """Return the program of the forward pass; its result is the hidden states [T, embed]."""
    # Process 0 pools the hidden states of all copies of the weights, so every device gets them if
    # copies are on several processes.
    apart = len({device.process_index for device in mesh.devices[:, 0, 0]}) > 1
    return Program(
        FORWARD,
        functools.partial(forward, structure, apart, reads),
        inputs,
        reads=(WEIGHTS, CACHES, NEWEST),
        writes=(CACHES, LOGITS, SEEN),
        donates=(CACHES,),
        results=(P() if apart else P(meshes.DATA),),
    )


def _sample_program(max_rows: int, sizes: Sizes, copies: int) -> Program:
    """Return the program of the sampler; its result is a token for each row.

    The tokens also stay on the device, as those of the last step.
    """

    def inputs(num_rows: int) -> tuple[Sampling, Edits]:
        edits = logit_rules.empty(copies * num_rows, sizes.vocab_size, sizes.max_model_len)
        edits = dataclasses.replace(edits, any_1=np.zeros(copies, np.bool_))
        return batch.join([batch.empty_sampling(num_rows)] * copies), edits

    return Program(
        SAMPLE,
        functools.partial(_sample, max_rows, sizes.num_logprobs),
        inputs,
        reads=(LOGITS, NEWEST),
        writes=(NEWEST,),
        results=(P(),),
    )


def _repeat_program(
    structure: Any, sizes: Sizes, copies: int, *, max_rows: int, max_steps: int
) -> Program:
    """Return the program of several decode steps, each with the tokens of the one before.

    Inputs: step input and sampling parameters of the first step, and the number of steps. Every row
    is one token and samples, without edits of the logits. The pages of the rows hold the tokens of
    all steps. Result: the rows of the first step, then those of the second, and so on.
    """

    def inputs(bucket: Bucket) -> tuple[StepInput, Sampling, np.ndarray]:
        (step,) = _step_input(copies, sizes, bucket)
        sampling = batch.join([batch.empty_sampling(bucket.num_rows)] * copies)
        return step, sampling, np.zeros(copies, np.int32)

    return Program(
        REPEAT,
        functools.partial(_repeat, structure, sizes=sizes, max_rows=max_rows, max_steps=max_steps),
        inputs,
        reads=(WEIGHTS, CACHES, NEWEST),
        writes=(CACHES, NEWEST),
        donates=(CACHES,),
        results=(P(),),
    )


def _step_input(copies: int, sizes: Sizes, bucket: Bucket) -> tuple[StepInput]:
    return (batch.join([batch.empty_step(bucket, sizes)] * copies),)


def forward(
    structure: Any,
    apart: bool,
    reads: tuple[int, ...] | None,
    leaves: list[jax.Array],
    caches: tuple[Any, ...],
    newest_R: jax.Array,
    step: StepInput,
) -> tuple[tuple[Any, ...], jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Compute caches, logits of the rows of results, and hidden states; traced under shard_map.

    Results: caches, logits, what a draft model reads (token ids, and the hidden states that
    ``reads`` names; nothing if that is None), and the last hidden states. ``apart``: return the
    last ones of all copies of the weights, on every device.
    """
    model: LanguageModel = jax.tree.unflatten(structure, leaves)
    ids_T = jnp.where(step.ids_T < 0, newest_R[jnp.maximum(-1 - step.ids_T, 0)], step.ids_T)
    x_TD, hidden, caches = model.run(dataclasses.replace(step, ids_T=ids_T), caches, reads or ())
    logits_BV = model.logits(x_TD[step.sample_at_B], step.num_samples_1[0])
    seen = () if reads is None else (ids_T, *hidden)
    return caches, logits_BV, seen, meshes.all_rows(x_TD) if apart else x_TD


def _sample(
    max_rows: int,
    num_logprobs: int,
    logits_BV: jax.Array,
    newest_R: jax.Array,
    sampling: Sampling,
    edits: Edits | None,
) -> tuple[jax.Array, sample.Sampled]:
    """Sample a token for each row: as the next step reads it, and as the host gets it.

    The host's have log probabilities, if a row asks for them.
    """

    def draw(logits_BV: jax.Array) -> jax.Array:
        return sample.sample(logits_BV, sampling)

    if edits is None:
        token_B = draw(logits_BV)
    else:
        token_B = _edited(draw, logits_BV, newest_R, sampling=sampling, edits=edits)
    newest_R = jnp.pad(token_B, (0, max_rows - token_B.shape[0]))
    token_B = jnp.where(sampling.given_B < 0, token_B, sampling.given_B)
    sampled = reported(logits_BV, sampling, token_B, num_logprobs=num_logprobs)
    return newest_R, jax.tree.map(lambda array: meshes.all_rows(array), sampled)


def reported(
    logits_BV: jax.Array, sampling: Sampling, token_B: jax.Array, *, num_logprobs: int
) -> sample.Sampled:
    """Return the tokens as the host gets them, with log probabilities if a row asks for them."""
    num_top = min(num_logprobs, logits_BV.shape[1])
    return jax.lax.cond(
        jnp.any(sampling.wants_logprobs_B),
        lambda: sample.logprobs(logits_BV, sampling.num_rows_1[0], token_B, num_top=num_top),
        lambda: sample.without_logprobs(token_B, num_top),
    )


def _edited(
    draw: Callable[[jax.Array], jax.Array],
    logits_BV: jax.Array,
    newest_R: jax.Array,
    *,
    sampling: Sampling,
    edits: Edits,
) -> jax.Array:
    """Apply the edits to the logits, if any row has some, and draw the tokens."""
    newest_B = jnp.where(
        sampling.last_B < 0, jnp.int32(-1), newest_R[jnp.maximum(sampling.last_B, 0)]
    )

    def draw_edited() -> jax.Array:
        positions_B = sampling.position_B
        return draw(sample.edit(logits_BV, edits, position_B=positions_B, newest_B=newest_B))

    # Both branches draw: a branch that returns the logits unchanged copies them, 2 ms for 16 rows.
    return jax.lax.cond(edits.any_1[0], draw_edited, lambda: draw(logits_BV))


def _repeat(
    structure: Any,
    leaves: list[jax.Array],
    caches: tuple[KVCache, ...],
    newest_R: jax.Array,
    step: StepInput,
    sampling: Sampling,
    num_steps_1: jax.Array,
    *,
    sizes: Sizes,
    max_rows: int,
    max_steps: int,
) -> tuple[tuple[KVCache, ...], jax.Array, sample.Sampled]:
    """Compute decode steps one after the other: -> caches, newest tokens, results of all steps."""
    num_rows = jax.lax.axis_size(meshes.DATA) * len(sampling.seed_B)

    def body(index: jax.Array, carry: Any) -> Any:
        caches, newest_R, found = carry
        caches, logits_BV, *_ = forward(
            structure,
            False,
            (),
            leaves=leaves,
            caches=caches,
            newest_R=newest_R,
            step=_advanced(step, index, sizes),
        )
        moved = dataclasses.replace(sampling, position_B=sampling.position_B + index)
        newest_R, sampled = _sample(
            max_rows, sizes.num_logprobs, logits_BV, newest_R=newest_R, sampling=moved, edits=None
        )
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=index * num_rows, axis=0
        )
        return caches, newest_R, jax.tree.map(put, found, sampled)

    tokens_B = jnp.zeros(max_steps * num_rows, jnp.int32)
    found = sample.without_logprobs(tokens_B, min(sizes.num_logprobs, sizes.vocab_size))
    return jax.lax.fori_loop(jnp.int32(0), num_steps_1[0], body, init_val=(caches, newest_R, found))


def _advanced(step: StepInput, index: jax.Array, sizes: Sizes) -> StepInput:
    """Return the input of the decode step ``index`` steps after ``step``.

    Each row is ``index`` tokens further, and reads the token that the step before has sampled.
    """
    is_used_T = jnp.arange(len(step.ids_T), dtype=jnp.int32) < step.num_tokens
    positions_T = step.positions_T + jnp.where(is_used_T, index, 0)

    def advanced(pages: PageMap) -> PageMap:
        page_T = pages.page_table_BM[step.row_T, positions_T // sizes.page_size]
        slots_T = page_T * sizes.page_size + positions_T % sizes.page_size
        return dataclasses.replace(pages, slots_T=jnp.where(is_used_T, slots_T, pages.slots_T))

    return dataclasses.replace(
        step,
        ids_T=jnp.where(index == 0, step.ids_T, -1 - step.row_T),
        positions_T=positions_T,
        lengths_B=step.lengths_B + jnp.where(step.counts_B > 0, index, 0),
        pages=tuple(advanced(pages) for pages in step.pages),
    )
