"""The offline interface: prompts in, finished outputs out, in this process; knows the engine, no HTTP.

Shaped like vLLM's ``LLM``, so that its users' scripts read on.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipway.codec.chat import ChatTemplate
from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput
from slipway.errors import InvalidBatch, InvalidConfig, InvalidRequest

NANO = str(Path(__file__).parent / "nano")

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = dict[str, Any]


class LLM:
    """A model ready to generate. ``model``: a directory or a hub id; by default ``"nano"``, which is shipped.

    Keyword arguments are the fields of ``EngineConfig``. Raises CheckpointError, UnsupportedModel, InvalidConfig or
    OutOfMemory.
    """

    def __init__(self, model: str | Path = "nano", **options: Any):
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        for name in options.keys() - known:
            raise InvalidConfig(name, options[name], f"no such option; there are {', '.join(sorted(known))}")
        if isinstance(model, Path):
            model = str(model.absolute())  # never a hub id
        # Imported here: an engine brings JAX, half a second and 170 MB, which commands that have none do without.
        from slipway.engine.launch import launch

        self.engine = launch(NANO if model == "nano" else model, EngineConfig(**options))
        tokenizer = self.engine.tokenizer
        self._chat = None if tokenizer is None else ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt: a text, token ids, ``{"prompt_token_ids": [...]}`` or ``{"prompt": text}``, or a list.

        ``sampling_params``: one for all, one each, or the defaults. ``use_tqdm``: a progress bar for more than one.
        Outputs come in the order of the prompts. Raises InvalidRequest; of several prompts the sound ones run to their
        end first, and InvalidBatch holds their outputs.
        """
        listed = _is_batch(prompts)
        items: list[Any] = list(prompts) if listed else [prompts]
        params = _each(sampling_params, len(items))
        ids: dict[str, int] = {}
        errors: dict[int, InvalidRequest] = {}
        outputs: list[RequestOutput | None] = [None] * len(items)
        try:
            for position, (prompt, params_of) in enumerate(zip(items, params)):
                try:
                    ids[self._add(prompt, params_of)] = position
                except InvalidRequest as error:
                    if not listed:
                        raise
                    errors[position] = error
            for output in self._finished(ids, use_tqdm and len(items) > 1):
                outputs[ids[output.request_id]] = output
        finally:  # an interruption leaves nothing behind
            for request_id in filter(self.engine.is_running, ids):
                self.engine.abort(request_id)
        if errors:
            raise InvalidBatch(errors, outputs)
        return [output for output in outputs if output is not None]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, giving what it has come to after every step. Leaving the loop early aborts it."""
        request = self.engine.request(self._add(prompt, _each(sampling_params, 1)[0]))
        shown = 0
        try:
            while not request.finished or request.num_generated > shown:
                if request.num_generated == shown:  # else another stream's step has moved this one too
                    self.engine.step()
                else:
                    shown = request.num_generated
                    yield request.output()
        finally:
            if not request.finished:
                self.engine.abort(request.request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the model's chat template.

        ``template_options``: ``add_generation_prompt``, ``continue_final_message``, and variables of the template.
        Raises InvalidRequest if there is no template or it refuses the conversation.
        """
        several = bool(messages) and isinstance(messages[0], Sequence)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.chat_prompt(conversation, **template_options) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_prompt(self, messages: Sequence[Message], **template_options: Any) -> dict[str, Any]:
        """A conversation as a prompt; the template has written its special tokens itself."""
        tokenizer = self.engine.tokenizer
        if self._chat is None or tokenizer is None:
            raise InvalidRequest("messages", messages, "a tokenizer; this engine runs with skip_tokenizer_init")
        text = self._chat.render(list(messages), **template_options)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        """Queue one prompt; its request id."""
        text: Any = prompt if isinstance(prompt, str) else None
        ids: Any = None if isinstance(prompt, str) else prompt
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None:
            if not isinstance(text, str) or not text:
                raise InvalidRequest("prompt", text, "a text that is not empty")
            if self.engine.tokenizer is None:
                raise InvalidRequest("prompt", text, "token ids; this engine runs with skip_tokenizer_init")
            ids = self.engine.tokenizer.encode(text)
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise InvalidRequest("prompt", ids, "a text, token ids, or a mapping with one of them")
        return self.engine.add([int(i) if isinstance(i, np.integer) else i for i in ids], params, text)

    def _finished(self, ids: Mapping[str, int], shown: bool) -> Iterator[RequestOutput]:
        """Run the engine until the requests have ended, giving each as it ends."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not shown) as progress:
            task = progress.add_task("prompts", total=len(ids))
            left = set(ids)
            while left:
                for request in self.engine.step():
                    if request.finished and request.request_id in left:
                        left.remove(request.request_id)
                        progress.advance(task)
                        yield request.output()


def _is_batch(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a list of prompts; a list of integers is one prompt."""
    return (
        isinstance(prompts, Sequence)
        and not isinstance(prompts, str)
        and not (prompts and isinstance(prompts[0], int | np.integer))
    )


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """Parameters for every prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
        raise InvalidRequest("sampling_params", params, "SamplingParams, one or a list of them")
    if len(params) != count:
        raise InvalidRequest("sampling_params", f"{len(params)} of them", f"one, or one for each of {count} prompts")
    return params
