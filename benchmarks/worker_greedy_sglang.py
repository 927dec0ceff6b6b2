"""Greedy tokens of prompts and their log-probabilities, by SGLang in its own environment.

Arguments are those of worker_greedy_vllm.py. Slipway is not installed here. SGLang's engine,
scheduler, loader and model class run as they are, on a CPU, with torch's own operations. Two
packages that they import have no build for this torch, and are replaced here by names: torchvision,
which serves pictures, and vLLM's kernel for rotary embeddings, instead of which ``forward_native``
runs.
"""

import importlib
import json
import sys
import types
from unittest.mock import MagicMock

from transformers.utils import is_torchvision_available

# transformers remembers the first answer, and does not use the replacements that follow
assert not is_torchvision_available()
FUNCTIONS = (".transforms.functional", ".transforms.v2.functional")
for name in ("", ".io", ".transforms", ".transforms.v2", *FUNCTIONS):
    sys.modules[f"torchvision{name}"] = MagicMock()
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm._custom_ops"] = types.ModuleType("vllm._custom_ops")
# a call of it fails
sys.modules["vllm._custom_ops"].__dict__["rotary_embedding"] = None
# SGLang's Transformers backend looks for an accelerator, and does not accept a CPU
importlib.import_module("sglang.srt.utils").__dict__["get_device"] = lambda *_: "cpu"

# SGLang starts processes that import this file again
if __name__ == "__main__":
    from sglang import Engine  # after the replacements above

    directory, request_file, out = sys.argv[1:]
    with open(request_file) as file:
        request = json.load(file)
    engine = Engine(
        model_path=directory,
        load_format="safetensors",
        dtype="float32",
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        max_running_requests=8,
        max_total_tokens=2048,
        mem_fraction_static=0.1,
        log_level="warning",
    )
    params = {"temperature": 0.0, "max_new_tokens": request["max_tokens"], "ignore_eos": True}
    outputs = engine.generate(
        input_ids=request["prompts"], sampling_params=params, return_logprob=True
    )
    answers = []
    for output in outputs:
        logprobs = [logprob for logprob, *_ in output["meta_info"]["output_token_logprobs"]]
        answers.append({"token_ids": output["output_ids"], "logprobs": logprobs})
    with open(out, "w") as file:
        json.dump(answers, file)
    engine.shutdown()
