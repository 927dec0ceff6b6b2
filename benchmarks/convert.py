"""`slipway bench convert`: a bf16 checkpoint converted by us, by the usual forty lines, copied by `cp`, and the disk
alone, in one run.

Decides the checkpoint and how each way is timed: a fresh process each, alternating, its own report of the time between
its imports and its end, and the kernel's of its largest memory. Knows no rules.

The order is drawn anew for each round: what ran before decides in which state a way finds the memory. A virtual machine
gives its host what has been free for seconds, and the first touch of that costs ten times a copy (`cp` of 2 GB: 0.5 s
or 4.9).
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from benchmarks import script
from slipway.checkpoint import shards
from slipway.checkpoint.shards import Spec
from slipway.convert.mappings import BUILT_IN
from slipway.convert.plan import Plan, resolve
from slipway.convert.sink import Pieces

BF16 = np.dtype(ml_dtypes.bfloat16)
EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 5632, 16, 8, 128, 65536
CHILD = Path(__file__).with_name("worker_convert.py")
LAYER_BYTES = 2 * (EMBED * MLP * 3 + EMBED * HEAD_DIM * (HEADS + KV_HEADS) * 2)
Way = Literal["ours", "forty_lines", "cp", "cp_and_flush", "disk"]
WAYS: tuple[Way, ...] = (
    "cp",
    "cp_and_flush",
    "ours",
    "forty_lines",
    "disk",
)  # ours flushes, forty lines and cp do not


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertBench:
    """Time and memory of a conversion beside the usual way and beside a copy."""

    size_gb: float = 2.0
    """Of the checkpoint that is made for it."""
    tree: Literal["nnx", "maxtext"] = "nnx"
    """Kernels (in, out) in one .safetensors file, or MaxText's scanned tree in Orbax."""
    rounds: int = 9
    """Alternating rounds."""
    folder: Path | None = None
    """Where to make it; by default a temporary directory."""

    def run(self) -> None:
        """Measure and print."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            print(json.dumps(self.measure(Path(folder)), indent=2))

    def measure(self, folder: Path) -> dict[str, Any]:
        """Medians over the rounds, and ratios."""
        source, config, size = make_checkpoint(folder, self.tree, self.size_gb)
        taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        order = random.Random(0)
        for _ in range(self.rounds + 1):  # the first round fills the page cache
            for way in order.sample(WAYS, len(WAYS)):
                os.sync()
                out = folder / "out"
                taken[way].append(_timed(way, source, out, config))
                shutil.rmtree(out)
        seconds = {way: statistics.median(t[0] for t in runs[1:]) for way, runs in taken.items()}
        return {
            "tree": self.tree,
            "size_gb": round(size / 1e9, 3),
            "rounds": self.rounds,
            "seconds": {way: round(value, 3) for way, value in seconds.items()},
            "spread": {
                way: [round(min(t[0] for t in r[1:]), 3), round(max(t[0] for t in r[1:]), 3)]
                for way, r in taken.items()
            },
            "process_seconds": {
                way: round(statistics.median(t[1] for t in runs[1:]), 3) for way, runs in taken.items()
            },
            "peak_rss_mb": {way: round(max(t[2] for t in runs)) for way, runs in taken.items()},
            "ours_to_cp": round(seconds["ours"] / seconds["cp"], 2),
            "fastest_ours_to_fastest_cp": round(min(taken["ours"][1:])[0] / min(taken["cp"][1:])[0], 2),
            "ours_to_disk": round(seconds["ours"] / seconds["disk"], 2),
            "disk_to_cp": round(seconds["disk"] / seconds["cp"], 2),
            "ours_to_cp_and_flush": round(seconds["ours"] / seconds["cp_and_flush"], 2),
            "forty_lines_to_ours": round(seconds["forty_lines"] / seconds["ours"], 2),
        }


def make_checkpoint(folder: Path, tree: str, size_gb: float) -> tuple[Path, Path, int]:
    """A checkpoint of random numbers, its config.json and its size."""
    layers = max(1, round((size_gb * 1e9 - 2 * VOCAB * EMBED) / LAYER_BYTES))
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "vocab_size": VOCAB,
        "hidden_size": EMBED, "intermediate_size": MLP, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    name = "maxtext qwen3, scanned" if tree == "maxtext" else "qwen3 in Flax, layers one by one"
    mapping = next(mapping for group in BUILT_IN.values() for mapping in group if mapping.name == name)
    sizes = {axis: int(config[field]) for axis, field in mapping.fields.items()}
    plan = resolve(mapping, "to_jax", {name: Spec(BF16, shape) for name, shape in _hf_shapes(layers)}, sizes)
    assert plan.fits, (plan.unmatched, plan.problems)
    noise = (np.random.default_rng(0).standard_normal(1 << 23) * 0.02).astype(BF16)
    if tree == "maxtext":
        from slipway.convert.orbax import OrbaxSink  # needs an extra, which only this tree wants

        source = folder / "source"
        sink = OrbaxSink(source, plan.targets, "bench", False)
        for name, spec in plan.targets.items():
            sink.write(name, _pieces(spec, noise))
        sink.finish()
    else:
        source = folder / "source.safetensors"
        _write(source, plan, noise)
    return source, folder / "config.json", sum(spec.nbytes for spec in plan.targets.values())


def _timed(way: Way, source: Path, out: Path, config: Path) -> tuple[float, float, float]:
    """Seconds of the work, of the whole process, and its peak memory in MB (0 for cp)."""
    own = ["cp", "-r", str(source), str(out / "copy")]
    command = [sys.executable, "-P", str(CHILD), way, str(source), str(out), str(config)]
    is_copy = way.startswith("cp")
    if is_copy:
        out.mkdir()
    if way == "cp_and_flush":
        own = [
            "sh",
            "-c",
            f"{shlex.join(own)} && find {shlex.quote(str(out))} -type f -exec sync {{}} +",
        ]
    started = time.perf_counter()
    done = subprocess.run(own if is_copy else command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    work, peak = map(float, done.stdout.split()) if not is_copy else (seconds, 0.0)
    return work, seconds, peak


def _hf_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
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
    size = int(np.prod(spec.shape))
    for first in range(0, size, noise.size):
        yield first, noise[: min(noise.size, size - first)]


def _write(path: Path, plan: Plan, noise: np.ndarray) -> None:
    """One safetensors file of the plan's targets, a piece at a time."""
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
