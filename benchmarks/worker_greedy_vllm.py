"""Greedy tokens of prompts and their log-probabilities, by vLLM in its own environment.

Arguments: the model directory, a JSON file {"prompts": [[id]], "max_tokens": n}, and the JSON file
to write. Slipway is not installed here.
"""

import json
import sys

from vllm import LLM, SamplingParams

# vLLM starts processes that import this file again
if __name__ == "__main__":
    directory, request_file, out = sys.argv[1:]
    with open(request_file) as file:
        request = json.load(file)
    llm = LLM(
        model=directory,
        load_format="safetensors",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    params = SamplingParams(
        max_tokens=request["max_tokens"],
        temperature=0.0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], params)
    answers = []
    for output in outputs:
        sample = output.outputs[0]
        entries = zip(sample.token_ids, sample.logprobs)
        logprobs = [entry[token].logprob for token, entry in entries]
        answers.append({"token_ids": list(sample.token_ids), "logprobs": logprobs})
    with open(out, "w") as file:
        json.dump(answers, file)
