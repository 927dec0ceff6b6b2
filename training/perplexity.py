"""Perplexity of the exported nano on its held-out text: `python -m training.perplexity`.

Both the exported weights and packed ones are evaluated; the results go to quantized.json, which the
model card shows. The forward pass is the engine's: its ops, its cache, its packed weights.

Not here: training (train.py), the model card (card.py).
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from slipway import mesh, models, ops, tree
from slipway.checkpoint import files, quantize, tensor_reader
from slipway.nn import linear
from slipway.ops import kv_cache
from training.data import held_out_rows
from training.export import NANO_FOLDER
from training.train import TrainConfig

RECORD = Path(__file__).parent / "quantized.json"
SCHEMES = {"bfloat16": None, "int8": quantize.Scheme(8, 0), "int4": quantize.Scheme(4, 32)}
PAGE_SIZE = 16


def mean_loss(directory: Path, scheme: quantize.Scheme | None, rows: np.ndarray) -> float:
    """Return nats per token of rows [N, context + 1], each a text by itself, in bfloat16."""
    checkpoint = files.open_checkpoint(directory)
    declaration = tree.separate(models.declare(checkpoint.config))
    if scheme is not None:
        declaration = linear.quantize(declaration, scheme.bits, scheme.group)
        checkpoint = quantize.packed_view(checkpoint, tensor_reader.wanted(declaration))
    one = mesh.make_mesh()
    model = tensor_reader.load(declaration, checkpoint, one, dtype=jnp.bfloat16)
    context = rows.shape[1] - 1
    num_pages = -(-context // PAGE_SIZE)
    sizes = {"page_size": PAGE_SIZE, "dtype": jnp.bfloat16}
    caches = kv_cache.allocate(declaration.cache_specs, [num_pages], platform="cpu", **sizes)
    positions_T, zero_1 = jnp.arange(context, dtype=jnp.int32), jnp.zeros(1, jnp.int32)
    whole_1 = zero_1 + context
    step = ops.StepInput(
        num_tokens_1=whole_1,
        ids_T=positions_T,
        positions_T=positions_T,
        prompt_lengths_T=whole_1.repeat(context),
        row_T=zero_1.repeat(context),
        starts_B=zero_1,
        counts_B=whole_1,
        lengths_B=whole_1,
        pages=(ops.PageMap(positions_T, jnp.arange(num_pages, dtype=jnp.int32)[None]),),
        num_samples_1=zero_1,
        sample_at_B=zero_1,
    )

    def loss(model, caches, row):
        x_TD, _ = model(dataclasses.replace(step, ids_T=row[:-1]), caches)
        chosen = jax.nn.log_softmax(model.logits(x_TD, jnp.int32(context)))[positions_T, row[1:]]
        return -chosen.mean()

    run = jax.jit(
        jax.shard_map(loss, mesh=one, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    )
    return float(np.mean([run(model, caches, jnp.asarray(row, jnp.int32)) for row in rows]))


def main() -> None:
    """Evaluate the held-out text with each kind of weight, and write quantized.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--every", type=int, default=1, help="evaluate every n-th row of the held-out text"
    )
    tokenizer = Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json"))
    rows = held_out_rows(tokenizer, TrainConfig().context)[:: parser.parse_args().every]
    perplexity = {
        name: float(np.exp(mean_loss(NANO_FOLDER, scheme, rows)))
        for name, scheme in SCHEMES.items()
    }
    print(json.dumps(perplexity))
    RECORD.write_text(json.dumps({"rows": len(rows), "perplexity": perplexity}, indent=2) + "\n")


if __name__ == "__main__":
    main()
