"""Replacement of the weights of a running engine: `python examples/weight_swap.py [MODEL]`.

The engine starts with random weights, compiles, gets the real ones and generates. One JSON line is
printed for each phase.
"""

import argparse
import json
import time

from slipway import LLM, SamplingParams
from slipway.errors import SlipwayError
from slipway.llm import NANO

HINTS = {
    "CheckpointError": "the directory holds another model; compare its config.json and tensors",
    "InvalidConfig": "an option does not fit this machine or this model",
    "WeightsLost": "the engine's weights are incomplete; update them again from a complete source",
}


def main() -> None:
    """Run the phases; exit with code 1 and a JSON line if one of them fails."""
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
        say(phase, llm, options, started=started)
        phase, started = "weights_swapped", time.perf_counter()
        llm.update_weights(options.weights or options.model)
        say(phase, llm, options, started=started)
        phase, started = "generate_result", time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=32)
        output = llm.generate(options.prompt, params)[0].outputs[0]
        fields = {"text": output.text, "token_ids": output.token_ids, "weights": output.weights}
        say(phase, llm, options, started=started, **fields)
        llm.close()
    except SlipwayError as error:
        kind = type(error).__name__
        line = {
            "phase": "weights_swap_error",
            "during": phase,
            "error": kind,
            "message": str(error),
            "hint": HINTS.get(kind, "see docs/weights.md"),
            "model": options.model,
            "tp": options.tp,
            "dp": options.dp,
        }
        print(json.dumps(line))
        raise SystemExit(1) from None


def say(phase: str, llm: LLM, options: argparse.Namespace, started: float, **more: object) -> None:
    """Print a JSON line for a phase that has ended."""
    weights = llm.engine.weights
    line = {
        "phase": phase,
        "model": options.model,
        "tp": options.tp,
        "dp": options.dp,
        "dtype": str(weights.dtype),
        "leaves": len(weights.arrays),
        "weights_version": llm.weights_version,
        "seconds": round(time.perf_counter() - started, 3),
    }
    print(json.dumps(line | more), flush=True)


if __name__ == "__main__":
    main()
