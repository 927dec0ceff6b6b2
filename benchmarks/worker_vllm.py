"""vLLM's offline engine under the loads of slipway/bench/driver.py, in vLLM's own environment.

Arguments: further options of vLLM as JSON, the model directory, the dtype, the longest context, the
number of requests at a time. Slipway is not installed here.
"""

import json
import os
import sys
from pathlib import Path

# vLLM's step runs in this process, so that no pipe is timed
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

# driver.py needs only the standard library
sys.path.append(str(Path(__file__).parents[1] / "slipway" / "bench"))
from driver import answer


class Engine:
    """vLLM's LLMEngine with the methods that the driver calls."""

    def __init__(self, directory, dtype, max_model_len, max_num_seqs, **options):
        llm = LLM(
            model=directory,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **options,
        )
        self._engine = llm.llm_engine
        # a request's number -> its tokens so far
        self._seen = {}

    def start(self, number, prompt, max_tokens):
        """Queue a request."""
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self._seen[number] = 0
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    def step(self):
        """Run a step; return a request's number once for each of its new tokens."""
        new = []
        for output in self._engine.step():
            number, count = int(output.request_id), len(output.outputs[0].token_ids)
            new += [number] * (count - self._seen[number])
            self._seen[number] = count
        return new


if __name__ == "__main__":
    # vLLM prints on standard output, which here carries the answers: let it print on stderr
    answers = os.dup(1)
    os.dup2(2, 1)
    options, directory, dtype, *sizes = sys.argv[1:]
    engine = Engine(directory, dtype, *map(int, sizes), **json.loads(options))
    sys.stdout = os.fdopen(answers, "w")
    answer(engine)
