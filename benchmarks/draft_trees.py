"""Tokens of a step with a tree of drafts beside a chain of as many, by nano's prediction layer.

On held-out text, it counts how often nano's likeliest token is the layer's first, second, ... one.
From these rates follow the expected tokens of the best tree and of the chain with as many drafts.
No step is timed. Not here: speculation as the engine does it, in chains (slipway/engine/drafts).
"""

import dataclasses
import heapq
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from benchmarks import script
from training import mtp
from training.export import KEPT_CHECKPOINT, read_kept_checkpoint
from training.model import Model, ModelConfig

RANKS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftTreesBench:
    """Expected tokens of a step that verifies a chain or a tree of drafts."""

    layer: Path = mtp.MTP_FOLDER
    """Directory of the prediction layer."""
    rows: int = 64
    """Rows of held-out text."""
    context: int = 256
    """Tokens of a row."""

    def run(self) -> None:
        """Measure, and print a table."""
        rates = self.rates()
        for depth, found in enumerate(rates, 1):
            shown = ", ".join(f"{rate:.3f}" for rate in found)
            print(f"draft {depth} of a chain: rank 1 to {RANKS} of the layer is right in {shown}")
        first = rates[0]
        print("\n| drafts | chain | tree | gain |\n|---|---|---|---|")
        for count in range(1, 17):
            chain = 1 + sum(first[0] ** depth for depth in range(1, count + 1))
            tree = 1 + best_tree(first, count)
            print(f"| {count} | {chain:.2f} | {tree:.2f} | {tree / chain:.3f} |")

    def rates(self) -> np.ndarray:
        """Return how often each rank is right [mtp.CHAIN, RANKS], if the drafts before are."""
        config = ModelConfig()
        model = Model(config, nnx.Rngs(0))
        kept = read_kept_checkpoint(KEPT_CHECKPOINT, config)
        nnx.update(model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), kept))
        layer = mtp.PredictionLayer(config, nnx.Rngs(0))
        _fill(layer, self.layer)
        of_model, of_layer = nnx.split(model), nnx.split(layer)
        count = jax.jit(lambda rows: _right(nnx.merge(*of_model), nnx.merge(*of_layer), rows))
        rows = mtp.read_tokens().held_out_rows(self.context)[: self.rows]
        return np.mean([count(row[None].astype(np.int32)) for row in rows], axis=0)


def _right(model: Model, layer: mtp.PredictionLayer, rows: Any) -> Any:
    """Return the share of positions at which each rank is nano's likeliest token."""
    hidden_BTD = model.hidden(rows[:, :-1])
    wanted_BT = model.embed_tokens.logits(hidden_BTD).argmax(-1)
    found = []
    for index, states in enumerate(mtp.chain(layer, model, rows, hidden_BTD)):
        count = hidden_BTD.shape[1] - 1 - index
        ranked = jax.lax.top_k(model.embed_tokens.logits(states[:, :count]), RANKS)[1]
        found.append((ranked == wanted_BT[:, index + 1 :, None]).mean((0, 1)))
    return jnp.stack(found)


def _fill(layer: mtp.PredictionLayer, folder: Path) -> None:
    """Give a layer the values of a directory: the inverse of mtp.export."""
    held = load_file(folder / "model.safetensors")
    for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        *names, kind = map(str, path)
        name = ".".join([*names, "weight"])
        name = f"mtp.{name}" if f"mtp.{name}" in held else f"mtp.layers.0.{name}"
        value = held[name].astype(np.float32)
        param[...] = jnp.asarray(value.T if kind == "kernel" else value)


def best_tree(rates: Any, count: int) -> float:
    """Return the sum of the chances of the ``count`` likeliest nodes of a tree of drafts.

    ``rates``: the chance of each child of a node that is right. A node's chance is the product of
    those on its path, so the likeliest nodes are a tree.
    """
    heap, total = [(-float(rate), float(rate)) for rate in rates], 0.0
    heapq.heapify(heap)
    for _ in range(count):
        _, chance = heapq.heappop(heap)
        total += chance
        for rate in rates:
            heapq.heappush(heap, (-chance * float(rate), chance * float(rate)))
    return total


if __name__ == "__main__":
    script.run("draft_trees", DraftTreesBench)
