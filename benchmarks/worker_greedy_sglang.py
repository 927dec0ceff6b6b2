"""Run by SGLang's own Python, which has no Slipway: greedy tokens and their log-probabilities of token-id prompts.

Arguments as of vllm_greedy.py. SGLang's engine, scheduler, loader and model class run as they are, on a CPU, with
torch's own operations. Two packages that they import have no build for this torch and are replaced here by names:
torchvision, which serves pictures, and vLLM's kernel for rotary embeddings, for which ``forward_native`` is called.
"""

import importlib
import json
import sys
import types
from unittest.mock import MagicMock

from transformers.utils import is_torchvision_available

assert not is_torchvision_available()  # asked now, and remembered: transformers shall not use what follows
for name in (
    "",
    ".io",
    ".transforms",
    ".transforms.functional",
    ".transforms.v2",
    ".transforms.v2.functional",
):
    sys.modules[f"torchvision{name}"] = MagicMock()
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm._custom_ops"] = types.ModuleType("vllm._custom_ops")
sys.modules["vllm._custom_ops"].__dict__["rotary_embedding"] = None  # whoever calls it fails
# its Transformers backend asks which accelerator there is, and takes no CPU for an answer
importlib.import_module("sglang.srt.utils").__dict__["get_device"] = lambda *_: "cpu"

if __name__ == "__main__":  # SGLang starts processes that import this file again
    from sglang import Engine  # finds what stands above

    directory, asked, out = sys.argv[1:]
    with open(asked) as file:
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
    outputs = engine.generate(input_ids=request["prompts"], sampling_params=params, return_logprob=True)
    answers = [
        {
            "token_ids": output["output_ids"],
            "logprobs": [logprob for logprob, *_ in output["meta_info"]["output_token_logprobs"]],
        }
        for output in outputs
    ]
    with open(out, "w") as file:
        json.dump(answers, file)
    engine.shutdown()
