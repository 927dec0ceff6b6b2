"""Generation with SGLang from a converted directory.

Usage: python examples/serve_with_sglang.py DIRECTORY "def main("
"""

import sys

import sglang

if __name__ == "__main__":  # SGLang starts processes that import this file again
    directory, prompt = sys.argv[1], sys.argv[2]
    engine = sglang.Engine(model_path=directory)
    print(prompt + engine.generate(prompt, {"max_new_tokens": 64, "temperature": 0.0})["text"])
    engine.shutdown()
