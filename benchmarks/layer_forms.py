"""Scan, loop over separate arrays, or unroll: decides how one model's step is built and timed in each form.

What follows from it stands in docs/adr/003.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import script
from slipway import mesh as meshes
from slipway import models, tree
from slipway.bench.random_model import QWEN3_SHAPE
from slipway.checkpoint import load
from slipway.engine import batch, programs
from slipway.engine.batch import Bucket, Sampling, Sizes
from slipway.engine.caches import Caches
from slipway.ops import StepInput

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersBench:
    """One decode step of the Qwen3-0.6B shape with its layers scanned, looped over and unrolled."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rows: int = 2
    """Rows, each at a context of 128 tokens."""
    rounds: int = 5
    topology: str | None = None
    """A TPU to compile for without having one, such as v6e:2x4; needs libtpu (jax[tpu]). Nothing runs then."""

    def run(self) -> None:
        """Measure each form in turn, and print."""
        figures = {name: measure(name, self.dtype, self.rows, self.rounds, self.topology) for name in FORMS}
        print(
            json.dumps(
                {
                    "topology": self.topology,
                    "rows": self.rows,
                    "dtype": self.dtype,
                    "forms": figures,
                },
                indent=2,
            )
        )


def measure(name: str, dtype_name: str, rows: int, rounds: int, topology: str | None) -> dict[str, float]:
    """Compile time, temporaries for each device and, where the devices are there, median step time of one form."""
    dtype, devices = jnp.dtype(dtype_name), None
    if topology is not None:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = meshes.make_mesh(tensor=1 if devices is None else len(devices), devices=devices)
    declaration = FORMS[name](meshes.fit(models.declare(QWEN3_SHAPE), mesh))
    config = declaration.config
    caches = Caches(declaration, mesh, dtype, PAGE_SIZE).shapes((NUM_PAGES,), 1)
    sizes, bucket = _sizes(config), Bucket(rows, rows)
    runner = programs.runner(declaration, mesh, caches, dtype=dtype, sizes=sizes, max_rows=rows, repeats=None)
    started = time.perf_counter()
    runner.compile(programs.wanted([bucket], None))
    figures = {
        "compile_s": round(time.perf_counter() - started, 2),
        "temp_mb": round(runner.temp_bytes() / 1e6, 1),
    }
    if topology is not None:
        return figures
    runner.state[programs.WEIGHTS] = jax.tree.leaves(load.dummy(declaration, mesh, dtype, seed=0))
    runner.allocate(programs.CACHES)
    runner.allocate(programs.NEWEST)
    times: list[float] = []
    step, sampling = _inputs(bucket, rows, sizes)
    for _ in range(rounds + 1):
        started = time.perf_counter()
        runner.call(programs.FORWARD, bucket, step)
        jax.block_until_ready(runner.call(programs.SAMPLE, rows, sampling, None))
        times.append(time.perf_counter() - started)
    return figures | {"step_ms": round(statistics.median(times[1:]) * 1e3, 1)}


def _sizes(config: Any) -> Sizes:
    return Sizes(PAGE_SIZE, (NUM_PAGES,), TABLE_WIDTH, config.vocab_size, TABLE_WIDTH * PAGE_SIZE)


def _inputs(bucket: Bucket, rows: int, sizes: Sizes) -> tuple[StepInput, Sampling]:
    step, sampling = batch.empty_step(bucket, sizes), batch.empty_sampling(rows)
    step.num_tokens_1[0] = step.num_samples_1[0] = sampling.num_rows_1[0] = rows
    step.counts_B[:], step.lengths_B[:] = 1, 128
    step.positions_T[:], step.pages[0].slots_T[:] = 127, range(rows)
    step.row_T[:] = step.starts_B[:] = step.sample_at_B[:] = range(rows)
    return step, sampling


def _replace(declaration: Any) -> Any:
    """The declaration with every Separate an Unrolled."""

    def one(node: Any) -> Any:
        return Unrolled(node.bodies, node.first) if isinstance(node, tree.Separate) else node

    return jax.tree.map(
        one,
        declaration,
        is_leaf=lambda node: isinstance(node, tree.Separate) or tree.is_param(node),
    )


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("layer_forms", LayersBench)


if __name__ == "__main__":
    main()
