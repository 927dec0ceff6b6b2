"""One decode step with its layers scanned, looped over as separate arrays, or unrolled.

The decision that follows from the figures is in docs/adr/003-layers.md.
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
from slipway.checkpoint import tensor_reader
from slipway.engine import batch, programs
from slipway.engine.batch import Bucket, Sampling, Sizes
from slipway.engine.caches import Caches
from slipway.ops import StepInput
from slipway.ops.addresses import by_address

PAGE_SIZE, NUM_PAGES, TABLE_WIDTH = 16, 256, 16
CONTEXT = 128


@jax.tree_util.register_pytree_with_keys_class
class Unrolled(tree.Separate):
    """Separate arrays, each layer compiled for itself: the form that was not chosen."""

    def fold(self, step: Callable, carry: Any) -> Any:
        """Apply ``carry = step(layer, index, carry)`` to each layer in a Python loop."""
        for index, layer in enumerate(self.bodies, self.first):
            carry = step(layer, index, carry)
        return carry


FORMS = {
    "scan over stacked arrays": lambda declaration: declaration,
    "loop over separate arrays": tree.separate,
    "unrolled": lambda declaration: _unrolled(tree.separate(declaration)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFormsBench:
    """One decode step of the Qwen3-0.6B shape with its layers scanned, looped over and unrolled."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rows: int = 2
    """Sequences that decode together, each at a context of 128 tokens."""
    rounds: int = 5
    topology: str | None = None
    """A TPU topology, such as v6e:2x4: compile for it without a TPU, and run nothing; needs libtpu
    (jax[tpu])."""

    def run(self) -> None:
        """Measure each form in turn, and print."""
        report = {"topology": self.topology, "rows": self.rows, "dtype": self.dtype}
        figures = {name: self.measure(name) for name in FORMS}
        print(json.dumps(report | {"forms": figures}, indent=2))

    def measure(self, form: str) -> dict[str, float]:
        """Return compile time and temporaries of one form, and its step time where it can run.

        ``temp_mb`` counts one device.
        """
        dtype, devices = jnp.dtype(self.dtype), None
        if self.topology is not None:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=self.topology)
            devices = topology.devices
        mesh = meshes.make_mesh(tensor=1 if devices is None else len(devices), devices=devices)
        declaration = FORMS[form](meshes.fit(models.declare(QWEN3_SHAPE), mesh))
        all_caches = Caches(declaration, (), mesh, dtype=dtype, page_size=PAGE_SIZE)
        caches, _ = all_caches.shapes((NUM_PAGES,))
        sizes, bucket = _sizes(declaration.config), Bucket(self.rows, self.rows)
        runner = programs.runner(
            declaration,
            mesh,
            caches,
            dtype=dtype,
            sizes=sizes,
            max_rows=self.rows,
            repeats=None,
        )
        started = time.perf_counter()
        runner.compile(programs.wanted([bucket], None))
        figures = {
            "compile_s": round(time.perf_counter() - started, 2),
            "temp_mb": round(runner.temp_bytes() / 1e6, 1),
        }
        if self.topology is not None:
            return figures
        weights = tensor_reader.dummy(declaration, mesh, dtype, seed=0)
        runner.state[programs.WEIGHTS] = jax.tree.leaves(by_address(weights, mesh))
        runner.allocate(programs.CACHES)
        runner.allocate(programs.NEWEST)
        (step, sampling), times = _inputs(bucket, sizes), []
        for _ in range(self.rounds + 1):
            started = time.perf_counter()
            runner.call(programs.FORWARD, bucket, step)
            jax.block_until_ready(runner.call(programs.SAMPLE, self.rows, sampling, None))
            times.append(time.perf_counter() - started)
        return figures | {"step_ms": round(statistics.median(times[1:]) * 1e3, 1)}


def _sizes(config: Any) -> Sizes:
    return Sizes(
        page_size=PAGE_SIZE,
        num_pages=(NUM_PAGES,),
        table_width=TABLE_WIDTH,
        vocab_size=config.vocab_size,
        max_model_len=TABLE_WIDTH * PAGE_SIZE,
    )


def _inputs(bucket: Bucket, sizes: Sizes) -> tuple[StepInput, Sampling]:
    """Return a step that decodes the last token of CONTEXT tokens in every row."""
    rows = bucket.num_rows
    step, sampling = batch.empty_step(bucket, sizes), batch.empty_sampling(rows)
    step.num_tokens_1[0] = rows
    step.num_samples_1[0] = rows
    sampling.num_rows_1[0] = rows
    step.counts_B[:] = 1
    step.lengths_B[:] = CONTEXT
    step.positions_T[:] = CONTEXT - 1
    step.pages[0].slots_T[:] = range(rows)
    step.row_T[:] = range(rows)
    step.starts_B[:] = range(rows)
    step.sample_at_B[:] = range(rows)
    return step, sampling


def _unrolled(declaration: Any) -> Any:
    """Return the declaration with every Separate replaced by an Unrolled."""

    def replaced(node: Any) -> Any:
        return Unrolled(node.bodies, node.first) if isinstance(node, tree.Separate) else node

    def is_leaf(node: Any) -> bool:
        return isinstance(node, tree.Separate) or tree.is_param(node)

    return jax.tree.map(replaced, declaration, is_leaf=is_leaf)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("layer_forms", LayerFormsBench)


if __name__ == "__main__":
    main()
