"""Several decode steps in one call: the same outputs as with single steps.

Also with requests that arrive, end or are aborted meanwhile.
"""

import dataclasses
import random

import jax
import numpy as np
import pytest

from slipway.codec.grammar import StructuredOutputs
from slipway.engine import launch, pipeline
from slipway.engine.batch import Bucket, Repeat
from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.programs import REPEAT
from slipway.engine.request import RequestSpec
from slipway.errors import InvalidConfig
from slipway.llm import LLM
from slipway.ops import cpu

pytestmark = pytest.mark.xdist_group("engine")

STEPS = 5
SIZES = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "page_size": 16,
}  # pages of 16: the C++ bodies serve
GREEDY = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True, logprobs=2)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def _engines(tiny):
    return LLM(tiny, decode_steps=1, **SIZES), LLM(tiny, decode_steps=STEPS, **SIZES)


@pytest.fixture
def single(_engines):
    """Engine that makes single steps, with no page cached."""
    _engines[0].engine.flush()
    return _engines[0]


@pytest.fixture
def several(_engines):
    """Engine that makes up to five steps in a call, with no page cached.

    Nothing may be left in it when a test ends.
    """
    llm = _engines[1]
    llm.engine.flush()
    yield llm
    assert not llm.engine.has_work()
    for scheduler in llm.engine.schedulers:
        assert scheduler.load == 0
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.pages.num_free + scheduler.tree.num_unlocked == scheduler.pages.num_pages


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 1000, int(rng.integers(1, 25))).tolist() for _ in range(count)]


def same(got, expected):
    """Compare texts and ends, and log probabilities to the last bit if the kernels promise that."""
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
                b.token_ids,
                b.text,
                b.finish_reason,
                b.stop_reason,
            )
            assert cpu.isa() is None or a.logprobs == b.logprobs
            assert [sorted(found) for found in a.logprobs or []] == [
                sorted(found) for found in b.logprobs or []
            ]


def calls(llm):
    """Return a list that fills with the number of steps of each call that makes several."""
    found, runner = [], llm.engine.runner
    call = type(runner).call

    def counted(name, *arguments):
        if name == REPEAT:
            found.append(int(arguments[-1][0]))
        return call(runner, name, *arguments)

    runner.call = counted
    return found


def test_every_kind_of_request_gives_what_single_steps_give(single, several):
    (prompt,) = prompts(1)
    text, ids = (lambda out: (out.text, out.token_ids))(
        single.generate(prompt, GREEDY)[0].outputs[0]
    )
    ends = [{"stop_token_ids": [ids[at]], "ignore_eos": False} for at in (1, 4, 5, 6, 12, 30)]
    ends += [
        {"stop": [text[at : at + 3]], "include_stop_str_in_output": at % 2 == 0}
        for at in (5, 20, 33, 60)
    ]
    ends += [{"max_tokens": count} for count in (1, 2, STEPS, STEPS + 1, STEPS + 2, 2 * STEPS + 3)]
    kinds = [dataclasses.replace(GREEDY, **end) for end in ends]
    kinds += [dataclasses.replace(SAMPLED, seed=seed, top_p=0.9, min_tokens=0) for seed in range(4)]
    kinds += [
        dataclasses.replace(SAMPLED, n=3),
        dataclasses.replace(SAMPLED, n=2, best_of=4, logprobs=None),
    ]
    kinds += [
        dataclasses.replace(SAMPLED, presence_penalty=1.0),
        dataclasses.replace(GREEDY, prompt_logprobs=1),
    ]
    kinds += [dataclasses.replace(SAMPLED, structured_outputs=StructuredOutputs(regex="[ab]{20}"))]
    made, reasons = calls(several), set()
    for params in kinds:
        expected = single.generate(prompt, params)
        same(several.generate(prompt, params), expected)
        reasons |= {(out.finish_reason, type(out.stop_reason)) for out in expected[0].outputs}
    assert {*made} == set(range(2, STEPS + 1)), "any number of steps, as many as are left"
    assert reasons >= {("stop", int), ("stop", str), ("length", type(None))}
    asked = prompts(len(kinds), seed=1)
    made.clear()
    same(
        several.generate(asked, kinds, use_tqdm=False),
        single.generate(asked, kinds, use_tqdm=False),
    )
    assert made


def test_the_end_of_text_ends_it(single, several, monkeypatch):
    (prompt,) = prompts(1)
    params = dataclasses.replace(GREEDY, ignore_eos=False)
    ids = single.generate(prompt, params)[0].outputs[0].token_ids
    for llm in (single, several):
        monkeypatch.setattr(llm.engine._admission, "_eos_ids", frozenset({ids[7]}))
    same(several.generate(prompt, params), single.generate(prompt, params))
    assert several.generate(prompt, params)[0].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("seed", range(6))
def test_who_comes_and_who_is_aborted_meanwhile_changes_nothing_for_the_others(
    single, several, seed
):
    asked, dice = prompts(6, seed=10 + seed), random.Random(seed)
    params = [
        dataclasses.replace(SAMPLED, seed=i, max_tokens=20 + 3 * i, n=1 + i % 2) for i in range(6)
    ]
    expected = single.generate(asked, params, use_tqdm=False)
    engine = several.engine
    made = calls(several)
    numbers, outputs, aborted = {}, {}, dice.sample(range(6), 2)
    while len(outputs) < 6:
        if len(numbers) < 6 and dice.random() < 0.3:
            number = len(numbers)
            numbers[engine.add(RequestSpec(asked[number], params[number]))] = number
        for request in engine.step():
            if request.finished:
                outputs[numbers[request.request_id]] = request.output()
        for request_id, number in numbers.items():
            if number in aborted and number not in outputs and dice.random() < 0.2:
                outputs[number] = engine.abort(request_id)
    engine.step()
    assert made
    same(
        [outputs[i] for i in range(6) if i not in aborted],
        [expected[i] for i in range(6) if i not in aborted],
    )
    for number in aborted:
        for got, whole in zip(outputs[number].outputs, expected[number].outputs):
            assert got.token_ids == whole.token_ids[: len(got.token_ids)]


def test_who_comes_waits_for_no_more_than_two_calls(several):
    engine, asked = several.engine, prompts(2)
    first = engine.request(engine.add(RequestSpec(asked[0], GREEDY)))
    while first.num_generated < 8:
        engine.step()
    before = first.num_generated
    second = engine.request(engine.add(RequestSpec(asked[1], GREEDY)))
    while not second.num_generated:
        engine.step()
    assert before + STEPS <= first.num_generated <= before + 2 * STEPS, "one call was on the device"
    for request in (first, second):
        engine.abort(request.request_id)
    engine.step()


def test_pages_that_run_out_change_no_output(single, several):
    asked = prompts(8, seed=3)
    params = [dataclasses.replace(SAMPLED, seed=i, max_tokens=36) for i in range(8)]
    scheduler, made = several.engine.schedulers[0], calls(several)
    spare = scheduler.pages.take(scheduler.pages.num_pages - 9)
    preempted = scheduler.counts.preemptions
    same(
        several.generate(asked, params, use_tqdm=False),
        single.generate(asked, params, use_tqdm=False),
    )
    assert scheduler.counts.preemptions > preempted
    assert made
    scheduler.pages.give_back(spare)


def cached(llm):
    """Return every path of the prefix tree."""
    found, stack = set(), [(root, ()) for root in llm.engine.schedulers[0].tree._roots.values()]
    while stack:
        node, path = stack.pop()
        found.add(path)
        stack += [(child, (*path, block)) for block, child in node.children.items()]
    return found


def test_the_prefix_tree_holds_what_it_does_after_single_steps(single, several, monkeypatch):
    """In particular, it holds no token computed after the end of an output."""
    # Otherwise a busy host dispatches no step ahead, which leaves the last token uncomputed.
    monkeypatch.setattr(pipeline, "LONG", 1e9)
    (prompt,), sizes = prompts(1), set()
    ids = single.generate(prompt, GREEDY)[0].outputs[0].token_ids
    for at in range(1, 20):
        params = dataclasses.replace(GREEDY, stop_token_ids=[ids[at]])
        for llm in (single, several):
            llm.engine.flush()
            llm.generate(prompt, params)
        assert cached(several) == cached(single)
        sizes.add(len(cached(single)))
    assert len(sizes) > 1


def test_nothing_compiles_while_serving(single, several):
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731  must be the same object to unregister
    before = several.engine.num_compiled
    assert before == single.engine.num_compiled + 1
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for count in range(1, 5):
            several.generate(
                prompts(count), [GREEDY, SAMPLED, GREEDY, SAMPLED][:count], use_tqdm=False
            )
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert [event for event in compiled if "compile" in event] == []
    assert several.engine.num_compiled == before


def test_time_between_tokens_is_that_between_their_arrivals(several):
    engine = several.engine
    request = engine.request(engine.add(RequestSpec(prompts(1)[0], GREEDY)))
    gaps = engine.stats.inter_token
    count, total = gaps.count, gaps.sum
    seen, last = [], 0
    while not request.finished:
        engine.step()
        if request.num_generated > last:
            seen.append(request.num_generated - last)
            last = request.num_generated
    engine.step()
    assert max(seen) == STEPS
    assert gaps.count - count == GREEDY.max_tokens - 1
    whole = request.sequences[0].last_token_at - request.first_token_at
    assert gaps.sum - total == pytest.approx(whole), (
        "each call's time counts once, to the first of its tokens"
    )


@pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "data_parallel_size": 2}]
)
def test_parallel_engines_give_one_devices_tokens(tiny, single, sizes):
    asked = prompts(3, seed=4)
    expected = [
        output.outputs[0].token_ids for output in single.generate(asked, SAMPLED, use_tqdm=False)
    ]
    with LLM(tiny, decode_steps=3, **SIZES, **sizes) as llm:
        made = calls(llm)
        assert [
            output.outputs[0].token_ids for output in llm.generate(asked, SAMPLED, use_tqdm=False)
        ] == expected
        assert 3 in made


def test_auto_is_for_small_models_on_one_cpu(tiny, uncompiled, monkeypatch):
    def repeats(**options):
        return LLM(tiny, **SIZES | options).engine.repeats

    assert repeats() == Repeat(Bucket(4, 4), 8)
    assert repeats(max_num_seqs=64, max_num_batched_tokens=64) == Repeat(Bucket(32, 32), 8), (
        "one shape for up to 32"
    )
    assert repeats(decode_steps=1) is None
    assert repeats(tensor_parallel_size=2) is None
    assert repeats(tensor_parallel_size=2, decode_steps=3) == Repeat(Bucket(4, 4), 3)
    monkeypatch.setattr(launch, "SMALL_BYTES", 1000)
    assert repeats() is None
    assert repeats(decode_steps=2) == Repeat(Bucket(4, 4), 2)


@pytest.mark.parametrize("bad", [0, -1, 65, "many", 2.0, True, None])
def test_other_numbers_of_steps_are_refused(bad):
    with pytest.raises(InvalidConfig, match="decode_steps"):
        EngineConfig(decode_steps=bad)
