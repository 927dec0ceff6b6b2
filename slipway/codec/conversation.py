"""Validation of a conversation's messages and conversion to the form that chat templates read.

Not here: changes that depend on the chat template (chat.py).
"""

import json
from typing import Any

from slipway.errors import InvalidRequest, Shown


def normalized(messages: Any) -> list[dict[str, Any]]:
    """Return copies of messages without null members and without OpenAI's older forms.

    - Arguments of tool calls are parsed into objects. Empty arguments and null become {}; a text
      that is not a JSON object stays a text.
    - `function_call` becomes `tool_calls`, and the role "function" becomes "tool".
    - A refusal becomes content.
    - Reasoning gets both of its names, `reasoning_content` and vLLM's `reasoning`, because a
      template reads one of the two.

    Raises InvalidRequest, naming the invalid field of a message.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", messages, "a list of at least one message")
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        field = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InvalidRequest(field, message, 'an object with "role" and "content"')
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{field}.role", message.get("role"), "a string")
        message = _with_both_names(_without_null(message))
        if "function_call" in message:
            message = _of_tools(message, number, field)
        elif message["role"] == "function":
            message = _result(message, found, field)
        if "tool_calls" in message:
            message = message | {"tool_calls": _calls(message["tool_calls"], f"{field}.tool_calls")}
            if not message["tool_calls"]:
                del message["tool_calls"]
        found.append(_with_content(message, field))
    return found


def unread_arguments(messages: list[dict[str, Any]]) -> str | None:
    """Return the field of the first tool call arguments that are still a text, or None.

    `messages` are the result of `normalized`.
    """
    for number, message in enumerate(messages):
        for index, call in enumerate(message.get("tool_calls", ())):
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                return f"messages[{number}].tool_calls[{index}].function.arguments"
    return None


def _without_null(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _with_both_names(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning, if any, under both of its names."""
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if not isinstance(reasoning, str):
        return message
    return message | {"reasoning_content": reasoning, "reasoning": reasoning}


def _of_tools(message: dict[str, Any], number: int, field: str) -> dict[str, Any]:
    """Return a message with `tool_calls` in place of OpenAI's older `function_call`.

    `number` is the message's position in the conversation.
    """
    function = message["function_call"]
    if "tool_calls" in message or not isinstance(function, dict):
        raise InvalidRequest(
            f"{field}.function_call", function, "an object, in a message without tool_calls"
        )
    call = {"id": _call_id(number), "type": "function", "function": function}
    return {key: value for key, value in message.items() if key != "function_call"} | {
        "tool_calls": [call]
    }


def _result(message: dict[str, Any], before: list[dict[str, Any]], field: str) -> dict[str, Any]:
    """Return a message of the role "function" as one of the role "tool".

    Its `tool_call_id` is the id of the latest call of that function in the messages `before` it.
    """
    if not isinstance(message.get("name"), str):
        raise InvalidRequest(
            f"{field}.name", message.get("name"), "the name of the called function"
        )
    for earlier in reversed(before):
        for call in earlier.get("tool_calls", ()):
            function = call.get("function")
            if (
                isinstance(function, dict)
                and function.get("name") == message["name"]
                and "id" in call
            ):
                return message | {"role": "tool", "tool_call_id": call["id"]}
    return message | {"role": "tool", "tool_call_id": _call_id(len(before))}


def _call_id(number: int) -> str:
    return f"call{number:05d}"  # Mistral's templates require nine characters of a-z and 0-9


def _calls(calls: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(field, calls, "a list of tool calls")
    found = []
    for number, call in enumerate(calls):
        if not isinstance(call, dict):
            raise InvalidRequest(
                f"{field}[{number}]", call, '{"id": ..., "type": "function", "function": {...}}'
            )
        call = _without_null(call)
        if isinstance(call.get("function"), dict):
            function = _without_null(call["function"])
            arguments = _arguments(
                function.get("arguments"), f"{field}[{number}].function.arguments"
            )
            call = call | {"function": function | {"arguments": arguments}}
        elif call.get("type", "function") == "function":
            raise InvalidRequest(
                f"{field}[{number}].function",
                call.get("function"),
                '{"name": ..., "arguments": ...}',
            )
        found.append(call)
    return found


def _arguments(given: Any, field: str) -> Any:
    if isinstance(given, dict):
        return given
    if given is None or (isinstance(given, str) and given.strip() in ("", "null")):
        return {}
    if not isinstance(given, str):
        raise InvalidRequest(field, given, "a JSON object, or its JSON text")
    try:
        value = json.loads(given)
    except (json.JSONDecodeError, RecursionError):
        return given
    return value if isinstance(value, dict) else given


def _with_content(message: dict[str, Any], field: str) -> dict[str, Any]:
    """Return a message with its content as a text or a list of text parts.

    Only an assistant's message with tool calls may have no content.
    """
    content = message.get("content")
    refusal = message.get("refusal")
    if content is None and message["role"] == "assistant":
        if isinstance(refusal, str):
            return message | {"content": refusal}
        return message if "tool_calls" in message else message | {"content": ""}
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise InvalidRequest(f"{field}.content", content, "a string or a list of text parts")
    return message | {
        "content": [_part(part, f"{field}.content[{i}]") for i, part in enumerate(content)]
    }


def _part(part: Any, field: str) -> dict[str, Any]:
    part = _without_null(part) if isinstance(part, dict) else part
    match part:
        case {"type": "text", "text": str()}:
            return part
        case {"type": "refusal", "refusal": str(refusal)}:
            return {"type": "text", "text": refusal}
    got = (
        Shown(f"a part of type {part['type']!r}")
        if isinstance(part, dict) and "type" in part
        else part
    )
    raise InvalidRequest(
        field, got, '{"type": "text", "text": "..."} or {"type": "refusal", "refusal": "..."}'
    )
