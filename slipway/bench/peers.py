"""Rivals on the same work: decides how each is called at its best; knows nothing of our engine.

torch and transformers are imported here alone, and only when asked for: they belong to the test extra.
"""

import time
from collections.abc import Mapping
from typing import Any


class Transformers:
    """Hugging Face transformers on torch, random weights, greedy, with its own cache."""

    def __init__(self, config: Mapping[str, Any], dtype: str):
        import torch
        import transformers

        self._torch = torch
        fields = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
        configuration = transformers.AutoConfig.for_model(**fields, dtype=dtype)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=getattr(torch, dtype))
        self._model = model.to_empty(device="cpu").eval()
        for parameter in self._model.parameters():
            parameter.data.uniform_(-0.03, 0.03)
        self._model.model.rotary_emb = type(model.model.rotary_emb)(configuration)  # its buffers are not parameters
        self._model.tie_weights()

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt of ``tokens`` to its first output token."""
        return self._run([[7] * tokens], 0)[0]

    def decode(self, batch: int, steps: int) -> float:
        """Seconds per step of ``batch`` sequences, after their first token."""
        return self._run([[7 + i] * 16 for i in range(batch)], steps)[1] / steps

    def _run(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        """Seconds of the prefill, and of ``steps`` decode steps after it."""
        torch = self._torch
        with torch.inference_mode():
            started = time.perf_counter()
            out = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            prefilled = time.perf_counter()
            for _ in range(steps):
                out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            return prefilled - started, time.perf_counter() - prefilled
