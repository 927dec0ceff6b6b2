"""Chat templates of the usual kinds against transformers' apply_chat_template; the sandbox."""

import copy

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slipway.codec.chat import ChatTemplate, ChatTemplates
from slipway.errors import CheckpointError, InvalidRequest

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\\n" }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == "user" %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.reasoning_content and loop.index0 > ns.last %}
        {%- set thought = message.reasoning_content.strip('\\n') %}
        {%- set content = '<think>' + thought + '</think>' + content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson(indent=2) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ('system', 'user', 'assistant') %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if loop.first %}{{- 'Today: ' + date_string + '\\n' }}{% endif %}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}{{- part['text'] }}{% endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
TURNS = [
    {"role": "user", "content": "Is 1 < 2 & \"2\" > '1'? <b>日本</b> "},
    {"role": "assistant", "content": " Yes. \n", "reasoning_content": "\nhm\n"},
]
CONVERSATIONS = {
    "one turn": TURNS[:1],
    "two turns": TURNS,
    "reasoning": [
        TURNS[0],
        {"role": "assistant", "content": "Yes", "thinking": "so so", "name": None},
    ],
    "tools": [
        TURNS[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<é>"}}}],
        },
        {"role": "tool", "content": "3"},
    ],
}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}
]
FUNCTION = {
    "type": "function",
    "function": {"name": "f", "description": "a < b é", "parameters": {}},
}


@pytest.fixture(scope="module")
def reference(directories) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directories["byte_fallback"])


def compare(reference, source: str, messages: list[dict], **options) -> None:
    """The same text, or both refuse; and the caller's messages stay as they were."""
    ours = ChatTemplate(source, reference.special_tokens_map)
    before = copy.deepcopy(messages)
    try:
        expected = reference.apply_chat_template(
            messages, chat_template=source, tokenize=False, **options
        )
    except (ValueError, TypeError, TemplateError):
        with pytest.raises(InvalidRequest):
            ours.render(messages, **options)
    else:
        assert ours.render(messages, **options) == expected
    assert messages == before


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers(reference, template, name):
    messages = CONVERSATIONS[name]
    compare(reference, TEMPLATES[template], messages, add_generation_prompt=True)
    compare(reference, TEMPLATES[template], messages, add_generation_prompt=False)
    compare(
        reference,
        TEMPLATES[template],
        messages,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string="x",
    )
    compare(reference, TEMPLATES[template], messages, add_generation_prompt=True, tools=[FUNCTION])
    compare(
        reference,
        TEMPLATES[template],
        messages,
        add_generation_prompt=False,
        continue_final_message=True,
    )


def test_content_parts(reference):
    compare(reference, LLAMA3, PARTS, add_generation_prompt=True)
    compare(reference, LLAMA3, PARTS, add_generation_prompt=False, continue_final_message=True)


def test_parts_are_joined_for_a_template_that_knows_none():
    """Unlike here, transformers would print the Python list."""
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {})
    assert template.render(PARTS) == "[a b]"


def test_a_template_that_drops_the_final_message_cannot_continue_it():
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        ChatTemplate("nothing", {}).render(
            TURNS, add_generation_prompt=False, continue_final_message=True
        )
    with pytest.raises(InvalidRequest, match="add_generation_prompt"):
        ChatTemplate("nothing", {}).render(TURNS, continue_final_message=True)


def test_the_template_s_own_refusal_is_passed_on():
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(TURNS[1:])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (["hello"], "messages[0]"),
        ([*TURNS, {"content": "x"}], "messages[2].role"),
        ([{"role": 1, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}],
            "messages[0].content[1]",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0]",
        ),
    ],
)
def test_bad_messages_are_named(messages, field):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML, {}).render(messages)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["messages", "self", "bos_token", "raise_exception", "range"])
def test_variables_of_the_template_cannot_be_replaced(name):
    with pytest.raises(InvalidRequest, match=f"chat_template_kwargs.{name}"):
        ChatTemplate(LLAMA3, {"bos_token": "<s>"}).render(TURNS, **{name: []})


def test_no_template_and_a_broken_one():
    with pytest.raises(InvalidRequest, match="a model with a chat template"):
        ChatTemplate(None, {}).render(TURNS)
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("fine\n{% for %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ '{0.__class__}'.format(messages) ~ ''.__class__.__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ dict.update(messages[0], role='system') }}",
        "{% set messages[0].role = 'system' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_the_sandbox_holds(source):
    messages = copy.deepcopy(TURNS)
    with pytest.raises((InvalidRequest, CheckpointError)):
        ChatTemplate(source, {}).render(messages)
    assert messages == TURNS


@pytest.mark.parametrize(
    "sources",
    [
        {"default": "plain", "tool_use": "with tools", "rag": "{% broken"},
        {"default": "plain"},
        {"default": "a", "rag": "b"},
        {"tool_use": "with tools", "rag": "b"},
        {"rag": "b", "search": "c"},
    ],
)
def test_templates_are_chosen_as_transformers_does(reference, sources):
    """One that no chat takes is not even compiled."""
    templates = ChatTemplates(sources, {})
    theirs = copy.copy(reference)
    theirs.chat_template = sources
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        try:
            expected = theirs.get_chat_template(tools=tools)
        except ValueError:
            with pytest.raises(InvalidRequest, match=", ".join(sorted(sources))) as caught:
                templates.choose(bool(tools))
            assert caught.value.field == "messages"
        else:
            assert templates.choose(bool(tools)).render(TURNS) == expected
    with pytest.raises(CheckpointError):
        ChatTemplates({"default": "fine", "tool_use": "{% for %}"}, {})


def test_models_without_templates_refuse_conversations():
    with pytest.raises(InvalidRequest, match="takes plain prompts"):
        ChatTemplates({}, {}).choose(tools=False).render(TURNS)
