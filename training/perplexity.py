"""Perplexity of the exported nano on its held-out text, as it is and packed: `python -m training.perplexity`.

Decides which text is judged and how; the numbers go to quantized.json, which the model card shows. The forward pass is
the engine's: its ops, its cache, its packed weights. Knows no training.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from slipway import mesh, models, ops, tree
from slipway.checkpoint import files, load, quantize
from slipway.nn import linear
from training.data import held_out_rows
from training.export import NANO_FOLDER
from training.train import TrainConfig

RECORD = Path(__file__).parent / "quantized.json"
SCHEMES = {"bfloat16": None, "int8": quantize.Scheme(8, 0), "int4": quantize.Scheme(4, 32)}
PAGE_SIZE = 16


def mean_loss(directory: Path, scheme: quantize.Scheme | None, rows: np.ndarray) -> float:
    """Nats per token of rows [N, context + 1], each a text by itself, in bfloat16."""
    checkpoint = files.open_checkpoint(directory)
    declaration = tree.separate(models.declare(checkpoint.config))
    if scheme is not None:
        declaration = linear.quantize(declaration, scheme.bits, scheme.group)
        checkpoint = quantize.packed_view(checkpoint, load.wanted(declaration))
    one = mesh.make_mesh()
    model = load.load(declaration, checkpoint, one, jnp.bfloat16)
    config, context = declaration.config, rows.shape[1] - 1
    pages = -(-context // PAGE_SIZE)
    cache = ops.allocate_kv(
        config.num_hidden_layers, pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim, jnp.bfloat16
    )
    steps = jnp.arange(context, dtype=jnp.int32)
    whole = [jnp.full(1, context, jnp.int32) for _ in range(2)]
    table = jnp.arange(pages, dtype=jnp.int32)[None]
    ragged = ops.Ragged(
        jnp.int32(context), steps, whole[0].repeat(context), steps, jnp.zeros(1, jnp.int32), *whole, table
    )

    def loss(model, cache, row):
        x_TD, _ = model(row[:-1], cache, ragged)
        chosen = jax.nn.log_softmax(model.logits(x_TD))[jnp.arange(context), row[1:]]
        return -chosen.mean()

    run = jax.jit(jax.shard_map(loss, mesh=one, in_specs=jax.P(), out_specs=jax.P(), check_vma=False))
    return float(np.mean([run(model, cache, jnp.asarray(row, jnp.int32)) for row in rows]))


def main() -> None:
    """Judge and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="judge every n-th row of the held-out text")
    tokenizer = Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json"))
    rows = held_out_rows(tokenizer, TrainConfig().context)[:: parser.parse_args().every]
    perplexity = {name: float(np.exp(mean_loss(NANO_FOLDER, scheme, rows))) for name, scheme in SCHEMES.items()}
    print(json.dumps(perplexity))
    RECORD.write_text(json.dumps({"rows": len(rows), "perplexity": perplexity}, indent=2) + "\n")


if __name__ == "__main__":
    main()
