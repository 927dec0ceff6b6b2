"""Generation with vLLM from a converted directory.

Usage: python examples/serve_with_vllm.py DIRECTORY "def main("
"""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file again
    directory, prompt = sys.argv[1], sys.argv[2]
    llm = LLM(model=directory, load_format="safetensors", max_model_len=512)
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=64, temperature=0.0))
    print(prompt + output.outputs[0].text)
