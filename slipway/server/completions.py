"""Completions, from a checked body to the response or its events, and reading of streams.

The functions at the end serve chats, too. A handler opens one stream per prompt. All messages that
have arrived for a stream become one event, so a slow reader gets fewer and larger events.

Not here: JSON objects of responses (responses.py), HTTP (app.py).
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from slipway.codec.offsets import Offsets
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import InvalidRequest, Shown
from slipway.server import schema
from slipway.server.messages import Delta, Sample
from slipway.server.replica import Stream
from slipway.server.responses import (
    DONE,
    CompletionLogprobs,
    Entry,
    Usage,
    encode,
    merge_deltas,
    weights_fields,
)
from slipway.server.service import PROMPT_FORMS, Prompt, QueueSlot, Service

DEFAULT_MAX_TOKENS = 16  # OpenAI's default


class CompletionHandler:
    """Handler of one completion request: from its body to its response, or its events."""

    def __init__(self, service: Service, body: schema.Completion, request_id: str | None):
        body.check_supported()
        if body.suffix is not None:
            expected = "no value: infilling is not supported"
            raise InvalidRequest("suffix", body.suffix, expected)
        self._service = service
        self._body = body
        names = service.names_token_ids(body)
        self.envelope = service.envelope(
            "text_completion", "cmpl", request_id=request_id, names_token_ids=names
        )
        self.usage = Usage()
        self._begun: set[int] = set()  # choices of which a part was returned
        self._logprobs_by_choice: dict[int, CompletionLogprobs] = {}

    async def prepare(self) -> None:
        """Make the prompts and sampling parameters. Raises InvalidRequest."""
        body, service = self._body, self._service
        if body.prompt is None:
            raise InvalidRequest("prompt", None, PROMPT_FORMS)
        self.prompts = await service.prompts(
            body.prompt, "prompt", body.truncate_prompt_tokens, side=body.truncation_side
        )
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens", 0, "at least 1, or echo: true")
        # 0 with echo asks for the prompt only: one token is generated and dropped.
        max_tokens = body.max_tokens if body.max_tokens != 0 else 1
        if "max_tokens" not in service.defaults and max_tokens is None:
            max_tokens = DEFAULT_MAX_TOKENS
        params = body.params(service.defaults, max_tokens, body.logprobs)
        if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
            params = dataclasses.replace(params, prompt_logprobs=body.logprobs)
        self.params = check_num_samples(params, self.prompts, service)
        await service.check_grammar(self.params, body.structure_field)

    async def full_response(self, slot: QueueSlot) -> bytes:
        """Return the whole response as JSON."""
        choices = []
        with self._open_streams(slot) as streams:
            deltas = await asyncio.gather(*map(read_all, streams))
        for number, (prompt, of_prompt) in enumerate(zip(self.prompts, deltas)):
            self.usage.prompt += len(prompt.token_ids)
            for delta in of_prompt:
                self.usage.add(delta)
            scored = of_prompt[-1].prompt_logprobs or []
            for sample in merge_deltas(of_prompt).values():
                choices.append(self._choice(number, sample, of_prompt[-1], scored=scored))
        choices.sort(key=lambda choice: choice["index"])
        return encode(self.envelope.response(choices, self.usage))

    async def events(self, slot: QueueSlot) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events."""
        options = self._body.stream_options or schema.StreamOptions()
        self.envelope.obfuscates = options.include_obfuscation
        usage = self.usage if options.continuous_usage_stats else None
        # Log probabilities by prompt; the engine sends them with the first message about a prompt.
        scored: dict[int, list[Entry | None]] = {}
        with self._open_streams(slot) as streams:
            self.usage.prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
            async for number, deltas in read_interleaved(streams):
                for delta in deltas:
                    self.usage.add(delta)
                    scored.setdefault(number, delta.prompt_logprobs or [])
                out = []
                for sample in merge_deltas(deltas).values():
                    choice = self._choice(number, sample, deltas[-1], scored=scored[number])
                    out.append(self.envelope.event([choice], usage))
                yield b"".join(out)
        if options.include_usage:
            yield self.envelope.event([], self.usage)
        yield DONE

    def _open_streams(self, slot: QueueSlot) -> contextlib.AbstractContextManager[list[Stream]]:
        facts = schema.facts(self._body)
        specs = [RequestSpec(prompt.token_ids, self.params, **facts) for prompt in self.prompts]
        return open_streams(self._service, slot, specs)

    def _choice(
        self, number: int, sample: Sample, last: Delta, *, scored: Sequence[Entry | None]
    ) -> dict[str, Any]:
        """Return a choice, or its new part: first the prompt if it is echoed, then the sample.

        ``number``: of the prompt. ``last``: the newest message about it. ``scored``: log
        probabilities of the prompt's tokens.
        """
        body, ids, text, prompt = self._body, sample.token_ids, sample.text, self.prompts[number]
        index = number * self.params.n + sample.index
        is_first = index not in self._begun
        self._begun.add(index)
        echo = self._prompt_text(prompt) if body.echo and is_first else ""
        if body.max_tokens == 0:
            ids, text = [], ""
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._logprobs(index, prompt, sample, echo=echo, scored=scored)
        choice = {
            "index": index,
            "text": echo + text,
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if not body.stream or (body.prompt_logprobs is not None and last.finished):
            wanted = None if body.prompt_logprobs is None else last.prompt_logprobs
            choice["prompt_logprobs"] = self.envelope.prompt_logprobs(wanted)
        if body.return_token_ids:
            choice["token_ids"] = ids
            choice["prompt_token_ids"] = prompt.token_ids if is_first else None
        elif not body.stream:  # as in vLLM: a whole response has every field
            choice["token_ids"] = choice["prompt_token_ids"] = None
        return choice | weights_fields(sample)

    def _logprobs(
        self,
        index: int,
        prompt: Prompt,
        sample: Sample,
        *,
        echo: str,
        scored: Sequence[Entry | None],
    ) -> dict[str, Any]:
        """Return the logprobs of the new part of a choice, after those of an echoed prompt."""
        tokenizer, of_prompt = self._service.tokenizer, None
        if (logprobs := self._logprobs_by_choice.get(index)) is None:
            offsets = None
            if tokenizer is not None:
                pieces = tokenizer.token_texts(self.params.skip_special_tokens)
                offsets = Offsets(pieces, prompt.token_ids, start=len(echo))
            logprobs = CompletionLogprobs(self.envelope, offsets, len(echo))
            self._logprobs_by_choice[index] = logprobs
            if self._body.echo:
                ids = prompt.token_ids[: len(scored)]
                prompt_offsets = self._prompt_offsets(prompt)[: len(ids)]
                of_prompt = self.envelope.completion_logprobs(ids, scored, prompt_offsets)
        if self._body.max_tokens == 0:
            new = logprobs.add([], [], "", ended=True)
        else:
            ended = sample.finish_reason is not None
            entries = sample.logprobs or []
            new = logprobs.add(sample.token_ids, entries, sample.text, ended=ended)
        if of_prompt is None:
            return new
        return {name: [*of_prompt[name], *new[name]] for name in new}

    def _prompt_offsets(self, prompt: Prompt) -> list[int]:
        """Return the character offsets of a prompt's tokens in its echoed text."""
        tokenizer = self._service.tokenizer
        if tokenizer is None:
            return [0] * len(prompt.token_ids)
        if prompt.text is not None:
            return tokenizer.offsets(prompt.text)
        offsets = Offsets(tokenizer.token_texts(skip_special_tokens=False))
        found = [*map(offsets.push, prompt.token_ids), offsets.finish()]
        return [offset for part in found for offset in part]

    def _prompt_text(self, prompt: Prompt) -> str:
        """Return the text of a prompt for echo; empty without a tokenizer."""
        if prompt.text is not None:
            return prompt.text
        tokenizer = self._service.tokenizer
        pieces = None if tokenizer is None else tokenizer.token_texts(skip_special_tokens=False)
        return "" if pieces is None else pieces.prompt_text(prompt.token_ids)


@contextlib.contextmanager
def open_streams(
    service: Service, slot: QueueSlot, specs: Sequence[RequestSpec]
) -> Iterator[list[Stream]]:
    """Start one stream for each request; close all of them at the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(service.open(slot, spec)) for spec in specs]


async def read_all(stream: Stream) -> list[Delta]:
    """Return all messages of a stream."""
    deltas: list[Delta] = []
    while not stream.finished:
        deltas += await stream.next()
    return deltas


async def read_interleaved(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """Yield messages from all streams as they arrive, each time with the stream's number."""
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
    """Return the parameters if prompts times samples is within the limit. Raises InvalidRequest."""
    limit = service.config.max_prompts
    if (count := len(prompts) * params.num_samples) > limit:
        raise InvalidRequest("n", Shown(f"{count} samples in total"), f"at most {limit}")
    return params
