"""Many requests: a shared prefix is computed once, and all end as if they ran alone."""

import jax
import numpy as np
import pytest

from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.llm import LLM

pytestmark = pytest.mark.xdist_group("load")
PREFIX = 512


def test_a_thousand_requests_compute_their_common_prefix_once():
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, 4000, PREFIX).tolist()
    prompts = [
        prefix + rng.integers(3, 4000, int(size)).tolist() for size in rng.integers(1, 17, 1000)
    ]
    with LLM(skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
        snapshot = llm.engine.snapshot()
    assert all(len(output.outputs[0].token_ids) == 1 for output in outputs)
    assert snapshot.computed_tokens == PREFIX + sum(len(prompt) - PREFIX for prompt in prompts)
    assert snapshot.cached_tokens == 999 * PREFIX
    assert snapshot.preemptions == 0


def test_two_thousand_mixed_requests_end_as_each_would_alone(tiny):
    """Poisson arrivals, prompts of every length, a fifth of the requests aborted.

    There are pages for a third of the sequences that could run.
    """
    count, rng = 2000, np.random.default_rng(1)
    with LLM(
        tiny, max_num_seqs=16, max_num_batched_tokens=64, page_size=16, skip_tokenizer_init=True
    ) as llm:
        engine, longest = llm.engine, llm.engine.limits.max_model_len
        scheduler = engine.schedulers[0]
        spare = scheduler.pages.take(scheduler.pages.num_pages - 20)
        prefixes = [rng.integers(3, 1000, 20).tolist() for _ in range(5)]
        asked = []
        for _ in range(count):
            own = rng.integers(3, 1000, int(rng.integers(1, longest - 20))).tolist()
            prompt = prefixes[int(rng.integers(5))] + own if rng.random() < 0.5 else own
            params = SamplingParams(
                max_tokens=int(rng.integers(1, longest)),
                temperature=float(rng.choice([0.0, 1.0])),
                ignore_eos=True,
                seed=int(rng.integers(2**32)),
                presence_penalty=float(rng.choice([0.0, 0.0, 0.0, 1.0])),
            )
            asked.append((prompt[: longest - 1], params, int(rng.integers(-1, 2))))
        aborted = {int(number) for number in rng.choice(count, count // 5, replace=False)}

        compiled = []
        listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731  the same object to unregister
        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            outputs = serve(engine, asked, aborted, rng)
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)
        assert [event for event in compiled if "compile" in event] == []
        snapshot = engine.snapshot()
        assert snapshot.preemptions > 0 and snapshot.cached_tokens > 0, (
            "nothing of that was put to the test"
        )
        assert (snapshot.running, snapshot.waiting, snapshot.pages_used) == (0, 0, len(spare))
        engine.flush()
        assert scheduler.pages.num_free == 20
        scheduler.pages.give_back(spare)

        for number, (prompt, params, _) in enumerate(asked):
            alone = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
            engine.flush()
            got = outputs[number]
            if number in aborted and got.finish_reason == "abort":
                assert got.token_ids == alone[: len(got.token_ids)]
            else:
                assert got.finish_reason == "length"
                assert got.token_ids == alone


def serve(engine, asked, aborted, rng):
    """Let requests arrive, 0.7 a step on average, and abort some; return the outputs by number."""
    numbers, outputs, doomed, arrived = {}, {}, {}, 0
    while arrived < len(asked) or engine.has_work():
        for _ in range(min(int(rng.poisson(0.7)), len(asked) - arrived)):
            prompt, params, priority = asked[arrived]
            request_id = engine.add(RequestSpec(prompt, params, priority=priority))
            numbers[request_id] = arrived
            if arrived in aborted:
                doomed[request_id] = int(rng.integers(0, 40))  # steps to live
            arrived += 1
        for request in engine.step():
            if request.finished:
                outputs[numbers[request.request_id]] = request.output().outputs[0]
        for request_id in list(doomed):
            doomed[request_id] -= 1
            if doomed[request_id] < 0:
                del doomed[request_id]
                if engine.is_running(request_id):
                    outputs[numbers[request_id]] = engine.abort(request_id).outputs[0]
    return outputs
