"""Conversion of a bf16 checkpoint by Slipway, beside the usual forty lines, `cp` and the disk.

Every conversion is a fresh process that reports the time from the end of its imports to its end,
and its peak memory. The order of the ways is drawn anew for each round, because what ran before
decides the state of free memory. A virtual machine returns memory to its host that has been free
for seconds, and touching it again takes ten times as long as a copy (`cp` of 2 GB: 0.5 s or 4.9).
Not here: the conversions (worker_convert.py).
"""

import dataclasses
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from benchmarks import script
from slipway.checkpoint import shards
from slipway.checkpoint.shards import Spec
from slipway.convert.mappings import BUILT_IN
from slipway.convert.plan import Plan, resolve
from slipway.convert.writer import Pieces

BF16 = np.dtype(ml_dtypes.bfloat16)
EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 5632, 16, 8, 128, 65536
WORKER = Path(__file__).with_name("worker_convert.py")
LAYER_BYTES = 2 * (EMBED * MLP * 3 + EMBED * HEAD_DIM * (HEADS + KV_HEADS) * 2)
Way = Literal["ours", "forty_lines", "cp", "cp_and_flush", "disk"]
# "ours" and "disk" flush what they write, "forty_lines" and "cp" do not.
WAYS: tuple[Way, ...] = ("cp", "cp_and_flush", "ours", "forty_lines", "disk")


@dataclasses.dataclass(frozen=True)
class Run:
    """Seconds of the work and of the whole process, and peak memory in MB (0 for cp)."""

    work_s: float
    process_s: float
    peak_mb: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertBench:
    """Time and memory of a conversion beside the usual way and beside a copy."""

    size_gb: float = 2.0
    """Size of the checkpoint, which is written first."""
    tree: Literal["nnx", "maxtext"] = "nnx"
    """Kernels (in, out) in one .safetensors file, or MaxText's scanned tree in Orbax."""
    rounds: int = 9
    """Rounds, each with every way once."""
    folder: Path | None = None
    """Folder for the files; by default a temporary directory."""

    def run(self) -> None:
        """Measure and print."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            print(json.dumps(self.measure(Path(folder)), indent=2))

    def measure(self, folder: Path) -> dict[str, Any]:
        """Return medians over the rounds, and ratios."""
        source, config, size = make_checkpoint(folder, self.tree, self.size_gb)
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        order = random.Random(0)
        for _ in range(self.rounds + 1):
            for way in order.sample(WAYS, len(WAYS)):
                os.sync()
                out = folder / "out"
                runs[way].append(timed(way, source, out, config=config))
                shutil.rmtree(out)
        sizes = {"tree": self.tree, "size_gb": round(size / 1e9, 3), "rounds": self.rounds}
        return sizes | figures(runs)


def figures(runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """Return medians, spread, memory and ratios.

    The first run of each way, which fills the page cache, counts for the memory only.
    """
    times = {way: sorted(run.work_s for run in each[1:]) for way, each in runs.items()}
    processes = {way: [run.process_s for run in each[1:]] for way, each in runs.items()}
    seconds = {way: statistics.median(each) for way, each in times.items()}
    process = {way: statistics.median(each) for way, each in processes.items()}
    return {
        "seconds": {way: round(value, 3) for way, value in seconds.items()},
        "spread": {way: [round(each[0], 3), round(each[-1], 3)] for way, each in times.items()},
        "process_seconds": {way: round(value, 3) for way, value in process.items()},
        "peak_rss_mb": {way: round(max(run.peak_mb for run in runs[way])) for way in runs},
        "ours_to_cp": round(seconds["ours"] / seconds["cp"], 2),
        "fastest_ours_to_fastest_cp": round(times["ours"][0] / times["cp"][0], 2),
        "ours_to_disk": round(seconds["ours"] / seconds["disk"], 2),
        "disk_to_cp": round(seconds["disk"] / seconds["cp"], 2),
        "ours_to_cp_and_flush": round(seconds["ours"] / seconds["cp_and_flush"], 2),
        "forty_lines_to_ours": round(seconds["forty_lines"] / seconds["ours"], 2),
    }


def make_checkpoint(folder: Path, tree: str, size_gb: float) -> tuple[Path, Path, int]:
    """Write a checkpoint of random numbers; return it, its config.json and its size in bytes."""
    layers = max(1, round((size_gb * 1e9 - 2 * VOCAB * EMBED) / LAYER_BYTES))
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "hidden_size": EMBED,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    name = "maxtext qwen3, scanned" if tree == "maxtext" else "qwen3 in Flax, layers one by one"
    mapping = next(each for group in BUILT_IN.values() for each in group if each.name == name)
    plan = resolve(
        mapping,
        "to_jax",
        {name: Spec(BF16, shape) for name, shape in hf_shapes(layers)},
        known={axis: int(config[field]) for axis, field in mapping.fields.items()},
    )
    assert plan.fits, (plan.unmatched, plan.problems)
    noise = (np.random.default_rng(0).standard_normal(1 << 23) * 0.02).astype(BF16)
    if tree == "maxtext":
        # needs an extra, which the other tree does not
        from slipway.convert.orbax import OrbaxWriter

        source = folder / "source"
        writer = OrbaxWriter(source, plan.targets, "bench", resume=False)
        for name, spec in plan.targets.items():
            writer.write(name, _pieces(spec, noise))
        writer.finish()
    else:
        source = folder / "source.safetensors"
        _write(source, plan, noise)
    return source, folder / "config.json", sum(spec.nbytes for spec in plan.targets.values())


def timed(way: Way, source: Path, out: Path, *, config: Path) -> Run:
    """Convert or copy the source into a new folder."""
    command = [sys.executable, "-P", str(WORKER), way, str(source), str(out), str(config)]
    copies = way.startswith("cp")
    if copies:
        out.mkdir()
        command = ["cp", "-r", str(source), str(out / "copy")]
    if way == "cp_and_flush":
        flush = f"find {shlex.quote(str(out))} -type f -exec sync {{}} +"
        command = ["sh", "-c", f"{shlex.join(command)} && {flush}"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    work_s, peak_mb = (seconds, 0.0) if copies else map(float, done.stdout.split())
    return Run(work_s, seconds, peak_mb)


def hf_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the model's tensors in Hugging Face's layout."""
    yield "model.embed_tokens.weight", (VOCAB, EMBED)
    yield "model.norm.weight", (EMBED,)
    for i in range(layers):
        key = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{key}.{norm}.weight", (EMBED,)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{key}.self_attn.{name}_proj.weight", (heads * HEAD_DIM, EMBED)
        yield f"{key}.self_attn.o_proj.weight", (EMBED, HEADS * HEAD_DIM)
        for name in ("q", "k"):
            yield f"{key}.self_attn.{name}_norm.weight", (HEAD_DIM,)
        for name in ("gate", "up"):
            yield f"{key}.mlp.{name}_proj.weight", (MLP, EMBED)
        yield f"{key}.mlp.down_proj.weight", (EMBED, MLP)


def _pieces(spec: Spec, noise: np.ndarray) -> Pieces:
    """Yield the numbers of a tensor: the index of each piece's first number, and the piece."""
    size = int(np.prod(spec.shape))
    for first in range(0, size, noise.size):
        yield first, noise[: min(noise.size, size - first)]


def _write(path: Path, plan: Plan, noise: np.ndarray) -> None:
    """Write one safetensors file of the plan's targets, a piece at a time."""
    header, places = shards.header(path, plan.targets)
    with path.open("wb") as file:
        file.write(header)
        for name, start in places.items():
            for first, piece in _pieces(plan.targets[name], noise):
                file.seek(start + first * BF16.itemsize)
                file.write(piece.view(np.uint8).data)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("convert", ConvertBench)


if __name__ == "__main__":
    main()
