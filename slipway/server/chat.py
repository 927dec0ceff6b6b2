"""Chats, from a checked body through the chat template to the response or its events.

Not here: tools and reasoning of a chat (tools.py), JSON objects of responses (responses.py).
"""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from slipway.codec.reasoning import ReasoningTokens
from slipway.engine.params import SamplingParams, check_logprobs
from slipway.engine.request import RequestSpec
from slipway.errors import InvalidRequest, Shown
from slipway.server import schema
from slipway.server.completions import check_num_samples, open_streams, read_all
from slipway.server.messages import Sample
from slipway.server.replica import Stream
from slipway.server.responses import (
    DONE,
    Usage,
    encode,
    merge_deltas,
    weights_fields,
)
from slipway.server.service import Prompt, QueueSlot, Service
from slipway.server.tools import Message, Tools


class ChatHandler:
    """Handler of one chat request: from its body to its response, or its events."""

    def __init__(self, service: Service, body: schema.Chat, request_id: str | None):
        body.check_supported()
        if body.top_logprobs is not None and not body.logprobs:
            expected = "no value unless logprobs is true"
            raise InvalidRequest("top_logprobs", body.top_logprobs, expected)
        self._service = service
        self._body = body
        names = service.names_token_ids(body)
        self.envelope = service.envelope(
            "chat.completion", "chatcmpl", request_id=request_id, names_token_ids=names
        )
        self.usage = Usage()

    async def prepare(self) -> None:
        """Make the prompt and the sampling parameters. Raises InvalidRequest."""
        body, service = self._body, self._service
        template, family = service.chat_format(bool(body.tools or body.functions))
        options = self._template_options(template)
        self.tools = Tools.read(body, family, template)
        self.prompt = await self._render(options)
        service.check_lengths([self.prompt], "messages")
        params = self._sampling_params()
        structure = self.tools.structure(service.marks)
        if structure is not None:
            if params.structured_outputs is not None:
                field = "function_call" if self.tools.legacy else "tool_choice"
                expected = "no forced call, as another field sets the structure of the output"
                raise InvalidRequest(field, Shown("a forced call"), expected)
            params = dataclasses.replace(params, structured_outputs=structure)
        reasoning = self.tools.reasoning(self.prompt.text or "", body.thinking_token_budget)
        params = dataclasses.replace(params, reasoning=reasoning)
        self.usage.thinking = {}
        if reasoning and service.tokenizer is not None:
            self.usage.thinking = {
                i: ReasoningTokens(reasoning, service.tokenizer) for i in range(params.n)
            }
        if self.tools.family.keeps_special and self.tools.schemas:
            params = dataclasses.replace(params, skip_special_tokens=False)
        self.params = check_num_samples(params, [self.prompt], service)
        if structure is None:
            await service.check_grammar(self.params, body.structure_field)
        else:
            await service.check_grammar(self.params, "tools", self.tools.forced_schemas())

    def _template_options(self, template: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the client's template variables and the documents. Raises InvalidRequest.

        ``template``: the text of the chat template.
        """
        body = self._body
        kwargs = (body.chat_template_kwargs or {}) | _effort_variables(body, template)
        if body.documents is None:
            return kwargs, {}
        if "documents" not in template:
            expected = "no value: the model's chat template does not use documents"
            raise InvalidRequest("documents", body.documents, expected)
        return kwargs, {"documents": body.documents}

    async def _render(self, options: tuple[dict[str, Any], dict[str, Any]]) -> Prompt:
        """Return the conversation as a prompt, cut to truncate_prompt_tokens."""
        body, service = self._body, self._service
        kwargs, fields = options
        if self.tools.listed:
            fields["tools"] = self.tools.listed
        prompt = await service.conversation(
            body.messages,
            kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **fields,
        )
        tokenizer = service.tokenizer
        if body.add_special_tokens and tokenizer is not None and prompt.text is not None:
            prompt = Prompt(tokenizer.encode(prompt.text), prompt.text)
        if body.truncate_prompt_tokens is not None:
            (cut,) = await service.prompts(
                [prompt.token_ids],
                "messages",
                body.truncate_prompt_tokens,
                side=body.truncation_side,
            )
            if cut.token_ids != prompt.token_ids and tokenizer is not None:
                text = tokenizer.decode(cut.token_ids, skip_special_tokens=False)
                prompt = Prompt(cut.token_ids, text)
        return prompt

    def _sampling_params(self) -> SamplingParams:
        """Return the parameters that the body's fields set. Raises InvalidRequest."""
        body, service = self._body, self._service
        older, newer = body.max_tokens, body.max_completion_tokens
        if None not in (older, newer) and older != newer:
            raise InvalidRequest(
                "max_tokens", older, f"the value of max_completion_tokens ({newer})"
            )
        for field in ("top_logprobs", "prompt_logprobs"):
            check_logprobs(field, getattr(body, field), service.limits["max_logprobs"])
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return body.params(service.defaults, newer if older is None else older, logprobs)

    def _message(self) -> Message:
        """Return a reader of one sample's text."""
        parser = self.tools.parser(self._body.separate_reasoning, self.prompt.text or "")
        return Message(parser, self.tools)

    async def full_response(self, slot: QueueSlot) -> bytes:
        """Return the whole response as JSON."""
        with self._open_streams(slot) as (stream,):
            deltas = await read_all(stream)
        self.usage.prompt = len(self.prompt.token_ids)
        for delta in deltas:
            self.usage.add(delta)
        choices = [self._full_choice(sample) for sample in merge_deltas(deltas).values()]
        choices.sort(key=lambda choice: choice["index"])
        scored = None if self._body.prompt_logprobs is None else deltas[-1].prompt_logprobs
        return encode(
            self.envelope.response(
                choices,
                self.usage,
                prompt_logprobs=self.envelope.prompt_logprobs(scored),
                prompt_token_ids=self.prompt.token_ids if self._body.return_token_ids else None,
            )
        )

    def _full_choice(self, sample: Sample) -> dict[str, Any]:
        reader = self._message()
        delta = self._delta(reader.push(sample.text, ended=True))
        message: dict[str, Any] = {"role": "assistant", "content": None} | delta
        if message["content"] is None and reader.finish_reason is None:
            message["content"] = ""
        if echoed := self._echoed():
            message["content"] = echoed + (message["content"] or "")
        for call in message.get("tool_calls", []):
            del call["index"]  # only events of a stream have it
        return self._choice(sample, reader) | {"message": message}

    async def events(self, slot: QueueSlot) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events."""
        options = self._body.stream_options or schema.StreamOptions()
        self.envelope.obfuscates = options.include_obfuscation
        usage = self.usage if options.continuous_usage_stats else None
        with self._open_streams(slot) as (stream,):
            self.usage.prompt = len(self.prompt.token_ids)
            out = self._first_events(usage)
            readers = [self._message() for _ in range(self.params.n)]
            while not stream.finished:
                # Before the first event is sent: a refusal is an HTTP error, not an event.
                deltas = await stream.next()
                for delta in deltas:
                    self.usage.add(delta)
                for sample in merge_deltas(deltas).values():
                    reader = readers[sample.index]
                    ended = sample.finish_reason is not None
                    new = self._delta(reader.push(sample.text, ended=ended))
                    choice = self._choice(sample, reader) | {"delta": new}
                    out.append(self.envelope.event([choice], usage))
                yield b"".join(out)
                out = []
        if options.include_usage:
            yield self.envelope.event([], self.usage)
        yield DONE

    def _first_events(self, usage: Usage | None) -> list[bytes]:
        """Return the event that opens each choice, with the role and the echoed message."""
        first = {"role": "assistant", "content": self._echoed()}
        more = {"prompt_token_ids": self.prompt.token_ids} if self._body.return_token_ids else {}
        choices = [
            {"index": i, "delta": first, "logprobs": None, "finish_reason": None}
            for i in range(self.params.n)
        ]
        return [self.envelope.event([choice], usage, **more) for choice in choices]

    def _delta(self, added: dict[str, Any]) -> dict[str, Any]:
        """Return the new part of a message with its reasoning under both names.

        With ``include_reasoning: false`` the reasoning is left out.
        """
        reasoning = added.get("reasoning_content")
        if reasoning is None:
            return added
        if not self._body.include_reasoning:
            return {name: value for name, value in added.items() if name != "reasoning_content"}
        return added | {"reasoning": reasoning}

    def _echoed(self) -> str:
        """Return the text of the last message if the response repeats it (vLLM's ``echo``)."""
        last = self._body.messages[-1]
        if not self._body.echo or last["role"] != "assistant":
            return ""
        content = last.get("content") or ""
        if isinstance(content, str):
            return content
        return "".join(part.get("text", "") for part in content)

    def _open_streams(self, slot: QueueSlot) -> contextlib.AbstractContextManager[list[Stream]]:
        spec = RequestSpec(self.prompt.token_ids, self.params, **schema.facts(self._body))
        return open_streams(self._service, slot, [spec])

    def _choice(self, sample: Sample, reader: Message) -> dict[str, Any]:
        """Return the fields that choices of whole responses and of events have in common."""
        body, logprobs, reason = self._body, None, sample.finish_reason
        if reason == "stop":
            reason = reader.finish_reason or reason
        if body.logprobs:
            logprobs = self.envelope.chat_logprobs(
                sample.token_ids, sample.logprobs or [], body.top_logprobs or 0
            )
        choice: dict[str, Any] = {
            "index": sample.index,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": sample.stop_reason,
        }
        if body.return_token_ids or not body.stream:  # as in vLLM: a whole response has every field
            choice["token_ids"] = sample.token_ids if body.return_token_ids else None
        return choice | weights_fields(sample)


def _effort_variables(body: schema.Chat, template: str) -> dict[str, Any]:
    """Return the template variables that stand for ``reasoning_effort``. Raises InvalidRequest.

    The template reads the effort itself, or only whether the model reasons at all
    (enable_thinking).
    """
    effort, given = body.reasoning_effort, body.chat_template_kwargs or {}
    if effort is None:
        return {}
    if effort == "none" and "enable_thinking" in template:
        found: dict[str, Any] = {"enable_thinking": False}
    elif "reasoning_effort" in template:
        found = {"reasoning_effort": effort}
    else:
        supported = "none, or no value" if "enable_thinking" in template else "no value"
        expected = f"{supported}: the model's chat template supports no other effort"
        raise InvalidRequest("reasoning_effort", effort, expected)
    for name in found.keys() & given.keys():
        expected = "no value, as reasoning_effort sets it"
        raise InvalidRequest(f"chat_template_kwargs.{name}", given[name], expected)
    return found
