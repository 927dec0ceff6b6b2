"""The shapes of answers: OpenAI's objects, and vLLM's additions to them; knows no engine and no HTTP.

Plain dictionaries, encoded once. A token's text in log probabilities is its bytes as UTF-8, with U+FFFD for half
characters; completions spell these as OpenAI does, "bytes:\\xf0\\x9f", for there texts are the keys of entries.
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
from slipway.server.messages import Delta, Sample

Entry = dict[int, tuple[float, int]]
encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
PADDED_BYTES = 128


class Usage:
    """Tokens of a request, counted as they come."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.cached = 0
        self.thinking: dict[int, ReasoningTokens] | None = (
            None  # of chats: each sample's, empty without reasoning
        )

    def add(self, delta: Delta) -> None:
        """Count what is new."""
        for sample in delta.samples:
            self.completion += len(sample.token_ids)
            if self.thinking and sample.index in self.thinking:
                self.thinking[sample.index].push(sample.token_ids)
        self.cached += delta.num_cached_tokens

    def shown(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        found = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.thinking is None:
            return found
        reasoning = sum(each.count for each in self.thinking.values())
        return found | {"completion_tokens_details": {"reasoning_tokens": reasoning}}


class Envelope:
    """The frame around choices: id, model and time are those of the whole request."""

    def __init__(
        self,
        kind: str,
        prefix: str,
        model: str,
        request_id: str | None,
        tokenizer: Tokenizer | None,
    ):
        self.id = request_id or f"{prefix}-{uuid.uuid4().hex}"
        self._kind, self._model, self._created, self._tokenizer = (
            kind,
            model,
            int(time.time()),
            tokenizer,
        )
        self.obfuscates = False  # whether an event's length hides the length of its text
        # OpenAI calls pieces of completions what it calls the whole
        piece = f"{kind}.chunk" if kind == "chat.completion" else kind
        self.names_token_ids = False  # in logprobs: "token_id:17" instead of a token's text
        self._opening = encode(self._frame(piece)).removesuffix(b"}") + b',"choices":'

    def response(self, choices: list[dict[str, Any]], usage: Usage, **more: Any) -> dict[str, Any]:
        """All of an answer."""
        return self._frame(self._kind) | {"choices": choices, "usage": usage.shown()} | more

    def event(self, choices: list[dict[str, Any]], usage: Usage | None, **more: Any) -> bytes:
        """A piece of a stream, as a server-sent event; what all pieces have in common is encoded once."""
        shown = b"" if usage is None else b',"usage":' + encode(usage.shown())
        more_shown = b"".join(
            b"," + encode(name) + b":" + encode(value) for name, value in more.items()
        )
        body = self._opening + encode(choices) + shown + more_shown
        return server_sent_event(body + (_padding(len(body)) if self.obfuscates else b"") + b"}")

    def completion_logprobs(
        self, ids: Sequence[int], entries: Sequence[Entry | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """Return OpenAI's logprobs of a completion's tokens; an entry of None: nothing is known of its token."""
        own = [None if entry is None else entry[token][0] for token, entry in zip(ids, entries)]
        tops = [
            None if entry is None else self._by_spelling(token, entry)
            for token, entry in zip(ids, entries)
        ]
        spelled = [self.spelling(token) for token in ids]
        return {
            "tokens": spelled,
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": list(offsets),
        }

    def spelling(self, token: int) -> str:
        """Return how a completion's logprobs write a token: its text, or its bytes where these are half characters."""
        if self._tokenizer is None or self.names_token_ids:
            return f"token_id:{token}"
        content = self._bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _by_spelling(self, chosen: int, entry: Entry) -> dict[str, float]:
        """Return all log probabilities of an entry; of tokens spelled alike the chosen, then the likeliest keeps it.

        The others are written token_id:17, as vLLM writes tokens on demand.
        """
        found = {self.spelling(chosen): entry[chosen][0]}
        for token, (value, _) in sorted(entry.items(), key=lambda item: item[1][1]):
            if token != chosen:
                name = self.spelling(token)
                found[f"token_id:{token}" if name in found else name] = value
        return found

    def chat_logprobs(
        self, ids: Sequence[int], entries: Sequence[Entry], top: int
    ) -> dict[str, Any]:
        """Return OpenAI's logprobs of a chat: for each token its own, and the ``top`` likeliest; -1: all."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self.text(token),
                "logprob": logprob,
                "bytes": list(self._bytes(token)),
            }

        content = []
        for token, entry in zip(ids, entries):
            likeliest = sorted(entry.items(), key=lambda item: item[1][1])[
                : None if top < 0 else top
            ]
            tops = [one(other, value) for other, (value, _) in likeliest]
            content.append(one(token, entry[token][0]) | {"top_logprobs": tops})
        return {"content": content}

    def prompt_logprobs(self, entries: Sequence[Entry | None] | None) -> list[Any] | None:
        """vLLM's: for each token of the prompt {id: {logprob, rank, decoded_token}}."""
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
        """Return how logprobs write a token."""
        return f"token_id:{token}" if self.names_token_ids else self._decoded(token)

    def _decoded(self, token: int) -> str:
        return (
            f"token_id:{token}"
            if self._tokenizer is None
            else self._bytes(token).decode(errors="replace")
        )

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _bytes(self, token: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)


class CompletionLogprobs:
    """Log probabilities of one sample as it comes, in OpenAI's arrays.

    A token is told of when the text before it is: what a stop string might still take back, and a run of byte tokens,
    are waited for, so that a stream's offsets are those of the whole answer and lie within its text. `offsets`: None
    without a tokenizer; all are 0 then. `start`: characters before the first token.
    """

    def __init__(self, envelope: Envelope, offsets: Offsets | None, start: int):
        self._envelope = envelope
        self._offsets = offsets
        self._length = start  # characters of the text so far
        self._held: list[tuple[int, Entry | None]] = []
        self._certain: list[int] = []  # offsets of the first of the held tokens

    def add(
        self, ids: Sequence[int], entries: Sequence[Entry | None], text: str, ended: bool
    ) -> dict[str, Any]:
        """Take new tokens with their entries and new text, perhaps the last; return what can be told."""
        self._length += len(text)
        for token, entry in zip(ids, entries):
            self._held.append((token, entry))
            self._certain += [0] if self._offsets is None else self._offsets.push(token)
        if ended and self._offsets is not None:
            self._certain += self._offsets.finish()
        told = len(self._held) if ended else sum(offset <= self._length for offset in self._certain)
        tokens, offsets = (
            self._held[:told],
            [min(offset, self._length) for offset in self._certain[:told]],
        )
        del self._held[:told], self._certain[:told]
        return self._envelope.completion_logprobs(
            [token for token, _ in tokens], [entry for _, entry in tokens], offsets
        )


def _padding(size_bytes: int) -> bytes:
    """Return a field of random text that brings an event of `size_bytes` to a multiple of PADDED_BYTES."""
    count = -(size_bytes + len(b',"obfuscation":""}')) % PADDED_BYTES or PADDED_BYTES
    return b',"obfuscation":"' + secrets.token_hex(PADDED_BYTES // 2)[:count].encode() + b'"'


def server_sent_event(content: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + content + b"\n\n"


def merge_samples(samples: Sequence[Sample]) -> dict[int, Sample]:
    """Pieces put together, by the sample that they belong to."""
    whole: dict[int, Sample] = {}
    for piece in samples:
        if (sample := whole.get(piece.index)) is None:
            whole[piece.index] = piece
            continue
        sample.text += piece.text
        sample.token_ids += piece.token_ids
        if piece.logprobs is not None:
            sample.logprobs = (sample.logprobs or []) + piece.logprobs
        sample.finish_reason, sample.stop_reason = piece.finish_reason, piece.stop_reason
        sample.weights = piece.weights
    return whole


def weights_fields(sample: Sample) -> dict[str, Any]:
    """At a sample's end, which version of the weights said it, and from which token on where that was more than one."""
    if not sample.weights:
        return {}
    several = (
        {"weights_versions": [list(each) for each in sample.weights]}
        if len(sample.weights) > 1
        else {}
    )
    return {"weights_version": sample.weights[-1][1]} | several


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return OpenAI's error object; `code` is a name or null, never a number."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
