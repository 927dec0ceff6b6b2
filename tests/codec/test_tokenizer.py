"""Tokenizer against transformers' AutoTokenizer on the same directories, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import CheckpointError, InvalidRequest

TEXTS = [
    "",
    " ",
    "Return a list of names.",
    "  two  spaces\n\ttab",
    "déjà vu 日本 😀",
    "a<|im_end|>b </s><s> <think> <soft>▁the",
]
FAST = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def reference(directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def editable(directories: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(directories["byte_fallback"], tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_equal(directory: Path) -> Tokenizer:
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert {i: str(token) for i, token in ours.raw.get_added_tokens_decoder().items()} == {
        i: str(token) for i, token in theirs.added_tokens_decoder.items()
    }
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    return ours


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_as_transformers(tokenizer, reference, add_special_tokens):
    expected = [reference.encode(text, add_special_tokens=add_special_tokens) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS, add_special_tokens) == expected
    assert [tokenizer.encode(text, add_special_tokens) for text in TEXTS] == expected


@FAST
@given(data=st.data(), skip=st.booleans())
def test_decodes_as_transformers(tokenizer, reference, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


def test_settings_as_transformers(directory, tokenizer, reference):
    assert_equal(directory)
    assert tokenizer.special_ids == set(reference.all_special_ids) | {
        i for i, token in reference.added_tokens_decoder.items() if token.special
    }
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.eos_token_ids == {reference.eos_token_id}


@pytest.mark.parametrize("add", [False, True])
def test_add_bos_token_of_the_config_says_nothing(editable, add):
    edit_config(editable, add_bos_token=add, add_eos_token=add)
    assert_equal(editable)


def test_tokens_that_only_the_config_declares(editable):
    raw = tokenizers.Tokenizer.from_file(str(editable / "tokenizer.json"))
    raw.add_tokens(["<soft>"])  # ordinary here, special in the config: stays ordinary
    raw.save(str(editable / "tokenizer.json"))
    size = Tokenizer.load(editable).vocab_size
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    edit_config(
        editable,
        eos_token={"__type": "AddedToken", "content": "<end>", "special": True, **flags},
        pad_token="<soft>",
        added_tokens_decoder={str(size): {"content": "<tool>", "special": False, **flags}},
        extra_special_tokens=["▁the", "<extra>", "<soft>"],
    )
    tokenizer = assert_equal(editable)
    assert tokenizer.decode(tokenizer.encode("x <tool><end><extra>")) == "x <tool>"


def test_generation_config_adds_ends(editable):
    (editable / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    tokenizer = Tokenizer.load(editable)
    assert tokenizer.eos_token_ids == {5, 7, tokenizer.eos_token_id}


def test_saved_limits_do_not_cut_or_pad(editable):
    raw = tokenizers.Tokenizer.from_file(str(editable / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    raw.save(str(editable / "tokenizer.json"))
    ids = Tokenizer.load(editable).encode("Return a list of the names.")
    assert len(ids) > 3
    assert ids[-1] != 0


def named(directory: Path) -> dict[str, str]:
    """The templates as transformers reads them, by name."""
    found = AutoTokenizer.from_pretrained(directory).chat_template
    return {"default": found} if isinstance(found, str) else found or {}


def test_template_sources(editable):
    """Files alone count where there is one; a model without a "default" loads all the same."""
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit_config(editable, chat_template=several)
    folder = editable / "additional_chat_templates"
    folder.mkdir()
    (folder / "notes.txt").write_text("no template")
    own = (editable / "chat_template.jinja").read_text()
    assert Tokenizer.load(editable).chat_templates == named(editable) == {"default": own}
    (folder / "v1.rag.jinja").write_text("documents")
    assert (
        Tokenizer.load(editable).chat_templates
        == named(editable)
        == {"default": own, "v1.rag": "documents"}
    )
    (editable / "chat_template.jinja").unlink()
    assert Tokenizer.load(editable).chat_templates == named(editable) == {"v1.rag": "documents"}
    assert Tokenizer.load(editable).chat_template is None
    shutil.rmtree(folder)
    assert (
        Tokenizer.load(editable).chat_templates
        == named(editable)
        == {"default": "plain", "tool_use": "tools"}
    )
    assert Tokenizer.load(editable).chat_template == "plain"
    edit_config(editable, chat_template=several[:1])
    assert Tokenizer.load(editable).chat_templates == named(editable) == {"tool_use": "tools"}
    edit_config(editable, chat_template={"rag": "documents"})
    assert Tokenizer.load(editable).chat_templates == named(editable) == {"rag": "documents"}
    edit_config(editable, chat_template=None)
    assert Tokenizer.load(editable).chat_templates == named(editable) == {}
    (editable / "chat_template.json").write_text('{"chat_template": "as processors save it"}')
    assert Tokenizer.load(editable).chat_template == "as processors save it"


def test_templates_that_are_none_are_all_named(editable):
    (editable / "chat_template.jinja").unlink()
    edit_config(
        editable, chat_template=[{"name": "default"}, {"name": "rag", "template": "fine"}, "text"]
    )
    with pytest.raises(CheckpointError, match=r"(?s)chat_template\[0\]: .*chat_template\[2\]: "):
        Tokenizer.load(editable)
    edit_config(editable, chat_template=7)
    with pytest.raises(CheckpointError, match="got int, expected a string or named"):
        Tokenizer.load(editable)


def test_missing_or_broken_files_are_all_named(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.model is not supported.*save_pretrained"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="prompt"):
        tokenizer.encode("half \ud83d")


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
