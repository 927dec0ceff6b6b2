"""Run by vLLM's own Python, which has no Slipway: greedy tokens and their log-probabilities of token-id prompts.

Arguments: the model directory, a JSON file {"prompts": [[id]], "max_tokens": n}, and the JSON file to write.
"""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file again
    directory, asked, out = sys.argv[1:]
    with open(asked) as file:
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
    samples = [output.outputs[0] for output in outputs]
    answers = [
        {
            "token_ids": list(sample.token_ids),
            "logprobs": [entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs)],
        }
        for sample in samples
    ]
    with open(out, "w") as file:
        json.dump(answers, file)
