"""Request bodies: their fields and types, and their conversion to SamplingParams.

The fields are OpenAI's, and those that vLLM and SGLang add. A field that is not listed is unknown:
a warning names it, or ``strict`` refuses it. Every listed field works or is refused with a reason.
The only exception is ``user``, which is accepted and changes nothing.

Not here: the body of SGLang's /generate (sglang.py), reading bodies from JSON (bodies.py), members
of nested objects (members.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec

from slipway.codec.grammar import StructuredOutputs
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import InvalidRequest, Shown
from slipway.server import members

DIRECT = (  # fields with the same name in SamplingParams
    "n", "best_of", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "allowed_token_ids", "bad_words", "stop",
    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "prompt_logprobs",
)  # fmt: skip
STRUCTURES = {  # former fields of vLLM, and fields of SGLang -> StructuredOutputs' names
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar", "json_schema": "json", "regex": "regex", "ebnf": "grammar",
}  # fmt: skip
# Fields of vLLM that would change a response: accepted values, and the reason against others.
UNSUPPORTED = {
    "use_beam_search": ((None, False), "false: beam search is not supported"),
    "length_penalty": ((None, 1), "1: it ranks beams, and beam search is not supported"),
    "prompt_embeds": ((None, []), "no value: a prompt must be a text or token ids"),
    "logprob_token_ids": (
        (None, []), "no value: logprobs are available of chosen and of likeliest tokens only",
    ),
    "spaces_between_special_tokens": (
        (None, True), "true: the text is always what the tokenizer decodes",
    ),
    "repetition_detection": (
        (None, {}), "no value: only stop conditions and max_tokens end an output",
    ),
    "vllm_xargs": ((None, {}), "no value: extensions are not supported"),
    "kv_transfer_params": ((None, {}), "no value: caches cannot leave their engine"),
    "mm_processor_kwargs": ((None, {}), "no value: a prompt must be a text or token ids"),
}  # fmt: skip
SCORE_PAIRS = (  # vLLM's names of the two sides of a score
    ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"),
)  # fmt: skip
INT_LIMIT = 2**31  # integers of requests have 32 bits, except the seed
Int = Annotated[int, msgspec.Meta(ge=-INT_LIMIT, lt=INT_LIMIT)]
# End at which a prompt that is too long is cut: "left" keeps its last tokens.
Side = Literal["left", "right"]
# A text, token ids, or a list of one of these; service.py refuses lists that mix them.
Texts = str | list[str | Int | list[Int]]
UpdateMode = Literal["inplace", "atomic"]
# Fate of running requests when the weights change.
UpdatePolicy = Literal["finish", "recompute", "continue"]


@runtime_checkable
class HasEngineNames(Protocol):
    """A body with fields that have other names in the engine."""

    def client_names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's names."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """Additions to the events of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


_FACTS = [field for field in dataclasses.fields(RequestSpec) if field.metadata.get("from_body")]


def _body_field(field: dataclasses.Field) -> tuple[str, Any, Any]:
    """Return a body's field for one of RequestSpec: bounded if an integer, else optional."""
    kind: Any = field.type
    return (field.name, Int, field.default) if kind is int else (field.name, kind | None, None)


# Fields of RequestSpec that clients set: a new one is a field of completions and chats as well.
Facts: Any = msgspec.defstruct(
    "Facts", [_body_field(field) for field in _FACTS], kw_only=True, module=__name__
)


def facts(body: Any) -> dict[str, Any]:
    """Return the values of a body that go into RequestSpec under the same name."""
    found = {field.name: getattr(body, field.name) for field in _FACTS}
    return {name: value for name, value in found.items() if value is not None}


class Sampling(Facts, msgspec.Struct, kw_only=True):
    """Fields that completions and chats have in common, beside those of Facts."""

    model: str | None = None
    n: Int | None = None
    best_of: Int | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Side = "left"
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    user: str | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    logprob_token_ids: list[Int] | None = None
    spaces_between_special_tokens: bool = True
    repetition_detection: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    def check_supported(self) -> None:
        """Raise InvalidRequest for a value of one of vLLM's fields that is not supported."""
        for field, (taken, expected) in UNSUPPORTED.items():
            if (value := getattr(self, field, None)) not in taken:
                raise InvalidRequest(field, value, expected)

    def params(
        self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Return the engine's sampling parameters. Raises InvalidRequest.

        ``defaults``: the model's values of fields that the body leaves out.
        """
        if self.stream and self.best_of is not None and self.best_of != (self.n or 1):
            expected = "the value of n in a stream: the best samples are known only at the end"
            raise InvalidRequest("best_of", self.best_of, expected)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options", Shown("a value"), "no value unless stream is true"
            )
        given = {name: value for name in DIRECT if (value := getattr(self, name)) is not None}
        fields = {"max_tokens": max_tokens} | dict(defaults) | given
        if max_tokens is not None:
            fields["max_tokens"] = max_tokens
        if self.seed is not None:
            fields["seed"] = self.seed % 2**32  # OpenAI's seeds have 64 bits and may be negative
        if self.logit_bias is not None:
            fields["logit_bias"] = bias_by_token(self.logit_bias)
        return SamplingParams(**fields, logprobs=logprobs, structured_outputs=self.structure())

    @property
    def structure_field(self) -> str:
        """Path of the field that sets the structure of the output, for errors."""
        return next(iter(self._structures()), ("structured_outputs", {}))[0]

    def structure(self) -> StructuredOutputs | None:
        """Return the structure of the output, from OpenAI's, vLLM's or SGLang's field for it.

        Raises InvalidRequest.
        """
        structures = self._structures()
        if len(structures) > 1:
            fields = " and ".join(field for field, _ in structures)
            expected = "only one field that sets the structure of the output"
            raise InvalidRequest("response_format", Shown(fields), expected)
        return structured_outputs(*structures[0]) if structures else None

    def _structures(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each field that sets a structure, with its arguments of StructuredOutputs."""
        found: list[tuple[str, dict[str, Any]]] = []
        if self.response_format is not None:
            found += _response_format(self.response_format)
        if self.structured_outputs is not None:
            known = members.KNOWN["structured_outputs"]
            given = {key: value for key, value in self.structured_outputs.items() if key in known}
            used = [name for name, value in given.items() if value not in (None, False)]
            path = f"structured_outputs.{used[0]}" if len(used) == 1 else "structured_outputs"
            found.append((path, given))
        for field, name in STRUCTURES.items():
            if (value := getattr(self, field)) is not None:
                found.append((field, {name: value}))
        return found


class Completion(Sampling, kw_only=True):
    """Generate completions of prompts: texts or token ids."""

    prompt: Texts | None = None
    prompt_embeds: str | list[str] | None = None
    echo: bool = False
    logprobs: Int | None = None
    suffix: str | None = None

    def client_names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's names."""
        return {"prompt_token_ids": "prompt"}


class Chat(Sampling, kw_only=True):
    """Generate the next message of a conversation."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: Literal["none", "auto"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool = True
    include_reasoning: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: Int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    def client_names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's names."""
        found = {"prompt_token_ids": "messages", "prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            found["max_tokens"] = "max_completion_tokens"
        return found


class Embedding(msgspec.Struct, kw_only=True):
    """Compute embeddings of texts, token ids or a conversation."""

    input: Texts | None = None
    messages: list[dict[str, Any]] | None = None  # a conversation, instead of input
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    use_activation: bool | None = None  # vLLM's name for normalize
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    truncate_prompt_tokens: Int | None = None
    truncation_side: Side = "left"
    priority: Int = 0
    user: str | None = None

    def client_names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's names."""
        field = "input" if self.messages is None else "messages"
        return {"prompt_token_ids": field, "prompt": field}


Document = str | dict[str, Any]  # a text, {"text": ...}, or {"content": [text parts]}


class Scoring(msgspec.Struct, kw_only=True):
    """Fields that scores and ranks have in common."""

    model: str | None = None
    pooling: Literal["last", "mean"] = "last"
    max_tokens_per_query: Int = 0
    max_tokens_per_doc: Int = 0
    truncate_prompt_tokens: Int | None = None
    truncation_side: Side = "left"
    instruction: str | None = None
    priority: Int = 0
    user: str | None = None


class Score(Scoring, kw_only=True):
    """Compute the cosine similarity of text pairs, or of one text with many."""

    queries: Document | list[Document] | None = None
    documents: Document | list[Document] | None = None
    items: Document | list[Document] | None = None
    data_1: Document | list[Document] | None = None
    data_2: Document | list[Document] | None = None
    text_1: Document | list[Document] | None = None
    text_2: Document | list[Document] | None = None


class Rerank(Scoring, kw_only=True):
    """Rank documents by their similarity to a query."""

    query: Document
    documents: Document | list[Document]
    top_n: Int = 0
    return_documents: bool = True


class Classify(msgspec.Struct, kw_only=True):
    """Refuse classification: no supported model has a classification head."""

    input: Texts
    model: str | None = None


class Tokenize(msgspec.Struct, kw_only=True):
    """Tokenize a text, or a conversation with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class Detokenize(msgspec.Struct, kw_only=True):
    """Convert token ids to text."""

    tokens: list[Int]
    model: str | None = None
    skip_special_tokens: bool = False


class AbortRequest(msgspec.Struct, kw_only=True):
    """Abort a running request, by the id that the client chose or was given."""

    rid: str


class UpdateFromDisk(msgspec.Struct, kw_only=True):
    """Update the weights from a directory or a hub model (SGLang's route)."""

    model_path: str
    weight_version: str | None = None
    mode: UpdateMode = "inplace"
    policy: UpdatePolicy = "finish"
    load_format: str | None = None
    flush_cache: bool = True


class BeginWeights(msgspec.Struct, kw_only=True):
    """Begin an update of the weights that is sent in pieces."""

    version: str | None = None
    mode: UpdateMode = "inplace"
    policy: UpdatePolicy = "finish"


class FinishWeights(msgspec.Struct, kw_only=True):
    """Apply an update of the weights after its last piece."""

    update_id: str


class Sleep(msgspec.Struct, kw_only=True):
    """Free device memory: level 1 keeps the weights in host memory, level 2 drops them."""

    level: Literal[1, 2] = 1


class WakeUp(msgspec.Struct, kw_only=True):
    """Bring the engines back from sleep."""


def structured_outputs(field: str, given: dict[str, Any]) -> StructuredOutputs:
    """Return the structure that a field sets.

    Raises InvalidRequest, naming the field as the client sent it.
    """
    try:
        return StructuredOutputs(**given)
    except InvalidRequest as error:
        names = sorted(given, key=len)
        name = next((name for name in names if error.field.startswith(name)), error.field)
        path = field + error.field.removeprefix(name)
        raise InvalidRequest(path, error.got, error.expected) from error


def _response_format(given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a response_format as arguments of StructuredOutputs, with its path for errors."""
    kind = given.get("type")
    if kind == "structural_tag":
        return [("response_format", {"structural_tag": given})]
    if kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", {"json_object": True})]
    held = given.get("json_schema")
    schema = held.get("schema") if isinstance(held, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        expected = (
            '{"type": "text" | "json_object"}, '
            '{"type": "json_schema", "json_schema": {"schema": {...}}}, '
            'or {"type": "structural_tag"} with "format", or with "structures" and "triggers"'
        )
        raise InvalidRequest("response_format", given, expected)
    return [("response_format.json_schema.schema", {"json": schema})]


def bias_by_token(bias: dict[str, float]) -> dict[int, float]:
    """Return ``logit_bias`` by token id. Raises InvalidRequest with every key that is no id."""
    wrong = [key for key in bias if not key.isascii() or not key.isdigit() or len(key) > 10]
    if wrong:
        keys = Shown(", ".join(map(repr, wrong)))
        raise InvalidRequest("logit_bias", keys, "token ids, written as text")
    return {int(key): value for key, value in bias.items()}
