"""Run by vLLM's own Python, which has no Slipway: its offline engine under bench/load.py's loads."""

import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its step runs here, so that no pipe is timed

from vllm import LLM, SamplingParams

# driver.py needs nothing of Slipway
sys.path.append(str(Path(__file__).parents[1] / "slipway" / "bench"))
from driver import answer

if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what it prints is no answer

    class Engine:
        """vLLM's LLMEngine, a token at a time."""

        def __init__(self, directory, dtype, max_model_len, max_num_seqs):
            llm = LLM(
                model=directory, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
                skip_tokenizer_init=True, disable_log_stats=True,
            )  # fmt: skip
            self._engine = llm.llm_engine
            self._held = {}

        def start(self, number, prompt, max_tokens):
            """Queue a request."""
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
            self._held[number] = 0
            self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

        def step(self):
            """A request's number for each of its new tokens."""
            new = []
            for output in self._engine.step():
                number, count = int(output.request_id), len(output.outputs[0].token_ids)
                new += [number] * (count - self._held[number])
                self._held[number] = count
            return new

    engine = Engine(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout = os.fdopen(answers, "w")
    answer(engine)
