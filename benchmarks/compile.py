"""`python -m benchmarks.compile`: the engine's step for TPUs that are not there; decides what is read off the programs.

libtpu compiles on any x86 Linux host, and refuses what does not fit a device's memory. Nothing runs, so nothing is said
about numbers or speed.
"""

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks import script
from slipway.bench.random_model import QWEN3_SHAPE

QWEN3_32B_SHAPE = QWEN3_SHAPE | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {"qwen3-32b": QWEN3_32B_SHAPE, "qwen3-0.6b": QWEN3_SHAPE}
WITHOUT_DEVICE = {
    "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileBench:
    """Compile decode and prefill of a Qwen3 shape in bf16 for a TPU topology, without one; needs libtpu (jax[tpu])."""

    model: Literal["qwen3-32b", "qwen3-0.6b"] = "qwen3-32b"
    topology: str = "v6e:2x4"
    """Of the TPU, such as v5e:2x4, v6e:2x4, tpu7x:2x2x1. All its devices share each layer."""
    rows: int = 64
    """Sequences that decode together."""
    prefill_tokens: int = 2048
    """Tokens of the largest step."""
    num_pages: int = 8192
    page_size: int = 16
    max_model_len: int = 4096
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Compile, and print what the programs need."""
        os.environ.update(WITHOUT_DEVICE)  # before JAX looks for devices
        report = compiled(self)
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")


def compiled(asked: CompileBench) -> dict[str, Any]:
    """Seconds, memory of one device and collectives of each program."""
    import jax.numpy as jnp
    from jax.experimental import topologies

    from slipway import mesh as meshes
    from slipway import models
    from slipway.engine import programs as model_programs
    from slipway.engine.batch import Bucket, Sizes
    from slipway.engine.caches import Caches

    devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=asked.topology).devices
    mesh = meshes.make_mesh(tensor=len(devices), devices=devices)
    declaration = meshes.fit(models.declare(SHAPES[asked.model]), mesh)
    caches = Caches(declaration, mesh, jnp.bfloat16, asked.page_size).shapes((asked.num_pages,), 1)
    width, kv = -(-asked.max_model_len // asked.page_size), caches[0].kv
    sizes = Sizes(asked.page_size, (asked.num_pages,), width, declaration.config.vocab_size, asked.max_model_len)
    runner = model_programs.runner(
        declaration, mesh, caches, dtype=jnp.bfloat16, sizes=sizes, max_rows=asked.rows, repeats=None
    )
    kv_bytes = kv.size * kv.dtype.itemsize // len(devices)
    programs = {}
    for name, tokens in (("decode", asked.rows), ("prefill", asked.prefill_tokens)):
        started = time.perf_counter()
        program = runner.compiled(model_programs.FORWARD, Bucket(tokens, asked.rows))
        programs[name] = {"tokens": tokens, "compile_s": round(time.perf_counter() - started, 1)} | read(program, kv)
    return {
        "model": asked.model, "topology": asked.topology, "device": devices[0].device_kind, "devices": len(devices),
        "bodies": runner.bodies, "kv_bytes_a_device": kv_bytes, "programs": programs,
    }  # fmt: skip


def read(program: Any, kv: Any) -> dict[str, Any]:
    """Memory of one device, what is donated, and how many collectives and copies of the cache the program has."""
    memory, text = program.memory_analysis(), program.as_text()
    layers, *rest = kv.sharding.shard_shape(kv.shape)
    whole = {",".join(map(str, shape)) for shape in ((layers, *rest), (layers * rest[0], *rest[1:]), rest)}
    copies = [shape for shape in re.findall(r"= bf16\[([\d,]*)\]\S* copy\(", text) if shape in whole]
    return {
        "arguments_bytes": memory.argument_size_in_bytes, "temporaries_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes, "copies_of_the_cache": len(copies),
        "collectives": {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
    }  # fmt: skip


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("compile", CompileBench)


if __name__ == "__main__":
    main()
