"""Detokenizer against the decoding of all ids at once, cut by a search that reads the text character by character."""

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from slipway.codec.detokenizer import Detokenizer, StopStrings
from slipway.codec.pieces import pieces
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest, UnsupportedModel

THOROUGH = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
PROSE = "Return the names. \n\n 日本 déjà vu 😀😀 <|im_end|></s>  indented, the end of the text"


def first_stop(text: str, stop: list[str]) -> str | None:
    """The longest stop string at the first character where any is complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return max(complete, key=len)
    return None


def cut(text: str, stop: list[str], include_stop: bool) -> str:
    found = first_stop(text, stop)
    if found is None:
        return text
    return text[: text.index(found) + (len(found) if include_stop else 0)]


@st.composite
def ids_of(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Any ids: bytes that are no UTF-8, special tokens anywhere, ids beyond the vocabulary; or ids of text."""
    anything = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12)
    low = st.lists(st.integers(0, 262), max_size=8)  # bytes and special tokens, where there are such
    spaced = st.sampled_from([tokenizer.encode(text, False) for text in (PROSE, PROSE[7:], "   the", " ", "😀")])
    return [i for part in draw(st.lists(st.one_of(anything, low, spaced), max_size=4)) for i in part]


def released(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@THOROUGH
@given(data=st.data(), skip=st.booleans(), include_stop=st.booleans())
def test_pieces_join_to_the_full_decode(tokenizer, data, skip, include_stop):
    ids = data.draw(ids_of(tokenizer))
    full = tokenizer.decode(ids, skip)
    spans = st.tuples(st.integers(0, len(full)), st.integers(1, 6)).map(lambda at: full[at[0] : at[0] + at[1]])
    stop = data.draw(st.lists(st.one_of(spans, st.text("ae \ufffd", max_size=3)).filter(bool), max_size=3))
    detokenizer = Detokenizer(tokenizer, stop, include_stop, skip)
    assert "".join(released(detokenizer, ids)) == detokenizer.text == cut(full, stop, include_stop)
    assert detokenizer.stopped == first_stop(full, stop)
    assert detokenizer.finish() == "" and (detokenizer.stopped is None or detokenizer.add(ids[0]) == "")


@THOROUGH
@given(data=st.data())
def test_holds_back_only_what_is_undecided(tokenizer, data):
    """Without byte tokens nothing is pending, so what is missing is just the tail that a stop string could claim."""
    ids = tokenizer.encode(data.draw(st.text("thear ", max_size=30)), False)
    stop = data.draw(st.lists(st.text("the ", min_size=1, max_size=4), max_size=3))
    detokenizer = Detokenizer(tokenizer, stop)
    for n, token_id in enumerate(ids, start=1):
        detokenizer.add(token_id)
        text = tokenizer.decode(ids[:n])
        if detokenizer.stopped is not None:
            break
        tails = [text[i:] for i in range(len(text)) if any(s.startswith(text[i:]) for s in stop)]
        assert detokenizer.text + max(tails, key=len, default="") == text


def test_characters_come_whole(directories):
    tokenizer = Tokenizer.load(directories["byte_level"])
    detokenizer = Detokenizer(tokenizer)
    emoji = [tokenizer.raw.token_to_id(token) for token in "ðŁĳį"]  # the bytes of one character, one token each
    assert [detokenizer.add(i) for i in emoji] == ["", "", "", "👍"]
    assert detokenizer.add(emoji[0]) == "" and detokenizer.finish() == "\ufffd"


def test_a_run_of_byte_tokens_waits_for_its_last(directories):
    tokenizer = Tokenizer.load(directories["byte_fallback"])
    good = [tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    word = tokenizer.raw.token_to_id("▁the")
    assert released(Detokenizer(tokenizer), [*good, word]) == ["", "", "é the", ""]
    assert released(Detokenizer(tokenizer), [*good, good[0], word]) == ["", "", "", "\ufffd\ufffd\ufffd the", ""]
    assert released(Detokenizer(tokenizer), [good[0], tokenizer.eos_token_id, good[1]]) == ["", "", "", "é"]


@pytest.mark.parametrize("stop", [[""], ["a", ""], "ab"])
def test_unusable_stop_is_refused(tokenizer, stop):
    with pytest.raises(InvalidRequest, match="stop"):
        Detokenizer(tokenizer, stop)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        decoders.Strip(" ", 0, 1),
        decoders.Replace("ab", "c"),
        decoders.Replace(tokenizers.Regex(" +"), " "),
    ],
)
def test_decoders_that_look_ahead_are_refused(decoder):
    raw = tokenizers.Tokenizer(models.BPE())
    raw.decoder = decoder
    with pytest.raises(UnsupportedModel, match="decoder"):
        pieces(raw, skip_special_tokens=True)


@THOROUGH
@given(stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4), text=st.text("abc", max_size=20))
def test_automaton(stop, text):
    stops = StopStrings(stop)
    state, end = stops.advance(0, text)
    found = first_stop(text, stop)
    assert (found is None) == (end is None)
    if end is not None:
        assert stops.complete[state] == found and end == text.index(found) + len(found)
