"""Logit rules: each edit against its definition, and outputs against transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slipway.engine import logit_rules, sample
from slipway.engine.params import MAX_LOGIT_BIAS, SamplingParams
from slipway.engine.request import Request, RequestSpec, Sequence
from slipway.engine.scheduler import Chunk
from slipway.errors import InvalidRequest
from slipway.llm import LLM

pytestmark = pytest.mark.xdist_group("engine")
V, LONGEST = 70, 24
PROMPT = [5, 6, 7, 8, 5, 9]


def rows(*cases, stop_ids=frozenset()):
    """Return rows of edits, and each row's sequence, for (params, prompt, output)."""
    found = []
    for number, (params, prompt, output) in enumerate(cases):
        request = Request(str(number), RequestSpec(prompt, params), LONGEST - len(prompt))
        request.rules = (
            logit_rules.Rules(params, stop_ids, None, V) if logit_rules.needed(params) else None
        )
        sequence = Sequence(request, 0, 0, frozenset(), None)
        for token in output:
            sequence.append(token, None)
        found.append(sequence)
    changed = [
        (row, Chunk(sequence, 0, sequence.num_tokens, samples=True))
        for row, sequence in enumerate(found)
        if sequence.request.rules is not None
    ]
    return logit_rules.build(logit_rules.empty(len(cases), V, LONGEST), changed), found


def apply(logits, changed, sequences, newest=None):
    positions = jnp.asarray(np.array([s.num_tokens for s in sequences], np.int32))
    newest = (
        jnp.full(len(sequences), -1, jnp.int32)
        if newest is None
        else jnp.asarray(newest, jnp.int32)
    )
    return np.asarray(
        jax.jit(sample.edit)(
            jnp.asarray(logits), jax.tree.map(jnp.asarray, changed), positions, newest
        )
    )


def test_edits_are_their_definitions_row_by_row():
    logits = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32)
    prompt, output = [1, 2, 2], [3, 3, 4, 1]
    cases = [
        SamplingParams(),
        SamplingParams(logit_bias={0: 1.5, 69: -2.0}),
        SamplingParams(allowed_token_ids=[0, 31, 32, 69]),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(frequency_penalty=0.5, presence_penalty=-0.25),
        SamplingParams(
            repetition_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={3: 4.0},
            allowed_token_ids=[1, 3, 5],
        ),
    ]
    got = apply(logits, *rows(*((params, prompt, output) for params in cases)))
    for row, params in enumerate(cases):
        expected = logits[row].astype(np.float64)
        if params.allowed_token_ids is not None:
            expected[
                [token for token in range(V) if token not in params.allowed_token_ids]
            ] = -np.inf
        for token, bias in params.logit_bias.items():
            expected[token] += bias
        for token in {*prompt, *output}:
            expected[token] *= (
                1 / params.repetition_penalty if expected[token] > 0 else params.repetition_penalty
            )
        for token in {*output}:
            expected[token] -= (
                params.frequency_penalty * output.count(token) + params.presence_penalty
            )
        np.testing.assert_allclose(got[row], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[0], logits[0])


def test_a_token_that_only_the_device_knows_counts():
    logits = np.ones((2, V), np.float32)
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=2.0)
    known, sequences = rows((params, [1], [3, 4]), (params, [1], [3, 4]))
    changed, shorter = rows((params, [1], [3]), (params, [1], [3, 4]))
    whole = apply(logits, known, sequences)
    positions = [sequence for sequence in sequences]
    np.testing.assert_array_equal(apply(logits, changed, positions, newest=[4, -1]), whole)
    assert len(shorter[0].token_ids) == 1


def test_min_tokens_bans_what_would_end():
    logits = np.zeros((2, V), np.float32)
    params = SamplingParams(min_tokens=3)
    got = apply(
        logits,
        *rows((params, [1], [2, 2]), (params, [1], [2, 2, 2]), stop_ids=frozenset({40, 7, 10**6})),
    )
    assert np.flatnonzero(np.isneginf(got[0])).tolist() == [7, 40]
    assert not np.isneginf(got[1]).any()


@pytest.mark.parametrize(
    "field, fields",
    [
        ("allowed_token_ids", {"allowed_token_ids": [V]}), ("logit_bias", {"logit_bias": {V: 1.0}}),
        ("bad_words", {"bad_words": ["x"]}),
        ("allowed_token_ids", {"allowed_token_ids": [7], "min_tokens": 2}),
    ],
)  # fmt: skip
def test_rules_that_leave_nothing_or_mean_nothing_are_refused(field, fields):
    with pytest.raises(InvalidRequest) as caught:
        logit_rules.Rules(SamplingParams(**fields), frozenset({7}), None, V)
    assert caught.value.field == field


BAD = [
    ("best_of", {"n": 3, "best_of": 2}), ("best_of", {"best_of": 0}),
    ("min_tokens", {"min_tokens": 17}),
    ("min_tokens", {"min_tokens": -1}), ("repetition_penalty", {"repetition_penalty": 0}),
    ("repetition_penalty", {"repetition_penalty": float("nan")}),
    ("frequency_penalty", {"frequency_penalty": 2.1}),
    ("presence_penalty", {"presence_penalty": "much"}), ("logit_bias", {"logit_bias": {1: 101}}),
    ("logit_bias", {"logit_bias": {"a": 1}}), ("logit_bias", {"logit_bias": [1]}),
    ("logit_bias", {"logit_bias": {-1: 1}}),
    ("logit_bias", {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1)}),
    ("allowed_token_ids", {"allowed_token_ids": []}),
    ("allowed_token_ids", {"allowed_token_ids": [-1]}),
    ("bad_words", {"bad_words": [""]}), ("bad_words", {"bad_words": [5]}),
    ("bad_words", {"bad_words": ["a"] * 129}),
    ("prompt_logprobs", {"prompt_logprobs": 21}), ("stop", {"stop": ["a"] * 65}),
]  # fmt: skip


@pytest.mark.parametrize("field, fields", BAD, ids=str)
def test_a_parameter_out_of_range_is_named(field, fields):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert caught.value.field == field
    assert caught.value.expected


@pytest.fixture(scope="module")
def theirs(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def generate(theirs, prompt, **options):
    with torch.inference_mode():
        ids = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
    return ids[0, len(prompt) :].tolist()


def complete(llm, prompt=PROMPT, **fields):
    params = SamplingParams(**({"temperature": 0, "max_tokens": 12, "ignore_eos": True} | fields))
    return llm.generate(prompt, params)[0].outputs[0]


def test_repetition_penalty_is_transformers(llm, theirs):
    plain = generate(theirs, PROMPT)
    for penalty in (5.0, 1.3, 0.3):
        expected = generate(theirs, PROMPT, repetition_penalty=penalty)
        assert complete(llm, repetition_penalty=penalty).token_ids == expected
    assert complete(llm).token_ids == plain != expected


def test_logit_bias_is_transformers_sequence_bias(llm, theirs):
    plain = generate(theirs, PROMPT)
    bias = {plain[1]: -4.0, 77: 2.5}
    expected = generate(
        theirs, PROMPT, sequence_bias=[[[token], value] for token, value in bias.items()]
    )
    assert complete(llm, logit_bias=bias).token_ids == expected != plain


def test_bad_words_are_never_completed(llm, theirs):
    """Words of one token and of several; transformers bans the same ids."""
    plain, tokenizer = complete(llm), llm.engine.tokenizer
    pairs = [plain.token_ids[i : i + 2] for i in range(11)]
    words = [
        tokenizer.decode(pair) for pair in pairs if tokenizer.encode(tokenizer.decode(pair)) == pair
    ][:2]
    words += [tokenizer.decode(plain.token_ids[:1])]
    output = complete(llm, bad_words=words)
    assert output.token_ids != plain.token_ids
    assert not any(word in output.text for word in words)
    banned = [ids for word in words for ids in logit_rules._spellings(word, tokenizer)]
    assert {len(ids) for ids in banned} >= {1, 2}, "both kinds"
    assert output.token_ids == generate(theirs, PROMPT, bad_words_ids=banned)


def test_allowed_tokens_are_the_only_ones(llm, theirs):
    allowed = [3, 50, 500, 777]
    output = complete(llm, allowed_token_ids=allowed, temperature=1.0, seed=3)
    assert {*output.token_ids} <= {*allowed}
    assert len({*output.token_ids}) > 1
    banned = [[token] for token in range(theirs.config.vocab_size) if token not in allowed]
    assert complete(llm, allowed_token_ids=allowed).token_ids == generate(
        theirs, PROMPT, bad_words_ids=banned
    )


def test_min_tokens_puts_off_every_end(llm):
    plain = complete(llm)
    stop = plain.token_ids[3]
    assert len(complete(llm, stop_token_ids=[stop]).token_ids) == 4
    later = complete(llm, stop_token_ids=[stop], min_tokens=6)
    assert len(later.token_ids) >= 6
    assert stop not in later.token_ids[:6]
    text = plain.text[2:5]
    assert len(complete(llm, stop=[text]).token_ids) < 6
    assert complete(llm, stop=[text], min_tokens=6).text.startswith(plain.text[:5])


def test_best_of_gives_the_likeliest(llm):
    params = SamplingParams(n=6, temperature=1.0, max_tokens=6, seed=1, logprobs=0, ignore_eos=True)
    drawn = llm.generate(PROMPT, params)[0].outputs

    def likelihood(sample_):
        return sum(
            entry[token].logprob for token, entry in zip(sample_.token_ids, sample_.logprobs)
        )

    expected = sorted(drawn, key=likelihood, reverse=True)[:2]
    best = llm.generate(
        PROMPT,
        SamplingParams(n=2, best_of=6, temperature=1.0, max_tokens=6, seed=1, ignore_eos=True),
    )
    assert [s.token_ids for s in best[0].outputs] == [s.token_ids for s in expected]
    assert [s.index for s in best[0].outputs] == [0, 1]


def test_penalties_do_not_depend_on_the_company(llm):
    """Rows with edits, beside rows without, give the tokens that each gives alone."""
    cases = [
        {"repetition_penalty": 1.5}, {}, {"frequency_penalty": 1.0, "temperature": 0.7, "seed": 4},
        {"bad_words": ["def"]}, {"allowed_token_ids": [4, 44, 444]}, {"presence_penalty": 2.0},
        {"min_tokens": 9},
    ]  # fmt: skip
    params = [
        SamplingParams(**({"temperature": 0, "max_tokens": 12, "ignore_eos": True} | case))
        for case in cases
    ]
    together = llm.generate([PROMPT] * len(cases), params, use_tqdm=False)
    for case, output in zip(cases, together):
        assert output.outputs[0].token_ids == complete(llm, **case).token_ids


def test_prompt_logprobs_and_logprobs_are_transformers(tiny, theirs):
    """The prompt is scored in several steps: it has more tokens than a step has rows of results.

    A long and a short prompt run together.
    """
    llm = LLM(
        tiny, max_num_seqs=4, max_num_batched_tokens=16, page_size=16, skip_tokenizer_init=True
    )
    asked = [np.random.default_rng(n).integers(3, 1000, n).tolist() for n in (31, 2, 9)]
    params = SamplingParams(
        temperature=0, max_tokens=6, logprobs=4, prompt_logprobs=4, ignore_eos=True, n=2
    )
    for _ in range(2):  # the second time the prompt is in the cache
        for prompt, output in zip(asked, llm.generate(asked, params, use_tqdm=False)):
            ids = [*prompt, *output.outputs[0].token_ids]
            with torch.inference_mode():
                exact = torch.log_softmax(
                    theirs(torch.tensor([ids])).logits[0].double(), -1
                ).numpy()
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(prompt)
            assert output.outputs[1].token_ids == output.outputs[0].token_ids
            found = output.prompt_logprobs[1:] + output.outputs[0].logprobs
            for row, (token, entries) in enumerate(zip(ids[1:], found, strict=True)):
                assert token in entries
                assert len(entries) in (4, 5)
                for id_, entry in entries.items():
                    assert abs(entry.logprob - exact[row, id_]) < 1e-4
                    assert abs(entry.rank - 1 - (exact[row] > exact[row, id_]).sum()) <= 1
                assert {*np.argsort(-exact[row])[:3].tolist()} <= entries.keys()
