"""Speculative decoding: every output is bit for bit that of the engine without it.

The drafts of these tests are the tokens that follow, with errors in random places, in random
numbers: so steps accept all, some and none of them. A second group checks the n-gram drafter and
the choice of the number of drafts.
"""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipway.codec.grammar import StructuredOutputs
from slipway.codec.reasoning import Reasoning
from slipway.convert import weight_sources
from slipway.engine.params import SamplingParams
from slipway.engine.request import DraftCounts, RequestSpec
from slipway.llm import LLM
from slipway.ops import cpu

pytestmark = pytest.mark.xdist_group("engine")

# Pages of 16: the C++ bodies serve.
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 16}
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2}
PLAIN = SamplingParams(temperature=0, max_tokens=24, logprobs=2)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=30, logprobs=2, ignore_eos=True)


class KnownDrafter:
    """Drafter of the true continuations, of which some are spoilt."""

    def __init__(self, seed, share):
        self.random = random.Random(seed)
        self.share = share  # of the drafts that are spoilt
        self.outputs = {}  # (prompt, sampling seed) -> tokens of the plain engine
        self.ended = []

    def draft(self, sequences):
        return [(self.of(sequence), 0) for sequence in sequences]

    def of(self, sequence):
        prompt = tuple(sequence.tokens[: sequence.num_prompt].tolist())
        known = self.outputs.get((prompt, sequence.seed), [])
        left = known[sequence.num_tokens - sequence.num_prompt :][: self.random.randint(0, 6)]
        spoilt = [t if self.random.random() > self.share else (t + 1) % 500 for t in left]
        return spoilt + [self.random.randrange(500)] * self.random.randint(0, 2)

    def end(self, sequence):
        self.ended.append(sequence)


def speculate(llm, drafter, seed=0):
    """Let an engine verify random numbers of the drafts of ``drafter``, in most steps."""
    dice, speculation = random.Random(seed), llm.engine._speculation

    def choose(rates, most):
        if dice.random() < 0.1:
            return np.zeros(len(most), np.int64)
        return np.array([dice.randint(0, count) for count in most.tolist()], np.int64)

    speculation._drafter = drafter
    speculation._rows.clear()
    speculation.lengths.choose = choose


@pytest.fixture(scope="module")
def plain(tiny):
    """Engine without speculation that makes single steps."""
    return LLM(tiny, decode_steps=1, **SIZES)


@pytest.fixture(scope="module")
def _drafting(tiny):
    return LLM(tiny, speculative_config=NGRAM, **SIZES)


@pytest.fixture
def drafting(_drafting):
    """Engine that verifies drafts, and makes several steps in a call where it has none.

    Nothing may be left in it when a test ends.
    """
    _drafting.engine.flush()
    yield _drafting
    engine = _drafting.engine
    assert not engine.has_work()
    assert not engine._speculation._rows
    for scheduler in engine.schedulers:
        assert scheduler.load == 0
        assert not scheduler.running
        assert scheduler.pages.num_free + scheduler.tree.num_unlocked == scheduler.pages.num_pages


def outputs_of(result):
    """Return what must be equal: all of an output, log probabilities to the last bit.

    Without the C++ kernels sums may depend on the batch, so only the places are compared.
    """
    logprobs = lambda found: found if cpu.isa() is not None else [sorted(x) for x in found or []]  # noqa: E731
    found = [
        (out.token_ids, out.text, out.finish_reason, out.stop_reason, logprobs(out.logprobs))
        for out in result.outputs
    ]
    scored = result.prompt_logprobs
    return found, scored and logprobs([place or {} for place in scored])


def run(llm, asked, dice=None, aborted=()):
    """Run requests that arrive at random times; return their outputs, those of aborted ones too."""
    engine, waiting = llm.engine, list(range(len(asked)))
    numbers, found = {}, {}
    while len(found) < len(asked):
        while waiting and (dice is None or not numbers or dice.random() < 0.3):
            number = waiting.pop(0)
            numbers[engine.add(asked[number])] = number
        for request in engine.step():
            if request.finished:
                found[numbers[request.request_id]] = request.output()
        for request_id, number in numbers.items():
            if number in aborted and number not in found and dice.random() < 0.1:
                found[number] = engine.abort(request_id)
    engine.step()
    return [found[number] for number in range(len(asked))]


def learn(drafter, asked, results):
    """Tell the drafter what the plain engine's sequences continue with."""
    for spec, result in zip(asked, results):
        for index, out in enumerate(result.outputs):
            drafter.outputs[tuple(spec.token_ids), spec.params.seed + index] = out.token_ids


def prompt(seed, length):
    return np.random.default_rng(seed).integers(3, 1000, length).tolist()


@st.composite
def params(draw):
    """Return parameters of a request, with any mixture of rules."""
    fields = {
        "seed": draw(st.integers(0, 2**20)),
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.3])),
        "max_tokens": draw(st.integers(1, 30)),
        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "logprobs": draw(st.sampled_from([None, 0, 3])),
        "ignore_eos": draw(st.booleans()),
    }
    extras = {
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.4,
        "logit_bias": {7: 4.0, 11: -100.0},
        "allowed_token_ids": tuple(range(3, 400)),
        "bad_words": ("self", "return x"),
        "stop": ("e", "re"),
        "stop_token_ids": (20, 50, 300),
        "prompt_logprobs": 1,
    }
    for name in draw(st.sets(st.sampled_from(sorted(extras)), max_size=4)):
        fields[name] = extras[name]
    if draw(st.booleans()):
        fields["min_tokens"] = draw(st.integers(0, fields["max_tokens"]))
    guided = draw(st.sampled_from(["", "", "", "regex", "json", "choice", "budget"]))
    if guided == "regex":
        fields["structured_outputs"] = StructuredOutputs(regex="[a-c ]{5,25}")
    elif guided == "json":
        fields["structured_outputs"] = StructuredOutputs(
            json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        )
    elif guided == "choice":
        fields["structured_outputs"] = StructuredOutputs(choice=["def", "class", "return self"])
    elif guided == "budget":
        fields["reasoning"] = Reasoning(start="<", end=">", opened=True, budget=6)
    if guided:
        fields.pop("allowed_token_ids", None)
    return SamplingParams(**fields)


@st.composite
def requests(draw):
    """Return one to five requests; some prompts begin in the same way."""
    shared = prompt(99, 20)
    found = []
    for number in range(draw(st.integers(1, 5))):
        own = prompt(draw(st.integers(0, 50)), draw(st.integers(1, 12)))
        tokens = (shared if draw(st.booleans()) else []) + [3 + number, *own]
        salt = draw(st.sampled_from(["", "a"]))
        found.append(RequestSpec(tokens, draw(params()), cache_salt=salt))
    return found


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=requests(), seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.2, 0.6]))
def test_any_mixture_of_requests_gives_the_plain_outputs(plain, drafting, asked, seed, share):
    expected = run(plain, asked)
    drafter, dice = KnownDrafter(seed, share), random.Random(seed)
    learn(drafter, asked, expected)
    speculate(drafting, drafter, seed)
    aborted = {number for number in range(len(asked)) if dice.random() < 0.15}
    scheduler = drafting.engine.schedulers[0]
    # Few pages: sequences are preempted.
    taken = scheduler.pages.take(max(0, scheduler.pages.num_free - 7)) if seed % 3 == 0 else []
    got = run(drafting, asked, dice, aborted)
    scheduler.pages.give_back(taken)
    for number, (one, other) in enumerate(zip(got, expected)):
        if number in aborted:
            for a, b in zip(one.outputs, other.outputs):
                assert a.token_ids == b.token_ids[: len(a.token_ids)]
        else:
            assert outputs_of(one) == outputs_of(other)
    assert all(sequence.finish_reason is not None for sequence in drafter.ended)


def sampled(number, **fields):
    params = dataclasses.replace(SAMPLED, seed=number, **fields)
    return RequestSpec(prompt(number, 5 + number), params)


@pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "data_parallel_size": 2}]
)
def test_parallel_engines_give_their_plain_outputs(tiny, sizes):
    asked = [sampled(number, n=1 + number % 2) for number in range(6)]
    with LLM(tiny, decode_steps=1, **SIZES, **sizes) as llm:
        expected = run(llm, asked)
    with LLM(tiny, speculative_config=NGRAM, **SIZES, **sizes) as llm:
        drafter = KnownDrafter(0, 0.2)
        learn(drafter, asked, expected)
        speculate(llm, drafter)
        got = run(llm, asked, random.Random(1))
        counts = llm.engine.stats
    assert [outputs_of(each) for each in got] == [outputs_of(each) for each in expected]
    assert 0 < counts.spec_decode_num_accepted_tokens < counts.spec_decode_num_draft_tokens


@pytest.mark.parametrize("policy", ["recompute", "continue", "finish"])
def test_new_weights_between_two_steps(tiny, plain, drafting, policy):
    """The values are those that the engine has, so its outputs are the plain ones."""
    asked = [sampled(number) for number in range(4)]
    expected = run(plain, asked)
    drafter = KnownDrafter(2, 0.3)
    learn(drafter, asked, expected)
    speculate(drafting, drafter)
    engine = drafting.engine
    numbers = {engine.add(spec): number for number, spec in enumerate(asked)}
    found, steps = {}, 0
    while len(found) < len(asked):
        if steps == 6:
            values = weight_sources.values(str(tiny), engine.weights)
            update = engine.update_weights(values, policy=policy)
        for request in engine.step():
            if request.finished:
                found[numbers[request.request_id]] = request.output()
        steps += 1
    engine.step()
    assert update.done()
    assert [outputs_of(found[n]) for n in range(4)] == [outputs_of(each) for each in expected]
    assert engine.stats.spec_decode_num_accepted_tokens
    if policy == "continue":
        assert found[0].outputs[0].weights[-1][1] == update.result()


def test_a_step_accepts_many_tokens(plain, drafting):
    asked = [RequestSpec(prompt(1, 9), PLAIN)]
    expected = run(plain, asked)
    drafter = KnownDrafter(0, 0.0)
    drafter.of = lambda sequence: expected[0].outputs[0].token_ids[sequence.num_tokens - 9 :][:5]
    speculate(drafting, drafter)
    drafting.engine._speculation.lengths.choose = lambda rates, most: most
    drafting.engine.reset_stats()
    (got,) = run(drafting, asked)
    assert outputs_of(got) == outputs_of(expected[0])
    stats = drafting.engine.stats
    counts = DraftCounts(
        stats.spec_decode_num_drafts,
        stats.spec_decode_num_draft_tokens,
        stats.spec_decode_num_accepted_tokens,
    )
    places = stats.spec_decode_accepted_per_pos
    assert got.drafts == counts
    assert counts.drafted == counts.accepted == sum(places)
    assert places[0] == counts.verified >= 2
    assert places[4] >= 1, "all five drafts of a step"
    assert stats.acceptance_length == 1 + counts.accepted / counts.verified


def test_nothing_compiles_while_serving(drafting):
    before = drafting.engine.num_compiled
    speculate(drafting, KnownDrafter(0, 1.0))
    run(drafting, [sampled(number) for number in range(4)])
    assert drafting.engine.num_compiled == before
