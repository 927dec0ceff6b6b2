"""From a body to the engine and back: prompts, templates, queue bounds, which replica; knows no HTTP and no JSON shape.

Tokenizing and templates run off the event loop. A request takes its place in the queue before anything is copied.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slipway.codec import json_schema, parts, tags
from slipway.codec.chat import ChatTemplates
from slipway.codec.grammar import StructuredOutputs
from slipway.codec.tokenizer import Tokenizer
from slipway.engine.params import SamplingParams
from slipway.errors import ClientBusy, ContextTooLong, EngineBusy, EngineDead, InvalidRequest, Shown
from slipway.server import schema
from slipway.server.config import ServerConfig
from slipway.server.grammar_sandbox import GrammarSandbox
from slipway.server.replica import Replica, Stream

logger = logging.getLogger(__name__)
TEMPLATE_TIMEOUT_S = 10.0
TEMPLATE_FIELDS = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "tools",
)
PREFIX_TOKENS, PREFIX_DEPTH, PREFIXES = (
    64,
    8,
    4096,
)  # by which a replica is found that has seen a prompt's beginning


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that they came from, if it was a text."""

    token_ids: list[int]
    text: str | None = None


@dataclasses.dataclass(eq=False)
class QueueSlot:
    """A request's place in the queue, and what runs for it."""

    streams: list[Stream] = dataclasses.field(default_factory=list)

    def abort(self) -> None:
        """End it where it stands."""
        for stream in self.streams:
            stream.abort()


class Service:
    """The model as its clients use it. All methods are called from one event loop."""

    def __init__(
        self,
        config: ServerConfig,
        model_name: str,
        tokenizer: Tokenizer | None,
        templates: Mapping[str, str],
        replicas: list[Replica],
        folder: Path,
        root: str = "",
        tokenizer_config: Mapping[str, Any] | None = None,
    ):
        self.root = root or model_name  # what the model was loaded by
        self._tokenizer_config = tokenizer_config
        self.folder = folder  # this user's alone
        self.config, self.model_name, self.tokenizer, self.replicas = (
            config,
            model_name,
            tokenizer,
            replicas,
        )
        special = (
            frozenset[int]() if tokenizer is None else tokenizer.special_ids
        )  # the text leaves those out
        marks = {} if tokenizer is None else tags.marks(tokenizer)
        self.marks = {mark: token for mark, token in marks.items() if token not in special}
        self._sandbox = None if tokenizer is None else GrammarSandbox(tokenizer)
        self._templates = ChatTemplates(
            templates, {} if tokenizer is None else tokenizer.special_tokens
        )
        parts.family(config.output_parser, None)  # an unknown name is refused before the start
        self._num_requests = self._num_tokens = 0
        self._by_client: Counter[str] = Counter()
        self._prefixes: dict[Replica, OrderedDict[bytes, None]] = {
            each: OrderedDict() for each in replicas
        }
        self._running: dict[str, QueueSlot] = {}  # by request id
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return not self.draining and any(replica.serves for replica in self.replicas)

    @property
    def limits(self) -> dict[str, Any]:
        """The engine's; raises EngineDead before one has started."""
        for replica in self.replicas:
            if replica.info is not None:
                return replica.info.limits
        raise EngineDead("the engine is not ready")

    @property
    def defaults(self) -> dict[str, Any]:
        """Of sampling, by the model's generation_config.json."""
        return next(
            (replica.info.defaults for replica in self.replicas if replica.info is not None), {}
        )

    @property
    def features(self) -> dict[str, bool]:
        """Return what can be asked of this model, by its tokenizer and its chat templates."""
        found = [self._templates.find(tools) for tools in (False, True)]
        plain, with_tools = ("" if template is None else template.source for template in found)
        return {
            "generation": True,
            "embeddings": True,
            "classification": False,
            "text": self.tokenizer is not None,
            "chat": bool(plain or with_tools),
            "tools": "tools" in with_tools,
            "documents": "documents" in plain,
            "reasoning": self._family(plain or with_tools).thinking is not None,
        }

    def tokenizer_info(self) -> dict[str, Any]:
        """Return tokenizer_config.json with the chat template in use. Raises InvalidRequest without a tokenizer."""
        if self._tokenizer_config is None:
            raise InvalidRequest("tokenizer", Shown("none"), "a server with a tokenizer")
        shown = {
            name: value
            for name, value in self._tokenizer_config.items()
            if not name.endswith(("_file", "_path"))
        }
        shown["tokenizer_class"] = shown.get("tokenizer_class") or "PreTrainedTokenizerFast"
        if sources := self._templates.sources:
            listed = [{"name": name, "template": source} for name, source in sources.items()]
            shown["chat_template"] = sources["default"] if [*sources] == ["default"] else listed
        return shown

    def chat_format(self, tools: bool) -> tuple[str, parts.Family]:
        """Return the template's text of a chat, with tools or without, and the format of the answers to it.

        Raises InvalidRequest where the model has several templates but none for the chat.
        """
        source = self._templates.choose(tools).source
        return source, self._family(source)

    def _family(self, source: str) -> parts.Family:
        return parts.family(self.config.output_parser, source)

    def names_token_ids(self, body: schema.Sampling) -> bool:
        """Return whether logprobs write tokens as "token_id:17": by the request, else by the server's option."""
        asked = body.return_tokens_as_token_ids
        return self.config.return_tokens_as_token_ids if asked is None else asked

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return self._num_requests

    @contextlib.contextmanager
    def queue_slot(self, client: str, request_id: str) -> Iterator[QueueSlot]:
        """A place in the queue. Raises EngineBusy or ClientBusy."""
        config = self.config
        if self.draining:
            raise EngineBusy("the server is draining")
        if self._num_requests >= config.max_queued_requests:
            raise EngineBusy(f"{self._num_requests} requests run or wait, as many as may")
        if self._by_client[client] >= config.max_requests_per_client:
            raise ClientBusy(f"{self._by_client[client]} requests of this client run or wait")
        if request_id in self._running:
            raise InvalidRequest("request_id", request_id, "one that is not running")
        slot = self._running[request_id] = QueueSlot()
        self._num_requests += 1
        self._by_client[client] += 1
        try:
            yield slot
        finally:
            self._num_requests -= 1
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]
            del self._running[request_id]

    def abort(self, request_id: str) -> bool:
        """End a request; False if it is not running."""
        if (slot := self._running.get(request_id)) is None:
            return False
        slot.abort()
        return True

    def abort_all(self) -> None:
        """End everything that runs."""
        for slot in self._running.values():
            slot.abort()

    async def prompts(
        self, given: Any, field: str, truncate: int | None, side: Literal["left", "right"] = "left"
    ) -> list[Prompt]:
        """Read the prompts of a body: texts or token ids, one or many.

        ``truncate``: tokens to keep of each, at most; ``side``: where the others are cut off. Raises InvalidRequest.
        """
        items = _items(given, field)
        if len(items) > self.config.max_prompts:
            raise InvalidRequest(
                field, f"{len(items)} prompts", f"at most {self.config.max_prompts}"
            )
        longest = (
            16 * self.limits["max_model_len"]
        )  # characters of any token: beyond, it cannot fit
        if any(isinstance(item, str) and len(item) > longest * 8 for item in items):
            size = max(len(item) for item in items if isinstance(item, str))
            raise ContextTooLong(
                field, f"a text of {size} characters", self.limits["max_model_len"]
            )
        texts = [item for item in items if isinstance(item, str)]
        encoded = iter(await self._encode(texts)) if texts else iter(())
        found = [
            Prompt(next(encoded), item) if isinstance(item, str) else Prompt(item) for item in items
        ]
        if truncate is not None:
            if truncate != -1 and truncate < 1:
                raise InvalidRequest(
                    "truncate_prompt_tokens", truncate, "at least 1, or -1 for what fits"
                )
            keep = self.limits["max_model_len"] - 1 if truncate == -1 else truncate
            kept = slice(keep) if side == "right" else slice(-keep, None)
            # what is left of a text that was cut is its tokens
            found = [
                each if len(each.token_ids) <= keep else Prompt(each.token_ids[kept])
                for each in found
            ]
        self.check_lengths(found, field)
        return found

    def check_lengths(self, prompts: Sequence[Prompt], field: str) -> None:
        """Raise ContextTooLong for a prompt that leaves no room for an answer; `field`: where the client sent it."""
        limit = self.limits["max_model_len"]
        for prompt in prompts:
            if len(prompt.token_ids) >= limit:
                raise ContextTooLong(field, f"{len(prompt.token_ids)} tokens", limit)

    async def conversation(
        self,
        messages: list[dict[str, Any]],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Prompt:
        """Render a conversation by its chat template, with ``chat_template_kwargs``.

        Raises InvalidRequest, too, if that takes too long, and for ``kwargs`` that are fields of the body.
        """
        for name in TEMPLATE_FIELDS:
            if kwargs and name in kwargs:
                raise InvalidRequest(
                    f"chat_template_kwargs.{name}", kwargs[name], "a field of the body instead"
                )
        options = {**(kwargs or {}), **options}
        if (tokenizer := self.tokenizer) is None:
            raise InvalidRequest("messages", messages, "a model with a tokenizer")
        chat = self._templates.choose(bool(options.get("tools")))

        def render() -> Prompt:
            text = chat.render(messages, **options)
            return Prompt(tokenizer.encode(text, add_special_tokens=False), text)

        try:
            return await asyncio.wait_for(asyncio.to_thread(render), TEMPLATE_TIMEOUT_S)
        except TimeoutError as error:
            raise InvalidRequest(
                "messages", messages, f"a template that ends within {TEMPLATE_TIMEOUT_S} s"
            ) from error

    async def check_grammar(
        self,
        params: SamplingParams,
        field: str = "structured_outputs",
        schemas: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that a client's grammar can be built.

        `field`: where the request states it. `schemas`: the JSON schemas in it, by their fields; by default those of
        the structure. Raises InvalidRequest, with the field and the location in it that cannot be built.
        """
        structure, sandbox = params.structured_outputs, self._sandbox
        if structure is None or sandbox is None:
            return
        vocab_size = self.limits["vocab_size"]
        if not (problem := await sandbox.problem(structure.notation(), vocab_size)):
            return
        for each, held in (structure.schemas(field) if schemas is None else schemas).items():
            if reason := await sandbox.problem(StructuredOutputs(json=held).notation(), vocab_size):
                field, problem = each, _without_grammar(reason)
                if at := json_schema.location(held, problem):
                    problem += f", at {at}"
                break
        raise InvalidRequest(field, Shown("a structure that cannot be compiled"), problem)

    def close(self) -> None:
        """End what runs beside the engines."""
        if self._sandbox is not None:
            self._sandbox.close()

    @contextlib.contextmanager
    def open(
        self,
        slot: QueueSlot,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        pooling: str = "",
    ) -> Iterator[Stream]:
        """What a prompt becomes, as it comes. Raises EngineBusy or EngineDead."""
        cost = params.num_samples * len(prompt.token_ids)
        if self._num_tokens and self._num_tokens + cost > self.config.max_queued_tokens:
            raise EngineBusy(f"{self._num_tokens} prompt tokens run or wait")
        stream = self._choose(prompt.token_ids, cache_salt).open(
            prompt.token_ids,
            params,
            priority=priority,
            timeout_s=self.config.request_timeout_s,
            cache_salt=cache_salt,
            pooling=pooling,
        )
        self._num_tokens += cost
        slot.streams.append(stream)
        try:
            yield stream
        finally:
            self._num_tokens -= cost
            stream.close()

    def _choose(self, token_ids: list[int], salt: str) -> Replica:
        """The ready replica that has seen most of a prompt's beginning, then the one with the least to do."""
        ready = [replica for replica in self.replicas if replica.serves]
        if not ready:
            if refusing := [replica.refuses for replica in self.replicas if replica.ready.is_set()]:
                raise EngineBusy(refusing[0])
            raise EngineDead("no engine is ready")
        if len(self.replicas) == 1:
            return ready[0]
        keys, digest = [], hashlib.blake2b(salt.encode(), digest_size=16)
        for start in range(
            0, min(len(token_ids), PREFIX_TOKENS * PREFIX_DEPTH) - PREFIX_TOKENS + 1, PREFIX_TOKENS
        ):
            digest.update(repr(token_ids[start : start + PREFIX_TOKENS]).encode())
            keys.append(digest.digest())
        chosen = min(
            ready, key=lambda each: (-sum(key in self._prefixes[each] for key in keys), each.load)
        )
        seen = self._prefixes[chosen]
        for key in keys:
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > PREFIXES:
            seen.popitem(last=False)
        return chosen

    async def _encode(self, texts: list[str]) -> list[list[int]]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequest(
                "prompt", texts[0], "token ids; the server runs with skip_tokenizer_init"
            )
        if sum(map(len, texts)) < 2000:
            return tokenizer.encode_batch(texts)
        return await asyncio.to_thread(tokenizer.encode_batch, texts)


def _without_grammar(problem: str) -> str:
    """Return llguidance's reason without the grammar, which the server wrote around the client's schema."""
    _, found, reason = problem.partition("failed to compile JSON schema: ")
    return (
        f"a JSON schema that llguidance compiles: {reason.partition(chr(10) * 2)[0]}"
        if found
        else problem
    )


def _items(given: Any, field: str) -> list[Any]:
    """One or many prompts as a list of them."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given]
    if kinds not in ({str}, {list}):
        raise InvalidRequest(field, given, "a text, token ids, or a list of one kind of these")
    return given
