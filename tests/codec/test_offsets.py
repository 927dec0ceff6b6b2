"""Offsets of tokens against the decoded text before each token, and against whole characters."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipway.codec.offsets import Offsets
from slipway.codec.tokenizer import Tokenizer

THOROUGH = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.text("ab the,日é😀 \n", max_size=20)


def offsets_of(
    tokenizer: Tokenizer, ids: list[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[int]:
    offsets = Offsets(tokenizer.token_texts(skip), prompt)
    return [at for found in [*map(offsets.push, ids), offsets.finish()] for at in found]


@THOROUGH
@given(data=st.data(), skip=st.booleans())
def test_an_offset_is_the_length_of_the_text_before(tokenizer, data, skip):
    anything = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=10)
    ids = data.draw(st.one_of(anything, TEXTS.map(tokenizer.encode)))
    full = tokenizer.decode(ids, skip)
    found = offsets_of(tokenizer, ids, skip=skip)
    assert len(found) == len(ids)
    assert found == sorted(found)
    assert all(0 <= at <= len(full) for at in found)
    for number, at in enumerate(found):
        before = tokenizer.decode(ids[:number], skip)
        # an invalid byte makes U+FFFD of every byte token before it, also of a space at the start,
        # which is stripped otherwise
        token = tokenizer.raw.id_to_token(ids[number - 1]) if number else ""
        is_replaced = (token or "").startswith("<0x") and full.startswith("\ufffd", len(before))
        if full.startswith(before) and not before.endswith("\ufffd") and not is_replaced:
            assert at == len(before)


@THOROUGH
@given(data=st.data())
def test_offsets_behind_a_prompt_are_those_of_both_less_the_prompts(tokenizer, data):
    ids = tokenizer.encode(data.draw(TEXTS))
    cut_at = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.decode(ids)
    prompt_text = tokenizer.token_texts(True).prompt_text(ids[:cut_at])
    assert whole.startswith(prompt_text)
    rest = [at - len(prompt_text) for at in offsets_of(tokenizer, ids)[cut_at:]]
    assert offsets_of(tokenizer, ids[cut_at:], ids[:cut_at]) == rest


@THOROUGH
@given(data=st.data())
def test_a_token_within_a_character_has_the_characters_offset(directories, data):
    for name in ("byte_level", "byte_fallback"):
        tokenizer = Tokenizer.load(directories[name])
        ids = tokenizer.encode(
            data.draw(st.text("a日😀", min_size=1, max_size=8)), add_special_tokens=False
        )
        text, place, wanted = tokenizer.decode(ids), 0, []
        ends = [len(text[: n + 1].encode()) for n in range(len(text))]
        stripped = len(b"".join(map(tokenizer.token_bytes, ids))) - len(text.encode())
        for token in ids:
            wanted.append(sum(end <= max(0, place - stripped) for end in ends))
            place += len(tokenizer.token_bytes(token))
        assert offsets_of(tokenizer, ids) == wanted


def test_offsets_wait_only_for_what_may_change_them(directories):
    tokenizer = Tokenizer.load(directories["byte_fallback"])
    first, *others = (tokenizer.raw.token_to_id(f"<0x{byte:02X}>") for byte in "日".encode())
    word, bad = tokenizer.raw.token_to_id("▁the"), tokenizer.raw.token_to_id("<0xFF>")
    offsets = Offsets(tokenizer.token_texts(True), [word], start=7)
    assert [*map(offsets.push, [first, *others, first, *others])] == [[]] * 6
    assert offsets.push(word) == [7, 7, 7, 8, 8, 8, 9]
    assert offsets.push(word) == [13]
    assert offsets.push(first) == []
    assert offsets.push(bad) == []
    assert offsets.finish() == [17, 18]


@pytest.mark.parametrize(
    "text", ["it is", "a<|im_end|>b</s>c", "日</s>é is", " 😀  [SEP] the names", "  two\n"]
)
def test_offsets_of_a_prompts_tokens_are_in_its_text(tokenizer, text):
    """An added token has no width; a token with a text of its own is found at its offset."""
    ids, found = tokenizer.encode(text), tokenizer.offsets(text)
    assert len(found) == len(ids)
    assert found == sorted(found)
    assert all(0 <= at <= len(text) for at in found)
    for at, token in zip(found, ids):
        told = tokenizer.decode([token], skip_special_tokens=False).strip()
        if told and told in text and token not in tokenizer.special_ids:
            assert text[at:].lstrip().startswith(told)


def test_offsets_of_added_tokens(directories):
    tokenizer = Tokenizer.load(directories["byte_fallback"])
    assert tokenizer.offsets("日")[:5] == [0, 0, 0, 0, 0], "<s>, ▁ and three bytes"
    word_piece = Tokenizer.load(directories["word_piece"])
    assert (word_piece.offsets("the the")[0], word_piece.offsets("the the")[-1]) == (0, 7)
