"""Comparison of a converted directory's logits with those of the original model, given as files.

Only this check can find a wrong conversion rule: the inverse of a wrong rule agrees with the result
of the rule. Not here: Slipway's engine compared with transformers, which both read the converted
directory (parity.py).
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slipway.engine.params import MAX_LOGPROBS, SamplingParams
from slipway.errors import CheckpointError, InvalidConfig
from slipway.llm import LLM


@dataclasses.dataclass(frozen=True)
class Expected:
    """Token ids [rows, tokens] and the original's logits [rows, tokens, vocabulary] for them."""

    ids: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Result of a comparison.

    ``quantity``: logits, or log-probabilities of the likeliest tokens.
    """

    program: str
    quantity: str
    positions: int
    max_difference: float
    tolerance: float
    """Largest allowed difference: the option's tolerance times the largest logit, or times 1."""
    same_argmax: float
    """Share of positions at which both have the same likeliest token."""


def read(ids_file: Path, logits_file: Path) -> Expected:
    """Read two .npy files.

    Raises InvalidConfig if they are not ids and logits of the same shape.
    """
    ids, logits = _array(ids_file), _array(logits_file)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        got = f"{ids_file}: {ids.dtype}{list(ids.shape)}"
        raise InvalidConfig("expect", got, "integers (B, T) or (T,)")
    # NumPy writes bfloat16 as two bytes without a type.
    if logits.dtype.kind == "V" and logits.itemsize == 2:
        logits = logits.view(ml_dtypes.bfloat16)
    shown = f"{logits_file}: {logits.dtype}{list(logits.shape)}"
    if logits.dtype.kind not in "fV" or logits.ndim not in (2, 3):
        raise InvalidConfig("expect", shown, "floats (B, T, V), or (T, V) for ids (T,)")
    ids, logits = np.atleast_2d(ids).astype(np.int64), logits.astype(np.float32)
    logits = logits[None] if logits.ndim == 2 else logits
    if logits.shape[:2] != ids.shape:
        raise InvalidConfig("expect", shown, f"logits for ids of shape {list(ids.shape)}")
    if not np.isfinite(logits).all():
        raise InvalidConfig("expect", shown, "finite numbers")
    if ids.min() < 0 or ids.max() >= logits.shape[2]:
        expected = f"ids from 0 to {logits.shape[2] - 1}"
        raise InvalidConfig("expect", f"{ids_file}: ids up to {ids.max()}", expected)
    return Expected(ids, logits)


def compare(directory: Path, expected: Expected, tolerance: float) -> Agreement:
    """Run the directory in float32 and compare.

    It runs in transformers where that is installed, else in Slipway's engine. Raises
    CheckpointError where a difference exceeds ``tolerance`` times the largest expected logit (at
    least 1).
    """
    config = json.loads((directory / "config.json").read_text())
    if (size := config.get("vocab_size")) is not None and size != expected.logits.shape[2]:
        got = f"logits of {expected.logits.shape[2]} tokens"
        raise InvalidConfig("expect", got, f"{size}, the vocabulary's size")
    if all(importlib.util.find_spec(package) is not None for package in ("transformers", "torch")):
        found = _by_transformers(directory, config, expected, tolerance=tolerance)
    else:
        found = _by_engine(directory, expected, tolerance)
    if not found.max_difference <= found.tolerance:
        raise CheckpointError(
            directory,
            [
                f"{found.quantity} in {found.program} differ from the original's by "
                f"{found.max_difference:.2g}, more than {found.tolerance:.2g} "
                "(--expect-tolerance); the likeliest token is the same at "
                f"{found.same_argmax:.1%} of {found.positions} positions"
            ],
        )
    return found


def _by_transformers(
    directory: Path,
    config: dict[str, Any],
    expected: Expected,
    tolerance: float,
) -> Agreement:
    import torch  # optional, like transformers
    import transformers

    names = config.get("architectures") or ["AutoModelForCausalLM"]
    model_class: Any = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
    try:
        model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits = model(torch.from_numpy(expected.ids)).logits.float().numpy()
    except (AttributeError, IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
        problem = f"transformers cannot compute logits of {names[0]} from token ids"
        raise CheckpointError(directory, [f"{problem}: {type(error).__name__}: {error}"]) from error
    if logits.shape != expected.logits.shape:
        got, wanted = list(logits.shape), list(expected.logits.shape)
        problem = f"logits in transformers: got shape {got}, expected {wanted}"
        raise CheckpointError(directory, [problem])
    same = float((logits.argmax(-1) == expected.logits.argmax(-1)).mean())
    worst = float(np.abs(logits - expected.logits).max())
    limit = tolerance * max(1.0, float(np.abs(expected.logits).max()))
    return Agreement(
        program="transformers",
        quantity="logits",
        positions=expected.ids.size,
        max_difference=worst,
        tolerance=limit,
        same_argmax=same,
    )


def _by_engine(directory: Path, expected: Expected, tolerance: float) -> Agreement:
    """Compare log-probabilities of the likeliest tokens of each position.

    Raises UnsupportedModel.
    """
    rows, length = expected.ids.shape
    llm = LLM(
        directory,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=length + 1,
        max_num_seqs=rows,
        max_num_batched_tokens=max(rows * length, rows),
    )
    count = min(MAX_LOGPROBS, expected.logits.shape[2])
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=count,
        prompt_logprobs=count,
        ignore_eos=True,
    )
    wanted = expected.logits - np.logaddexp.reduce(expected.logits, -1, keepdims=True)
    differences, same = [], []
    for output, row in zip(llm.generate(expected.ids.tolist(), params, use_tqdm=False), wanted):
        sample = output.outputs[0].logprobs
        assert output.prompt_logprobs is not None and sample is not None
        for entries, theirs in zip([*output.prompt_logprobs[1:], sample[0]], row, strict=True):
            assert entries is not None
            differences += [abs(e.logprob - float(theirs[token])) for token, e in entries.items()]
            likeliest = max(entries, key=lambda token: entries[token].logprob)
            same.append(likeliest == int(theirs.argmax()))
    limit = tolerance * max(1.0, float(np.abs(expected.logits).max()))
    quantity = f"log-probabilities of the {count} likeliest tokens"
    return Agreement(
        program="slipway",
        quantity=quantity,
        positions=len(same),
        max_difference=float(np.max(differences)),
        tolerance=limit,
        same_argmax=float(np.mean(same)),
    )


def _array(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidConfig("expect", str(file), f"a readable .npy file ({error})") from error
