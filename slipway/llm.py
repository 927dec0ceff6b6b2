"""The offline interface: prompts in, finished outputs out, in this process; knows the engine, no HTTP.

Shaped like vLLM's ``LLM``, so that its users' scripts read on.
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
        self._templates = (
            None if tokenizer is None else ChatTemplates(tokenizer.chat_templates, tokenizer.special_tokens)
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the device's memory; nothing can be run afterwards."""
        self.engine.close()

    def update_weights(
        self, source: Any, *, mapping: str | None = None, mode: "Mode" = "inplace", policy: "Policy" = "finish",
        version: str | None = None,
    ) -> str:  # fmt: skip
        """Serve other weights of the same model from the next step on, without compiling anything; their version.

        ``source``: an HF directory or hub id; (HF name, array) pairs; a tree of this model's arrays, another engine's
        ``weights``, or a foreign tree or ``flax.nnx`` module that ``mapping`` names (as in ``slipway convert``; by
        default the one that fits). Arrays are NumPy's or JAX's, on any mesh, and stay the caller's. ``mode`` and
        ``policy`` as in ``Engine.update_weights``. Everything is checked first: CheckpointError lists all that does not
        fit, and the old weights serve on. WeightsLost: a leaf failed after others had changed.
        """
        from slipway.convert import live  # with the rules of every foreign tree, which few need

        values = live.values(source, self.engine.weights, mapping)
        values.check(self.engine.weights, mode)
        return self._until(self.engine.update_weights(values, version=version, mode=mode, policy=policy))

    def sleep(self, level: int = 1) -> None:
        """Free the cache, and devices of the weights; ``level`` 1 keeps these on the host, 2 drops them."""
        self._until(self.engine.sleep(level))

    def wake_up(self) -> None:
        """Undo ``sleep``; after level 2 ``update_weights`` must bring weights before anything can run."""
        self._until(self.engine.wake_up())

    @property
    def weights_version(self) -> str:
        """Of the weights that serve: "0" as loaded, then 1, 2, ... or what ``update_weights`` was told."""
        return self.engine.weights.version

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt: a text, token ids, ``{"prompt_token_ids": [...]}`` or ``{"prompt": text}``, or a list.

        ``sampling_params``: one for all, one each, or the model's defaults. ``priority``: of each, the smaller first.
        ``use_tqdm``: a progress bar for more than one. Outputs come in the order of the prompts. Raises InvalidRequest;
        of several prompts the sound ones run to their end first, and InvalidBatch holds their outputs.
        """
        items: list[Any] = list(prompts) if is_batch(prompts) else [prompts]
        params = self._each(sampling_params, len(items))
        first = [0] * len(items) if priority is None else list(priority)
        if len(first) != len(items):
            raise InvalidRequest("priority", first, f"one for each of {len(items)} prompts")
        adds = [partial(self._add, *each) for each in zip(items, params, first)]
        return self._run(adds, is_batch(prompts), use_tqdm)

    def encode(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last", normalize: bool = True, use_tqdm: bool = True
    ) -> list[np.ndarray]:
        """The final hidden state [embed] of every prompt, in f32: of its ``last`` token, or the ``mean`` of all.

        ``normalize``: to length 1. Raises InvalidRequest as ``generate`` does.
        """
        if pooling not in ("last", "mean"):
            raise InvalidRequest("pooling", pooling, "last or mean")
        items: list[Any] = list(prompts) if is_batch(prompts) else [prompts]
        adds = [partial(self._add, item, SamplingParams(max_tokens=1), pooling=pooling) for item in items]
        outputs = self._run(adds, is_batch(prompts), use_tqdm)
        vectors = [output.hidden for output in outputs if output.hidden is not None]
        return [vector / np.linalg.norm(vector) for vector in vectors] if normalize else vectors

    def score(self, a: Prompt | Sequence[Prompt], b: Prompt | Sequence[Prompt], pooling: str = "last") -> list[float]:
        """How alike texts are: the cosine of their embeddings, pair by pair, or of one ``a`` with every ``b``."""
        ours, theirs = (self.encode(texts, pooling, use_tqdm=False) for texts in (a, b))
        if len(ours) not in (1, len(theirs)):
            raise InvalidRequest("b", f"{len(theirs)} prompts", f"as many as a has ({len(ours)})")
        return [float(one @ other) for one, other in zip(ours * len(theirs) if len(ours) == 1 else ours, theirs)]

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Raises InvalidRequest without a tokenizer, or for text that has no UTF-8 form."""
        if self.engine.tokenizer is None:
            raise InvalidRequest("text", text, "an engine with a tokenizer; this one runs with skip_tokenizer_init")
        return self.engine.tokenizer.encode(text, add_special_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says."""
        return SamplingParams(**self.engine.defaults)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, giving what it has come to after every step. Leaving the loop early aborts it."""
        request = self.engine.request(self._add(prompt, self._each(sampling_params, 1)[0]))
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
        chat_template: str | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the model's chat template.

        ``template_options``: ``add_generation_prompt``, ``continue_final_message``, and variables of the template.
        ``chat_template``: the name of one of the model's templates, or a template's text; by default a chat
        with ``tools`` among the options takes "tool_use" if there is one, every other chat "default".
        Raises InvalidRequest if there is no template or it refuses the conversation.
        """
        several = bool(messages) and isinstance(messages[0], Sequence)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.chat_prompt(conversation, chat_template, **template_options) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_prompt(
        self, messages: Sequence[Message], chat_template: str | None = None, **template_options: Any
    ) -> dict[str, Any]:
        """Render a conversation as a prompt, with the options of `chat`; the template writes its special tokens."""
        tokenizer = self.engine.tokenizer
        if self._templates is None or tokenizer is None:
            raise InvalidRequest("messages", messages, "a tokenizer; this engine runs with skip_tokenizer_init")
        if chat_template is None:
            template = self._templates.choose(bool(template_options.get("tools")))
        else:
            template = self._templates.given(chat_template)
        text = template.render(list(messages), **template_options)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _add(self, prompt: Prompt, params: SamplingParams, priority: int = 0, pooling: str = "") -> str:
        """Queue one prompt; its request id."""
        text, ids, salt = parse_prompt(prompt, self.engine.tokenizer)
        spec = RequestSpec(ids, params, prompt=text, priority=priority, cache_salt=salt, pooling=pooling)
        return self.engine.add(spec)

    def _run(self, adds: Sequence[Callable[[], str]], listed: bool, use_tqdm: bool) -> list[RequestOutput]:
        """Queue requests and run them to their end. Where only one was asked for, its error is raised itself."""
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
        finally:  # an interruption leaves nothing behind
            for request_id in filter(self.engine.is_running, ids):
                self.engine.abort(request_id)
        if errors:
            raise InvalidBatch(errors, outputs)
        return [output for output in outputs if output is not None]

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

    def _until(self, change: Future[Any]) -> Any:
        """Run what runs until a change has been made; what that came to."""
        while not change.done():
            self.engine.step()
        return change.result()

    def _each(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        """Parameters for every prompt."""
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
            raise InvalidRequest("sampling_params", params, "SamplingParams, one or a list of them")
        if len(params) != count:
            raise InvalidRequest("sampling_params", f"{len(params)} of them", f"one, or one for each of {count}")
        return params
