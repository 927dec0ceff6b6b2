"""Completions: from a checked body to the objects, or the events, of its answer; and what chats need, too.

Each handler opens one stream per prompt. What came in one step is put together, so that a slow reader gets fewer and
larger events.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from slipway.codec.offsets import Offsets
from slipway.engine.params import SamplingParams
from slipway.errors import InvalidRequest
from slipway.server import schema
from slipway.server.messages import Delta, Sample
from slipway.server.replica import Stream
from slipway.server.responses import (
    DONE,
    CompletionLogprobs,
    Envelope,
    Usage,
    encode,
    merge_samples,
    weights_fields,
)
from slipway.server.service import Prompt, QueueSlot, Service


class CompletionHandler:
    """The answer to a Completion."""

    def __init__(self, service: Service, body: schema.Completion, request_id: str | None):
        body.check_supported()
        if body.suffix is not None:
            raise InvalidRequest("suffix", body.suffix, "none: this model does not fill in")
        self._service, self._body = service, body
        self.envelope = Envelope(
            "text_completion", "cmpl", service.model_name, request_id, service.tokenizer
        )
        self.envelope.names_token_ids = service.names_token_ids(body)
        self.usage = Usage()
        self._begun: set[int] = set()  # choices of which something was told
        self._readers: dict[int, CompletionLogprobs] = {}  # by choice

    async def prepare(self) -> None:
        """Make prompts and parameters of the body. Raises InvalidRequest."""
        body, service = self._body, self._service
        if body.prompt is None:
            raise InvalidRequest(
                "prompt", None, "a text, token ids, or a list of one kind of these"
            )
        cut = body.truncate_prompt_tokens, body.truncation_side
        self.prompts = await service.prompts(body.prompt, "prompt", *cut)
        max_tokens = (
            body.max_tokens if body.max_tokens != 0 else 1
        )  # 0 with echo: only the prompt's are wanted
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens", 0, "at least 1, or echo")
        if "max_tokens" not in service.defaults and max_tokens is None:
            max_tokens = 16  # OpenAI's default
        params = body.params(service.defaults, max_tokens, body.logprobs)
        if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
            params = dataclasses.replace(params, prompt_logprobs=body.logprobs)
        self.params = check_num_samples(params, self.prompts, service)
        await service.check_grammar(self.params, body.structure_field)

    async def full_response(self, slot: QueueSlot) -> bytes:
        """The answer at once."""
        choices = []
        with self._open_streams(slot) as streams:
            deltas = await asyncio.gather(*map(read_all, streams))
        for number, (prompt, of_prompt) in enumerate(zip(self.prompts, deltas)):
            self.usage.prompt += len(prompt.token_ids)
            for delta in of_prompt:
                self.usage.add(delta)
            last = of_prompt[-1]
            for sample in merge_samples(
                [sample for delta in of_prompt for sample in delta.samples]
            ).values():
                choices.append(
                    self._choice(number, prompt, sample, last, last.prompt_logprobs or [])
                )
        return encode(
            self.envelope.response(sorted(choices, key=lambda choice: choice["index"]), self.usage)
        )

    async def events(self, slot: QueueSlot) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        options = self._body.stream_options or schema.StreamOptions()
        self.envelope.obfuscates = options.include_obfuscation
        scored: dict[int, list[Any]] = {}  # by prompt; they come with its first delta
        with self._open_streams(slot) as streams:
            self.usage.prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
            async for number, deltas in read_interleaved(streams):
                for delta in deltas:
                    self.usage.add(delta)
                    scored.setdefault(number, delta.prompt_logprobs or [])
                out, prompt = [], self.prompts[number]
                for sample in merge_samples(
                    [sample for delta in deltas for sample in delta.samples]
                ).values():
                    choice = self._choice(number, prompt, sample, deltas[-1], scored[number])
                    out.append(
                        self.envelope.event(
                            [choice], self.usage if options.continuous_usage_stats else None
                        )
                    )
                yield b"".join(out)
        if options.include_usage:
            yield self.envelope.event([], self.usage)
        yield DONE

    def _open_streams(self, slot: QueueSlot) -> contextlib.AbstractContextManager[list[Stream]]:
        params = [self.params] * len(self.prompts)
        return open_streams(
            self._service, slot, self.prompts, params, self._body.priority, self._body.cache_salt
        )

    def _choice(
        self, number: int, prompt: Prompt, sample: Sample, last: Delta, of_prompt: list[Any]
    ) -> dict[str, Any]:
        """Return a choice, or what is new in it: first what is echoed of the prompt, then the sample."""
        body, ids, text = self._body, sample.token_ids, sample.text
        index = number * self.params.n + sample.index
        is_first = index not in self._begun
        self._begun.add(index)
        echo = self._echoed(prompt) if body.echo and is_first else ""
        if body.max_tokens == 0:
            ids, text = [], ""
        shown = None
        if body.logprobs is not None:
            shown = self._logprobs(index, prompt, sample, echo, of_prompt)
        choice = {
            "index": index,
            "text": echo + text,
            "logprobs": shown,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if not body.stream or (body.prompt_logprobs is not None and last.finished):
            wanted = body.prompt_logprobs is not None
            choice["prompt_logprobs"] = self.envelope.prompt_logprobs(
                last.prompt_logprobs if wanted else None
            )
        if body.return_token_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt.token_ids if is_first else None}
        elif not body.stream:  # as in vLLM: a whole answer has every field
            choice |= {"token_ids": None, "prompt_token_ids": None}
        return choice | weights_fields(sample)

    def _logprobs(
        self, index: int, prompt: Prompt, sample: Sample, echo: str, of_prompt: list[Any]
    ) -> dict[str, Any]:
        """Return the logprobs of what is new in a choice; with the prompt's own where that is echoed."""
        tokenizer, shown = self._service.tokenizer, None
        if (reader := self._readers.get(index)) is None:
            offsets = None
            if tokenizer is not None:
                pieces = tokenizer.pieces(self.params.skip_special_tokens)
                offsets = Offsets(pieces, prompt.token_ids, start=len(echo))
            reader = self._readers[index] = CompletionLogprobs(self.envelope, offsets, len(echo))
            if self._body.echo:
                ids = prompt.token_ids[: len(of_prompt)]
                shown = self.envelope.completion_logprobs(
                    ids, of_prompt, self._offsets(prompt)[: len(ids)]
                )
        if self._body.max_tokens == 0:
            new = reader.add([], [], "", ended=True)
        else:
            ended = sample.finish_reason is not None
            new = reader.add(sample.token_ids, sample.logprobs or [], sample.text, ended)
        return new if shown is None else {name: [*shown[name], *new[name]] for name in new}

    def _offsets(self, prompt: Prompt) -> list[int]:
        """Return where the tokens of a prompt begin in what is echoed of it."""
        tokenizer = self._service.tokenizer
        if tokenizer is None:
            return [0] * len(prompt.token_ids)
        if prompt.text is not None:
            return tokenizer.offsets(prompt.text)
        offsets = Offsets(tokenizer.pieces(skip_special_tokens=False))
        return [
            at for found in [*map(offsets.push, prompt.token_ids), offsets.finish()] for at in found
        ]

    def _echoed(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        tokenizer = self._service.tokenizer
        pieces = None if tokenizer is None else tokenizer.pieces(skip_special_tokens=False)
        return "" if pieces is None else pieces.prompt_text(prompt.token_ids)


@contextlib.contextmanager
def open_streams(
    service: Service,
    slot: QueueSlot,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    priority: int,
    salt: str | None,
) -> Iterator[list[Stream]]:
    """A stream for every prompt, by parameters of its own; none is left running."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                service.open(slot, prompt, each, priority=priority, cache_salt=salt or "")
            )
            for prompt, each in zip(prompts, params)
        ]


async def read_all(stream: Stream) -> list[Delta]:
    """All of a stream."""
    deltas: list[Delta] = []
    while not stream.finished:
        deltas += await stream.next()
    return deltas


async def read_interleaved(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """What comes from any stream, with its number."""
    if len(streams) == 1:
        while not streams[0].finished:
            yield 0, await streams[0].next()
        return
    waiting = {
        asyncio.ensure_future(stream.next()): number for number, stream in enumerate(streams)
    }
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


def check_num_samples(
    params: SamplingParams, prompts: Sequence[Prompt], service: Service
) -> SamplingParams:
    """The parameters, if their samples are not too many. Raises InvalidRequest."""
    if (asked := len(prompts) * params.num_samples) > service.config.max_prompts:
        raise InvalidRequest(
            "n", f"{asked} samples in all", f"at most {service.config.max_prompts}"
        )
    return params
