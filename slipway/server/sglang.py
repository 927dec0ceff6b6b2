"""SGLang's route /generate: its request body, and its responses.

Each event of a stream holds the whole output of its sample so far, not only the new part, because
SGLang's clients read it like that. Prompts and streams are those of completions (completions.py).

Not here: bodies of all other routes (schema.py).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

import msgspec

from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import InvalidRequest, Shown
from slipway.server import schema
from slipway.server.completions import (
    check_num_samples,
    open_streams,
    read_all,
    read_interleaved,
)
from slipway.server.messages import Delta, Sample
from slipway.server.replica import Stream
from slipway.server.responses import (
    DONE,
    Entry,
    by_rank,
    encode,
    merge_deltas,
    merge_samples,
    server_sent_event,
)
from slipway.server.service import Prompt, QueueSlot, Service

SGLANG_FIELDS = {  # SGLang's names -> SamplingParams' names
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output", "n": "n", "temperature": "temperature",
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty", "repetition_penalty": "repetition_penalty",
    "stop": "stop", "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
}  # fmt: skip
SGLANG_STRUCTURES = {
    "json_schema": "json", "regex": "regex", "ebnf": "grammar", "structural_tag": "structural_tag",
}  # fmt: skip
SGLANG_MAX_TOKENS = 128  # SGLang's default


class SGLangSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """SGLang's sampling_params; as in SGLang, unknown members are refused."""

    max_new_tokens: schema.Int | None = None
    min_new_tokens: schema.Int | None = None
    n: schema.Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: schema.Int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[schema.Int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] = True  # false is not supported
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def params(
        self, defaults: Mapping[str, Any], logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return the engine's sampling parameters. Raises InvalidRequest.

        ``defaults``: the model's values of fields that the body leaves out.
        """
        fields = {"max_tokens": SGLANG_MAX_TOKENS} | dict(defaults) | self._given(SGLANG_FIELDS)
        if self.logit_bias is not None:
            fields["logit_bias"] = schema.bias_by_token(self.logit_bias)
        structures = self._given(SGLANG_STRUCTURES)
        if structures.get("json") == "$$ANY$$":  # SGLang's notation for any object
            structures |= {"json": None, "json_object": True}
        structure = None
        if structures:
            structure = schema.structured_outputs(self.structure_field, structures)
        return SamplingParams(
            **fields,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=structure,
        )

    def _given(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the values that are not null, under the engine's names."""
        values = {engine_name: getattr(self, name) for name, engine_name in names.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def structure_field(self) -> str:
        """Path of the field that sets the structure of the output, for errors."""
        given = [name for name in SGLANG_STRUCTURES if getattr(self, name) is not None]
        return f"sampling_params.{given[0]}" if len(given) == 1 else "sampling_params"


class Generate(msgspec.Struct, kw_only=True):
    """Generate completions in SGLang's format; sampling_params is one object, or one per prompt."""

    text: str | list[str] | None = None
    input_ids: list[schema.Int | list[schema.Int]] | None = None
    sampling_params: SGLangSampling | list[SGLangSampling] | None = None
    return_logprob: bool = False
    logprob_start_len: schema.Int = -1
    top_logprobs_num: schema.Int = 0
    return_text_in_logprobs: bool = False
    stream: bool = False
    priority: schema.Int = 0
    extra_key: str | None = None
    model: str | None = None
    request_id: str | None = msgspec.field(name="rid", default=None)

    def client_names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's names."""
        prompt = "text" if self.input_ids is None else "input_ids"
        scores = {"logprobs": "top_logprobs_num", "prompt_logprobs": "top_logprobs_num"}
        sampling = {
            engine_name: f"sampling_params.{name}" for name, engine_name in SGLANG_FIELDS.items()
        }
        more = {
            "logit_bias": "sampling_params.logit_bias",
            "prompt_token_ids": prompt,
            "prompt": prompt,
        }
        names = sampling | scores | more
        if self.request_id is not None:  # otherwise the id comes from a header
            names["request_id"] = "rid"
        return names


class GenerateHandler:
    """Handler of one /generate request: from its body to its response, or its events."""

    def __init__(self, service: Service, body: Generate, request_id: str | None):
        if (body.text is None) == (body.input_ids is None):
            raise InvalidRequest("text", body.text, "either text or input_ids")
        scores = (body.top_logprobs_num, body.logprob_start_len)
        if not body.return_logprob and scores != (0, -1):
            expected = "true, as top_logprobs_num or logprob_start_len is given"
            raise InvalidRequest("return_logprob", False, expected)
        self._service = service
        self._body = body
        self.envelope = service.envelope("generate", "gen", request_id=request_id)

    async def prepare(self) -> None:
        """Make the prompts and sampling parameters. Raises InvalidRequest."""
        body, service = self._body, self._service
        field = "text" if body.input_ids is None else "input_ids"
        given = getattr(body, field)
        self._prompts = await service.prompts(given, field, None)
        each = body.sampling_params or SGLangSampling()
        sampling = each if isinstance(each, list) else [each] * len(self._prompts)
        if len(sampling) != len(self._prompts):
            expected = f"one object for each of the {len(self._prompts)} prompts"
            raise InvalidRequest("sampling_params", Shown(f"{len(sampling)} objects"), expected)
        self._params = [
            self._sampling_params(each, prompt) for each, prompt in zip(sampling, self._prompts)
        ]
        if len({params.n for params in self._params}) > 1:
            counts = [params.n for params in self._params]
            raise InvalidRequest("sampling_params", counts, "the same n for every prompt")
        check_num_samples(self._params[0], self._prompts, service)
        for each, params in zip(sampling, self._params):
            await service.check_grammar(params, each.structure_field)
        single = isinstance(given, str) or isinstance(next(iter(given or ()), None), int)
        self._has_one_sample = single and self._params[0].n == 1

    def _sampling_params(self, sampling: SGLangSampling, prompt: Prompt) -> SamplingParams:
        body, start = self._body, self._body.logprob_start_len
        if not -1 <= start <= len(prompt.token_ids):
            expected = f"-1, or a position in the prompt (0 to {len(prompt.token_ids)})"
            raise InvalidRequest("logprob_start_len", start, expected)
        if body.top_logprobs_num < 0:
            raise InvalidRequest("top_logprobs_num", body.top_logprobs_num, "at least 0")
        if not body.return_logprob:
            return sampling.params(self._service.defaults, None, None)
        scores_prompt = 0 <= start < len(prompt.token_ids)
        top = body.top_logprobs_num
        return sampling.params(self._service.defaults, top, top if scores_prompt else None)

    async def full_response(self, slot: QueueSlot) -> bytes:
        """Return the response: an object, or a list of them if there is more than one sample."""
        with self._open_streams(slot) as streams:
            deltas = await asyncio.gather(*map(read_all, streams))
        found = []
        for number, of_prompt in enumerate(deltas):
            samples = merge_deltas(of_prompt)
            found += [
                self._sample_object(number, samples[index], of_prompt[-1])
                for index in sorted(samples)
            ]
        return encode(found[0] if self._has_one_sample else found)

    async def events(self, slot: QueueSlot) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events, with ``index`` if there are several samples."""
        so_far: list[dict[int, Sample]] = [{} for _ in self._prompts]
        with self._open_streams(slot) as streams:
            async for number, deltas in read_interleaved(streams):
                new = [sample for delta in deltas for sample in delta.samples]
                so_far[number] = merge_samples([*so_far[number].values(), *new])
                out = []
                for index in sorted({sample.index for sample in new}):
                    content = self._sample_object(number, so_far[number][index], deltas[-1])
                    if not self._has_one_sample:
                        content["index"] = number * self._params[number].n + index
                    out.append(server_sent_event(encode(content)))
                yield b"".join(out)
        yield DONE

    def _open_streams(self, slot: QueueSlot) -> contextlib.AbstractContextManager[list[Stream]]:
        facts: dict[str, Any] = {
            "priority": self._body.priority,
            "cache_salt": self._body.extra_key or "",
        }
        pairs = zip(self._prompts, self._params)
        specs = [RequestSpec(prompt.token_ids, params, **facts) for prompt, params in pairs]
        return open_streams(self._service, slot, specs)

    def _sample_object(self, number: int, sample: Sample, last: Delta) -> dict[str, Any]:
        """Return SGLang's object of a sample so far; ``last``: the newest message of its prompt."""
        prompt = self._prompts[number]
        request_id = self.envelope.id
        meta: dict[str, Any] = {
            "id": request_id if len(self._prompts) == 1 else f"{request_id}_{number}",
            "finish_reason": self._finish_reason(sample),
            "prompt_tokens": len(prompt.token_ids),
            "completion_tokens": len(sample.token_ids),
            "cached_tokens": last.num_cached_tokens,
        }
        if (drafts := last.drafts).verified:
            meta |= {
                "spec_verify_ct": drafts.verified,
                "spec_draft_token_num": drafts.drafted,
                "spec_accept_token_num": drafts.accepted,
                "spec_accept_rate": drafts.accepted / drafts.drafted,
                "spec_accept_length": 1 + drafts.accepted / drafts.verified,
            }
        if self._body.return_logprob:
            meta |= self._logprobs("output", sample.token_ids, sample.logprobs or [])
            if last.finished:  # the last message brings the prompt's log probabilities
                start, scored = self._body.logprob_start_len, last.prompt_logprobs
                entries = [] if scored is None else scored[start:]
                ids = prompt.token_ids[start:] if entries else []
                # As in SGLang, the first token has none: the others follow from it.
                meta |= self._logprobs("input", ids, [None, *entries[1:]])
        if sample.weights:
            meta["weight_version"] = sample.weights[-1][1]
        return {"text": sample.text, "output_ids": sample.token_ids, "meta_info": meta}

    def _finish_reason(self, sample: Sample) -> dict[str, Any] | None:
        """Return SGLang's finish_reason, with the token or text that ended the sample.

        SGLang has no reason for an end by time; it becomes "abort".
        """
        reason, ids = sample.finish_reason, sample.token_ids
        if reason is None:
            return None
        if reason == "length":
            return {"type": "length", "length": len(ids)}
        if reason == "stop":
            matched = ids[-1] if sample.stop_reason is None and ids else sample.stop_reason
            return {"type": "stop", "matched": matched}
        cause = sample.stop_reason or reason
        return {"type": "abort", "message": f"the request ended early: {cause}"}

    def _logprobs(
        self, side: str, ids: list[int], entries: list[Entry] | list[Entry | None]
    ) -> dict[str, Any]:
        """Return SGLang's logprobs: for each token its own, and the likeliest tokens' there.

        Each is written [log probability, token id, text or null]. ``side``: "input" or "output".
        """

        def triple(token: int, value: float | None) -> list[Any]:
            text = self.envelope.text(token) if self._body.return_text_in_logprobs else None
            return [value, token, text]

        own = [
            triple(token, None if entry is None else entry[token][0])
            for token, entry in zip(ids, entries)
        ]
        found: dict[str, Any] = {f"{side}_token_logprobs": own}
        if top := self._body.top_logprobs_num:
            found[f"{side}_top_logprobs"] = [
                None
                if entry is None
                else [triple(token, value) for token, (value, _) in by_rank(entry)[:top]]
                for _, entry in zip(ids, entries)
            ]
        return found
