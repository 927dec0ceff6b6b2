"""JSON objects of responses: OpenAI's, with vLLM's additions.

They are plain dictionaries, encoded once. Log probabilities give a token's text as its bytes
decoded from UTF-8, with U+FFFD for incomplete characters. Completions use token texts as keys, so
they write such tokens as OpenAI does: "bytes:\\xf0\\x9f".

Not here: handlers that fill the objects (completions.py, chat.py), error responses (middleware.py).
"""

import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from slipway.codec.offsets import Offsets
from slipway.codec.reasoning import ReasoningTokens
from slipway.codec.tokenizer import Tokenizer
from slipway.engine.request import DraftCounts
from slipway.server.messages import Delta, Sample

Entry = dict[int, tuple[float, int]]  # token id -> (log probability, rank)
encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
PADDED_BYTES = 128


class Usage:
    """Counts of a request's tokens, updated while it runs."""

    def __init__(self) -> None:
        self.prompt = 0
        self.completion = 0
        self.cached = 0
        self.drafts = DraftCounts()
        # Of chats only: reasoning tokens by sample; empty if the model does not reason.
        self.thinking: dict[int, ReasoningTokens] | None = None

    def add(self, delta: Delta) -> None:
        """Count the new tokens of a message from the engine."""
        for sample in delta.samples:
            self.completion += len(sample.token_ids)
            if self.thinking and sample.index in self.thinking:
                self.thinking[sample.index].push(sample.token_ids)
        self.cached += delta.num_cached_tokens
        self.drafts = self.drafts.plus(delta.drafts)

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's usage object.

        OpenAI's fields for predicted outputs are those of accepted and rejected drafts.
        """
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        details = {}
        if self.thinking is not None:
            details["reasoning_tokens"] = sum(each.count for each in self.thinking.values())
        if self.drafts.verified:
            details["accepted_prediction_tokens"] = self.drafts.accepted
            details["rejected_prediction_tokens"] = self.drafts.drafted - self.drafts.accepted
        return found | ({"completion_tokens_details": details} if details else {})


class Envelope:
    """Frame around the choices of a response: id, model and time are those of the whole request."""

    def __init__(
        self,
        kind: str,
        prefix: str,
        model: str,
        *,
        request_id: str | None,
        tokenizer: Tokenizer | None,
        names_token_ids: bool = False,
    ):
        self.id = request_id or f"{prefix}-{uuid.uuid4().hex}"
        self.obfuscates = False
        """Whether the length of an event hides the length of its text."""
        self._names_token_ids = names_token_ids  # logprobs have "token_id:17" for a token's text
        self._kind = kind
        self._model = model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        # OpenAI gives events of completions the same name as whole completions.
        event_kind = f"{kind}.chunk" if kind == "chat.completion" else kind
        self._opening = encode(self._frame(event_kind)).removesuffix(b"}") + b',"choices":'

    def response(self, choices: list[dict[str, Any]], usage: Usage, **more: Any) -> dict[str, Any]:
        """Return a whole response."""
        return self._frame(self._kind) | {"choices": choices, "usage": usage.as_json()} | more

    def event(self, choices: list[dict[str, Any]], usage: Usage | None, **more: Any) -> bytes:
        """Return an event of a stream; the part that all events share is encoded once."""
        encoded_usage = b"" if usage is None else b',"usage":' + encode(usage.as_json())
        encoded_more = b"".join(
            b"," + encode(name) + b":" + encode(value) for name, value in more.items()
        )
        body = self._opening + encode(choices) + encoded_usage + encoded_more
        return server_sent_event(body + (_padding(len(body)) if self.obfuscates else b"") + b"}")

    def completion_logprobs(
        self, ids: Sequence[int], entries: Sequence[Entry | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """Return OpenAI's logprobs of a completion's tokens.

        An entry is None where the engine has computed no log probabilities.
        """
        pairs = list(zip(ids, entries))
        return {
            "tokens": [self.spelling(token) for token in ids],
            "token_logprobs": [
                None if entry is None else entry[token][0] for token, entry in pairs
            ],
            "top_logprobs": [
                None if entry is None else self._by_spelling(token, entry) for token, entry in pairs
            ],
            "text_offset": list(offsets),
        }

    def spelling(self, token: int) -> str:
        """Return a token as a completion's logprobs write it.

        That is its text, or its bytes if they are not whole characters.
        """
        if self._tokenizer is None or self._names_token_ids:
            return f"token_id:{token}"
        content = self._bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _by_spelling(self, chosen: int, entry: Entry) -> dict[str, float]:
        """Return the log probabilities of an entry by the spelling of their tokens.

        Of several tokens with one spelling, the chosen token keeps it, else the likeliest. The
        others are written token_id:17, as vLLM writes tokens on demand.
        """
        found = {self.spelling(chosen): entry[chosen][0]}
        for token, (value, _) in by_rank(entry):
            if token != chosen:
                name = self.spelling(token)
                found[f"token_id:{token}" if name in found else name] = value
        return found

    def chat_logprobs(
        self, ids: Sequence[int], entries: Sequence[Entry], top: int
    ) -> dict[str, Any]:
        """Return OpenAI's logprobs of a chat: each token's own and the ``top`` likeliest.

        ``top`` -1: all.
        """

        def token_object(token: int, logprob: float) -> dict[str, Any]:
            content = list(self._bytes(token))
            return {"token": self.text(token), "logprob": logprob, "bytes": content}

        content = []
        for token, entry in zip(ids, entries):
            likeliest = by_rank(entry)[: None if top < 0 else top]
            tops = [token_object(other, value) for other, (value, _) in likeliest]
            content.append(token_object(token, entry[token][0]) | {"top_logprobs": tops})
        return {"content": content}

    def prompt_logprobs(self, entries: Sequence[Entry | None] | None) -> list[Any] | None:
        """Return vLLM's prompt_logprobs: {id: {logprob, rank, decoded_token}} for each token."""
        if entries is None:
            return None
        return [
            None
            if entry is None
            else {
                str(token): {"logprob": value, "rank": rank, "decoded_token": self._decoded(token)}
                for token, (value, rank) in entry.items()
            }
            for entry in entries
        ]

    def text(self, token: int) -> str:
        """Return a token as a chat's logprobs write it."""
        return f"token_id:{token}" if self._names_token_ids else self._decoded(token)

    def _decoded(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return self._bytes(token).decode(errors="replace")

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _bytes(self, token: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)


class CompletionLogprobs:
    """Log probabilities of one sample in OpenAI's arrays, returned while the sample grows.

    A token is returned once the text before it is final. Text that a stop string may still remove,
    and runs of byte tokens, are waited for. So the offsets in a stream equal those of the whole
    response, and lie within its text.

    ``offsets``: None without a tokenizer; all offsets are 0 then. ``start``: number of characters
    before the first token.
    """

    def __init__(self, envelope: Envelope, offsets: Offsets | None, start: int):
        self._envelope = envelope
        self._offsets = offsets
        self._length = start  # characters of the text so far
        self._pending: list[tuple[int, Entry | None]] = []
        self._pending_offsets: list[int] = []  # of the first pending tokens: those that are final

    def add(
        self, ids: Sequence[int], entries: Sequence[Entry | None], text: str, *, ended: bool
    ) -> dict[str, Any]:
        """Add new tokens with their entries and new text; return the logprobs that are final.

        ``ended``: whether these are the last tokens.
        """
        self._length += len(text)
        for token, entry in zip(ids, entries):
            self._pending.append((token, entry))
            self._pending_offsets += [0] if self._offsets is None else self._offsets.push(token)
        if ended and self._offsets is not None:
            self._pending_offsets += self._offsets.finish()
        final = sum(offset <= self._length for offset in self._pending_offsets)
        if ended:
            final = len(self._pending)
        tokens = self._pending[:final]
        offsets = [min(offset, self._length) for offset in self._pending_offsets[:final]]
        del self._pending[:final], self._pending_offsets[:final]
        return self._envelope.completion_logprobs(
            [token for token, _ in tokens], [entry for _, entry in tokens], offsets
        )


def _padding(size_bytes: int) -> bytes:
    """Return a field of random text that brings an event to a multiple of PADDED_BYTES."""
    count = -(size_bytes + len(b',"obfuscation":""}')) % PADDED_BYTES or PADDED_BYTES
    return b',"obfuscation":"' + secrets.token_hex(PADDED_BYTES // 2)[:count].encode() + b'"'


def server_sent_event(content: bytes) -> bytes:
    """Return content as a server-sent event."""
    return b"data: " + content + b"\n\n"


def by_rank(entry: Entry) -> list[tuple[int, tuple[float, int]]]:
    """Return the items of an entry, the likeliest token first."""
    return sorted(entry.items(), key=lambda item: item[1][1])


def merge_deltas(deltas: Sequence[Delta]) -> dict[int, Sample]:
    """Return the samples of several messages about one prompt, by index, each in one piece."""
    return merge_samples([sample for delta in deltas for sample in delta.samples])


def merge_samples(samples: Sequence[Sample]) -> dict[int, Sample]:
    """Return pieces of samples merged by sample index; the first piece of each is changed."""
    whole: dict[int, Sample] = {}
    for piece in samples:
        if (sample := whole.get(piece.index)) is None:
            whole[piece.index] = piece
            continue
        sample.text += piece.text
        sample.token_ids += piece.token_ids
        if piece.logprobs is not None:
            sample.logprobs = (sample.logprobs or []) + piece.logprobs
        sample.finish_reason = piece.finish_reason
        sample.stop_reason = piece.stop_reason
        sample.weights = piece.weights
    return whole


def weights_fields(sample: Sample) -> dict[str, Any]:
    """Return the fields of a finished sample that name the version of the weights.

    Of several versions, ``weights_versions`` lists each with its first token.
    """
    if not sample.weights:
        return {}
    fields: dict[str, Any] = {"weights_version": sample.weights[-1][1]}
    if len(sample.weights) > 1:
        fields["weights_versions"] = [list(each) for each in sample.weights]
    return fields


def token_usage(num_tokens: int) -> dict[str, int]:
    """Return the usage object of a response without generated tokens."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object; ``code`` is a name or null, never a number."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
