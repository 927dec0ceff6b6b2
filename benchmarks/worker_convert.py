"""One conversion in a process of its own: by Slipway, by the usual forty lines, or the disk alone.

Arguments: the way ("ours", "forty_lines" or "disk"), the source, the new directory, config.json. Prints the seconds of
the work, without the imports, and the peak resident memory in MB.
Not here: the source and the rounds (convert.py).
"""

import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slipway.convert.conversion import ConvertConfig, convert
from slipway.convert.formats import open_source

DISK_BLOCK = 1 << 22


def main() -> None:
    """One way, in a process of its own: its seconds on standard output."""
    way, source, out, config = sys.argv[1], *map(Path, sys.argv[2:])
    started = time.perf_counter()
    if way == "ours":
        convert(open_source(source), out, ConvertConfig(config=config))
    elif way == "disk":
        _disk_alone(source, out)
    else:
        _forty_lines(source, out)
    print(time.perf_counter() - started, _peak_rss_mb())


def _peak_rss_mb() -> float:
    """Of this process: the kernel's figure for a child would include the parent that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def _disk_alone(source: Path, out: Path) -> None:
    """As many bytes as the source's, of one buffer, past the page cache and flushed: what is on the disk costs this."""
    out.mkdir()
    block = mmap.mmap(-1, DISK_BLOCK)  # begins on a page
    block.write(random.Random(0).randbytes(DISK_BLOCK))
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    flags = os.O_WRONLY | os.O_CREAT
    try:
        file = os.open(out / "bytes", flags | os.O_DIRECT)
    except (OSError, AttributeError):  # not of this file system or system: then as everyone writes
        file = os.open(out / "bytes", flags)
    for _ in range(sum(path.stat().st_size for path in files) // DISK_BLOCK):
        os.write(file, block)
    os.fsync(file)
    os.close(file)


def _forty_lines(source: Path, out: Path) -> None:
    """What guides show: every tensor as a JAX array, transposed, the dict written at once. It knows this tree only."""
    import jax
    from safetensors.flax import load_file, save_file

    if source.is_file():
        kernels = {}
        for name, value in load_file(source).items():
            module, leaf = name.rsplit(".", 1)
            kernels[f"model.{module}.weight"] = value.T if leaf == "kernel" else value
    else:
        import orbax.checkpoint as ocp

        restored = ocp.PyTreeCheckpointer().restore(source)
        kernels = dict(_unstacked(jax.tree.map(jax.numpy.asarray, restored)["params"]["params"]))
    out.mkdir()
    save_file(
        {name: jax.numpy.asarray(value) for name, value in kernels.items()},
        out / "model.safetensors",
    )


def _unstacked(tree: Any) -> Iterator[tuple[str, Any]]:
    """MaxText's scanned Qwen3 tree, taken apart by hand."""
    layers = tree["decoder"]["layers"]
    yield "model.embed_tokens.weight", tree["token_embedder"]["embedding"]
    yield "model.norm.weight", tree["decoder"]["decoder_norm"]["scale"]
    for i in range(layers["mlp"]["wo"]["kernel"].shape[1]):
        key, attention = f"model.layers.{i}", layers["self_attention"]
        yield (
            f"{key}.input_layernorm.weight",
            layers["pre_self_attention_layer_norm"]["scale"][:, i],
        )
        yield (
            f"{key}.post_attention_layernorm.weight",
            layers["post_self_attention_layer_norm"]["scale"][:, i],
        )
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = attention[ours]["kernel"][:, i]
            yield f"{key}.self_attn.{theirs}_proj.weight", kernel.reshape(kernel.shape[0], -1).T
        kernel = attention["out"]["kernel"][:, i]
        yield f"{key}.self_attn.o_proj.weight", kernel.reshape(-1, kernel.shape[-1]).T
        yield f"{key}.self_attn.q_norm.weight", attention["query_norm"]["scale"][:, i]
        yield f"{key}.self_attn.k_norm.weight", attention["key_norm"]["scale"][:, i]
        for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            yield f"{key}.mlp.{theirs}_proj.weight", layers["mlp"][ours]["kernel"][:, i].T


if __name__ == "__main__":
    main()
