"""Compilation of the engine's step for a TPU that is not there: its memory and its collectives.

libtpu compiles on any x86 Linux host, and refuses a program that does not fit into a device's
memory. Nothing runs, so neither numbers nor speed are checked. Needs libtpu (jax[tpu]).
"""

import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks import script
from slipway.bench.random_model import QWEN3_MOE_SHAPE, QWEN3_SHAPE

QWEN3_32B_SHAPE = QWEN3_SHAPE | {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "tie_word_embeddings": False,
}
QWEN3_235B_SHAPE = QWEN3_MOE_SHAPE | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}
# The published config.json of DeepSeek-V3, in bf16.
DEEPSEEK_V3_SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
SHAPES = {
    "qwen3-32b": QWEN3_32B_SHAPE,
    "qwen3-0.6b": QWEN3_SHAPE,
    "qwen3-30b-a3b": QWEN3_MOE_SHAPE,
    "qwen3-235b-a22b": QWEN3_235B_SHAPE,
    "deepseek-v3": DEEPSEEK_V3_SHAPE,
}
# Environment in which libtpu loads on a host without a TPU.
WITHOUT_DEVICE = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
# Operations that write a new array; a fusion may be one that only moves numbers.
MOVES = (
    "copy|copy-start|gather|all-gather|all-gather-start|dynamic-slice|concatenate|transpose|fusion"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileBench:
    """Compile decode and prefill of a published shape in bf16 for a TPU topology, without a TPU;
    needs libtpu (jax[tpu])."""

    model: Literal["qwen3-32b", "qwen3-0.6b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3"] = (
        "qwen3-32b"
    )
    topology: str = "v6e:2x4"
    """TPU topology, such as v5e:2x4, v6e:2x4 or tpu7x:2x2x1. All its devices share each layer."""
    expert_parallel_size: int = 1
    """Groups of the devices that hold different experts."""
    expert_exchange: Literal["auto", "sum", "all-to-all"] = "auto"
    """How the results of experts on different devices are joined, as for slipway serve."""
    rows: int = 64
    """Sequences that decode together."""
    prefill_tokens: int = 2048
    """Tokens of the largest step."""
    num_pages: int = 8192
    """Pages of the key-value cache."""
    page_size: int = 16
    """Tokens per page."""
    max_model_len: int = 4096
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Compile, and print the programs' memory and collectives."""
        # before JAX looks for devices
        os.environ.update(WITHOUT_DEVICE)
        report = compiled(self)
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")


def compiled(options: CompileBench) -> dict[str, Any]:
    """Compile both programs; return their seconds, memory of one device, and collectives."""
    # after the environment is set
    import jax.numpy as jnp
    from jax.experimental import topologies

    from slipway import mesh as meshes
    from slipway import models, tree
    from slipway.engine import programs
    from slipway.engine.batch import Bucket, Sizes
    from slipway.engine.caches import Caches
    from slipway.nn import moe

    topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    devices = topology.devices
    groups = options.expert_parallel_size
    mesh = meshes.make_mesh(tensor=len(devices), devices=devices, expert=groups)
    declared = moe.with_exchange(models.declare(SHAPES[options.model]), options.expert_exchange)
    declaration = meshes.fit(declared, mesh)
    caches = Caches(declaration, (), mesh, dtype=jnp.bfloat16, page_size=options.page_size)
    shapes, _ = caches.shapes((options.num_pages,))
    sizes = Sizes(
        page_size=options.page_size,
        num_pages=(options.num_pages,),
        table_width=-(-options.max_model_len // options.page_size),
        vocab_size=declaration.config.vocab_size,
        max_model_len=options.max_model_len,
    )
    runner = programs.runner(
        declaration,
        mesh,
        shapes,
        dtype=jnp.bfloat16,
        sizes=sizes,
        max_rows=options.rows,
        repeats=None,
    )
    kv = shapes[0].kv
    # Shapes of the experts of one layer on one device, or of the whole model there.
    experts = set()
    for leaf in tree.leaves(declaration):
        param = leaf.param
        if any(axis == "experts" for axis, _ in param.stacks):
            held = meshes.shardings(param, mesh).shard_shape(param.shape)
            experts |= {held, held[1:], (held[0] * held[1], *held[2:])}
    figures = {}
    for name, tokens in (("decode", options.rows), ("prefill", options.prefill_tokens)):
        started = time.perf_counter()
        program = runner.compiled(programs.FORWARD, Bucket(tokens, options.rows))
        seconds = round(time.perf_counter() - started, 1)
        figures[name] = {"tokens": tokens, "compile_s": seconds} | read(program, kv, experts)
    return {
        "model": options.model,
        "topology": options.topology,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "bodies": runner.bodies,
        "kv_bytes_a_device": math.prod(kv.sharding.shard_shape(kv.shape)) * kv.dtype.itemsize,
        "programs": figures,
    }


def read(program: Any, kv: Any, experts: set[tuple[int, ...]]) -> dict[str, Any]:
    """Return memory of one device, donated bytes, and counts of collectives and of copies.

    ``experts``: shapes that a copy of all experts would have.
    """
    memory, text = program.memory_analysis(), program.as_text()
    layers, *rest = kv.sharding.shard_shape(kv.shape)
    # the whole cache, the same with layers and pages as one axis, and one layer's cache
    shapes = ((layers, *rest), (layers * rest[0], *rest[1:]), rest)
    whole = {",".join(map(str, shape)) for shape in shapes}
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", text)
    return {
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "copies_of_the_cache": sum(shape in whole for shape in copied),
        "results_with_all_experts": len(
            [
                shape
                for shape in experts
                if re.search(rf"= bf16\[{','.join(map(str, shape))}\]\S* (?:{MOVES})\(", text)
            ]
        ),
        "collectives": {
            name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES
        },
    }


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("compile", CompileBench)


if __name__ == "__main__":
    main()
