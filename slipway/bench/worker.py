"""Child process that holds one engine, Slipway or transformers, and answers loads over a pipe.

Not here: the parent's side (engine_process.py), the loads and the measurement (driver.py).
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from slipway.bench.driver import answer
from slipway.engine.request import RequestSpec

# Models of benchmarks may take most of the memory, which the default of a CPU does not allow.
MEMORY_FRACTION = 0.8
# Options of speculation.
NGRAM = {"method": "ngram", "num_speculative_tokens": 8}
MTP = {"method": "mtp", "num_speculative_tokens": 3}


class Ours:
    """Slipway's engine, called directly."""

    def __init__(
        self,
        directory: str,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        quantization: str | None = None,
        speculative_config: Mapping[str, Any] | None = None,
    ):
        # brings JAX, which a process with transformers does not need
        from slipway import LLM, SamplingParams

        self._params = SamplingParams
        self._engine = LLM(
            directory,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(512, max_num_seqs),
            quantization=quantization,
            speculative_config=speculative_config,
            memory_fraction=MEMORY_FRACTION,
        ).engine
        # request id -> the request's number in the load, and its tokens so far
        self._seen: dict[str, tuple[int, int]] = {}

    def start(self, number: int, prompt: list[int], max_tokens: int) -> None:
        """Queue a request."""
        params = self._params(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self._seen[self._engine.add(RequestSpec(prompt, params))] = number, 0

    def step(self) -> list[int]:
        """Run a step; return a request's number once for each of its new tokens."""
        new: list[int] = []
        for request in self._engine.step():
            number, seen = self._seen[request.request_id]
            new += [number] * (request.num_generated - seen)
            self._seen[request.request_id] = number, request.num_generated
        return new


class Transformers:
    """Hugging Face transformers on torch: one batch at a time, with prompts of equal length."""

    def __init__(self, directory: str, dtype: str, *_: int):
        import torch
        import transformers

        self._torch = torch
        kind = transformers.AutoModelForCausalLM
        self._model = kind.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self._waiting: list[tuple[int, list[int]]] = []
        self._running: list[int] = []
        # the newest tokens and the key-value cache
        self._state: Any = None

    def start(self, number: int, prompt: list[int], max_tokens: int) -> None:
        """Put a prompt into the next batch."""
        del max_tokens  # the driver counts the tokens, and starts the next batch after them
        self._waiting.append((number, prompt))

    def step(self) -> list[int]:
        """Prefill a waiting batch, or decode one token for each row; return the rows' numbers."""
        torch = self._torch
        with torch.inference_mode():
            if self._waiting:
                self._running = [number for number, _ in self._waiting]
                ids = torch.tensor([prompt for _, prompt in self._waiting])
                out = self._model(ids, use_cache=True, logits_to_keep=1)
                self._waiting = []
            else:
                token, cache = self._state
                out = self._model(token, past_key_values=cache, use_cache=True)
            self._state = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        return self._running


ENGINES: dict[str, Any] = {
    "ours": Ours,
    "ours int8": partial(Ours, quantization="int8"),
    "ours int4": partial(Ours, quantization="int4"),
    "ours ngram": partial(Ours, speculative_config=NGRAM),
    "ours mtp": partial(Ours, speculative_config=MTP),
    "transformers": Transformers,
}

if __name__ == "__main__":
    name, directory, dtype, *sizes = sys.argv[1:]
    answer(ENGINES[name](directory, dtype, *map(int, sizes)))
