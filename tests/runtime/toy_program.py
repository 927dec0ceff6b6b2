"""Program that doubles a hidden state.

As a script it is one of two processes that run the program: RANK PORT.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slipway import mesh as meshes
from slipway.runtime import multihost
from slipway.runtime.runner import Program, Runner

COPIES, WIDTH = 2, 8
# Sums of the hidden state after three calls that add 1, 2 and nothing, then double; by key.
EXPECTED = {4: [16.0, 64.0, 128.0], 8: [16.0, 64.0, 128.0]}


def runner(mesh) -> Runner:
    """Return a runner with one program over ``hidden`` [16]: add the mean of the input, then
    double."""

    def double(hidden_W, added_K):
        doubled_W = (hidden_W + jnp.mean(added_K)) * 2
        return doubled_W, jax.lax.psum(jnp.sum(doubled_W), meshes.DATA)[None] / jax.lax.axis_size(
            meshes.DATA
        )

    sharding = NamedSharding(mesh, P(meshes.DATA))
    size = mesh.shape[meshes.DATA] * WIDTH
    program = Program(
        "double",
        double,
        lambda key: (np.zeros(mesh.shape[meshes.DATA] * key, np.float32),),
        reads=("hidden",),
        writes=("hidden",),
        donates=("hidden",),
        results=(P(),),
    )
    return Runner(
        mesh,
        {"hidden": lambda _: jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding)},
        [program],
    )


def run(runner: Runner, key: int) -> list[float]:
    """Call the program three times, the last time with the neutral input; return its results."""
    runner.allocate("hidden")
    results = []
    for added in (1.0, 2.0, None):
        given = None if added is None else np.full_like(runner.inputs("double", key)[0], added)
        (result,) = runner.call("double", key, given)
        results.append(float(np.asarray(result)[0]))
    return results


def main(rank: int, port: str) -> None:
    """Lead or follow, and print results and this process's part of the state."""
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=1"  # read when JAX looks for devices
    )
    address = f"127.0.0.1:{port}"
    multihost.join(2, rank, address)
    made = runner(meshes.make_mesh(data=COPIES))
    made.compile([("double", 4)])
    results: list[float] = []
    if rank:
        made.allocate("hidden")
        multihost.follow(made, address)
    else:
        leader = multihost.Leader(made, 1, address)
        results = run(made, 4)
        leader.close()
    (shard,) = made.state["hidden"].addressable_shards
    print(json.dumps({"results": results, "hidden": np.asarray(shard.data).tolist()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
