"""Drafts from repeated text, the number of drafts that pay, and the options of speculation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.engine.batch import Bucket
from slipway.engine.config import EngineConfig
from slipway.engine.drafts.lengths import CALLS, STALE, WEIGHT, Lengths, chances, observe
from slipway.engine.drafts.ngram import NgramDrafter
from slipway.engine.drafts.speculation import Speculation
from slipway.engine.params import SamplingParams
from slipway.engine.request import FinishReason, Request, RequestSpec, Sequence
from slipway.engine.results import Dispatched
from slipway.engine.scheduler import Chunk
from slipway.errors import InvalidConfig

pytestmark = pytest.mark.host
CANDIDATES = 32


def sequence_of(tokens, room=100, salt=""):
    request = Request("0", RequestSpec(list(tokens), SamplingParams(), cache_salt=salt), room)
    return Sequence(request, 0, 0, frozenset(), None)


def best_match(text, ending, shortest, longest, own):
    """Return (length, position of its last token) of the longest match, of equal ones the newest.

    Written from the definition: every position after which the last 3 tokens recur, or the last 2,
    or the last one, but not fewer than ``shortest``.
    """
    for run in range(max(shortest, min(3, longest)), shortest - 1, -1):
        if (found := best_of_run(text, ending, run, longest, own))[0]:
            return found
    return (0, -1)


def best_of_run(text, ending, shortest, longest, own):
    best = (0, -1)
    if len(ending) < shortest:
        return best
    ends = range(len(text) - 1 - own, shortest - 2, -1)
    ends = [e for e in ends if text[e + 1 - shortest : e + 1] == ending[-shortest:]][:CANDIDATES]
    for end in ends:
        length = 0
        while (
            length < min(longest, len(ending), end + 1)
            and text[end - length] == ending[-1 - length]
        ):
            length += 1
        if length > best[0]:
            best = length, end
    return best


def expected_draft(own, shared, shortest, longest, most):
    found = [(*best_match(own, own, shortest, longest, True), own)]
    found += [(*best_match(text, own, shortest, longest, False), text) for text in shared]
    length, end, text = max(found, key=lambda match: match[0])
    if not length:
        return [], 0
    continued = list(text[end + 1 :])
    if text is own:
        while len(continued) < most:
            continued.append(continued[len(continued) - (len(own) - 1 - end)])
    draft = continued[:most]
    return draft[: draft.index(-1)] if -1 in draft else draft, length


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=120),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    shortest=st.integers(1, 4),
    more=st.integers(0, 8),
    most=st.integers(1, 9),
    outputs=st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=3),
)
def test_a_draft_follows_the_longest_and_newest_match(text, pieces, shortest, more, most, outputs):
    longest = shortest + more
    drafter = NgramDrafter(shortest, longest, most, shared_tokens=10_000)
    shared = []
    for output in outputs:
        ended = sequence_of([0], room=len(output) + 1)
        for token in output:
            ended.append(token, None)
        drafter.end(ended)
        shared += [*output, -1]
    text = [0, *text]
    sequence = sequence_of(text[:1], room=len(text) + 5)
    for size in [1, *pieces]:
        for token in text[sequence.num_tokens :][: size - 1]:
            sequence.append(token, None)
        (draft,) = drafter.draft([sequence])
        own = text[: sequence.num_tokens]
        assert draft == expected_draft(own, [shared, []], shortest, longest, most)


def test_rows_of_a_batch_do_not_mix():
    texts = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 8], [9, 9, 9, 9], [1, 2, 3, 7, 1, 2, 3]]
    drafter = NgramDrafter(2, 8, 4)
    rows = [sequence_of(text) for text in texts]
    drafts = [([4, 1, 2, 3], 3), ([], 0), ([9, 9, 9, 9], 3), ([7, 1, 2, 3], 3)]
    assert drafter.draft(rows) == drafts
    assert drafter.draft(rows[3:]) == drafts[3:]


def test_outputs_of_salted_requests_are_not_shared():
    drafter = NgramDrafter(2, 8, 4, shared_tokens=100)
    for number, salt in enumerate(["secret", ""]):
        ended = sequence_of([0], salt=salt)
        for token in (number, 11, 12, 13 + number):
            ended.append(token, None)
        drafter.end(ended)
    assert drafter.draft([sequence_of([11, 12])]) == [([14], 2)]


def test_shared_outputs_are_forgotten_in_time():
    drafter = NgramDrafter(2, 8, 4, shared_tokens=40)
    for number in range(60):
        ended = sequence_of([0])
        for token in (100 + number, 200 + number, 300 + number):
            ended.append(token, None)
        drafter.end(ended)
    found = [drafter.draft([sequence_of([100 + n, 200 + n])])[0][0] for n in range(60)]
    assert found[-5:] == [[300 + n] for n in range(55, 60)]
    assert found[:45] == [[]] * 45
    assert sum(len(index) for index in found) < 15


def chosen(lengths, rates, most):
    """Choose the numbers of drafts of rows, each with one rate of acceptance."""
    most = np.array(most)
    return lengths.choose(chances(np.array(rates)[:, None], np.zeros_like(most), most), most)


def lengths_with(plain_s, of_tokens, rows=1, num_steps=1):
    """Return Lengths that have measured plain steps, and steps that verify drafts."""
    lengths = Lengths()
    assert not chosen(lengths, [0.9] * rows, [4] * rows).any(), "nothing is measured"
    for _ in range(CALLS):
        lengths.plain(rows, num_steps, plain_s)
        for num_tokens, seconds in of_tokens.items():
            lengths.drafted(rows, num_tokens, new_tokens=rows, seconds=seconds)
    return lengths


def one(lengths, rate, most=7):
    (count,) = chosen(lengths, [rate], [most]).tolist()
    return count


def test_free_drafts_are_all_verified():
    assert one(lengths_with(1.0, {2: 1.0, 4: 1.0, 8: 1.0}), 0.95) == 7


def test_drafts_that_cost_too_much_are_not_verified():
    lengths = lengths_with(1.0, {2: 1.9, 4: 3.7, 8: 7.0})
    assert one(lengths, 0.8) == 0
    assert one(lengths, 0.99) == 7


def test_rows_that_accept_more_get_more_drafts():
    lengths = lengths_with(1.0, {8: 1.5, 16: 1.7, 32: 3.0}, rows=4)
    counts = chosen(lengths, [0.95, 0.7, 0.3, 0.05], [6, 6, 6, 6])
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] >= 3 > counts[2]
    assert counts[3] == 0


def test_calls_of_several_steps_are_compared_by_their_tokens():
    lengths = lengths_with(1.0, {2: 0.9, 4: 0.9, 8: 0.9}, num_steps=8)
    assert one(lengths, 0.9) == 0, "8 tokens in 1 s, 5.7 in 0.9 s"
    assert one(lengths, 0.99) == 7, "7.7 in 0.9 s"


def test_numbers_of_drafts_are_tried():
    assert one(lengths_with(1.0, {}), 0.95) == 7


def test_trials_that_lose_become_rare():
    lengths = lengths_with(1.0, {})
    trials, calls = 0, 3000
    for call in range(calls):
        # No number of tokens is tried twice in a row, so none is ever measured.
        most = 1 + call % 60
        count = one(lengths, 0.99, most)
        if count:
            trials += 1
            lengths.drafted(1, 1 + count, new_tokens=1, seconds=10.0)
            lengths._drafted.clear()
        else:
            lengths.plain(1, 1, 1.0)
    assert trials >= 2
    assert 9 * trials <= 0.012 * calls + 5 + 9


def test_the_first_call_of_a_program_does_not_count():
    lengths = lengths_with(1.0, {2: 1.0, 4: 1.0})
    for seconds in (100.0, 2.0, 2.0):
        lengths.drafted(1, 8, new_tokens=8, seconds=seconds)
    assert one(lengths, 0.95) == 7


def test_a_pause_of_the_host_is_forgotten():
    lengths = lengths_with(1.0, {2: 1.0, 4: 1.0, 8: 2.0})
    for seconds in (1000.0, 2.0):
        lengths.drafted(1, 8, new_tokens=8, seconds=seconds)
    assert one(lengths, 0.95) == 7


def test_times_are_measured_again():
    lengths = lengths_with(1.0, {2: 10.0, 4: 10.0, 8: 10.0})
    assert one(lengths, 0.99) == 0
    for _ in range(20 * STALE):
        lengths.plain(1, 1, 1.0)
    assert one(lengths, 0.99) == 7


def test_a_longer_match_is_trusted_further():
    """A draft's chance is the product of rates that grow by one token of match each."""
    rates = np.array([[0.0, 0.5, 0.8, 1.0]] * 3)
    found = chances(rates, basis=np.array([1, 2, 3]), most=np.array([4, 4, 2]))
    expected = [[0.5, 0.4, 0.4, 0.4], [0.8, 0.8, 0.8, 0.8], [1.0, 1.0, 0.0, 0.0]]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("drafts", "tokens", "trials"),
    [
        ([1, 2, 3], [1, 2, 3], [1, 1, 1]),
        ([1, 2, 3], [1, 5, 3], [1, 0]),
        ([1, 2], [1], [1]),
        ([], [1, 2], []),
    ],
)
def test_each_draft_up_to_the_first_wrong_one_is_a_trial(drafts, tokens, trials):
    rates = np.full(5, 0.5)
    observe(rates, 3, drafts, tokens=tokens)
    expected = np.full(5, 0.5)
    for at, trial in zip((3, 4, 4), trials):
        expected[at] += WEIGHT * (trial - expected[at])
    np.testing.assert_allclose(rates, expected)


def step_of(sequence):
    chunk = Chunk(sequence, sequence.num_tokens - 2, 1, samples=True)
    return Dispatched(
        [[chunk]],
        Bucket(2, 2),
        num_steps=1,
        sampled=None,
        x_TD=None,
        drafts_BK=None,
        num_drafts=0,
        at=0.0,
        follows=True,
    )


def test_a_row_learns_while_its_drafts_are_not_used():
    speculation = Speculation(NgramDrafter(2, 8, 4))
    sequence = sequence_of([1, 2, 3, 1, 2])
    speculation.propose([sequence])
    assert sequence.drafts == [], "no time is measured"
    # The match of two tokens has the basis 2.
    before = speculation._rows[sequence].rates[2]
    sequence.append(3, None)
    speculation.observe(step_of(sequence), 1, seconds=1.0)
    assert speculation._rows[sequence].rates[2] > before
    before = speculation._rows[sequence].rates[3]
    sequence.append(7, None)
    speculation.observe(step_of(sequence), 1, seconds=1.0)
    assert speculation._rows[sequence].rates[3] < before
    sequence.finish(FinishReason.STOP)
    speculation.end(sequence)
    assert not speculation._rows


NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"method": "magic"}, "method", "ngram"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens", "1 to 64"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens", "1 to 64"),
        ({"prompt_lookup_min": 0}, "prompt_lookup_min", "1 to 256"),
        (
            {"prompt_lookup_min": 9, "prompt_lookup_max": 2},
            "prompt_lookup_max",
            "at least prompt_lookup_min",
        ),
        ({"shared_tokens": -1}, "shared_tokens", "from 0"),
        ({"draft_sample_method": "greedy"}, "draft_sample_method", "no such field"),
    ],
)
def test_invalid_options_are_named(given, field, expected):
    with pytest.raises(InvalidConfig) as caught:
        EngineConfig(speculative_config=NGRAM | given)
    assert f"speculative_config: {field}" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("missing", ["method", "num_speculative_tokens"])
def test_missing_options_are_named(missing):
    with pytest.raises(InvalidConfig, match=f"speculative_config: {missing}"):
        EngineConfig(speculative_config={k: v for k, v in NGRAM.items() if k != missing})


def test_it_must_be_a_mapping():
    with pytest.raises(InvalidConfig, match="speculative_config"):
        EngineConfig(speculative_config="ngram")


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr("slipway.native.library", lambda: None)
    with pytest.raises(InvalidConfig, match="without a C\\+\\+ compiler"):
        NgramDrafter(2, 8, 4)
