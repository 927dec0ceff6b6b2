"""Training of nano's prediction layer: `python -m training.mtp --minutes 40`.

The layer drafts tokens for speculative decoding (slipway/models/mtp.py). It learns nano's own
distributions on nano's training text, with nano frozen. As in use, it drafts in a chain: from its
second draft on it reads its own hidden state (Li et al., EAGLE-3, 2025, section 3.1, call that
training-time test).

Not here: the text (data.py), nano itself (train.py).
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from training.data import Batches, Tokens, read_corpus, tokenize
from training.export import KEPT_CHECKPOINT, NANO_FOLDER, model_json, read_kept_checkpoint
from training.model import (
    MLP,
    Attention,
    Linear,
    Model,
    ModelConfig,
    RMSNorm,
    rope_rotation,
    rotate,
)
from training.train import TrainConfig, learning_rate, optimizer

logger = logging.getLogger(__name__)

MTP_FOLDER = NANO_FOLDER / "mtp"
LOG = Path(__file__).parent / "mtp_log.jsonl"
# Drafts of a chain in training; the loss of each counts half as much as that before it.
CHAIN = 3
WEIGHTS = (1.0, 0.5, 0.25)


class PredictionLayer(nnx.Module):
    """Decoder layer of the next token's embedding and a hidden state; names are Qwen's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size = config.hidden_size
        self.pre_fc_norm_embedding = RMSNorm(size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(size, config.rms_norm_eps)
        self.fc = Linear(2 * size, size, stddev=config.initializer_range, rngs=rngs)
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)
        self.norm = RMSNorm(size, config.rms_norm_eps)

    def projections(
        self, embeds_BTD: Array, hidden_BTD: Array, rotation: tuple[Array, Array]
    ) -> tuple[Array, Array, Array, Array]:
        """Return the input of the attention's residual connection, queries, keys and values."""
        parts = self.pre_fc_norm_embedding(embeds_BTD), self.pre_fc_norm_hidden(hidden_BTD)
        x_BTD = self.fc(jnp.concatenate(parts, axis=-1))
        y_BTD, attn = self.input_layernorm(x_BTD), self.self_attn

        def heads(projection: Linear, count: int) -> Array:
            return projection(y_BTD).reshape((*y_BTD.shape[:2], count, attn.head_dim))

        q_BTNH = rotate(attn.q_norm(heads(attn.q_proj, attn.heads)), rotation)
        k_BTKH = rotate(attn.k_norm(heads(attn.k_proj, attn.kv_heads)), rotation)
        return x_BTD, q_BTNH, k_BTKH, heads(attn.v_proj, attn.kv_heads)

    def after_attention(self, x_BTD: Array, o_BTNH: Array) -> Array:
        """Return the layer's normed hidden states."""
        x_BTD = x_BTD + self.self_attn.o_proj(o_BTNH.reshape((*x_BTD.shape[:2], -1)))
        return self.norm(x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)))


def chain(layer: PredictionLayer, model: Model, tokens_BT: Array, hidden_BTD: Array) -> list[Array]:
    """Return the hidden states [B, T, D] of each draft of a chain that starts at each position.

    ``tokens_BT``: T + 1 tokens. Draft j at position t reads token t + j + 1, and stands for the
    token after it. It attends to the positions up to t, where hidden states are nano's, and to the
    drafts of its own chain. Rows near the end of T lack tokens: their results are padding.
    """
    config, length = model.config, hidden_BTD.shape[1]
    cos, sin = rope_rotation(length + CHAIN, config)
    embeds_BTD = model.embed_tokens(tokens_BT[:, 1:])
    states, drafted_k, drafted_v, found = hidden_BTD, [], [], []
    first: tuple[Array, Array] | None = None
    for index in range(CHAIN):
        rotation = cos[index : index + length], sin[index : index + length]
        embeds = jnp.pad(embeds_BTD[:, index:], ((0, 0), (0, index), (0, 0)))
        x_BTD, q_BTNH, k_BTKH, v_BTKH = layer.projections(embeds, states, rotation)
        if first is None:
            first = k_BTKH, v_BTKH
        else:
            drafted_k.append(k_BTKH)
            drafted_v.append(v_BTKH)
        o_BTNH = _attend(q_BTNH, first, drafted=(drafted_k, drafted_v))
        states = layer.after_attention(x_BTD, o_BTNH)
        found.append(states)
    return found


def _attend(
    q_BTNH: Array, first: tuple[Array, Array], *, drafted: tuple[list[Array], list[Array]]
) -> Array:
    """Attend to positions up to one's own, and to the drafts of the chain that starts there."""
    k_BTKH, v_BTKH = first
    drafted_k, drafted_v = drafted
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape((batch, length, kv_heads, heads // kv_heads, head_dim))
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BTKH)
    visible = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(visible, scores, -jnp.inf)
    own = [jnp.einsum("btkgh,btkh->bkgt", q_BTKGH, k)[..., None] for k in drafted_k]
    weights = jax.nn.softmax(jnp.concatenate([scores, *own], axis=-1) * head_dim**-0.5, axis=-1)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights[..., :length], v_BTKH)
    for index, v in enumerate(drafted_v):
        share = weights[..., length + index].transpose((0, 3, 1, 2))
        o_BTKGH = o_BTKGH + share[..., None] * v[:, :, :, None]
    return o_BTKGH.reshape(q_BTNH.shape)


@dataclass(frozen=True)
class Result:
    """Loss in nats, and how often each draft of a chain is nano's likeliest token."""

    loss: float
    agreement: tuple[float, ...]


class MtpTrainer:
    """Compiled functions for one frozen model."""

    def __init__(self, model_config: ModelConfig, config: TrainConfig, params: nnx.State):
        self.config = config
        model = Model(model_config, nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
        self._model = nnx.split(model)
        layer = PredictionLayer(model_config, nnx.Rngs(config.seed))
        self._structure, self.params = nnx.split(layer, nnx.Param)
        # The optimizer tells matrices of layers by their path.
        self.optimizer = optimizer(config)
        self.state = self.optimizer.init({"layers": self.params})
        self._step = jax.jit(self._update, donate_argnums=(0, 1))
        self._losses = jax.jit(self._mean_loss)

    def step(self, rows: np.ndarray, fraction: float) -> float:
        """Advance by one batch of rows [B, context + 1]; return its loss."""
        rate = np.float32(learning_rate(fraction, self.config))
        held = self.params, self.state
        self.params, self.state, loss = self._step(*held, rows, rate)
        return float(loss)

    def evaluate(self, rows: np.ndarray) -> Result:
        """Return the mean over rows, without the last, partial batch."""
        size = self.config.rows_per_batch
        batches = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        each = [self._losses(self.params, batch.astype(np.int32)) for batch in batches]
        losses, agreements = zip(*each)
        mean = np.mean(np.array(agreements), axis=0)
        return Result(float(np.mean(losses)), tuple(map(float, mean)))

    def _update(
        self, params: nnx.State, state: optax.OptState, rows: Array, rate: Array
    ) -> tuple[nnx.State, optax.OptState, Array]:
        (loss, _), gradients = jax.value_and_grad(self._mean_loss, has_aux=True)(params, rows)
        wrapped = {"layers": params}
        updates, state = self.optimizer.update({"layers": gradients}, state, wrapped)
        scaled = jax.tree.map(lambda u: rate * u, updates)
        return optax.apply_updates(wrapped, scaled)["layers"], state, loss

    def _mean_loss(self, params: nnx.State, rows: Array) -> tuple[Array, Array]:
        """Return the weighted cross entropy to nano's distributions, and the agreements."""
        model, layer = nnx.merge(*self._model), nnx.merge(self._structure, params)
        hidden_BTD = jax.lax.stop_gradient(model.hidden(rows[:, :-1]))
        states = chain(layer, model, rows, hidden_BTD)
        length = hidden_BTD.shape[1]

        def of_row(total: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
            hidden_TD, *drafts = row
            targets_TV = model.embed_tokens.logits(hidden_TD)
            losses, right = jnp.zeros(()), []
            for index, (state_TD, weight) in enumerate(zip(drafts, WEIGHTS)):
                count = length - 1 - index
                logits = model.embed_tokens.logits(state_TD[:count])
                wanted = jax.lax.stop_gradient(targets_TV[index + 1 :])
                mean = optax.softmax_cross_entropy(logits, jax.nn.softmax(wanted)).mean()
                losses += weight * mean
                right.append((logits.argmax(-1) == wanted.argmax(-1)).mean())
            return total + losses, jnp.stack(right)

        total, right = jax.lax.scan(jax.checkpoint(of_row), jnp.zeros(()), (hidden_BTD, *states))
        return total / len(rows), right.mean(axis=0)


def export(params: nnx.State, folder: Path, model_config: ModelConfig) -> None:
    """Write the layer as a directory: config.json and model.safetensors, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    own = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    tensors = {}
    for path, param in nnx.to_flat_state(params):
        *names, kind = map(str, path)
        value = np.asarray(param[...], np.float32)
        prefix = "mtp" if names[0] in own else "mtp.layers.0"
        name = ".".join([prefix, *names, "weight"])
        tensors[name] = np.ascontiguousarray(value.T if kind == "kernel" else value)
    save_file({name: _bf16(value) for name, value in tensors.items()}, folder / "model.safetensors")
    config = model_json(model_config) | {"num_nextn_predict_layers": 1, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _bf16(value: np.ndarray) -> np.ndarray:
    import ml_dtypes  # with jax

    return value.astype(ml_dtypes.bfloat16)


def read_tokens() -> Tokens:
    """Return the corpus in nano's tokens."""
    return tokenize(read_corpus(), Tokenizer.from_file(str(NANO_FOLDER / "tokenizer.json")))


def main() -> None:
    """Train for a number of minutes, log, and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--folder", type=Path, default=MTP_FOLDER)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    model_config, config = ModelConfig(), TrainConfig(seconds=arguments.minutes * 60)
    trainer = MtpTrainer(model_config, config, read_kept_checkpoint(KEPT_CHECKPOINT, model_config))
    tokens = read_tokens()
    rows, context = config.rows_per_batch, config.context
    batches = Batches(tokens, config.seed, context=context, rows_per_batch=rows)
    held_out = tokens.held_out_rows(context)
    started, step = time.monotonic(), 0
    LOG.unlink(missing_ok=True)
    while (seconds := time.monotonic() - started) < config.seconds:
        loss = trainer.step(batches[step], seconds / config.seconds)
        step += 1
        if step % 200 == 0:
            result = trainer.evaluate(held_out[:32])
            _log(step, seconds, step * rows * context, loss=loss, result=result)
            export(trainer.params, arguments.folder, model_config)
    result = trainer.evaluate(held_out)
    _log(step, seconds, step * rows * context, loss=loss, result=result)
    export(trainer.params, arguments.folder, model_config)


def _log(step: int, seconds: float, num_tokens: int, *, loss: float, result: Result) -> None:
    line = {
        "step": step,
        "seconds": round(seconds, 1),
        "tokens": num_tokens,
        "train_loss": round(loss, 4),
        "held_out_loss": round(result.loss, 4),
        "agreement": [round(share, 4) for share in result.agreement],
    }
    logger.info("%s", line)
    with LOG.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
