"""Training of a prediction layer for a tiny model, and its drafts in the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slipway import SamplingParams
from slipway.llm import LLM
from training import mtp
from training.export import write_model
from training.model import Model, ModelConfig
from training.train import TrainConfig

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=128,
    initializer_range=0.2,
)
RUN = TrainConfig(seconds=1e9, steps=20, context=16, rows_per_batch=2)


@pytest.fixture(autouse=True)
def _usual_promotion():
    """The recipe is plain Flax code: it broadcasts, unlike the engine's strict code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory with a model and, below mtp/, its layer; the trainer; and its losses."""
    folder = tmp_path_factory.mktemp("trained")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = Model(TINY, nnx.Rngs(1))
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
        write_model(folder, jax.tree.map(np.asarray, params), TINY)
        trainer = mtp.MtpTrainer(TINY, RUN, params)
        rows = np.random.default_rng(0).integers(0, 256, (2, 17)).astype(np.int32)
        losses = [trainer.step(rows, 0.1) for _ in range(20)]
        result = trainer.evaluate(rows)
        mtp.export(trainer.params, folder / "mtp", TINY)
    return folder, trainer, losses, result


def test_the_loss_falls(trained):
    _, _, losses, result = trained
    assert losses[-1] < 0.95 * losses[0]
    assert result.loss == pytest.approx(losses[-1], rel=0.2)
    assert len(result.agreement) == mtp.CHAIN


def test_the_engine_drafts_as_in_training(trained):
    """Drafts of the engine are the likeliest tokens of the states that training computes."""
    folder, trainer, _, _ = trained
    options = {"skip_tokenizer_init": True, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    options |= {"memory_fraction": 0.1, "decode_steps": 2, "dtype": "float32"}
    config = {"method": "mtp", "model": str(folder / "mtp"), "num_speculative_tokens": 3}
    prompts = [[5, 200, 31, 7], list(range(20))]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = []
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        LLM(folder, speculative_config=config, **options) as llm,
    ):
        speculation = llm.engine._speculation
        put = speculation.on_device.put

        def recorded(sequence, drafts):
            found.append((sequence.tokens[: sequence.num_tokens].tolist(), drafts))
            put(sequence, drafts)

        speculation.on_device.put = recorded
        speculation.lengths.choose = lambda rates, most: most
        llm.generate(prompts, params, use_tqdm=False)
    assert len(found) > 5
    model = nnx.merge(*trainer._model)
    layer = nnx.merge(trainer._structure, trainer.params)
    for tokens, drafts in found:
        ids = jnp.array([[*tokens, *drafts]])
        hidden = model.hidden(ids[:, : len(tokens)])
        padded = jnp.pad(hidden, ((0, 0), (0, len(drafts)), (0, 0)))[:, : ids.shape[1] - 1]
        states = mtp.chain(layer, model, ids, padded)
        for state, draft in zip(states, drafts):
            logits = model.embed_tokens.logits(state[0, len(tokens) - 2])
            assert logits.max() - logits[draft] < 0.05 * jnp.abs(logits).max()
