"""Choice among several named chat templates, and refused requests, without an engine."""

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from slipway.codec.tokenizer import Tokenizer
from slipway.engine.params import SamplingParams
from slipway.errors import InvalidConfig, InvalidRequest
from slipway.llm import LLM, NANO
from slipway.server import schema
from slipway.server.app import App
from slipway.server.chat import ChatHandler
from slipway.server.config import ServerConfig
from slipway.server.serve import chat_templates
from slipway.server.service import Service

PLAIN = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}{{ documents }}<think>"
)
USE = "{{ tools | length }} <tool_call> {% for m in messages %}{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}},
    }
]
LIMITS = {"max_model_len": 100, "max_logprobs": 5, "vocab_size": 1000}


class Engine:
    """Fake replica with all that a chat reads before it runs."""

    serves = True
    info = SimpleNamespace(limits=LIMITS, defaults={})


def service(templates):
    engine = Engine()
    return Service(
        ServerConfig(),
        "nano",
        Tokenizer.load(Path(NANO)),
        templates,
        [engine],
        Path(),
        tokenizer_config={},
    )


def prepared(service, **fields):
    handler = ChatHandler(service, schema.Chat(messages=CHAT, **fields), None)
    asyncio.run(handler.prepare())
    return handler


def refused(service, **fields):
    with pytest.raises(InvalidRequest) as caught:
        prepared(service, **fields)
    return caught.value


def test_a_chat_with_tools_uses_the_template_for_tools():
    several = service({"default": PLAIN, "tool_use": USE})
    handler = prepared(several, tools=TOOLS)
    assert handler.prompt.text == "1 <tool_call> hi"
    assert handler.tools.family.calls is not None
    assert prepared(several, tools=TOOLS, tool_choice="none").prompt.text == "1 <tool_call> hi"
    old = [tool["function"] for tool in TOOLS]
    assert prepared(several, functions=old).prompt.text == "1 <tool_call> hi"
    for fields in ({}, {"tools": []}):
        plain = prepared(several, **fields)
        assert plain.prompt.text == "hiNone<think>"
        assert plain.tools.family.thinking is not None


def test_options_are_checked_against_the_chosen_template():
    """Only PLAIN supports effort and documents; only USE supports tools."""
    several = service({"default": PLAIN, "tool_use": USE})
    assert prepared(several, reasoning_effort="none").prompt.text == "hiFalseNone<think>"
    assert "one" in prepared(several, documents=[{"text": "one"}]).prompt.text
    assert refused(several, reasoning_effort="none", tools=TOOLS).field == "reasoning_effort"
    assert refused(several, documents=[{"text": "one"}], tools=TOOLS).field == "documents"
    assert refused(service({"default": PLAIN, "rag": USE}), tools=TOOLS).field == "tools"
    assert several.features["tools"]
    assert several.features["documents"]
    assert several.features["chat"]


def test_without_a_default_template_the_error_lists_the_names():
    tools_only, other = service({"tool_use": USE, "rag": PLAIN}), service({"rag": PLAIN})
    assert prepared(tools_only, tools=TOOLS).prompt.text == "1 <tool_call> hi"
    for error in (refused(tools_only), refused(other), refused(other, tools=TOOLS)):
        assert error.field == "messages"
        assert "rag" in error.expected
        assert "--chat-template" in error.expected
    assert "rag, tool_use" in refused(tools_only).expected
    assert tools_only.features["chat"]
    assert not other.features["chat"]


def test_tokenize_uses_the_template_of_the_chat():
    several, tokenizer = service({"default": PLAIN, "tool_use": USE}), Tokenizer.load(Path(NANO))
    for kwargs, text in ({}, "hiNone<think>"), ({"tools": TOOLS}, "1 <tool_call> hi"):
        body = schema.Tokenize(messages=CHAT, chat_template_kwargs=kwargs)
        found = asyncio.run(App(several).tokenize(body, None))
        assert tokenizer.decode(found["tokens"], skip_special_tokens=False) == text


def test_tokenizer_info_lists_the_templates():
    listed = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": USE}]
    assert service({"default": PLAIN, "tool_use": USE}).tokenizer_info()["chat_template"] == listed
    assert service({"default": PLAIN}).tokenizer_info()["chat_template"] == PLAIN
    assert "chat_template" not in service({}).tokenizer_info()


def test_chat_template_option_is_a_file_or_a_name(tmp_path):
    own = {"default": PLAIN, "tool_use": USE, "rag": "documents"}
    (tmp_path / "mine.jinja").write_text("mine")
    assert chat_templates(own, None) == own
    assert chat_templates(own, str(tmp_path / "mine.jinja")) == {"default": "mine"}
    assert chat_templates(own, "rag") == {"default": "documents"}
    for given, expected in (own, "default, tool_use, rag"), ({}, "a file"):
        with pytest.raises(InvalidConfig, match=expected) as caught:
            chat_templates(given, "search")
        assert caught.value.field == "chat_template"


def test_offline_chats_choose_templates_as_transformers_does(tmp_path):
    folder = shutil.copytree(NANO, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(USE)
    theirs = AutoTokenizer.from_pretrained(folder)
    with LLM(folder, max_num_seqs=1) as llm:
        for options in {}, {"tools": TOOLS}:
            expected = theirs.apply_chat_template(
                CHAT, tokenize=False, add_generation_prompt=True, **options
            )
            assert llm.chat_prompt(CHAT, **options)["prompt"] == expected
        expected = theirs.apply_chat_template(
            CHAT, tokenize=False, chat_template="tool_use", tools=[]
        )
        assert llm.chat_prompt(CHAT, "tool_use", tools=[])["prompt"] == expected
        assert (
            llm.chat(CHAT, SamplingParams(max_tokens=1), chat_template="tool_use", tools=[])[
                0
            ].prompt
            == expected
        )
        text = "{{ messages[0].role }}"
        assert llm.chat_prompt(CHAT, text)["prompt"] == "user"
        with pytest.raises(InvalidRequest, match="default, tool_use") as caught:
            llm.chat(CHAT, chat_template="rag")
        assert caught.value.field == "chat_template"
