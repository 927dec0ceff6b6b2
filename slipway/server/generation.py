"""Completions and chats: from a checked body to the objects, or the events, of its answer; knows no socket.

Each handler opens one stream per prompt. What came in one step is put together, so that a slow reader gets fewer and
larger events.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from slipway.engine.params import SamplingParams
from slipway.errors import InvalidRequest, SlipwayError
from slipway.server import schema
from slipway.server.answers import Shape, Usage, merged
from slipway.server.messages import Delta, Sample
from slipway.server.replica import Stream
from slipway.server.service import Place, Prompt, Service

encode = msgspec.json.Encoder().encode
NOT_YET = {"tools": None, "tool_choice": ("none", None)}


class Completions:
    """The answer to a Completion."""

    def __init__(self, service: Service, body: schema.Completion, request_id: str | None):
        if body.suffix is not None:
            raise InvalidRequest("suffix", body.suffix, "none: this model does not fill in")
        self._service, self._body = service, body
        self.shape = Shape("text_completion", "cmpl", service.model_name, request_id, service.tokenizer)
        self.usage = Usage()

    async def prepare(self) -> None:
        """Make prompts and parameters of the body. Raises InvalidRequest."""
        body, service = self._body, self._service
        self.prompts = await service.prompts(body.prompt, "prompt", body.truncate_prompt_tokens)
        max_tokens = body.max_tokens if body.max_tokens != 0 else 1  # 0 with echo: only the prompt's are wanted
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens", 0, "at least 1, or echo")
        if "max_tokens" not in service.defaults and max_tokens is None:
            max_tokens = 16  # OpenAI's default
        params = body.params(service.defaults, max_tokens, body.logprobs)
        if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
            params = dataclasses.replace(params, prompt_logprobs=body.logprobs)
        self.params = _bounded(params, self.prompts, service)

    async def whole(self, place: Place) -> bytes:
        """The answer at once."""
        body, choices = self._body, []
        with _opened(self._service, place, self.prompts, self.params, body) as streams:
            deltas = await asyncio.gather(*map(_drained, streams))
        for number, (prompt, of_prompt) in enumerate(zip(self.prompts, deltas)):
            self.usage.prompt += len(prompt.token_ids)
            for delta in of_prompt:
                self.usage.add(delta)
            last = of_prompt[-1]
            for sample in merged([sample for delta in of_prompt for sample in delta.samples]).values():
                choices.append(self._choice(number, prompt, sample, last))
        return encode(self.shape.whole(sorted(choices, key=lambda choice: choice["index"]), self.usage))

    async def events(self, place: Place) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        body, options = self._body, self._body.stream_options or schema.StreamOptions()
        begun: set[tuple[int, int]] = set()
        with _opened(self._service, place, self.prompts, self.params, body) as streams:
            self.usage.prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
            async for number, deltas in _interleaved(streams):
                for delta in deltas:
                    self.usage.add(delta)
                out, prompt = [], self.prompts[number]
                for sample in merged([sample for delta in deltas for sample in delta.samples]).values():
                    echoes = body.echo and (number, sample.index) not in begun
                    begun.add((number, sample.index))
                    choice = self._choice(number, prompt, sample, deltas[-1], echoes)
                    out.append(self.shape.chunk([choice], self.usage if options.continuous_usage_stats else None))
                yield _lines(out)
        if options.include_usage:
            yield _lines([self.shape.chunk([], self.usage)])
        yield b"data: [DONE]\n\n"

    def _choice(self, number: int, prompt: Prompt, sample: Sample, last: Delta, echoes: bool = True) -> dict[str, Any]:
        body, ids, entries = self._body, sample.token_ids, list(sample.logprobs or [])
        text, shown = sample.text, None
        echoed = body.echo and echoes
        if echoed:
            text = self._echoed(prompt) + text
        if body.max_tokens == 0:
            text, ids, entries = text[: len(text) - len(sample.text)], [], []
        if body.logprobs is not None:
            scored = list(last.prompt_logprobs or []) if echoed else []
            known = prompt.token_ids[: len(scored)]
            shown = self.shape.completion_logprobs([*known, *ids], [*scored, *entries], 0)
        choice = {
            "index": number * self.params.n + sample.index, "text": text, "logprobs": shown,
            "finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason,
        }  # fmt: skip
        if body.prompt_logprobs is not None and last.finished:
            choice["prompt_logprobs"] = self.shape.prompt_logprobs(last.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt.token_ids if echoes else None}
        return choice

    def _echoed(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        tokenizer = self._service.tokenizer
        return "" if tokenizer is None else tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


class Chats:
    """The answer to a Chat."""

    def __init__(self, service: Service, body: schema.Chat, request_id: str | None):
        for name, harmless in NOT_YET.items():
            value = getattr(body, name)
            if value is not None and (harmless is None or value not in harmless):
                raise InvalidRequest(name, value, "nothing: not implemented yet")
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("top_logprobs", body.top_logprobs, "none without logprobs")
        self._service, self._body = service, body
        self.shape = Shape("chat.completion", "chatcmpl", service.model_name, request_id, service.tokenizer)
        self.usage = Usage()

    async def prepare(self) -> None:
        """Make a prompt and parameters of the body. Raises InvalidRequest."""
        body, service = self._body, self._service
        kwargs = body.chat_template_kwargs or {}
        for name in ("messages", "add_generation_prompt", "continue_final_message", "documents", "tools"):
            if name in kwargs:
                raise InvalidRequest(f"chat_template_kwargs.{name}", kwargs[name], "a field of the body instead")
        if body.documents is not None:
            kwargs = kwargs | {"documents": body.documents}
        self.prompt = await service.conversation(
            body.messages, add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message, **kwargs,
        )  # fmt: skip
        if body.add_special_tokens and service.tokenizer is not None and self.prompt.text is not None:
            self.prompt = Prompt(service.tokenizer.encode(self.prompt.text), self.prompt.text)
        if body.truncate_prompt_tokens is not None:
            (self.prompt,) = await service.prompts([self.prompt.token_ids], "messages", body.truncate_prompt_tokens)
        both = body.max_tokens, body.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise InvalidRequest("max_tokens", body.max_tokens, f"max_completion_tokens ({body.max_completion_tokens})")
        asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        params = body.params(service.defaults, asked, (body.top_logprobs or 0) if body.logprobs else None)
        self.params = _bounded(params, [self.prompt], service)

    async def whole(self, place: Place) -> bytes:
        """The answer at once."""
        with _opened(self._service, place, [self.prompt], self.params, self._body) as (stream,):
            deltas = await _drained(stream)
        self.usage.prompt = len(self.prompt.token_ids)
        for delta in deltas:
            self.usage.add(delta)
        choices = []
        for sample in merged([sample for delta in deltas for sample in delta.samples]).values():
            message = {"role": "assistant", "content": sample.text}
            choices.append(self._choice(sample) | {"message": message})
        more: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None:
            more["prompt_logprobs"] = self.shape.prompt_logprobs(deltas[-1].prompt_logprobs)
        if self._body.return_token_ids:
            more["prompt_token_ids"] = self.prompt.token_ids
        choices.sort(key=lambda choice: choice["index"])
        return encode(self.shape.whole(choices, self.usage, **more))

    async def events(self, place: Place) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        options = self._body.stream_options or schema.StreamOptions()
        usage = self.usage if options.continuous_usage_stats else None
        with _opened(self._service, place, [self.prompt], self.params, self._body) as (stream,):
            self.usage.prompt = len(self.prompt.token_ids)
            first = {"role": "assistant", "content": ""}
            opening = [
                {"index": i, "delta": first, "logprobs": None, "finish_reason": None} for i in range(self.params.n)
            ]
            yield _lines([self.shape.chunk([choice], usage) for choice in opening])
            while not stream.finished:
                deltas, out = await stream.next(), []
                for delta in deltas:
                    self.usage.add(delta)
                for sample in merged([sample for delta in deltas for sample in delta.samples]).values():
                    choice = self._choice(sample) | {"delta": {"content": sample.text} if sample.text else {}}
                    out.append(self.shape.chunk([choice], usage))
                yield _lines(out)
        if options.include_usage:
            yield _lines([self.shape.chunk([], self.usage)])
        yield b"data: [DONE]\n\n"

    def _choice(self, sample: Sample) -> dict[str, Any]:
        body, logprobs = self._body, None
        if body.logprobs:
            logprobs = self.shape.chat_logprobs(sample.token_ids, sample.logprobs or [], body.top_logprobs or 0)
        choice = {
            "index": sample.index, "logprobs": logprobs, "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }  # fmt: skip
        return choice | {"token_ids": sample.token_ids} if body.return_token_ids else choice


@contextlib.contextmanager
def _opened(service: Service, place: Place, prompts: Sequence[Prompt], params: SamplingParams, body: schema.Sampling):
    """A stream for every prompt; none is left running."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                service.open(place, prompt, params, priority=body.priority, cache_salt=body.cache_salt or "")
            )
            for prompt in prompts
        ]


async def _drained(stream: Stream) -> list[Delta]:
    deltas: list[Delta] = []
    while not stream.finished:
        deltas += await stream.next()
    return deltas


async def _interleaved(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """What comes from any stream, with its number."""
    if len(streams) == 1:
        while not streams[0].finished:
            yield 0, await streams[0].next()
        return
    waiting = {asyncio.ensure_future(stream.next()): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                deltas = task.result()
                if not streams[number].finished:
                    waiting[asyncio.ensure_future(streams[number].next())] = number
                yield number, deltas
    finally:
        for task in waiting:
            task.cancel()


def _bounded(params: SamplingParams, prompts: Sequence[Prompt], service: Service) -> SamplingParams:
    if (asked := len(prompts) * params.num_samples) > service.config.max_prompts:
        raise InvalidRequest("n", f"{asked} samples in all", f"at most {service.config.max_prompts}")
    return params


def _lines(chunks: Sequence[Any]) -> bytes:
    return b"".join(b"data: " + encode(chunk) + b"\n\n" for chunk in chunks)


def failed(error: SlipwayError) -> bytes:
    """The event that ends a stream which could not go on."""
    return (
        b"data: " + encode({"error": {"message": str(error), "type": type(error).__name__}}) + b"\n\ndata: [DONE]\n\n"
    )
