"""Drafts of a language model with the same vocabulary: those of transformers, and plain outputs."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from slipway.engine.params import SamplingParams
from slipway.errors import InvalidConfig
from slipway.llm import LLM
from tests.engine.test_model_drafts import MIMO, OPTIONS, asked
from tests.engine.test_speculation import outputs_of, run
from tests.models.runner import Case, make_checkpoint, their_logits
from tests.models.test_models import CASES
from tests.models.test_mtp import drafts_of

pytestmark = pytest.mark.xdist_group("draft_lm")
PAGE = 16


@pytest.fixture(scope="module")
def expected():
    """Outputs of MiMo without drafts."""
    with LLM(MIMO, decode_steps=1, **OPTIONS) as llm:
        return run(llm, asked())


def drafting(model, count=3, directory=MIMO, **options):
    config = {"method": "draft_model", "model": str(model), "num_speculative_tokens": count}
    return LLM(directory, speculative_config=config, **OPTIONS, **options)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"decode_steps": 4},
        {"tensor_parallel_size": 2, "data_parallel_size": 2, "decode_steps": 2},
    ],
)
def test_a_model_that_drafts_for_itself_is_always_right(expected, sizes):
    """Also for sampled tokens, as drafts are drawn with the same random numbers."""
    plain = [p for p in asked() if p.params.repetition_penalty == 1 and not p.params.logit_bias]
    known = {tuple(r.prompt_token_ids): r.outputs[0].token_ids for r in expected}
    compared = 0
    with drafting(MIMO, page_size=PAGE, **sizes) as llm:
        speculation, before = llm.engine._speculation, llm.engine.num_compiled
        speculation.lengths.choose = lambda rates, most: most
        put = speculation.on_device.put

        def check(sequence, drafts):
            nonlocal compared
            prompt = tuple(sequence.tokens[: sequence.num_prompt].tolist())
            true = known[prompt][sequence.num_tokens - sequence.num_prompt :]
            # Behind the pages of a sequence a draft is a guess.
            room = len(sequence.pages) * PAGE - sequence.num_tokens
            count = max(0, min(len(true), room + 1 if room else 0))
            assert drafts[:count] == true[: len(drafts[:count])]
            compared += len(drafts[:count])
            put(sequence, drafts)

        speculation.on_device.put = check
        for dice in (None, random.Random(1)):
            got = run(llm, plain, dice)
            same = [one for one in expected if one.prompt_token_ids in [p.prompt for p in plain]]
            for one, other in zip(got, same):
                assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
                assert sizes.get("tensor_parallel_size") or outputs_of(one) == outputs_of(other)
        assert llm.engine.num_compiled == before
    assert compared > 40


def test_a_model_of_another_family(expected, tmp_path):
    """Outputs stay, with rules for logits too, as its drafts are mostly wrong."""
    make_checkpoint(Case("drafter", "llama", {"vocab_size": 512}), tmp_path)
    with drafting(tmp_path, decode_steps=2) as llm:
        llm.engine._speculation.lengths.choose = lambda rates, most: most
        got = run(llm, asked(), random.Random(2))
        llm.sleep()
        llm.wake_up()
        again = run(llm, asked(), random.Random(3))
    for each in (got, again):
        assert [outputs_of(one) for one in each] == [outputs_of(other) for other in expected]


@pytest.mark.parametrize("name", ["qwen3-window", "mixtral"])
def test_drafts_are_those_of_transformers(name, tmp_path):
    """Windows and experts are the draft model's own: the target has neither."""
    case = next(case for case in CASES if case.name == name)
    theirs = make_checkpoint(case, tmp_path / "drafter")
    make_checkpoint(Case("target", "qwen2", {"num_key_value_heads": 2}), tmp_path / "target")
    found = drafts_of(tmp_path / "target", method="draft_model", model=str(tmp_path / "drafter"))
    assert len(found) > 8
    for tokens, drafts in found:
        for count, draft in enumerate(drafts[: 1 + bool(len(tokens) % PAGE)]):
            logits = their_logits(theirs, [*tokens, *drafts[:count]])[-1]
            assert logits.max() - logits[draft] < 1e-3


def test_the_prefix_cache_serves_the_drafts_too(tiny):
    """Pages that sequences share hold the draft model's keys and values of the same tokens."""
    prompt = np.random.default_rng(3).integers(0, 500, 40).tolist()
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with drafting(tiny, directory=tiny, page_size=PAGE) as llm:
        llm.engine._speculation.lengths.choose = lambda rates, most: most
        llm.generate([prompt], params, use_tqdm=False)
        first = llm.engine.stats.spec_decode_num_accepted_tokens
        (second,) = llm.generate([[*prompt[:36], 7, 8, 9]], params, use_tqdm=False)
        assert second.num_cached_tokens == 32
        accepted = llm.engine.stats.spec_decode_num_accepted_tokens - first
        assert accepted >= first - 2 > 8


@pytest.fixture
def other_tokens(tiny, tmp_path):
    """The tiny model, with two tokens of its tokenizer exchanged."""
    directory = Path(shutil.copytree(tiny, tmp_path / "other"))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (one, first), (two, second) = list(vocab.items())[5:7]
    vocab[one], vocab[two] = second, first
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def test_models_of_another_vocabulary_are_refused(tiny, other_tokens, tmp_path):
    with pytest.raises(InvalidConfig, match="speculative_config: model: vocab_size"):
        drafting(MIMO, directory=tiny)
    with pytest.raises(InvalidConfig, match=r"tokenizer\.json: token \d+"):
        drafting(other_tokens, directory=tiny)
    with pytest.raises(InvalidConfig, match="speculative_config: model: got 'nothing'"):
        drafting("", directory=tiny)
    with pytest.raises(InvalidConfig, match="num_speculative_tokens"):
        drafting(tiny, count=64, directory=tiny)
