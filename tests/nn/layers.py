"""Helpers of the tests of layers: random arrays, inputs of a step, calls on a mesh of devices."""

import jax
import jax.numpy as jnp
import numpy as np

from slipway import mesh, tree
from slipway.ops import PageMap, StepInput

F32 = jnp.float32
WHOLE = jax.P()
# f32 sums in another order than the reference's
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(rng, *shape):
    """Return random numbers in f32."""
    return rng.normal(size=shape).astype(np.float32)


def fill(declaration, rng):
    """Return the layer that a declaration describes, with random numbers."""
    return tree.map_params(lambda param: jnp.asarray(draw(rng, *param.shape)), declaration)


def one_sequence(first, count, *, padding=0, num_pages=8, page_size=4, rope=None):
    """Return the input of a step with the tokens ``first`` to ``first + count`` of one sequence.

    ``padding`` tokens follow. Page 0 of the cache is not used, so that a wrong page is noticed.
    """
    positions_T = np.arange(first, first + count + padding, dtype=np.int32)
    prompt_lengths_T = np.full_like(positions_T, first + count)
    table_M = np.arange(1, num_pages, dtype=np.int32)
    page_T = table_M[np.minimum(positions_T // page_size, len(table_M) - 1)]
    slots_T = page_T * page_size + positions_T % page_size
    slots_T[count:] = num_pages * page_size
    one = [np.array([value], np.int32) for value in (0, count, first + count)]
    step = StepInput(
        num_tokens_1=one[1],
        ids_T=np.zeros_like(positions_T),
        positions_T=positions_T,
        prompt_lengths_T=prompt_lengths_T,
        row_T=np.zeros_like(positions_T),
        starts_B=one[0],
        counts_B=one[1],
        lengths_B=one[2],
        pages=(PageMap(slots_T, table_M[None]),),
        num_samples_1=one[0],
        sample_at_B=one[0],
        angles=()
        if rope is None
        else (rope(jnp.asarray(positions_T), jnp.asarray(prompt_lengths_T)),),
    )
    return jax.tree.map(jnp.asarray, step)


def call(function, declaration, layer, *operands, tensor=1, specs=(), out_specs=WHOLE):
    """Call ``function(layer, *operands)`` with the layer split over ``tensor`` devices.

    ``specs`` are the partitions of the first operands; the others are whole.
    """
    missing = len(operands) - len(specs)
    devices = mesh.make_mesh(1, tensor)
    held = tree.map_params(lambda param: mesh.partition(param, devices), declaration)
    mapped = jax.shard_map(
        function,
        mesh=devices,
        in_specs=(held, *specs, *[WHOLE] * missing),
        out_specs=out_specs,
        check_vma=False,
    )
    return jax.jit(mapped)(layer, *operands)
