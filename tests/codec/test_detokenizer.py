"""Detokenizer against the decoding of all ids at once, cut by a naive search for stop strings."""

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from slipway.codec.detokenizer import Detokenizer, StopStrings
from slipway.codec.token_text import token_texts
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest, UnsupportedModel

THOROUGH = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
    """Any ids (invalid UTF-8, special tokens, ids beyond the vocabulary), or the ids of a text."""
    anything = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12)
    # bytes and special tokens, in vocabularies that have them
    low = st.lists(st.integers(0, 262), max_size=8)
    spaced = st.sampled_from(
        [tokenizer.encode(text, False) for text in (PROSE, PROSE[7:], "   the", " ", "😀")]
    )
    return [
        i for part in draw(st.lists(st.one_of(anything, low, spaced), max_size=4)) for i in part
    ]


def released(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@THOROUGH
@given(data=st.data(), skip=st.booleans(), include_stop=st.booleans())
def test_pieces_join_to_the_full_decode(tokenizer, data, skip, include_stop):
    ids = data.draw(ids_of(tokenizer))
    full = tokenizer.decode(ids, skip)
    spans = st.tuples(st.integers(0, len(full)), st.integers(1, 6)).map(
        lambda at: full[at[0] : at[0] + at[1]]
    )
    stop = data.draw(
        st.lists(st.one_of(spans, st.text("ae \ufffd", max_size=3)).filter(bool), max_size=3)
    )
    detokenizer = Detokenizer(tokenizer, stop, include_stop, skip)
    assert "".join(released(detokenizer, ids)) == detokenizer.text == cut(full, stop, include_stop)
    assert detokenizer.stopped == first_stop(full, stop)
    assert detokenizer.finish() == ""
    if detokenizer.stopped is not None:
        assert detokenizer.add(ids[0]) == ""


@THOROUGH
@given(data=st.data(), skip=st.booleans())
def test_follows_a_prompt(tokenizer, data, skip):
    """The oracle: the decoding of prompt and completion together, less that of the prompt."""
    prompt, ids = data.draw(ids_of(tokenizer)), data.draw(ids_of(tokenizer))
    before, full = tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *ids], skip)
    assume(full.startswith(before) and not is_unfinished(tokenizer, prompt, skip))
    assert (
        "".join(released(Detokenizer(tokenizer, (), False, skip, prompt=prompt), ids))
        == full[len(before) :]
    )


@THOROUGH
@given(data=st.data(), skip=st.booleans())
def test_a_text_can_be_cut_anywhere(tokenizer, data, skip):
    """The texts of prompt and completion, joined, are the whole text for every cut."""
    text = data.draw(st.text("ab é日😀", max_size=12))
    ids = tokenizer.encode(text)
    cut_at = data.draw(st.integers(0, len(ids)))
    stream = tokenizer.stream(skip)
    certain = "".join(stream.push(token) for token in ids[:cut_at])
    full = tokenizer.decode(ids, skip)
    told = "".join(
        released(Detokenizer(tokenizer, (), False, skip, prompt=ids[:cut_at]), ids[cut_at:])
    )
    assert full.endswith(told)
    assert len(told) <= len(full) - len(certain)
    if is_unfinished(tokenizer, ids[:cut_at], skip) or not full.startswith(
        tokenizer.decode(ids[:cut_at], skip)
    ):
        assert "\ufffd" not in told[:1] or "\ufffd" in full, (
            "the whole character is the completion's"
        )


def is_unfinished(tokenizer: Tokenizer, ids: list[int], skip: bool) -> bool:
    """Whether more bytes could complete the last character."""
    text = tokenizer.decode(ids, skip)
    tail = b"".join(
        tokenizer.token_bytes(i) for i in ids if not (skip and i in tokenizer.special_ids)
    )[-4:]
    ends = range(1, min(len(tail), 3) + 1)
    return text.endswith("\ufffd") and any(
        begins_character(tail[len(tail) - size :]) for size in ends
    )


def begins_character(tail: bytes) -> bool:
    """Whether these bytes, which begin with a lead byte, are an incomplete character."""
    fills = (b"\x80", b"\x90", b"\xa0", b"\xbf", b"\x9f", b"\x8f")
    size = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}.get(tail[0] >> 4, 0)
    if not len(tail) < size:
        return False
    for fill in fills:
        try:
            (tail + fill + b"\x80" * (size - len(tail) - 1)).decode()
        except UnicodeDecodeError:
            continue
        return True
    return False


SPACED = [
    ("byte_fallback", "it", "▁the"),
    ("metaspace", "it", "▁the"),
    ("metaspace_first", "it", "▁the"),
    ("metaspace_never", "it", "▁the"),
    ("word_piece", "it", "the"),
    ("no_decoder", "it", "the"),
]


@pytest.mark.parametrize(("name", "prompt", "token"), SPACED)
def test_the_first_token_keeps_its_space(directories, name, prompt, token):
    tokenizer = Tokenizer.load(directories[name])
    word = tokenizer.raw.token_to_id(token)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert "".join(released(Detokenizer(tokenizer, prompt=ids), [word, word])) == " the the"
    stopped = Detokenizer(tokenizer, [" the"], prompt=ids)
    assert "".join(released(stopped, [word])) == ""
    assert stopped.stopped == " the"
    if tokenizer.bos_token_id is not None:  # which has no text: the completion is all of it
        assert (
            "".join(released(Detokenizer(tokenizer, prompt=[tokenizer.bos_token_id]), [word]))
            == "the"
        )


def test_half_a_character_of_the_prompt_is_the_completions(directories):
    for name, spelling in (
        ("byte_level", "ðŁĳį"),
        ("byte_fallback", [f"<0x{byte:02X}>" for byte in "👍".encode()]),
    ):
        tokenizer = Tokenizer.load(directories[name])
        emoji = [tokenizer.raw.token_to_id(token) for token in spelling]
        prompt = tokenizer.encode("it")
        for cut_at in (1, 2, 3):
            found = released(
                Detokenizer(tokenizer, prompt=[*prompt, *emoji[:cut_at]]), emoji[cut_at:]
            )
            assert "".join(found) == "👍"
        assert "".join(released(Detokenizer(tokenizer, prompt=[*prompt, *emoji]), emoji)) == "👍"


def test_a_bad_byte_leaves_the_prompts_characters_alone(directories):
    tokenizer = Tokenizer.load(directories["byte_fallback"])
    good = [tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    bad = tokenizer.raw.token_to_id("<0xFF>")
    assert "".join(released(Detokenizer(tokenizer, prompt=good), [bad, bad])) == "\ufffd\ufffd"
    assert "".join(released(Detokenizer(tokenizer, prompt=[bad]), good)) == "\ufffd\ufffd", (
        "as the full decode has it"
    )


@THOROUGH
@given(data=st.data())
def test_bytes_of_tokens_join_to_the_text(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    prompt = [
        next(
            i for i in range(tokenizer.vocab_size) if tokenizer.decode([i], False).strip(" \ufffd")
        )
    ]
    before, full = tokenizer.decode(prompt, False), tokenizer.decode([*prompt, *ids], False)
    joined = b"".join(map(tokenizer.token_bytes, ids))
    assume("\ufffd" not in full)
    assert joined.decode() == full[len(before) :]


def test_bytes_of_single_tokens(directories):
    wanted = {
        "byte_fallback": {
            "<0xF0>": b"\xf0",
            "▁the": b" the",
            "t": b"t",
            "▁": b" ",
            "</s>": b"</s>",
        },
        "metaspace": {"▁the": b" the", "</s>": b"</s>"},
        "word_piece": {"##ing": b"ing", "the": b" the"},
        "byte_level": {
            "Ġthe": b" the",
            "ð": b"\xf0",
            "naïve tag": "naïve tag".encode(),
            "<|im_end|>": b"<|im_end|>",
        },
    }
    for name, tokens in wanted.items():
        tokenizer = Tokenizer.load(directories[name])
        assert {
            token: tokenizer.token_bytes(tokenizer.raw.token_to_id(token)) for token in tokens
        } == tokens


@THOROUGH
@given(data=st.data())
def test_holds_back_only_what_is_undecided(tokenizer, data):
    """Without byte tokens, only an end that may begin a stop string is held back."""
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
    # the bytes of one character, one token each
    emoji = [tokenizer.raw.token_to_id(token) for token in "ðŁĳį"]
    assert [detokenizer.add(i) for i in emoji] == ["", "", "", "👍"]
    assert detokenizer.add(emoji[0]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_run_of_byte_tokens_waits_for_its_last(directories):
    tokenizer = Tokenizer.load(directories["byte_fallback"])
    good = [tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    word = tokenizer.raw.token_to_id("▁the")
    assert released(Detokenizer(tokenizer), [*good, word]) == ["", "", "é the", ""]
    assert released(Detokenizer(tokenizer), [*good, good[0], word]) == [
        "",
        "",
        "",
        "\ufffd\ufffd\ufffd the",
        "",
    ]
    assert released(Detokenizer(tokenizer), [good[0], tokenizer.eos_token_id, good[1]]) == [
        "",
        "",
        "",
        "é",
    ]


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
        token_texts(raw, skip_special_tokens=True)


@THOROUGH
@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    text=st.text("abc", max_size=20),
)
def test_automaton(stop, text):
    stops = StopStrings(stop)
    state, end = stops.advance(0, text)
    found = first_stop(text, stop)
    assert (found is None) == (end is None)
    if end is not None:
        assert stops.complete[state] == found
        assert end == text.index(found) + len(found)
