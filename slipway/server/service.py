"""Service of one model: prompts, chat templates, bounds of the queue, choice of the replica.

Tokenization and templates run in threads beside the event loop. A request takes its slot in the
queue before any of its data is copied.

Not here: HTTP (app.py), JSON objects of responses (responses.py), engine processes (replica.py).
"""

import asyncio
import contextlib
import dataclasses
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slipway.codec import json_schema, output_parser, structural_tags
from slipway.codec.chat import ChatTemplates
from slipway.codec.grammar import StructuredOutputs
from slipway.codec.tokenizer import Tokenizer
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import (
    ClientBusy,
    ContextTooLong,
    EngineBusy,
    EngineDead,
    InvalidRequest,
    Shown,
)
from slipway.server import schema
from slipway.server.config import ServerConfig
from slipway.server.grammar_sandbox import GrammarSandbox
from slipway.server.replica import NOT_READY, Replica, Stream
from slipway.server.responses import Envelope

TEMPLATE_TIMEOUT_S = 10.0
# Template variables that the body's own fields set.
TEMPLATE_FIELDS = (
    "messages", "add_generation_prompt", "continue_final_message", "documents", "tools",
)  # fmt: skip
PROMPT_FORMS = "a text, token ids, or a list of one kind of these"
MAX_TOKEN_CHARACTERS = 128  # longer texts than this per token of the context cannot fit
THREAD_CHARACTERS = 2000  # from here on, texts are tokenized in a thread
# Prefixes by which the replica is found that has cached the beginning of a prompt.
PREFIX_TOKENS = 64
MAX_PREFIXES_PER_PROMPT = 8
MAX_PREFIXES_PER_REPLICA = 4096


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and its text if the client sent one."""

    token_ids: list[int]
    text: str | None = None


@dataclasses.dataclass(eq=False)
class QueueSlot:
    """One request's slot in the queue, with the streams that run for it."""

    streams: list[Stream] = dataclasses.field(default_factory=list)

    def abort(self) -> None:
        """End all streams of the request."""
        for stream in self.streams:
            stream.abort()


class Service:
    """A model as clients use it. All methods are called from one event loop."""

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
        """Make a service that is ready once one of its replicas is.

        ``templates``: chat templates by name. ``folder``: private directory for files. ``root``:
        the name the model was loaded by. ``tokenizer_config``: content of tokenizer_config.json.
        """
        self.config = config
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.replicas = replicas
        self.folder = folder
        self.root = root or model_name
        self.draining = False
        # Marks that models write as single tokens; the text has no special tokens.
        marks = {} if tokenizer is None else structural_tags.marks(tokenizer)
        special = frozenset[int]() if tokenizer is None else tokenizer.special_ids
        self.marks = {mark: token for mark, token in marks.items() if token not in special}
        self._tokenizer_config = tokenizer_config
        self._sandbox = None if tokenizer is None else GrammarSandbox(tokenizer)
        special_tokens = {} if tokenizer is None else tokenizer.special_tokens
        self._templates = ChatTemplates(templates, special_tokens)
        output_parser.family(config.output_parser, None)  # raises for an unknown name
        self._num_requests = 0
        self._num_tokens = 0
        self._by_client: Counter[str] = Counter()
        self._prefixes: dict[Replica, OrderedDict[bytes, None]] = {
            replica: OrderedDict() for replica in replicas
        }
        self._running: dict[str, QueueSlot] = {}  # by request id

    @property
    def ready(self) -> bool:
        """Whether the service would accept a request now."""
        return not self.draining and any(replica.serves for replica in self.replicas)

    @property
    def ready_replicas(self) -> list[Replica]:
        """Replicas with a running engine, including those that refuse requests for a while."""
        return [replica for replica in self.replicas if replica.ready.is_set()]

    @property
    def limits(self) -> dict[str, Any]:
        """The engine's limits. Raises EngineDead before an engine has started."""
        for replica in self.replicas:
            if replica.info is not None:
                return replica.info.limits
        raise EngineDead(NOT_READY)

    @property
    def defaults(self) -> dict[str, Any]:
        """The model's default sampling parameters, from its generation_config.json."""
        infos = [replica.info for replica in self.replicas if replica.info is not None]
        return infos[0].defaults if infos else {}

    @property
    def features(self) -> dict[str, bool]:
        """Features that the model's tokenizer and chat templates support."""
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
        """Return tokenizer_config.json with the chat template in use.

        Raises InvalidRequest without a tokenizer.
        """
        if self._tokenizer_config is None:
            raise InvalidRequest("tokenizer", Shown("none"), "a server with a tokenizer")
        found = {
            name: value
            for name, value in self._tokenizer_config.items()
            if not name.endswith(("_file", "_path"))
        }
        found["tokenizer_class"] = found.get("tokenizer_class") or "PreTrainedTokenizerFast"
        if sources := self._templates.sources:
            listed = [{"name": name, "template": source} for name, source in sources.items()]
            only_default = [*sources] == ["default"]
            found["chat_template"] = sources["default"] if only_default else listed
        return found

    def chat_format(self, tools: bool) -> tuple[str, output_parser.Family]:
        """Return the text of the template for chats, and the format of the output.

        ``tools``: whether the chat has tools. Raises InvalidRequest if the model has several
        templates, but none for the chat.
        """
        source = self._templates.choose(tools).source
        return source, self._family(source)

    def _family(self, source: str) -> output_parser.Family:
        return output_parser.family(self.config.output_parser, source)

    def names_token_ids(self, body: schema.Sampling) -> bool:
        """Return whether logprobs write tokens as "token_id:17".

        The request decides, or else the server's option.
        """
        wanted = body.return_tokens_as_token_ids
        return self.config.return_tokens_as_token_ids if wanted is None else wanted

    def envelope(
        self, kind: str, prefix: str, *, request_id: str | None, names_token_ids: bool = False
    ) -> Envelope:
        """Return the frame of a response of this model; ``prefix``: of the id that it is given."""
        return Envelope(
            kind,
            prefix,
            self.model_name,
            request_id=request_id,
            tokenizer=self.tokenizer,
            names_token_ids=names_token_ids,
        )

    @property
    def num_requests(self) -> int:
        """Number of requests that run or wait."""
        return self._num_requests

    @contextlib.contextmanager
    def queue_slot(self, client: str, request_id: str) -> Iterator[QueueSlot]:
        """Hold a slot in the queue. Raises EngineBusy, ClientBusy or InvalidRequest."""
        self._check_queue(client, request_id)
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

    def _check_queue(self, client: str, request_id: str) -> None:
        """Raise EngineBusy, ClientBusy or InvalidRequest if a request gets no slot."""
        limit, client_limit = self.config.max_queued_requests, self.config.max_requests_per_client
        if self.draining:
            raise EngineBusy("the server is shutting down")
        if self._num_requests >= limit:
            count = f"{self._num_requests} of {limit} requests"
            raise EngineBusy(f"queue full: {count} running or waiting")
        if self._by_client[client] >= client_limit:
            count = f"{self._by_client[client]} of {client_limit} requests"
            raise ClientBusy(f"client limit reached: {count} running or waiting")
        if request_id in self._running:
            raise InvalidRequest("request_id", request_id, "an id that no running request has")

    def abort(self, request_id: str) -> bool:
        """End a request; return False if it is not running."""
        if (slot := self._running.get(request_id)) is None:
            return False
        slot.abort()
        return True

    def abort_all(self) -> None:
        """End all running requests."""
        for slot in self._running.values():
            slot.abort()

    async def prompts(
        self, given: Any, field: str, truncate: int | None, *, side: schema.Side = "left"
    ) -> list[Prompt]:
        """Return the prompts of a body: texts or token ids, one or many. Raises InvalidRequest.

        ``truncate``: most tokens to keep of each; -1: as many as fit. ``side``: where the others
        are cut off.
        """
        items = _items(given, field)
        if len(items) > self.config.max_prompts:
            got = Shown(f"{len(items)} prompts")
            raise InvalidRequest(field, got, f"at most {self.config.max_prompts}")
        texts = [item for item in items if isinstance(item, str)]
        max_model_len = self.limits["max_model_len"]
        longest = max(map(len, texts), default=0)
        if longest > MAX_TOKEN_CHARACTERS * max_model_len:
            raise ContextTooLong(field, f"a text of {longest} characters", max_model_len)
        encoded = iter(await self._encode(texts)) if texts else iter(())
        found = [
            Prompt(next(encoded), item) if isinstance(item, str) else Prompt(item) for item in items
        ]
        if truncate is not None:
            if truncate != -1 and truncate < 1:
                expected = "at least 1, or -1 for as many as fit"
                raise InvalidRequest("truncate_prompt_tokens", truncate, expected)
            keep = max_model_len - 1 if truncate == -1 else truncate
            kept = slice(keep) if side == "right" else slice(-keep, None)
            # A prompt that was cut has no text, only its remaining tokens.
            found = [
                each if len(each.token_ids) <= keep else Prompt(each.token_ids[kept])
                for each in found
            ]
        self.check_lengths(found, field)
        return found

    def check_lengths(self, prompts: Sequence[Prompt], field: str) -> None:
        """Raise ContextTooLong for a prompt that leaves no room for output.

        ``field``: the body's field with the prompts.
        """
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
        """Return a conversation as a prompt, rendered by its chat template.

        ``kwargs``: the client's chat_template_kwargs. ``options``: variables from fields of the
        body. Raises InvalidRequest, also if rendering takes too long, or ``kwargs`` has a field of
        the body.
        """
        for name in TEMPLATE_FIELDS:
            if kwargs and name in kwargs:
                expected = f"no value here: {name} is a field of the body"
                raise InvalidRequest(f"chat_template_kwargs.{name}", kwargs[name], expected)
        variables = {**(kwargs or {}), **options}
        if (tokenizer := self.tokenizer) is None:
            raise InvalidRequest("messages", messages, "a model with a tokenizer")
        template = self._templates.choose(bool(variables.get("tools")))

        def render() -> Prompt:
            text = template.render(messages, **variables)
            return Prompt(tokenizer.encode(text, add_special_tokens=False), text)

        try:
            return await asyncio.wait_for(asyncio.to_thread(render), TEMPLATE_TIMEOUT_S)
        except TimeoutError as error:
            expected = f"a chat template that ends within {TEMPLATE_TIMEOUT_S} s"
            raise InvalidRequest("messages", messages, expected) from error

    async def check_grammar(
        self,
        params: SamplingParams,
        field: str = "structured_outputs",
        schemas: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise InvalidRequest if a client's grammar cannot be compiled.

        ``field``: the body's field with the structure. ``schemas``: JSON schemas in it, by their
        paths; by default those of the structure. The error names the schema and the location in it.
        """
        structure, sandbox = params.structured_outputs, self._sandbox
        if structure is None or sandbox is None:
            return
        vocab_size = self.limits["vocab_size"]
        if not (problem := await sandbox.problem(structure.notation(), vocab_size)):
            return
        by_path = structure.schemas(field) if schemas is None else schemas
        for path, part in by_path.items():
            notation = StructuredOutputs(json=part).notation()
            if reason := await sandbox.problem(notation, vocab_size):
                field, problem = path, _without_grammar(reason)
                if location := json_schema.location(part, problem):
                    problem += f", at {location}"
                break
        raise InvalidRequest(field, Shown("a structure that cannot be compiled"), problem)

    def close(self) -> None:
        """End the process that compiles grammars."""
        if self._sandbox is not None:
            self._sandbox.close()

    @contextlib.contextmanager
    def open(self, slot: QueueSlot, spec: RequestSpec) -> Iterator[Stream]:
        """Run a request in a replica, under the server's timeout; yield its stream.

        Raises EngineBusy or EngineDead.
        """
        cost = spec.params.num_samples * len(spec.token_ids)
        limit = self.config.max_queued_tokens
        if self._num_tokens and self._num_tokens + cost > limit:
            count = f"{self._num_tokens} of {limit} prompt tokens"
            raise EngineBusy(f"queue full: {count} running or waiting, {cost} more requested")
        spec = dataclasses.replace(spec, timeout_s=self.config.request_timeout_s)
        stream = self._choose_replica(spec.token_ids, spec.cache_salt).open(spec)
        self._num_tokens += cost
        slot.streams.append(stream)
        try:
            yield stream
        finally:
            self._num_tokens -= cost
            stream.close()

    def _choose_replica(self, token_ids: list[int], salt: str) -> Replica:
        """Return the replica that has seen most prefixes of a prompt, then the least loaded.

        Raises EngineBusy or EngineDead if no replica takes requests.
        """
        serving = [replica for replica in self.replicas if replica.serves]
        if not serving:
            if refusing := self.ready_replicas:
                raise EngineBusy(refusing[0].refuses)
            raise EngineDead("no engine is ready")
        if len(self.replicas) == 1:
            return serving[0]
        prefixes = _prefixes(token_ids, salt)

        def preference(replica: Replica) -> tuple[int, int]:
            num_seen = sum(prefix in self._prefixes[replica] for prefix in prefixes)
            return -num_seen, replica.load

        chosen = min(serving, key=preference)
        seen = self._prefixes[chosen]
        for prefix in prefixes:
            seen[prefix] = None
            seen.move_to_end(prefix)
        while len(seen) > MAX_PREFIXES_PER_REPLICA:
            seen.popitem(last=False)
        return chosen

    async def _encode(self, texts: list[str]) -> list[list[int]]:
        tokenizer = self.tokenizer
        if tokenizer is None:
            expected = "token ids; the server runs with skip_tokenizer_init"
            raise InvalidRequest("prompt", texts[0], expected)
        if sum(map(len, texts)) < THREAD_CHARACTERS:
            return tokenizer.encode_batch(texts)
        return await asyncio.to_thread(tokenizer.encode_batch, texts)


def _prefixes(token_ids: list[int], salt: str) -> list[bytes]:
    """Return digests of the first whole prefixes of a prompt, the shortest first."""
    prefixes, digest = [], hashlib.blake2b(salt.encode(), digest_size=16)
    length = min(len(token_ids), PREFIX_TOKENS * MAX_PREFIXES_PER_PROMPT)
    for start in range(0, length - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        digest.update(repr(token_ids[start : start + PREFIX_TOKENS]).encode())
        prefixes.append(digest.digest())
    return prefixes


def _without_grammar(problem: str) -> str:
    """Return llguidance's reason without the grammar that the server wrote around a schema."""
    _, found, reason = problem.partition("failed to compile JSON schema: ")
    if not found:
        return problem
    reason, _, _ = reason.partition("\n\n")
    return f"a JSON schema that llguidance compiles: {reason}"


def _items(given: Any, field: str) -> list[Any]:
    """Return one or many prompts as a list of prompts. Raises InvalidRequest."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given]
    if kinds not in ({str}, {list}):
        raise InvalidRequest(field, given, PROMPT_FORMS)
    return given
