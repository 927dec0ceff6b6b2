"""The loads that every engine is timed under; decides who waits for whom. Runs in any Python, without Slipway.

An engine has ``start(number, prompt, max_tokens)``, which queues a request, and ``step()``, which returns the number of
a request once for each new token that it has. A worker process answers one JSON line per load: when each request
started, and when each of its tokens came.
"""

import json
import sys
import time


def drive(engine, prompts, max_tokens, concurrency):
    """Run the prompts, ``concurrency`` at a time; seconds at which each started, and at which each token came."""
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
    """Serve loads from standard input until it ends; the first line says that the engine is ready."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(drive(engine, **json.loads(line))), flush=True)
