"""Training of nano: `python -m training.train --minutes 115`.

Run it again to continue from the last checkpoint. This module sets loss, optimizer and learning
rate, and when to evaluate, save and end.

Not here: the text (data.py), the model (model.py), the use of the weights (export.py).
"""

import argparse
import json
import logging
import platform
import signal
import threading
import time
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array

from training.data import Batches, Tokens, chat_samples, read_corpus, tokenize
from training.model import Model, ModelConfig
from training.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

RUN_FOLDER = Path(__file__).parent / "run"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    It ends after `seconds` of wall-clock time or after `steps`, whichever is first. The learning
    rate follows that progress, so a run on a busy machine takes fewer steps but still decays to
    zero. `seconds` and `steps` may change when a run is resumed; the other fields may not.
    """

    seconds: float = 115 * 60
    steps: int = 20_000
    context: int = 512
    rows_per_batch: int = 4
    peak_learning_rate: float = 5e-3
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.5
    weight_decay: float = 0.05
    seed: int = 0
    log_every_steps: int = 20
    evaluate_every_s: float = 600
    evaluation_rows: int = 32
    save_every_s: float = 300


@dataclass
class Progress:
    """State of a run: the content of a checkpoint."""

    params: nnx.State
    optimizer_state: optax.OptState
    step: int = 0
    seconds: float = 0.0

    def fraction(self, config: TrainConfig) -> float:
        """Return the share of the run's budget that is spent."""
        return max(self.step / config.steps, self.seconds / config.seconds)


class Trainer:
    """Compiled functions of one model and configuration, without training state."""

    def __init__(self, model_config: ModelConfig, config: TrainConfig):
        self.config = config
        self.optimizer = optimizer(config)
        model = Model(model_config, nnx.Rngs(config.seed))
        self._structure, self._initial_params = nnx.split(model, nnx.Param)
        self._step = jax.jit(self._update, donate_argnums=(0, 1))
        self._loss = jax.jit(self._mean_loss)

    def start(self) -> Progress:
        """Return the state at the beginning of a run."""
        params = jax.tree.map(jnp.copy, self._initial_params)
        return Progress(params, self.optimizer.init(params))

    def step(self, progress: Progress, rows: np.ndarray) -> float:
        """Advance `progress` by one batch; return its loss in nats per token.

        The call waits for the device, so that time measured outside is correct.
        """
        rate = np.float32(learning_rate(progress.fraction(self.config), self.config))
        state = progress.params, progress.optimizer_state
        progress.params, progress.optimizer_state, loss = self._step(*state, rows, rate)
        progress.step += 1
        return float(loss)

    def evaluate(self, params: nnx.State, rows: np.ndarray) -> float:
        """Return the mean loss over rows in nats per token, without the last, partial batch."""
        size = self.config.rows_per_batch
        batches = [
            rows[i : i + size].astype(np.int32) for i in range(0, len(rows) - size + 1, size)
        ]
        return float(np.mean([self._loss(params, batch) for batch in batches]))

    def _update(
        self, params: nnx.State, optimizer_state: optax.OptState, rows: Array, rate: Array
    ) -> tuple[nnx.State, optax.OptState, Array]:
        loss, gradients = jax.value_and_grad(self._mean_loss)(params, rows)
        updates, optimizer_state = self.optimizer.update(gradients, optimizer_state, params)
        scaled = jax.tree.map(lambda u: rate * u, updates)
        return optax.apply_updates(params, scaled), optimizer_state, loss

    def _mean_loss(self, params: nnx.State, rows: Array) -> Array:
        model = nnx.merge(self._structure, params)
        return mean_cross_entropy(model, rows[:, :-1], rows[:, 1:])


def train(folder: Path, trainer: Trainer, tokens: Tokens) -> Progress:
    """Start or resume a run until its budget is spent or SIGTERM arrives; save at the end."""
    config = trainer.config
    batches = Batches(
        tokens, config.seed, context=config.context, rows_per_batch=config.rows_per_batch
    )
    held_out = tokens.held_out_rows(config.context)
    sample = held_out[:: max(1, len(held_out) // config.evaluation_rows)][: config.evaluation_rows]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with Checkpoints(folder / "checkpoints") as checkpoints:
        progress = checkpoints.restore(trainer.start())
        earlier_s, started = progress.seconds, time.monotonic()
        evaluated_s = saved_s = progress.seconds
        logger.info("from step %d with %s", progress.step, config)
        while progress.fraction(config) < 1 and not stop.is_set():
            loss = trainer.step(progress, batches[progress.step])
            if progress.step % config.log_every_steps == 0:
                _log(folder, progress, config, train_loss=loss)
            progress.seconds = earlier_s + time.monotonic() - started
            if progress.seconds - evaluated_s > config.evaluate_every_s:
                evaluated_s = progress.seconds
                _log_held_out(folder, progress, trainer, rows=sample, tokens=tokens)
            if progress.seconds - saved_s > config.save_every_s:
                saved_s = progress.seconds
                checkpoints.save(progress)
        checkpoints.save(progress)
    if not stop.is_set():
        _log_held_out(folder, progress, trainer, rows=held_out, tokens=tokens)
    return progress


def learning_rate(fraction: float, config: TrainConfig) -> float:
    """Return the learning rate of a trapezoid: linear up, flat, linear down to 0 at fraction 1."""
    up = (fraction + 1e-3) / config.warmup_fraction
    down = (1 - fraction) / config.decay_fraction
    return config.peak_learning_rate * max(0.0, min(1.0, up, down))


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return Muon for the layers' matrices and Adam for the embedding and the norms.

    Its learning rate is 1; Trainer scales the update. consistent_rms=0.2 gives Muon's updates the
    size of Adam's, so that one learning rate fits both (Liu et al., 2025, arXiv:2502.16982).
    """
    return optax.contrib.muon(
        learning_rate=1.0,
        weight_decay=config.weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices_of_layers,
    )


def mean_cross_entropy(model: Model, tokens_BT: Array, targets_BT: Array) -> Array:
    """Return nats per token, computed row by row of the batch.

    The logits of a whole batch are by far the largest array of a step. Computing them one row at a
    time, and again in the backward pass, is 1.25 times as fast on a CPU, because a row's logits fit
    into its cache.
    """

    def add_row(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        x_TD, targets_T = row
        losses_T = optax.softmax_cross_entropy_with_integer_labels(
            model.embed_tokens.logits(x_TD), targets_T
        )
        return total + losses_T.sum(), None

    total, _ = jax.lax.scan(
        jax.checkpoint(add_row), jnp.zeros(()), (model.hidden(tokens_BT), targets_BT)
    )
    return total / targets_BT.size


class Checkpoints:
    """Orbax checkpoints of a run's Progress; only the last two are kept."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, progress: Progress) -> None:
        """Save the state unless its step is saved already."""
        if progress.step not in self._manager.all_steps():
            self._manager.save(progress.step, args=ocp.args.StandardSave(_as_tree(progress)))
            self._manager.wait_until_finished()

    def restore(self, progress: Progress) -> Progress:
        """Return the last saved state, or `progress` itself if there is none.

        `progress` also gives the shapes of the saved arrays.
        """
        step = self._manager.latest_step()
        if step is None:
            return progress
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(progress))
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return Progress(
            tree["params"], tree["optimizer_state"], step=step, seconds=float(tree["seconds"])
        )


def prepare(folder: Path) -> Tokens:
    """Train the tokenizer and encode the corpus, or read both from an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens_path = folder / "tokens.npz"
    if not tokens_path.exists():
        corpus = read_corpus()
        texts = [document.text for document in corpus.library]
        tokenizer = train_tokenizer([*texts, *chat_samples(corpus.library)])
        tokenizer.save(str(folder / "tokenizer.json"))
        tokens = tokenize(corpus, tokenizer)
        (folder / "corpus.json").write_text(
            json.dumps(tokens.sizes() | {"python": platform.python_version()}) + "\n"
        )
        np.savez(tokens_path, **asdict(tokens))
    arrays = np.load(tokens_path)
    return Tokens(**{name: arrays[name] for name in arrays.files})


def main() -> None:
    """Prepare the text, then start or resume the run."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RUN_FOLDER)
    parser.add_argument(
        "--minutes", type=float, default=defaults.seconds / 60, help="wall clock, over all resumes"
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.steps, help="end sooner, after this many steps"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    config = TrainConfig(seconds=arguments.minutes * 60, steps=arguments.steps)
    train(arguments.folder, Trainer(ModelConfig(), config), prepare(arguments.folder))


def _matrices_of_layers(params: nnx.State) -> nnx.State:
    matrix = optax.contrib.MuonDimensionNumbers()
    return jax.tree.map_with_path(
        lambda path, x: matrix if x.ndim == 2 and "layers" in jax.tree_util.keystr(path) else None,
        params,
    )


def _as_tree(progress: Progress) -> dict:
    return {
        "params": progress.params,
        "optimizer_state": progress.optimizer_state,
        "seconds": np.float64(progress.seconds),
    }


def _log_held_out(
    folder: Path, progress: Progress, trainer: Trainer, rows: np.ndarray, tokens: Tokens
) -> None:
    loss = trainer.evaluate(progress.params, rows)
    bits_per_byte = loss / log(2) * len(tokens.held_out) / int(tokens.held_out_bytes)
    _log(
        folder,
        progress,
        trainer.config,
        held_out_loss=loss,
        bits_per_byte=bits_per_byte,
        rows=len(rows),
    )


def _log(folder: Path, progress: Progress, config: TrainConfig, **values: float) -> None:
    """Append one line to log.jsonl, from which card.py draws the model card."""
    line = {
        "step": progress.step,
        "tokens": progress.step * config.rows_per_batch * config.context,
        "seconds": round(progress.seconds, 1),
        "learning_rate": round(learning_rate(progress.fraction(config), config), 7),
    }
    with (folder / "log.jsonl").open("a") as file:
        rounded = {name: round(value, 5) for name, value in values.items()}
        file.write(json.dumps(line | rounded) + "\n")


if __name__ == "__main__":
    main()
