"""The bodies that clients send: fields, types, and how they become SamplingParams; knows no engine and no HTTP.

OpenAI's fields, and those that vLLM and SGLang add. A field that is not listed is unknown: named in a warning, or
refused under ``strict``. A field that is listed works, or is refused with a reason; none is ignored but ``user``, which
says who asks and changes nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec

from slipway.codec.grammar import StructuredOutputs
from slipway.engine.params import SamplingParams
from slipway.errors import InvalidRequest, Shown
from slipway.server import members

DIRECT = (  # fields that SamplingParams has under the same name
    "n",
    "best_of",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)
STRUCTURES = {  # vLLM's former fields and SGLang's
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}
UNSUPPORTED = {  # fields of vLLM that would change an answer: the values that are taken, and why no others are
    "use_beam_search": (
        (None, False),
        "false: tokens are drawn, or the likeliest is taken; there is no beam search",
    ),
    "length_penalty": ((None, 1), "1: it ranks beams, and there is no beam search"),
    "prompt_embeds": ((None, []), "none: a prompt is a text or token ids"),
    "logprob_token_ids": (
        (None, []),
        "none: logprobs are of the chosen and of the likeliest tokens",
    ),
    "spaces_between_special_tokens": ((None, True), "true: the text is what the tokenizer decodes"),
    "repetition_detection": ((None, {}), "none: an output ends by its stops and its length"),
    "vllm_xargs": ((None, {}), "none: there are no extensions"),
    "kv_transfer_params": ((None, {}), "none: caches stay in their engine"),
    "mm_processor_kwargs": ((None, {}), "none: a prompt is a text or token ids"),
}
Int = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
Side = Literal["left", "right"]  # where a prompt that is too long is cut: "left" keeps its end
Texts = (
    str | list[str | Int | list[Int]]
)  # a text, token ids, or a list of one of these; service.py refuses mixtures


@runtime_checkable
class HasEngineNames(Protocol):
    """A body whose fields have other names in the engine."""

    def names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream holds beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """What completions and chats have in common."""

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
    priority: Int = 0
    cache_salt: str | None = None
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
        """Raise InvalidRequest, naming the field, for one that is known from vLLM and cannot be honoured."""
        for field, (taken, expected) in UNSUPPORTED.items():
            if (value := getattr(self, field, None)) not in taken:
                raise InvalidRequest(field, value, expected)

    def params(
        self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Of the engine. ``defaults``: the model's, where the body says nothing. Raises InvalidRequest."""
        if self.stream and self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                "best_of", self.best_of, "n, in a stream: which samples are best shows at the end"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "given", "none without stream")
        given = {name: value for name in DIRECT if (value := getattr(self, name)) is not None}
        fields = {"max_tokens": max_tokens} | dict(defaults) | given
        if max_tokens is not None:
            fields["max_tokens"] = max_tokens
        if self.seed is not None:
            fields["seed"] = self.seed % 2**32  # OpenAI's are 64 bits wide, and may be negative
        if self.logit_bias is not None:
            fields["logit_bias"] = _by_token(self.logit_bias)
        return SamplingParams(**fields, logprobs=logprobs, structured_outputs=self.structure())

    @property
    def structure_field(self) -> str:
        """Where the body states the structure of the output, as errors name it."""
        return next(iter(self._structures()), ("structured_outputs", {}))[0]

    def structure(self) -> StructuredOutputs | None:
        """Return the structure of the output, by OpenAI's, vLLM's or SGLang's field for it. Raises InvalidRequest."""
        asked = self._structures()
        if len(asked) > 1:
            fields = " and ".join(field for field, _ in asked)
            raise InvalidRequest(
                "response_format", Shown(fields), "one field that states the output's structure"
            )
        return _structure(*asked[0]) if asked else None

    def _structures(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each field that states a structure, with the arguments of StructuredOutputs."""
        asked: list[tuple[str, dict[str, Any]]] = []
        if self.response_format is not None:
            asked += _response_format(self.response_format)
        if self.structured_outputs is not None:
            known = members.KNOWN["structured_outputs"]
            given = {
                name: value for name, value in self.structured_outputs.items() if name in known
            }
            used = [name for name, value in given.items() if value not in (None, False)]
            field = f"structured_outputs.{used[0]}" if len(used) == 1 else "structured_outputs"
            asked.append((field, given))
        for field, name in STRUCTURES.items():
            if (value := getattr(self, field)) is not None:
                asked.append((field, {name: value}))
        return asked


class Completion(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: Texts | None = None
    prompt_embeds: str | list[str] | None = None
    echo: bool = False
    logprobs: Int | None = None
    suffix: str | None = None

    def names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's."""
        return {"prompt_token_ids": "prompt"}


class Chat(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

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

    def names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's."""
        found = {"prompt_token_ids": "messages", "prompt": "messages", "logprobs": "top_logprobs"}
        return (
            found
            if self.max_completion_tokens is None
            else found | {"max_tokens": "max_completion_tokens"}
        )


SGLANG_FIELDS = {  # SGLang's names -> SamplingParams'
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
    "n": "n",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
}
SGLANG_STRUCTURES = {
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "structural_tag": "structural_tag",
}


class SGLangSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """SGLang's sampling_params; as there, one that nobody knows is refused. Its defaults, too: 128 new tokens."""

    max_new_tokens: Int | None = None
    min_new_tokens: Int | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] = True  # msgspec refuses what we cannot do
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def params(
        self, defaults: Mapping[str, Any], logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Of the engine. ``defaults``: the model's, where the body says nothing. Raises InvalidRequest."""
        given = {
            ours: value
            for name, ours in SGLANG_FIELDS.items()
            if (value := getattr(self, name)) is not None
        }
        fields = {"max_tokens": 128} | dict(defaults) | given
        if self.logit_bias is not None:
            fields["logit_bias"] = _by_token(self.logit_bias)
        asked = {
            ours: value
            for name, ours in SGLANG_STRUCTURES.items()
            if (value := getattr(self, name)) is not None
        }
        if asked.get("json") == "$$ANY$$":  # SGLang's way to say: any object
            asked = asked | {"json": None, "json_object": True}
        structure = _structure(self.structure_field, asked) if asked else None
        return SamplingParams(
            **fields,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=structure,
        )

    @property
    def structure_field(self) -> str:
        """Where the body states the structure of the output, as errors name it."""
        given = [name for name in SGLANG_STRUCTURES if getattr(self, name) is not None]
        return f"sampling_params.{given[0]}" if len(given) == 1 else "sampling_params"


class Generate(msgspec.Struct, kw_only=True):
    """POST /generate: SGLang's own shape; what is said for one prompt, or for each of several."""

    text: str | list[str] | None = None
    input_ids: list[Int | list[Int]] | None = None
    sampling_params: SGLangSampling | list[SGLangSampling] | None = None
    return_logprob: bool = False
    logprob_start_len: Int = -1
    top_logprobs_num: Int = 0
    return_text_in_logprobs: bool = False
    stream: bool = False
    priority: Int = 0
    extra_key: str | None = None
    model: str | None = None
    request_id: str | None = msgspec.field(name="rid", default=None)

    def names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's."""
        prompt = "text" if self.input_ids is None else "input_ids"
        scores = {"logprobs": "top_logprobs_num", "prompt_logprobs": "top_logprobs_num"}
        sampling = {ours: f"sampling_params.{name}" for name, ours in SGLANG_FIELDS.items()}
        more = {
            "logit_bias": "sampling_params.logit_bias",
            "prompt_token_ids": prompt,
            "prompt": prompt,
        }
        named = {} if self.request_id is None else {"request_id": "rid"}  # else a header has it
        return sampling | scores | more | named


class Embedding(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings."""

    input: Texts | None = None
    messages: list[dict[str, Any]] | None = None  # a conversation, in place of input
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    use_activation: bool | None = None  # vLLM's name of normalize
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    truncate_prompt_tokens: Int | None = None
    truncation_side: Side = "left"
    priority: Int = 0
    user: str | None = None

    def names(self) -> dict[str, str]:
        """Return the body's names of fields by the engine's."""
        field = "input" if self.messages is None else "messages"
        return {"prompt_token_ids": field, "prompt": field}


Document = str | dict[str, Any]  # a text, {"text": ...}, or {"content": [text parts]}


class Scoring(msgspec.Struct, kw_only=True):
    """What scores and ranks have in common."""

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
    """POST /v1/score: the cosine of two texts' embeddings, pair by pair or one with many."""

    queries: Document | list[Document] | None = None
    documents: Document | list[Document] | None = None
    items: Document | list[Document] | None = None
    data_1: Document | list[Document] | None = None
    data_2: Document | list[Document] | None = None
    text_1: Document | list[Document] | None = None
    text_2: Document | list[Document] | None = None


class Rerank(Scoring, kw_only=True):
    """POST /v1/rerank: documents by their score with a query."""

    query: Document
    documents: Document | list[Document]
    top_n: Int = 0
    return_documents: bool = True


class Classify(msgspec.Struct, kw_only=True):
    """POST /classify: refused, for no model here has a classification head."""

    input: Texts
    model: str | None = None


class Tokenize(msgspec.Struct, kw_only=True):
    """POST /tokenize: of a text, or of a conversation through the chat template."""

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
    """POST /detokenize."""

    tokens: list[Int]
    model: str | None = None
    skip_special_tokens: bool = False


class AbortRequest(msgspec.Struct, kw_only=True):
    """POST /abort_request: by the id that a client chose or was given."""

    rid: str


class UpdateFromDisk(msgspec.Struct, kw_only=True):
    """POST /update_weights_from_disk: SGLang's, with how the engine goes about it."""

    model_path: str
    weight_version: str | None = None
    mode: Literal["inplace", "atomic"] = "inplace"
    policy: Literal["finish", "recompute", "continue"] = "finish"
    load_format: str | None = None
    flush_cache: bool = True


class BeginWeights(msgspec.Struct, kw_only=True):
    """POST /weights/begin: an update that follows in pieces."""

    version: str | None = None
    mode: Literal["inplace", "atomic"] = "inplace"
    policy: Literal["finish", "recompute", "continue"] = "finish"


class FinishWeights(msgspec.Struct, kw_only=True):
    """POST /weights/finish: all pieces are there."""

    update_id: str


class Sleep(msgspec.Struct, kw_only=True):
    """POST /sleep: 1 keeps the weights on the host, 2 drops them."""

    level: Literal[1, 2] = 1


class WakeUp(msgspec.Struct, kw_only=True):
    """POST /wake_up: undo /sleep."""


def _structure(field: str, given: dict[str, Any]) -> StructuredOutputs:
    """Return the structure that a field states. Raises InvalidRequest, naming the field as the client sent it."""
    try:
        return StructuredOutputs(**given)
    except InvalidRequest as error:
        name = next(
            (name for name in sorted(given, key=len) if error.field.startswith(name)), error.field
        )
        raise InvalidRequest(
            field + error.field.removeprefix(name), error.got, error.expected
        ) from error


def _response_format(given: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return OpenAI's field as arguments of StructuredOutputs, with the part of it that errors name."""
    kind = given.get("type")
    if kind == "structural_tag":
        return [("response_format", {"structural_tag": given})]
    if kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", {"json_object": True})]
    held = given.get("json_schema")
    if (
        kind != "json_schema"
        or not isinstance(held, dict)
        or not isinstance(held.get("schema"), dict)
    ):
        expected = (
            '{"type": "text" | "json_object"}, {"type": "json_schema", "json_schema": {"schema": {...}}}, '
            'or {"type": "structural_tag"} with "format", or with "structures" and "triggers"'
        )
        raise InvalidRequest("response_format", given, expected)
    return [("response_format.json_schema.schema", {"json": held["schema"]})]


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    """Return ``logit_bias`` by token. Raises InvalidRequest with every key that is no token id."""
    wrong = [key for key in bias if not key.isascii() or not key.isdigit() or len(key) > 10]
    if wrong:
        raise InvalidRequest("logit_bias", Shown(", ".join(map(repr, wrong))), "token ids as text")
    return {int(key): value for key, value in bias.items()}
