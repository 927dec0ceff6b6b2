"""One of the two processes of an engine in test_multihost.py.

Usage: python -m tests.runtime.two_processes RANK PORT MODEL.
"""

import json
import os
import sys
from typing import Any

from slipway import LLM, SamplingParams
from slipway.engine.config import EngineConfig
from slipway.engine.launch import follow

PROMPTS = [[5, 6, 7], [8] * 20, [9, 10], [11], [12, 13, 14, 15]]
PARAMS = [
    SamplingParams(
        temperature=t, max_tokens=8, seed=3, ignore_eos=True, logprobs=2, presence_penalty=p
    )
    for t, p in [(0, 0), (1, 0), (0, 1), (0, 0), (1, 1)]
]
OPTIONS = {
    "tensor_parallel_size": 4, "data_parallel_size": 2, "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "decode_steps": 3,
}  # fmt: skip


def found(llm: LLM) -> dict[str, Any]:
    """Return the engine's tokens, the likeliest tokens beside them, and pooled hidden states."""
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)  # several steps in a call
    repeated = llm.generate(PROMPTS[:3], plain, use_tqdm=False)
    return {
        "tokens": [output.outputs[0].token_ids for output in outputs],
        "shown": [[sorted(entry) for entry in output.outputs[0].logprobs] for output in outputs],
        "repeated": [output.outputs[0].token_ids for output in repeated],
        "pooled": [
            [x.tolist() for x in llm.encode(PROMPTS, kind, use_tqdm=False)]
            for kind in ("last", "mean")
        ],
    }


def main(rank: int, port: str, model: str, endless: bool) -> None:
    """Lead or follow; the leader prints its tokens as JSON."""
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=4"  # read when JAX looks for devices
    )
    nodes = {"nnodes": 2, "node_rank": rank, "dist_init_addr": f"127.0.0.1:{port}"}
    if rank:
        follow(model, EngineConfig(skip_tokenizer_init=True, **OPTIONS, **nodes))
        return
    with LLM(model, skip_tokenizer_init=True, **OPTIONS, **nodes) as llm:
        while True:
            print(json.dumps(found(llm)), flush=True)
            if not endless:
                return


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], len(sys.argv) > 4)
