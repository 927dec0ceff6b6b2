"""Rendering of a conversation to one prompt text with the model's Jinja chat template.

A template is a program from an untrusted source, so it runs in Jinja's immutable sandbox. Its
functions, filters and variables are those of transformers' apply_chat_template, so that a prompt
equals the prompts that the model was trained on.

Not here: validation of messages (conversation.py), tokens (tokenizer.py).
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slipway.codec.conversation import normalized, unread_arguments
from slipway.errors import CheckpointError, InvalidRequest, Shown

# Errors that an untrusted template can raise: Jinja's, the sandbox's, and those of Python's
# operators.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
CUT = "CONTINUE_FINAL_MESSAGE_TAG "  # the trailing space shows whether the template trims messages


class ChatTemplate:
    """Compiled chat template.

    `special_tokens` ("bos_token" -> "<s>") are variables of the template. `source` is None for a
    model without a template; `render` then refuses every conversation. Raises CheckpointError if
    `source` is not a valid template.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]):
        environment = _environment()
        self.source = source or ""
        self._special_tokens = dict(special_tokens)
        self._reserved = {*special_tokens, *environment.globals, "messages", "self"}
        self._template = None
        if source is None:
            return
        try:
            self._template = environment.from_string(source)
            self._reads_parts = _mentions(environment.parse(source), "text")
        except TemplateSyntaxError as error:
            raise CheckpointError(
                "chat template", [f"line {error.lineno}: {error.message}"]
            ) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        /,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Return the prompt of a conversation.

        `add_generation_prompt` opens the assistant's turn; `continue_final_message` leaves the last
        message open instead. `kwargs` (tools, documents, enable_thinking, ...) are variables of the
        template. If the template reads no content parts, their texts are joined to one text.

        Raises InvalidRequest, naming the invalid field.
        """
        chat = normalized(messages)
        for name in kwargs.keys() & self._reserved:
            raise InvalidRequest(
                f"chat_template_kwargs.{name}",
                kwargs[name],
                "a name that the template does not reserve",
            )
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest("add_generation_prompt", True, "false with continue_final_message")
        if self._template is None:
            raise InvalidRequest(
                "messages",
                messages,
                "a model with a chat template; this model takes plain prompts only",
            )
        unread = unread_arguments(chat)
        chat = [self._prepared(message) for message in chat]
        if continue_final_message:
            last = _mark_end(chat[-1], f"messages[{len(chat) - 1}].content")
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        try:
            text = self._template.render(
                variables, messages=chat, add_generation_prompt=add_generation_prompt
            )
        except TEMPLATE_ERRORS as error:
            if unread is not None:
                expected = f"a JSON object, for this chat template: {error}"
                raise InvalidRequest(
                    unread, Shown("a text that is not a JSON object"), expected
                ) from error
            raise InvalidRequest(
                "messages", messages, f"messages that the chat template accepts: {error}"
            ) from error
        return _cut_at_mark(text, last) if continue_final_message else text

    def _prepared(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in the form that this template reads.

        Reasoning is copied to the names that templates use. A list of content parts is copied, or
        joined to a text if the template reads no parts.
        """
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if isinstance(message.get("content"), list):
            parts = [dict(part) for part in message["content"]]
            message["content"] = (
                parts if self._reads_parts else "".join(part["text"] for part in parts)
            )
        return message


class ChatTemplates:
    """Chat templates of a model by name.

    `sources` are the templates' texts. Only "default" and "tool_use", the templates of chats, are
    compiled here. Raises CheckpointError if one of these two is not a valid template.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]):
        self.sources = sources
        self._special_tokens = special_tokens
        self._compiled = {
            name: ChatTemplate(sources[name], special_tokens)
            for name in ("default", "tool_use")
            if name in sources
        }
        if not sources:
            self._compiled["default"] = ChatTemplate(None, special_tokens)

    def find(self, tools: bool) -> ChatTemplate | None:
        """Return the template of a chat with or without tools; None if the model has none for it.

        "tool_use" is the template of chats with tools; without it, "default" is.
        """
        default = self._compiled.get("default")
        return self._compiled.get("tool_use", default) if tools else default

    def given(self, template: str) -> ChatTemplate:
        """Return a template that a request gives by name or as text.

        Raises InvalidRequest for an unknown name.
        """
        if template in self._compiled and self.sources:
            return self._compiled[template]
        if template not in self.sources and "{" not in template:
            choices = ", ".join(["a template's text", *sorted(self.sources)])
            raise InvalidRequest("chat_template", template, choices)
        return ChatTemplate(self.sources.get(template, template), self._special_tokens)

    def choose(self, tools: bool) -> ChatTemplate:
        """Return the template of a chat with or without tools.

        Raises InvalidRequest, naming the model's templates, if none of them is for such a chat.
        """
        if (found := self.find(tools)) is None:
            names = ", ".join(sorted(self.sources))
            got = Shown("a chat" if tools else "a chat without tools")
            expected = f'a chat template named "default"; the model has {names}'
            hint = "choose one by name with chat_template (--chat-template)"
            raise InvalidRequest("messages", got, f"{expected}: {hint}")
        return found


class GenerationTag(Extension):
    """Jinja tag {% generation %}, which marks the assistant's text for training.

    Here it renders its body in a scope of its own.
    """

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag's body (called by Jinja)."""
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    # a function, not the type: `dict.update(message, ...)` would bypass the immutable sandbox
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize to JSON without escaping <, > and &.

    Jinja's own filter escapes them for HTML, which no training prompt has.
    """
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _mentions(template: nodes.Template, name: str) -> bool:
    """Return whether the template reads an item or attribute of that name."""
    return any(node.value == name for node in template.find_all(nodes.Const)) or any(
        node.attr == name for node in template.find_all(nodes.Getattr)
    )


def _mark_end(message: dict[str, Any], field: str) -> str:
    """Append the mark CUT to the message's text, in place; return the text before."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CUT
        return content
    if not content:
        raise InvalidRequest(field, content, "text to continue")
    text: str = content[-1]["text"]
    content[-1]["text"] = text + CUT
    return text


def _cut_at_mark(text: str, last: str) -> str:
    """Return the prompt up to the end of the last message's text `last`.

    If the template trims messages, the text's own trailing space is removed too.
    """
    at = text.rfind(CUT.strip())
    if at < 0 or last.strip() not in text:
        raise InvalidRequest(
            "continue_final_message", True, "a chat template that renders the final message in full"
        )
    return text[:at] if text.startswith(CUT, at) else text[:at].rstrip()
