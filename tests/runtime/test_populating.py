"""Memory of a cache, populated while nothing runs.

All of it is populated, its content does not change, and the threads can be ended at any moment.
"""

import functools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slipway import ops
from slipway.ops import cpu
from slipway.runtime.populating import Populating

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="the portable body fills memory")

SIZE_BYTES = 1 << 27


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def empty():
    return jax.block_until_ready(jax.jit(lambda: ops.zeros((SIZE_BYTES,), jnp.int8))())


def wait_until_all_came(before: int):
    deadline = time.monotonic() + 120
    while resident_bytes() - before < SIZE_BYTES * 0.95:
        assert time.monotonic() < deadline, (
            "a processor that is never idle, or nothing is populated"
        )
        time.sleep(0.01)


def test_all_of_it_comes_and_what_was_written_stays():
    write = jax.jit(lambda array: array.at[SIZE_BYTES // 3].set(7), donate_argnums=0)
    array, before = empty(), resident_bytes()
    populating = Populating(array)
    array = write(array)
    wait_until_all_came(before)
    populating.end()
    assert np.flatnonzero(array).tolist() == [SIZE_BYTES // 3]


def test_all_parts_of_an_array_on_several_devices_come():
    mesh = jax.make_mesh((2,), ("parts",), devices=jax.devices()[:2])
    half = functools.partial(ops.zeros, (SIZE_BYTES // 2,), jnp.int8)
    array = jax.jit(jax.shard_map(half, mesh=mesh, in_specs=(), out_specs=jax.P("parts")))()
    before = resident_bytes()
    populating = Populating(array)
    wait_until_all_came(before)
    populating.end()
    assert not np.any(array)


def test_it_ends_at_any_moment_and_the_memory_can_go():
    for _ in range(20):
        array = empty()
        populating = Populating(array)
        populating.end()
        populating.end()
        array.delete()
