"""Load loop for offline engines: a fixed number of requests run at a time.

This file needs only Python's standard library, because it also runs in the environments of other
engines (benchmarks/worker_vllm.py).

An engine has two methods: ``start(number, prompt, max_tokens)`` queues a request, and ``step()``
returns the number of a request once for each new token of it. A worker process answers each load,
a JSON line, with a JSON line: when each request started, and when each of its tokens arrived.
"""

import json
import sys
import time


def drive(engine, prompts, max_tokens, concurrency):
    """Run all prompts, ``concurrency`` at a time.

    Returns ``started``, the second at which each request started, and ``times``, the seconds at
    which its tokens arrived. Both count from the start of the load.
    """
    waiting, running = list(range(len(prompts)))[::-1], set()
    started, times = [0.0] * len(prompts), [[] for _ in prompts]
    begin = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < concurrency:
            number = waiting.pop()
            started[number] = time.perf_counter() - begin
            engine.start(number, prompts[number], max_tokens)
            running.add(number)
        for number in engine.step():
            times[number].append(time.perf_counter() - begin)
            if len(times[number]) == max_tokens:
                running.remove(number)
    return {"started": started, "times": times}


def answer(engine):
    """Report that the engine is ready, then run loads from standard input until its end."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(drive(engine, **json.loads(line))), flush=True)
