"""One conversion in a process of its own: by Slipway, by the usual forty lines, or the disk alone.

Arguments: the way ("ours", "forty_lines" or "disk"), the source, the new directory, config.json.
Prints the seconds of the work without the imports, and the peak resident memory in MB.
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
    """Convert in the way of the command line, and print seconds and memory."""
    way, source, out, config = sys.argv[1], *map(Path, sys.argv[2:])
    started = time.perf_counter()
    if way == "ours":
        convert(open_source(source), out, ConvertConfig(config=config))
    elif way == "disk":
        write_to_disk(source, out)
    else:
        forty_lines(source, out)
    print(time.perf_counter() - started, _peak_rss_mb())


def write_to_disk(source: Path, out: Path) -> None:
    """Write as many bytes as the source has, past the page cache, and flush them."""
    out.mkdir()
    # memory that begins on a page, as O_DIRECT requires
    block = mmap.mmap(-1, DISK_BLOCK)
    block.write(random.Random(0).randbytes(DISK_BLOCK))
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    flags = os.O_WRONLY | os.O_CREAT
    try:
        file = os.open(out / "bytes", flags | os.O_DIRECT)
    except (OSError, AttributeError):
        # the file system or the operating system has no O_DIRECT: write through the page cache
        file = os.open(out / "bytes", flags)
    for _ in range(sum(path.stat().st_size for path in files) // DISK_BLOCK):
        os.write(file, block)
    os.fsync(file)
    os.close(file)


def forty_lines(source: Path, out: Path) -> None:
    """Convert as guides do: read every tensor as a JAX array, transpose, write the dict at once.

    The names are those of convert.py's trees.
    """
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
    arrays = {name: jax.numpy.asarray(value) for name, value in kernels.items()}
    save_file(arrays, out / "model.safetensors")


def _unstacked(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the HF name and the weight of every parameter of MaxText's scanned Qwen3 tree."""
    layers = tree["decoder"]["layers"]
    attention, mlp = layers["self_attention"], layers["mlp"]
    yield "model.embed_tokens.weight", tree["token_embedder"]["embedding"]
    yield "model.norm.weight", tree["decoder"]["decoder_norm"]["scale"]
    for i in range(mlp["wo"]["kernel"].shape[1]):
        key = f"model.layers.{i}"
        for norm, name in (("pre", "input_layernorm"), ("post", "post_attention_layernorm")):
            yield f"{key}.{name}.weight", layers[f"{norm}_self_attention_layer_norm"]["scale"][:, i]
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = attention[ours]["kernel"][:, i]
            yield f"{key}.self_attn.{theirs}_proj.weight", kernel.reshape(kernel.shape[0], -1).T
        kernel = attention["out"]["kernel"][:, i]
        yield f"{key}.self_attn.o_proj.weight", kernel.reshape(-1, kernel.shape[-1]).T
        yield f"{key}.self_attn.q_norm.weight", attention["query_norm"]["scale"][:, i]
        yield f"{key}.self_attn.k_norm.weight", attention["key_norm"]["scale"][:, i]
        for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            yield f"{key}.mlp.{theirs}_proj.weight", mlp[ours]["kernel"][:, i].T


def _peak_rss_mb() -> float:
    """Return the peak resident memory of this process in MB.

    The kernel's figure for a child, which the parent could read, includes the parent's own memory.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


if __name__ == "__main__":
    main()
