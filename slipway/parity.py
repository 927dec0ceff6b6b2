"""Comparison of Slipway's engine with transformers on one HF directory.

Random prompts are completed greedily in float32; the other program then computes the same tokens.
Not here: the original model's logits (expected_logits.py).
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput
from slipway.errors import CheckpointError, UnsupportedModel
from slipway.llm import LLM

TOLERANCE = 1e-3  # of a log-probability; float32 against float32 differs by about 1e-5
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 24, 8


@dataclasses.dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    ``not_run`` lists reasons for which a program was not compared; the numbers are None if fewer
    than two were.
    """

    programs: tuple[str, ...]
    not_run: tuple[str, ...]
    tokens: int = 0
    max_logprob_difference: float | None = None
    same_choices: bool | None = None


def compare(directory: Path, vocab_size: int, seed: int = 0) -> Parity:
    """Compare the programs that can run ``directory``.

    Raises CheckpointError if they disagree by more than TOLERANCE.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size, _PROMPT_TOKENS).tolist() for _ in range(_PROMPTS)]
    try:
        outputs = _complete(directory, prompts)
    except UnsupportedModel as error:
        return Parity((), (f"slipway: {error}",))
    if any(importlib.util.find_spec(package) is None for package in ("transformers", "torch")):
        return Parity(("slipway",), ("transformers: not installed",))
    differences, same = [], True
    for output, theirs in zip(outputs, _judge(directory, outputs)):
        sample = output.outputs[0]
        assert sample.logprobs is not None
        ours = [entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs)]
        differences += [abs(a - b[token]) for a, b, token in zip(ours, theirs, sample.token_ids)]
        chosen = zip(theirs, sample.token_ids)
        same &= all(float(b.max()) - float(b[token]) <= TOLERANCE for b, token in chosen)
    worst = float(max(differences))
    if worst > TOLERANCE or not same:
        problem = f"slipway and transformers differ by {worst:.2g} in a log-probability"
        raise CheckpointError(directory, [problem])
    return Parity(
        ("slipway", "transformers"),
        (),
        tokens=len(differences),
        max_logprob_difference=worst,
        same_choices=same,
    )


def _complete(directory: Path, prompts: list[list[int]]) -> list[RequestOutput]:
    length = _PROMPT_TOKENS + _NEW_TOKENS
    llm = LLM(
        directory,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=_PROMPTS,
        max_num_batched_tokens=_PROMPTS * _PROMPT_TOKENS,
    )
    params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, logprobs=0, ignore_eos=True)
    return llm.generate(prompts, params, use_tqdm=False)


def _judge(directory: Path, outputs: list[RequestOutput]) -> list[np.ndarray]:
    """Return transformers' log-probabilities of every generated position.

    Each array is [new tokens, vocabulary].
    """
    import torch  # optional, like transformers: neither is needed to convert or to serve
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    judged = []
    with torch.inference_mode():
        for output in outputs:
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            logits = model(torch.tensor([ids])).logits[0, len(output.prompt_token_ids) - 1 : -1]
            judged.append(torch.log_softmax(logits, -1).numpy())
    return judged
