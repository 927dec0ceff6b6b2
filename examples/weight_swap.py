"""New weights in a running engine: `python examples/weight_swap.py [MODEL] [--tp N] [--dp N]`.

The engine starts with random weights, compiles, is given the real ones and generates. One JSON line for each phase.
"""

import argparse
import json
import time

from slipway import LLM, SamplingParams
from slipway.errors import SlipwayError
from slipway.llm import NANO

HINTS = {
    "CheckpointError": "the directory is not the model that runs: compare its config.json and tensors with the list",
    "InvalidConfig": "an option does not fit this machine or this model",
    "WeightsLost": "the engine has no whole weights: update them again from a source that can be read to its end",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", default=NANO, help="an HF directory or a hub id; by default nano"
    )
    parser.add_argument(
        "--weights", help="a directory with the real weights; by default the model's own"
    )
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--prompt", default="def fibonacci(n):\n")
    options = parser.parse_args()
    phase = "engine_ready_dummy"
    try:
        started = time.perf_counter()
        llm = LLM(
            options.model,
            load_format="dummy",
            tensor_parallel_size=options.tp,
            data_parallel_size=options.dp,
        )
        say(phase, llm, options, started)
        phase, started = "weights_swapped", time.perf_counter()
        llm.update_weights(options.weights or options.model)
        say(phase, llm, options, started)
        phase, started = "generate_result", time.perf_counter()
        output = llm.generate(options.prompt, SamplingParams(temperature=0, max_tokens=32))[
            0
        ].outputs[0]
        say(
            phase,
            llm,
            options,
            started,
            text=output.text,
            token_ids=output.token_ids,
            weights=output.weights,
        )
        llm.close()
    except SlipwayError as error:
        kind = type(error).__name__
        print(json.dumps({
            "phase": "weights_swap_error", "during": phase, "error": kind, "message": str(error),
            "hint": HINTS.get(kind, "see docs/weights.md"), "model": options.model, "tp": options.tp, "dp": options.dp,
        }))  # fmt: skip
        raise SystemExit(1) from None


def say(phase: str, llm: LLM, options: argparse.Namespace, started: float, **more: object) -> None:
    """A phase that has ended."""
    weights = llm.engine.weights
    print(json.dumps({
        "phase": phase, "model": options.model, "tp": options.tp, "dp": options.dp, "dtype": str(weights.dtype),
        "leaves": len(weights.arrays), "weights_version": llm.weights_version,
        "seconds": round(time.perf_counter() - started, 3), **more,
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
