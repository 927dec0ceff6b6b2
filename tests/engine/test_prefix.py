"""Prefix cache in a running engine: the same outputs with less work, and no wrong sharing.

With the C++ bodies, outputs with and without the cache are equal to the last bit; the portable ones
promise the same tokens, and log probabilities within 1e-6. That bound is only meaningful if the
logits are of the order of 1. Those of the shared model reach 30, where neighbours in f32 are 2e-6
apart, so its head is divided by 16 here.
"""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import InvalidRequest
from slipway.llm import LLM
from slipway.ops import cpu

pytestmark = pytest.mark.xdist_group("engine")

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "skip_tokenizer_init": True}


def prompts(count, shared=20, own=6, seed=0):
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 1000, shared).tolist()
    return [prefix + rng.integers(3, 1000, own).tolist() for _ in range(count)]


def computed(llm):
    return sum(scheduler.counts.computed_tokens for scheduler in llm.engine.schedulers)


def same(got, expected):
    for one, other in zip(got, expected, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert a.token_ids == b.token_ids
        if cpu.isa() is not None:
            assert a.logprobs == b.logprobs
        for found, wanted in zip(a.logprobs, b.logprobs, strict=True):
            assert found.keys() == wanted.keys()
            for token in found:
                assert abs(found[token].logprob - wanted[token].logprob) <= 1e-6


@pytest.fixture(scope="module")
def calm(tiny, tmp_path_factory):
    """The shared model with a smaller head."""
    directory = tmp_path_factory.mktemp("calm")
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).symlink_to(path)
    (weights,) = tiny.glob("*.safetensors")
    tensors = load_file(weights)
    save_file(
        tensors | {"lm_head.weight": tensors["lm_head.weight"] / 16}, directory / weights.name
    )
    return directory


@pytest.fixture(scope="module")
def uncached(calm):
    return LLM(calm, page_size=16, enable_prefix_caching=False, **SIZES)


@pytest.fixture
def cached(_cached):
    _cached.engine.flush()
    return _cached


@pytest.fixture(scope="module")
def _cached(calm):
    return LLM(calm, page_size=16, **SIZES)


def test_cached_equals_uncached(cached, uncached):
    """Prompts one after the other, together, and again when all of them are cached."""
    asked = prompts(6, shared=37)
    expected = uncached.generate(asked, GREEDY, use_tqdm=False)
    same([cached.generate(prompt, GREEDY)[0] for prompt in asked], expected)
    again = cached.generate(asked, GREEDY, use_tqdm=False)
    same(again, expected)
    assert [output.num_cached_tokens for output in again] == [32] * 6
    cached.engine.flush()
    same(cached.generate(asked, GREEDY, use_tqdm=False), expected)
    assert all(scheduler.tree.num_pages == 0 for scheduler in uncached.engine.schedulers)


def test_a_prefix_is_computed_once(cached):
    before = computed(cached)
    cached.generate(
        prompts(8, shared=32, own=4), dataclasses.replace(GREEDY, max_tokens=1), use_tqdm=False
    )
    assert computed(cached) - before == 32 + 8 * 4


def test_salts_keep_tenants_apart(cached):
    (prompt,) = prompts(1, shared=40)
    params = dataclasses.replace(GREEDY, max_tokens=2)

    def run(salt):
        request_id = cached.engine.add(RequestSpec(prompt, params, cache_salt=salt))
        request = cached.engine.request(request_id)
        while cached.engine.has_work():
            cached.engine.step()
        return request.output()

    outputs = [run(salt) for salt in ("a", "a", "b", "")]
    assert [output.num_cached_tokens for output in outputs] == [0, 32, 0, 0]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_flush_forgets(cached):
    (prompt,) = prompts(1, shared=40)
    assert cached.generate(prompt, GREEDY)[0].num_cached_tokens == 0
    assert cached.generate(prompt, GREEDY)[0].num_cached_tokens == 32
    assert cached.engine.flush() > 0
    assert cached.generate(prompt, GREEDY)[0].num_cached_tokens == 0


def test_outputs_are_cached_for_the_next_turn(cached):
    (prompt,) = prompts(1, shared=20, own=0)
    first = cached.generate(prompt, dataclasses.replace(GREEDY, max_tokens=30))[0].outputs[0]
    turn = prompt + first.token_ids + [7, 8, 9]
    assert cached.generate(turn, GREEDY)[0].num_cached_tokens == 48


def test_dynamic_rope_has_no_prefix_cache(config_only):
    """Frequencies follow the length of the whole prompt, so keys of equal prefixes differ."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    directory = config_only(rope_scaling=scaling, max_position_embeddings=64)
    llm = LLM(directory, load_format="dummy", page_size=16, **SIZES)
    assert llm.engine.limits.prefix_caching is False
    asked = [5 + i % 80 for i in range(40)]
    assert [llm.generate(asked, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preemption_changes_no_output(calm, uncached, temperature):
    """There is room for a little more than two full requests, and four want to run."""
    asked = prompts(10, shared=0, own=14, seed=3)
    params = [
        SamplingParams(temperature=temperature, max_tokens=40, seed=i, ignore_eos=True, logprobs=1)
        for i in range(10)
    ]
    expected = uncached.generate(asked, params, use_tqdm=False)
    llm = LLM(calm, page_size=16, **SIZES)
    scheduler = llm.engine.schedulers[0]
    spare = scheduler.pages.take(scheduler.pages.num_pages - 9)
    same(llm.generate(asked, params, use_tqdm=False), expected)
    assert scheduler.counts.preemptions > 0, "nothing was preempted"
    scheduler.pages.give_back(spare)


def test_what_can_never_fit_is_refused_with_the_figures(llm, monkeypatch):
    limits = dataclasses.replace(llm.engine.limits, num_pages=(4,))
    monkeypatch.setattr(llm.engine._admission, "_limits", limits)
    with pytest.raises(InvalidRequest, match=r"10 prompt tokens \+ 50 max_tokens.*16 tokens"):
        llm.generate(list(range(3, 13)), SamplingParams(max_tokens=50))
    assert not llm.engine.has_work()


def test_priority_runs_first_and_a_deadline_ends(llm):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    ids = [
        llm.engine.add(RequestSpec([5, 6, number], params, priority=1)) for number in range(7, 15)
    ]
    urgent = llm.engine.add(RequestSpec([5, 6, 6], params, priority=0))
    late = llm.engine.add(RequestSpec([5, 6, 5], params, timeout_s=1e-9, priority=0))
    ended = []
    while llm.engine.has_work():
        ended += [request for request in llm.engine.step() if request.finished]
    order = [request.request_id for request in ended]
    assert order[0] == late
    assert ended[0].output().outputs[0].finish_reason == "timeout"
    assert order.index(urgent) < min(order.index(number) for number in ids[4:])
    for bad in ({"priority": 1.5}, {"timeout_s": 0}, {"timeout_s": "soon"}, {"cache_salt": 5}):
        with pytest.raises(InvalidRequest) as caught:
            llm.engine.add(RequestSpec([5], params, **bad))
        assert caught.value.field == next(iter(bad))
