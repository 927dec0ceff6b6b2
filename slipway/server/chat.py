"""Chats: from a checked body through the template to the objects, or the events, of its answer; knows no socket."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from slipway.codec.reasoning import ReasoningTokens
from slipway.engine.params import check_logprobs
from slipway.errors import InvalidRequest, Shown
from slipway.server import schema
from slipway.server.completions import check_num_samples, open_streams, read_all
from slipway.server.messages import Sample
from slipway.server.replica import Stream
from slipway.server.responses import DONE, Envelope, Usage, encode, merge_samples, weights_fields
from slipway.server.service import Prompt, QueueSlot, Service
from slipway.server.tools import Message, Tools


class ChatHandler:
    """The answer to a Chat."""

    def __init__(self, service: Service, body: schema.Chat, request_id: str | None):
        body.check_supported()
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("top_logprobs", body.top_logprobs, "none without logprobs")
        self._service, self._body = service, body
        self.envelope = Envelope(
            "chat.completion", "chatcmpl", service.model_name, request_id, service.tokenizer
        )
        self.envelope.names_token_ids = service.names_token_ids(body)
        self.usage = Usage()

    async def prepare(self) -> None:
        """Make a prompt and parameters of the body. Raises InvalidRequest."""
        body, service = self._body, self._service
        template, family = service.chat_format(bool(body.tools or body.functions))
        kwargs = (body.chat_template_kwargs or {}) | _effort(body, template)
        given: dict[str, Any] = {}
        if body.documents is not None:
            if "documents" not in template:
                raise InvalidRequest(
                    "documents",
                    body.documents,
                    "none: this model's chat template knows no documents",
                )
            given["documents"] = body.documents
        self.tools = Tools.read(body, family, template)
        if self.tools.listed:
            given["tools"] = self.tools.listed
        self.prompt = await service.conversation(
            body.messages,
            kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **given,
        )
        if (
            body.add_special_tokens
            and service.tokenizer is not None
            and self.prompt.text is not None
        ):
            self.prompt = Prompt(service.tokenizer.encode(self.prompt.text), self.prompt.text)
        if body.truncate_prompt_tokens is not None:
            cut = body.truncate_prompt_tokens, body.truncation_side
            (cut_prompt,) = await service.prompts([self.prompt.token_ids], "messages", *cut)
            if cut_prompt.token_ids != self.prompt.token_ids and service.tokenizer is not None:
                ids = cut_prompt.token_ids
                self.prompt = Prompt(ids, service.tokenizer.decode(ids, skip_special_tokens=False))
        service.check_lengths([self.prompt], "messages")
        both = body.max_tokens, body.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise InvalidRequest(
                "max_tokens",
                body.max_tokens,
                f"max_completion_tokens ({body.max_completion_tokens})",
            )
        asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        for field in ("top_logprobs", "prompt_logprobs"):
            check_logprobs(field, getattr(body, field), service.limits["max_logprobs"])
        params = body.params(
            service.defaults, asked, (body.top_logprobs or 0) if body.logprobs else None
        )
        if (structure := self.tools.structure(service.marks)) is not None:
            if params.structured_outputs is not None:
                field = "function_call" if self.tools.legacy else "tool_choice"
                raise InvalidRequest(
                    field, Shown("a forced call"), "none, where the output's structure is stated"
                )
            params = dataclasses.replace(params, structured_outputs=structure)
        reasoning = self.tools.reasoning(self.prompt.text or "", body.thinking_token_budget)
        params = dataclasses.replace(params, reasoning=reasoning)
        tokenizer = service.tokenizer
        self.usage.thinking = {
            i: ReasoningTokens(reasoning, tokenizer)
            for i in range(params.n)
            if reasoning and tokenizer is not None
        }
        if self.tools.family.keeps_special and self.tools.schemas:
            params = dataclasses.replace(params, skip_special_tokens=False)
        self.params = check_num_samples(params, [self.prompt], service)
        if structure is None:
            await service.check_grammar(self.params, body.structure_field)
        else:
            await service.check_grammar(self.params, "tools", self.tools.forced_schemas())

    def _message(self) -> Message:
        """A reader for one sample."""
        parser = self.tools.parser(self._body.separate_reasoning, self.prompt.text or "")
        return Message(parser, self.tools)

    async def full_response(self, slot: QueueSlot) -> bytes:
        """The answer at once."""
        with self._open_streams(slot) as (stream,):
            deltas = await read_all(stream)
        self.usage.prompt = len(self.prompt.token_ids)
        for delta in deltas:
            self.usage.add(delta)
        choices = []
        for sample in merge_samples(
            [sample for delta in deltas for sample in delta.samples]
        ).values():
            read = self._message()
            added = self._shown(read.push(sample.text, ended=True))
            message: dict[str, Any] = {"role": "assistant", "content": None} | added
            if message["content"] is None and read.finish_reason is None:
                message["content"] = ""
            if echoed := self._echoed():
                message["content"] = echoed + (message["content"] or "")
            for call in message.get("tool_calls", []):
                del call["index"]  # which pieces of streams have
            choices.append(self._choice(sample, read) | {"message": message})
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

    async def events(self, slot: QueueSlot) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        options = self._body.stream_options or schema.StreamOptions()
        self.envelope.obfuscates = options.include_obfuscation
        usage = self.usage if options.continuous_usage_stats else None
        with self._open_streams(slot) as (stream,):
            self.usage.prompt = len(self.prompt.token_ids)
            first = {"role": "assistant", "content": self._echoed()}
            opening = [
                {"index": i, "delta": first, "logprobs": None, "finish_reason": None}
                for i in range(self.params.n)
            ]
            about = (
                {"prompt_token_ids": self.prompt.token_ids} if self._body.return_token_ids else {}
            )
            out = [self.envelope.event([choice], usage, **about) for choice in opening]
            reading = [self._message() for _ in range(self.params.n)]
            while not stream.finished:
                deltas = (
                    await stream.next()
                )  # before anything is yielded: a refusal is not an event
                for delta in deltas:
                    self.usage.add(delta)
                for sample in merge_samples(
                    [sample for delta in deltas for sample in delta.samples]
                ).values():
                    read = reading[sample.index]
                    added = self._shown(
                        read.push(sample.text, ended=sample.finish_reason is not None)
                    )
                    out.append(
                        self.envelope.event([self._choice(sample, read) | {"delta": added}], usage)
                    )
                yield b"".join(out)
                out = []
        if options.include_usage:
            yield self.envelope.event([], self.usage)
        yield DONE

    def _shown(self, added: dict[str, Any]) -> dict[str, Any]:
        """Return what is new in a message, its reasoning under both names; ``include_reasoning`` false: without it."""
        reasoning = added.get("reasoning_content")
        if reasoning is None:
            return added
        if not self._body.include_reasoning:
            return {name: value for name, value in added.items() if name != "reasoning_content"}
        return added | {"reasoning": reasoning}

    def _echoed(self) -> str:
        """Return the text of the conversation's last message, where the answer repeats it: vLLM's ``echo``."""
        last = self._body.messages[-1]
        if not self._body.echo or last["role"] != "assistant":
            return ""
        content = last.get("content") or ""
        return (
            content
            if isinstance(content, str)
            else "".join(part.get("text", "") for part in content)
        )

    def _open_streams(self, slot: QueueSlot) -> contextlib.AbstractContextManager[list[Stream]]:
        body = self._body
        return open_streams(
            self._service, slot, [self.prompt], [self.params], body.priority, body.cache_salt
        )

    def _choice(self, sample: Sample, read: Message) -> dict[str, Any]:
        body, logprobs, reason = self._body, None, sample.finish_reason
        if reason == "stop":
            reason = read.finish_reason or reason
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
        if body.return_token_ids or not body.stream:  # as in vLLM: a whole answer has every field
            choice["token_ids"] = sample.token_ids if body.return_token_ids else None
        return choice | weights_fields(sample)


def _effort(body: schema.Chat, template: str) -> dict[str, Any]:
    """Template variables for ``reasoning_effort``: how much where the template knows that, whether at all else."""
    effort, given = body.reasoning_effort, body.chat_template_kwargs or {}
    if effort is None:
        return {}
    if effort == "none" and "enable_thinking" in template:
        found: dict[str, Any] = {"enable_thinking": False}
    elif "reasoning_effort" in template:
        found = {"reasoning_effort": effort}
    else:
        able = "none, or no effort" if "enable_thinking" in template else "no effort"
        raise InvalidRequest(
            "reasoning_effort", effort, f"{able}: this model's chat template knows no other"
        )
    for name in found.keys() & given.keys():
        raise InvalidRequest(
            f"chat_template_kwargs.{name}", given[name], "nothing beside reasoning_effort"
        )
    return found
