"""Offline interface: complete prompts in this process.

Its methods are those of vLLM's ``LLM``, so that scripts for vLLM need few changes.

Not here: use from an event loop (async_engine.py), HTTP (server/), steps of the engine (engine/).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipway.codec.chat import ChatTemplates
from slipway.codec.prompt import Prompt, is_batch, parse_prompt
from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestOutput, RequestSpec
from slipway.errors import InvalidBatch, InvalidConfig, InvalidRequest

if TYPE_CHECKING:
    from slipway.checkpoint.swap import Mode
    from slipway.engine.updates import Policy

NANO = str(Path(__file__).parent / "nano")

Message = dict[str, Any]


class LLM:
    """Loaded model, ready to generate.

    ``model`` is a directory or a hub id; "nano" is the model shipped with Slipway. Keyword
    arguments are the fields of ``EngineConfig``. Raises CheckpointError, UnsupportedModel,
    InvalidConfig or OutOfMemory.
    """

    def __init__(self, model: str | Path = "nano", **options: Any):
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        for name in options.keys() - known:
            expected = f"no such option; the options are {', '.join(sorted(known))}"
            raise InvalidConfig(name, options[name], expected)
        if isinstance(model, Path):
            model = str(model.absolute())  # never a hub id
        # Imported here: an engine imports JAX (half a second, 170 MB), which not every command
        # needs.
        from slipway.engine.launch import launch

        self.engine = launch(NANO if model == "nano" else model, EngineConfig(**options))
        tokenizer = self.engine.tokenizer
        self._templates: ChatTemplates | None = None
        if tokenizer is not None:
            self._templates = ChatTemplates(tokenizer.chat_templates, tokenizer.special_tokens)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the device's memory; no other method may be called afterwards."""
        self.engine.close()

    def update_weights(
        self,
        source: Any,
        *,
        mapping: str | None = None,
        mode: "Mode" = "inplace",
        policy: "Policy" = "finish",
        version: str | None = None,
    ) -> str:
        """Replace the weights from the next step on, without compiling; return their version.

        ``source`` is an HF directory or hub id; (HF name, array) pairs; a tree of this model's
        arrays, such as another engine's ``weights``; or a tree of another framework or a
        ``flax.nnx`` module. For the latter, ``mapping`` names the rules, as in ``slipway convert``;
        the default is the one that fits. Arrays are NumPy's or JAX's, on any mesh, and stay the
        caller's. ``mode`` and ``policy`` are those of ``Engine.update_weights``.

        Everything is checked first. Raises CheckpointError, listing all that does not fit, before
        anything has changed: the old weights stay in use. Raises WeightsLost if a leaf fails after
        others have changed.
        """
        # imports the rules of all other trees, which few callers need
        from slipway.convert import weight_sources

        values = weight_sources.values(source, self.engine.weights, mapping)
        values.check(self.engine.weights, mode)
        change = self.engine.update_weights(values, version=version, mode=mode, policy=policy)
        return self._until(change)

    def sleep(self, level: int = 1) -> None:
        """Free the KV cache and the weights on the devices.

        Level 1 keeps the weights on the host, level 2 drops them.
        """
        self._until(self.engine.sleep(level))

    def wake_up(self) -> None:
        """Undo ``sleep``; after level 2 call ``update_weights`` before any request."""
        self._until(self.engine.wake_up())

    @property
    def weights_version(self) -> str:
        """Version of the weights in use: "0" as loaded, then "1", "2", ... or an update's own."""
        return self.engine.weights.version

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt, or each prompt of a list; return outputs in the same order.

        A prompt is a text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": [...]}``.
        ``sampling_params`` are for all prompts, or one for each; None takes the model's defaults.
        Prompts with a smaller ``priority`` are run first. ``use_tqdm`` shows a progress bar if
        there are several prompts.

        Raises InvalidRequest for one invalid prompt. If a prompt of a list is invalid, the valid
        ones are completed first; then InvalidBatch is raised, which holds their outputs.
        """
        items: list[Any] = list(prompts) if is_batch(prompts) else [prompts]
        params = self._each(sampling_params, len(items))
        first = [0] * len(items) if priority is None else list(priority)
        if len(first) != len(items):
            raise InvalidRequest("priority", first, f"one for each of {len(items)} prompts")
        adds = [partial(self._add, *each) for each in zip(items, params, first)]
        return self._run(adds, is_batch(prompts), use_tqdm)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: str = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[np.ndarray]:
        """Return the final hidden state [embed] of each prompt, in f32.

        ``pooling`` takes that of the "last" token or the "mean" of all. ``normalize`` scales it to
        length 1. Raises InvalidRequest as ``generate`` does.
        """
        if pooling not in ("last", "mean"):
            raise InvalidRequest("pooling", pooling, "last or mean")
        items: list[Any] = list(prompts) if is_batch(prompts) else [prompts]
        params = SamplingParams(max_tokens=1)
        adds = [partial(self._add, item, params, pooling=pooling) for item in items]
        outputs = self._run(adds, is_batch(prompts), use_tqdm)
        vectors = [output.hidden for output in outputs if output.hidden is not None]
        return [vector / np.linalg.norm(vector) for vector in vectors] if normalize else vectors

    def score(
        self,
        a: Prompt | Sequence[Prompt],
        b: Prompt | Sequence[Prompt],
        pooling: str = "last",
    ) -> list[float]:
        """Return the cosine similarity of texts' embeddings, pair by pair.

        A single ``a`` is compared with each ``b``.
        """
        ours, theirs = (self.encode(texts, pooling, use_tqdm=False) for texts in (a, b))
        if len(ours) not in (1, len(theirs)):
            raise InvalidRequest("b", f"{len(theirs)} prompts", f"as many as a has ({len(ours)})")
        if len(ours) == 1:
            ours = ours * len(theirs)
        return [float(one @ other) for one, other in zip(ours, theirs)]

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Raises InvalidRequest if the engine has no tokenizer, or if the text cannot be encoded as
        UTF-8.
        """
        if self.engine.tokenizer is None:
            raise InvalidRequest("text", text, "an engine without skip_tokenizer_init")
        return self.engine.tokenizer.encode(text, add_special_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the model's generation_config.json."""
        return SamplingParams(**self.engine.defaults)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[RequestOutput]:
        """Complete one prompt; yield its output so far after each step.

        Leaving the loop early aborts the request.
        """
        request = self.engine.request(self._add(prompt, self._each(sampling_params, 1)[0]))
        shown = 0
        try:
            while not request.finished or request.num_generated > shown:
                # a step of another stream may have advanced this request too
                if request.num_generated == shown:
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
        chat_template: str | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, with the model's chat template.

        ``template_options`` are ``add_generation_prompt``, ``continue_final_message``, and
        variables of the template. ``chat_template`` is the name of one of the model's templates, or
        the text of a template. By default a chat with ``tools`` among the options uses "tool_use"
        if the model has it, and every other chat uses "default". Raises InvalidRequest if there is
        no template or it refuses the conversation.
        """
        several = bool(messages) and isinstance(messages[0], Sequence)
        conversations: Sequence[Any] = messages if several else [messages]
        options = {"chat_template": chat_template, **template_options}
        prompts = [self.chat_prompt(conversation, **options) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_prompt(
        self, messages: Sequence[Message], chat_template: str | None = None, **template_options: Any
    ) -> dict[str, Any]:
        """Render a conversation to a prompt, with the options of ``chat``.

        The template writes the special tokens, so the tokenizer adds none.
        """
        tokenizer = self.engine.tokenizer
        if self._templates is None or tokenizer is None:
            raise InvalidRequest("messages", messages, "an engine without skip_tokenizer_init")
        if chat_template is None:
            template = self._templates.choose(bool(template_options.get("tools")))
        else:
            template = self._templates.given(chat_template)
        text = template.render(list(messages), **template_options)
        return {
            "prompt": text,
            "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False),
        }

    def _add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        pooling: str = "",
    ) -> str:
        """Queue one prompt; return its request id."""
        text, ids, salt = parse_prompt(prompt, self.engine.tokenizer)
        spec = RequestSpec(
            ids,
            params,
            prompt=text,
            priority=priority,
            cache_salt=salt,
            pooling=pooling,
        )
        return self.engine.add(spec)

    def _run(
        self,
        adds: Sequence[Callable[[], str]],
        listed: bool,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Queue requests and run them to their end.

        If ``listed`` is false there is only one request, and its own error is raised.
        """
        ids: dict[str, int] = {}
        errors: dict[int, InvalidRequest] = {}
        outputs: list[RequestOutput | None] = [None] * len(adds)
        try:
            for position, add in enumerate(adds):
                try:
                    ids[add()] = position
                except InvalidRequest as error:
                    if not listed:
                        raise
                    errors[position] = error
            for output in self._finished(ids, use_tqdm and len(adds) > 1):
                outputs[ids[output.request_id]] = output
        finally:  # also after an interruption, no request stays in the engine
            for request_id in filter(self.engine.is_running, ids):
                self.engine.abort(request_id)
        if errors:
            raise InvalidBatch(errors, outputs)
        return [output for output in outputs if output is not None]

    def _finished(self, ids: Mapping[str, int], shown: bool) -> Iterator[RequestOutput]:
        """Run the engine until the requests have ended; yield the output of each when it ends."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not shown) as progress:
            task = progress.add_task("prompts", total=len(ids))
            left = set(ids)
            while left:
                for request in self.engine.step():
                    if request.finished and request.request_id in left:
                        left.remove(request.request_id)
                        progress.advance(task)
                        yield request.output()

    def _until(self, change: Future[Any]) -> Any:
        """Run steps of the engine until a change is made; return its result."""
        while not change.done():
            self.engine.step()
        return change.result()

    def _each(
        self,
        params: SamplingParams | Sequence[SamplingParams] | None,
        count: int,
    ) -> Sequence[SamplingParams]:
        """Return the sampling parameters of each prompt."""
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        is_list = isinstance(params, Sequence)
        if not is_list or not all(isinstance(each, SamplingParams) for each in params):
            raise InvalidRequest("sampling_params", params, "SamplingParams, one or a list of them")
        if len(params) != count:
            got = f"{len(params)} of them"
            expected = f"one, or one for each of {count} prompts"
            raise InvalidRequest("sampling_params", got, expected)
        return params
