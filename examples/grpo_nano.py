"""GRPO on nano: `python -m examples.grpo_nano [--steps 40] [--plot FILE]`.

Run it from the repository's root. A Flax NNX trainer and a Slipway engine share one process. Each
step samples groups of completions with the engine, rewards those that parse as Python, takes one
optimizer step, and gives the engine the trainer's weights. The algorithm is DeepSeekMath's
(https://arxiv.org/abs/2402.03300, section 4.1) without its KL term: advantages are rewards
normalized within the group of a prompt; the policy's ratio to the sampler is clipped.
"""

import argparse
import ast
import json
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from slipway import LLM, SamplingParams
from training.export import KEPT_CHECKPOINT, read_kept_checkpoint
from training.model import Model, ModelConfig

PROMPTS = (
    "def area(width, height):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\n\ndef read(path):\n",
    "def is_prime(n):\n",
    "def reverse(text):\n",
    "for name in names:\n",
    "def merge(left, right):\n    result = []\n",
    "with open(path) as f:\n",
)
NEW_TOKENS, CLIP = 32, 0.2


def reward(prompt: str, completion: str) -> float:
    """Return 1 if the completion's whole lines parse after the prompt and are not empty, else 0."""
    lines = completion[: completion.rfind("\n") + 1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(prompt + lines)
    except (SyntaxError, ValueError):
        return 0.0
    return float(len(lines.split()) >= 3)


def rollouts(llm: LLM, group: int, seed: int) -> tuple[dict[str, np.ndarray], float]:
    """Return samples of each prompt as padded arrays [B, T], and their mean reward."""
    params = SamplingParams(temperature=1.0, n=group, max_tokens=NEW_TOKENS, seed=seed, logprobs=0)
    longest = max(len(llm.tokenize(prompt)) for prompt in PROMPTS) + NEW_TOKENS
    rows = len(PROMPTS) * group
    batch = {
        "tokens_BT": np.zeros((rows, longest), np.int32),
        "said_BT": np.zeros((rows, longest), bool),
        "logprobs_BT": np.zeros((rows, longest), np.float32),
        "advantages_B": np.zeros(rows, np.float32),
    }
    rewards = []
    for number, output in enumerate(llm.generate(list(PROMPTS), params, use_tqdm=False)):
        assert output.prompt is not None
        of_group = np.array([reward(output.prompt, sample.text) for sample in output.outputs])
        rewards.append(of_group.mean())
        first, prompt = number * group, output.prompt_token_ids
        advantages = (of_group - of_group.mean()) / (of_group.std() + 1e-4)
        batch["advantages_B"][first : first + group] = advantages
        for row, sample in enumerate(output.outputs, first):
            assert sample.logprobs is not None
            said = slice(len(prompt), len(prompt) + len(sample.token_ids))
            batch["tokens_BT"][row, : said.stop] = prompt + sample.token_ids
            batch["said_BT"][row, said] = True
            batch["logprobs_BT"][row, said] = [
                entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs)
            ]
    return batch, float(np.mean(rewards))


@nnx.jit
def train(
    model: Model, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Take one step; return the loss and the largest change of a log probability since sampling."""

    def loss(model: Model) -> tuple[jax.Array, jax.Array]:
        tokens_BT, said_BT = batch["tokens_BT"], batch["said_BT"]
        logits_BTV = model(tokens_BT)[:, :-1]
        logprobs_BT = jnp.take_along_axis(
            jax.nn.log_softmax(logits_BTV), tokens_BT[:, 1:, None], axis=-1
        )[..., 0]
        mask_BT, old_BT = said_BT[:, 1:], batch["logprobs_BT"][:, 1:]
        ratio_BT = jnp.exp(jnp.where(mask_BT, logprobs_BT - old_BT, 0.0))
        gain_BT = ratio_BT * batch["advantages_B"][:, None]
        clipped_BT = jnp.clip(ratio_BT, 1 - CLIP, 1 + CLIP) * batch["advantages_B"][:, None]
        per_token_BT = jnp.where(mask_BT, jnp.minimum(gain_BT, clipped_BT), 0.0)
        apart = jnp.where(mask_BT, jnp.abs(logprobs_BT - old_BT), 0.0).max()
        return -(per_token_BT.sum(1) / jnp.maximum(mask_BT.sum(1), 1)).mean(), apart

    (value, apart), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return value, apart


def main() -> None:
    """Train for some steps and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--group", type=int, default=16, help="samples of each prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--plot", type=Path, help="write the rewards as a picture")
    options = parser.parse_args()
    model = Model(ModelConfig(), nnx.Rngs(0))
    kept = read_kept_checkpoint(KEPT_CHECKPOINT, ModelConfig())
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), kept))
    update = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.learning_rate))
    optimizer = nnx.Optimizer(model, update, wrt=nnx.Param)
    llm = LLM(
        "nano",
        dtype="float32",
        load_format="dummy",
        max_num_seqs=len(PROMPTS) * options.group,
        max_model_len=128,
    )
    rewards = []
    for step in range(options.steps):
        started = time.perf_counter()
        version = llm.update_weights(model, mapping="nnx")
        swapped = time.perf_counter()
        batch, mean = rollouts(llm, options.group, seed=1000 * step)
        sampled = time.perf_counter()
        value, apart = train(model, optimizer, batch)
        rewards.append(mean)
        line = {
            "step": step,
            "reward": round(mean, 3),
            "loss": round(float(value), 4),
            "logprobs_apart": float(apart),
            "weights_version": version,
            "swap_s": round(swapped - started, 3),
            "rollout_s": round(sampled - swapped, 2),
            "train_s": round(time.perf_counter() - sampled, 2),
        }
        print(json.dumps(line), flush=True)
    llm.close()
    if options.plot is not None:
        plot(rewards, options.plot)


def plot(rewards: list[float], path: Path) -> None:
    """Plot the rewards over the steps, and their mean over ten steps."""
    import matplotlib.pyplot as plt

    smooth = [np.mean(rewards[max(0, at - 9) : at + 1]) for at in range(len(rewards))]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.plot(rewards, color="#9bb", linewidth=1, label="mean of a step's samples")
    axes.plot(smooth, color="#135", linewidth=2, label="mean of the last ten steps")
    axes.set(xlabel="step", ylabel="completions that parse", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
