"""Serve a converted directory with vLLM: `python examples/serve_with_vllm.py DIRECTORY "def main("`."""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file again
    directory, prompt = sys.argv[1], sys.argv[2]
    llm = LLM(model=directory, load_format="safetensors", max_model_len=512)
    print(
        prompt
        + llm.generate(prompt, SamplingParams(max_tokens=64, temperature=0.0))[0].outputs[0].text
    )
