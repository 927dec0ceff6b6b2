"""Comparison of a converted directory's logits with those of the original model, given as files.

The one check that sees a wrong conversion rule: the inverse of a wrong rule agrees with what the rule wrote.
Not here: our engine beside transformers, which both read the converted directory (parity.py).
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
    """What was compared, and how far it is apart. ``quantity``: logits, or log-probabilities of the likeliest."""

    program: str
    quantity: str
    positions: int
    max_difference: float
    tolerance: float
    """Largest difference that passes: the tolerance that was asked for, times the largest logit if that is above 1."""
    same_argmax: float
    """Share of positions at which both hold the same token for the likeliest."""


def read(ids_file: Path, logits_file: Path) -> Expected:
    """Read two .npy files. Raises InvalidConfig where they are no ids and logits that belong together."""
    ids, logits = _array(ids_file), _array(logits_file)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise InvalidConfig("expect", f"{ids_file}: {ids.dtype}{list(ids.shape)}", "integers (B, T) or (T,)")
    if logits.dtype.kind == "V" and logits.itemsize == 2:  # NumPy writes bfloat16 as two nameless bytes
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
        raise InvalidConfig("expect", f"{ids_file}: ids up to {ids.max()}", f"ids from 0 to {logits.shape[2] - 1}")
    return Expected(ids, logits)


def compare(directory: Path, expected: Expected, tolerance: float) -> Agreement:
    """Run the directory in float32, in transformers where it is installed, else in our engine, and compare.

    Raises CheckpointError where a difference exceeds ``tolerance`` times the largest expected logit (at least 1).
    """
    config = json.loads((directory / "config.json").read_text())
    if (size := config.get("vocab_size")) is not None and size != expected.logits.shape[2]:
        raise InvalidConfig("expect", f"logits of {expected.logits.shape[2]} tokens", f"{size}, the vocabulary's size")
    if importlib.util.find_spec("transformers") is not None and importlib.util.find_spec("torch") is not None:
        found = _by_transformers(directory, config, expected, tolerance)
    else:
        found = _by_engine(directory, expected, tolerance)
    if not found.max_difference <= found.tolerance:
        raise CheckpointError(
            directory,
            [
                f"{found.quantity} in {found.program} differ from the original's by {found.max_difference:.2g}, more "
                f"than {found.tolerance:.2g} (--expect-tolerance); the likeliest token is the same at "
                f"{found.same_argmax:.1%} of {found.positions} positions"
            ],
        )
    return found


def _by_transformers(directory: Path, config: dict[str, Any], expected: Expected, tolerance: float) -> Agreement:
    import torch  # optional, like transformers
    import transformers

    names = config.get("architectures") or ["AutoModelForCausalLM"]
    model_class: Any = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
    try:
        model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits = model(torch.from_numpy(expected.ids)).logits.float().numpy()
    except (AttributeError, IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = f"transformers cannot compute logits of {names[0]} from token ids: {type(error).__name__}: {error}"
        raise CheckpointError(directory, [reason]) from error
    if logits.shape != expected.logits.shape:
        got, wanted = list(logits.shape), list(expected.logits.shape)
        raise CheckpointError(directory, [f"logits in transformers: got shape {got}, expected {wanted}"])
    same = float((logits.argmax(-1) == expected.logits.argmax(-1)).mean())
    worst = float(np.abs(logits - expected.logits).max())
    limit = tolerance * max(1.0, float(np.abs(expected.logits).max()))
    return Agreement("transformers", "logits", expected.ids.size, worst, limit, same)


def _by_engine(directory: Path, expected: Expected, tolerance: float) -> Agreement:
    """Compare log-probabilities of the likeliest tokens of each position. Raises UnsupportedModel."""
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
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=count, prompt_logprobs=count, ignore_eos=True)
    wanted = expected.logits - np.logaddexp.reduce(expected.logits, -1, keepdims=True)
    differences, same = [], []
    for output, row in zip(llm.generate(expected.ids.tolist(), params, use_tqdm=False), wanted):
        sample = output.outputs[0].logprobs
        assert output.prompt_logprobs is not None and sample is not None
        for entries, theirs in zip([*output.prompt_logprobs[1:], sample[0]], row, strict=True):
            assert entries is not None
            differences += [abs(entry.logprob - float(theirs[token])) for token, entry in entries.items()]
            same.append(max(entries, key=lambda token: entries[token].logprob) == int(theirs.argmax()))
    limit = tolerance * max(1.0, float(np.abs(expected.logits).max()))
    quantity = f"log-probabilities of the {count} likeliest tokens"
    return Agreement("slipway", quantity, len(same), float(np.max(differences)), limit, float(np.mean(same)))


def _array(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidConfig("expect", str(file), f"a readable .npy file ({error})") from error
