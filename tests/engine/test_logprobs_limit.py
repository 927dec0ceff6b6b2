"""Limit of the log probabilities of a request: max_logprobs, and the whole vocabulary."""

import itertools

import numpy as np
import pytest

from slipway import LLM, SamplingParams
from slipway.engine.config import EngineConfig
from slipway.errors import InvalidConfig, InvalidRequest

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "dtype": "float32"}
PROMPT = "def read(path):"


def params(**fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": 5, "ignore_eos": True} | fields)


@pytest.fixture(scope="module")
def whole():
    with LLM(max_logprobs=-1, **SMALL) as llm:
        yield llm


@pytest.mark.parametrize("steps", [1, 4])
def test_the_whole_vocabulary_is_a_distribution(steps):
    with LLM(max_logprobs=-1, decode_steps=steps, **SMALL) as llm:
        (given,) = llm.generate([PROMPT], params(logprobs=-1, prompt_logprobs=-1), use_tqdm=False)
        vocab_size = llm.engine.limits.vocab_size
    entries = given.outputs[0].logprobs + given.prompt_logprobs[1:]
    ids = given.outputs[0].token_ids + given.prompt_token_ids[1:]
    for entry in entries:
        assert entry.keys() == set(range(vocab_size)), "every token once"
        assert np.exp([each.logprob for each in entry.values()]).sum() == pytest.approx(1, abs=1e-4)
        by_rank = sorted(entry.values(), key=lambda each: each.rank)
        assert all(first.logprob >= second.logprob for first, second in itertools.pairwise(by_rank))
    assert all(entry[token].rank == 1 for token, entry in zip(ids[:5], entries)), "greedy"


def test_few_are_the_same_beside_all(whole):
    (all_of_them,) = whole.generate([PROMPT], params(logprobs=-1), use_tqdm=False)
    (few,) = whole.generate([PROMPT], params(logprobs=3), use_tqdm=False)
    for one, other in zip(few.outputs[0].logprobs, all_of_them.outputs[0].logprobs):
        assert len(one) == 3
        assert all(other[token] == each for token, each in one.items())


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_beyond_the_limit_is_refused_by_name(field):
    with LLM(max_logprobs=5, **SMALL) as llm:
        for value, fine in ((5, True), (6, False), (-1, False)):
            if fine:
                assert llm.generate([PROMPT], params(**{field: value}), use_tqdm=False)[0].finished
                continue
            with pytest.raises(InvalidRequest, match="max_logprobs") as caught:
                llm.generate([PROMPT], params(**{field: value}), use_tqdm=False)
            assert caught.value.field.endswith(field)
            assert "5" in caught.value.expected


@pytest.mark.host
@pytest.mark.parametrize("value", [21, -2, 1.5, True, None])
def test_a_limit_out_of_range_is_named(value):
    with pytest.raises(InvalidConfig) as caught:
        EngineConfig(max_logprobs=value)
    assert caught.value.field == "max_logprobs"
