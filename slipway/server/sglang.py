"""POST /generate: from a checked body to answers in SGLang's own shape; the same prompts and streams as completions.

An event of a stream holds all that there is of its sample so far, not what is new: that is what SGLang's clients read.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from slipway.engine.params import SamplingParams
from slipway.errors import InvalidRequest
from slipway.server import schema
from slipway.server.completions import check_num_samples, open_streams, read_all, read_interleaved
from slipway.server.messages import Delta, Sample
from slipway.server.responses import DONE, Entry, Envelope, encode, merge_samples, server_sent_event
from slipway.server.service import Prompt, QueueSlot, Service


class GenerateHandler:
    """The answer to a Generate."""

    def __init__(self, service: Service, body: schema.Generate, request_id: str | None):
        if (body.text is None) == (body.input_ids is None):
            raise InvalidRequest("text", body.text, "either text or input_ids")
        if not body.return_logprob and (body.top_logprobs_num, body.logprob_start_len) != (0, -1):
            raise InvalidRequest(
                "return_logprob", False, "true, with top_logprobs_num or logprob_start_len"
            )
        self._service, self._body = service, body
        self.envelope = Envelope(
            "generate", "gen", service.model_name, request_id, service.tokenizer
        )

    async def prepare(self) -> None:
        """Make prompts and parameters of the body. Raises InvalidRequest."""
        body, service = self._body, self._service
        given, field = (
            (body.text, "text") if body.input_ids is None else (body.input_ids, "input_ids")
        )
        self._prompts = await service.prompts(given, field, None)
        each = body.sampling_params or schema.SGLangSampling()
        asked = each if isinstance(each, list) else [each] * len(self._prompts)
        if len(asked) != len(self._prompts):
            raise InvalidRequest(
                "sampling_params",
                f"{len(asked)} of them",
                f"one for each prompt ({len(self._prompts)})",
            )
        self._params = [self._of(each, prompt) for each, prompt in zip(asked, self._prompts)]
        if len({params.n for params in self._params}) > 1:
            raise InvalidRequest(
                "sampling_params",
                [params.n for params in self._params],
                "the same n for each prompt",
            )
        check_num_samples(self._params[0], self._prompts, service)
        for each, params in zip(asked, self._params):
            await service.check_grammar(params, each.structure_field)
        single = isinstance(given, str) or isinstance(next(iter(given or ()), None), int)
        self._alone = single and self._params[0].n == 1

    def _of(self, asked: schema.SGLangSampling, prompt: Prompt) -> SamplingParams:
        body, start = self._body, self._body.logprob_start_len
        if not -1 <= start <= len(prompt.token_ids):
            expected = f"-1, or a place in the prompt (0 to {len(prompt.token_ids)})"
            raise InvalidRequest("logprob_start_len", start, expected)
        if body.top_logprobs_num < 0:
            raise InvalidRequest("top_logprobs_num", body.top_logprobs_num, "at least 0")
        if not body.return_logprob:
            return asked.params(self._service.defaults, None, None)
        scores = 0 <= start < len(prompt.token_ids)
        return asked.params(
            self._service.defaults, body.top_logprobs_num, body.top_logprobs_num if scores else None
        )

    async def full_response(self, slot: QueueSlot) -> bytes:
        """The answer at once: an object, or a list of them where there is more than one sample."""
        with open_streams(
            self._service, slot, self._prompts, self._params, self._body.priority, self._salt
        ) as streams:
            deltas = await asyncio.gather(*map(read_all, streams))
        found = []
        for number, of_prompt in enumerate(deltas):
            samples = merge_samples([sample for delta in of_prompt for sample in delta.samples])
            found += [
                self._shown(number, samples[index], of_prompt[-1]) for index in sorted(samples)
            ]
        return encode(found[0] if self._alone else found)

    async def events(self, slot: QueueSlot) -> AsyncIterator[bytes]:
        """The answer as server-sent events; with ``index`` where there is more than one sample."""
        held: list[dict[int, Sample]] = [{} for _ in self._prompts]
        with open_streams(
            self._service, slot, self._prompts, self._params, self._body.priority, self._salt
        ) as streams:
            async for number, deltas in read_interleaved(streams):
                new = [sample for delta in deltas for sample in delta.samples]
                moved = sorted({sample.index for sample in new})
                held[number] = merge_samples([*held[number].values(), *new])
                out = []
                for index in moved:
                    shown = self._shown(number, held[number][index], deltas[-1])
                    place_of = (
                        {} if self._alone else {"index": number * self._params[number].n + index}
                    )
                    out.append(server_sent_event(encode(shown | place_of)))
                yield b"".join(out)
        yield DONE

    @property
    def _salt(self) -> str:
        return self._body.extra_key or ""

    def _shown(self, number: int, sample: Sample, last: Delta) -> dict[str, Any]:
        prompt = self._prompts[number]
        meta: dict[str, Any] = {
            "id": self.envelope.id if len(self._prompts) == 1 else f"{self.envelope.id}_{number}",
            "finish_reason": self._reason(sample),
            "prompt_tokens": len(prompt.token_ids),
            "completion_tokens": len(sample.token_ids),
            "cached_tokens": last.num_cached_tokens,
        }
        if self._body.return_logprob:
            meta |= self._logprobs("output", sample.token_ids, sample.logprobs or [])
            if last.finished:  # the prompt's come with the last piece
                start = self._body.logprob_start_len
                entries = (
                    (last.prompt_logprobs or [])[start:] if last.prompt_logprobs is not None else []
                )
                # the first one's is not given, as in SGLang: it is what the others are read from
                meta |= self._logprobs(
                    "input", prompt.token_ids[start:] if entries else [], [None, *entries[1:]]
                )
        if sample.weights:
            meta["weight_version"] = sample.weights[-1][1]
        return {"text": sample.text, "output_ids": sample.token_ids, "meta_info": meta}

    def _reason(self, sample: Sample) -> dict[str, Any] | None:
        """SGLang's: which token or text it stopped at; it knows no end by time."""
        reason, ids = sample.finish_reason, sample.token_ids
        if reason is None:
            return None
        if reason == "length":
            return {"type": "length", "length": len(ids)}
        if reason == "stop":
            return {
                "type": "stop",
                "matched": ids[-1] if sample.stop_reason is None and ids else sample.stop_reason,
            }
        return {
            "type": "abort",
            "message": f"the request ended early: {sample.stop_reason or reason}",
        }

    def _logprobs(
        self, side: str, ids: list[int], entries: list[Entry] | list[Entry | None]
    ) -> dict[str, Any]:
        """[log probability, token, its text or null] for each token, and the likeliest instead of each."""

        def one(token: int, value: float | None) -> list[Any]:
            return [
                value,
                token,
                self.envelope.text(token) if self._body.return_text_in_logprobs else None,
            ]

        own = [
            one(token, None if entry is None else entry[token][0])
            for token, entry in zip(ids, entries)
        ]
        found: dict[str, Any] = {f"{side}_token_logprobs": own}
        if top := self._body.top_logprobs_num:
            found[f"{side}_top_logprobs"] = [
                None
                if entry is None
                else [
                    one(token, value)
                    for token, (value, _) in sorted(entry.items(), key=lambda item: item[1][1])[
                        :top
                    ]
                ]
                for _, entry in zip(ids, entries)
            ]
        return found
