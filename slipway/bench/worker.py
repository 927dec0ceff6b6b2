"""A process that holds one engine under bench/load.py's loads: ours, or transformers.

Decides how each is called at its best; measures nothing itself.
"""

import sys
from functools import partial
from typing import Any

from slipway.bench.driver import answer
from slipway.engine.request import RequestSpec


class Ours:
    """Our engine, offline."""

    def __init__(
        self,
        directory: str,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        quantization: str | None = None,
    ):
        from slipway import LLM, SamplingParams  # with JAX, which the other worker does without

        self._params = SamplingParams
        self._engine = LLM(
            directory, dtype=dtype, skip_tokenizer_init=True, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max(512, max_num_seqs), quantization=quantization,
        ).engine  # fmt: skip
        self._held: dict[str, tuple[int, int]] = {}  # each request's number and how many tokens it had

    def start(self, number: int, prompt: list[int], max_tokens: int) -> None:
        """Queue a request."""
        request_id = self._engine.add(
            RequestSpec(prompt, self._params(temperature=0, max_tokens=max_tokens, ignore_eos=True))
        )
        self._held[request_id] = number, 0

    def step(self) -> list[int]:
        """A request's number for each of its new tokens, of which a call may bring several."""
        new: list[int] = []
        for request in self._engine.step():
            number, held = self._held[request.request_id]
            new += [number] * (request.num_generated - held)
            self._held[request.request_id] = number, request.num_generated
        return new


class Transformers:
    """Hugging Face transformers on torch: one batch at a time, all of its prompts equally long."""

    def __init__(self, directory: str, dtype: str, *_: int):
        import torch
        import transformers

        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        self._waiting: list[tuple[int, list[int]]] = []
        self._running: list[int] = []
        self._state: Any = None

    def start(self, number: int, prompt: list[int], max_tokens: int) -> None:
        """Put a prompt into the next batch."""
        del max_tokens  # who asks stops by himself
        self._waiting.append((number, prompt))

    def step(self) -> list[int]:
        """Prefill of the batch, then a token for each of its rows."""
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
    "transformers": Transformers,
}

if __name__ == "__main__":
    name, directory, dtype, *sizes = sys.argv[1:]
    answer(ENGINES[name](directory, dtype, *map(int, sizes)))
