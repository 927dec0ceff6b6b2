"""Requests: what a caller states, the state of each sample while it runs, and the outputs.

Not here: checks of a request (admission.py), which sequences run (scheduler.py).
"""

import dataclasses
import enum
import math
import time
from typing import Any, NamedTuple

import numpy as np

from slipway.cache.radix import Node
from slipway.codec.detokenizer import Detokenizer
from slipway.codec.reasoning import Constraint
from slipway.engine.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log probability of a token under the model, and its rank (1: the likeliest).

    Both are those before penalties and temperature.
    """

    logprob: float
    rank: int


Logprobs = dict[int, Logprob]
FROM_BODY = {"from_body": True}  # metadata of a field that HTTP clients set by the same name


class DraftCounts(NamedTuple):
    """Sums of speculative decoding.

    ``verified``: how often drafts of a sequence were verified; ``drafted``: all these drafts;
    ``accepted``: those among them that became tokens.
    """

    verified: int = 0
    drafted: int = 0
    accepted: int = 0

    def plus(self, other: "DraftCounts") -> "DraftCounts":
        """Return the sums of both."""
        return DraftCounts(*(a + b for a, b in zip(self, other)))


class FinishReason(enum.StrEnum):
    """Reason of a sample's end: end token or stop string, max_tokens, abort, or deadline."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"

    __repr__ = str.__repr__  # in a printed RequestOutput the word, as any other text


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample so far. ``finish_reason``: None while it runs.

    ``weights``: which version of the weights it comes from, as (first token of the output,
    version), in order.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    weights: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples so far.

    ``prompt_logprobs``: for each token of the prompt, None for the first. ``num_cached_tokens``: of
    the prompt, those that were in the cache already. ``hidden``: the pooled hidden state, where
    that was asked for. ``drafts``: sums of speculation over all samples.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    hidden: np.ndarray | None = None
    drafts: DraftCounts = DraftCounts()


@dataclasses.dataclass(frozen=True)
class RequestSpec:
    """Everything that a caller states about a request, on its way from the HTTP body to the batch.

    ``prompt``: the text of ``token_ids``, to be shown in outputs. ``priority``: the smaller runs
    first. ``cache_salt``: only requests of the same salt share cached pages. ``timeout_s``: seconds
    after which the request ends with what it has. ``pooling``: "last" or "mean" for the prompt's
    hidden state instead of an output, else "".

    A new fact is a field here, with ``metadata=FROM_BODY`` if clients set it, and its reader: the
    batch (engine/batch.py) finds it at ``sequence.request.spec``.
    """

    token_ids: list[int]
    params: SamplingParams
    _: dataclasses.KW_ONLY
    prompt: str | None = None
    priority: int = dataclasses.field(default=0, metadata=FROM_BODY)
    cache_salt: str = dataclasses.field(default="", metadata=FROM_BODY)
    timeout_s: float | None = None
    pooling: str = ""


class Sequence:
    """One sample of one request while it runs: the scheduler moves it, the engine adds its tokens.

    A token goes through three states: sampled by a step that is still on the device
    (``num_pending`` counts those), known to the host, and computed, that is, with keys and values
    in the cache or on their way there.
    """

    # Attributes by slots: a dictionary of more than 30 is slower to read in CPython.
    __slots__ = (
        "_flushed", "_num_hidden", "_num_read", "_num_shown", "cumulative_logprob", "detokenizer",
        "draft_counts", "drafts", "duplicates", "finish_reason", "first_run", "index", "last_row",
        "last_token_at", "logprobs", "matcher", "max_length", "needs_every_token", "node",
        "num_cached", "num_computed", "num_pending", "num_prompt", "num_scored", "num_tokens",
        "overtaken", "pages", "params", "pooling", "request", "scores", "seed", "slot", "stop_ids",
        "stop_reason", "tokens", "wants_logprobs", "weights", "window_pages",
    )  # fmt: skip

    def __init__(
        self,
        request: "Request",
        index: int,
        seed: int,
        stop_ids: frozenset[int],
        detokenizer: Detokenizer | None,
    ):
        self.request = request
        self.index = index
        self.seed = seed
        self.stop_ids = stop_ids
        self.detokenizer = detokenizer
        # Facts of the request that every token needs: reading them here costs the host less.
        self.params = params = request.spec.params
        self.pooling = request.spec.pooling
        self.num_prompt = len(request.spec.token_ids)
        self.num_tokens = self.num_prompt  # of prompt and output together
        self.max_length = self.num_prompt + request.max_tokens
        # The prompt is scored once for all samples.
        self.scores = request.prompt_logprobs is not None and index == 0
        # Every token of the prompt must be computed, even those that the cache holds.
        self.needs_every_token = self.scores or request.spec.pooling == "mean"
        self.wants_logprobs = (
            params.logprobs is not None or params.best_of is not None or self.scores
        )
        self.tokens = np.empty(self.max_length, np.int32)
        self.tokens[: self.num_tokens] = request.spec.token_ids
        self.logprobs: list[Logprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0  # summed where samples are ranked
        self._num_read = 0  # tokens of the output that the detokenizer has
        self._num_shown = 0  # tokens of the output in deltas so far
        self._flushed = False  # the detokenizer has given all of its text
        self._num_hidden = 0  # 1: the last token is a stop token, which the text leaves out
        # The following belong to the scheduler.
        self.num_computed = 0
        self.num_pending = 0
        self.num_scored = 0
        self.pages: list[int] = []
        # Its pages of each numbering for sliding windows, FREED before the window
        # (cache/windows.py).
        self.window_pages: list[list[int]] = []
        self.duplicates: list[int] = []  # its own copies of pages that the tree has from others
        # The tree's deepest page among them; those after it are the sequence's own.
        self.node: Node | None = None
        self.slot = -1  # its row of the scheduler's page tables while it runs
        # Its row of the last step's results, which hold its token while that is pending.
        self.last_row = -1
        self.overtaken = 0
        # State of its grammar or budget of reasoning, if it has one.
        self.matcher: Constraint | None = None
        # Tokens that may follow its last one, for the next step to verify (engine/drafts/).
        self.drafts: list[int] = []
        self.draft_counts = DraftCounts()
        self.first_run = True
        self.last_token_at = 0.0  # seconds of time.monotonic(); 0: none yet
        self.num_cached: int | None = None  # tokens that the cache held when it first ran
        self.weights: tuple[tuple[int, str], ...] = ()
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def length(self) -> int:
        """Number of its tokens, those still on the device included."""
        return self.num_tokens + self.num_pending

    @property
    def awaits_a_step(self) -> bool:
        """Whether only its newest token is still to be computed, and the host has that token."""
        return not self.num_pending and self.num_computed + 1 == self.num_tokens

    @property
    def is_scoring(self) -> bool:
        """Whether tokens of its prompt are still to be scored."""
        return self.scores and self.num_scored < self.num_prompt - 1

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key of the scheduler: the smaller goes first."""
        return self.request.spec.priority, self.request.arrival, self.index

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the output."""
        return self.tokens[self.num_prompt : self.num_tokens].tolist()

    def append(self, token_id: int, logprobs: Logprobs | None) -> None:
        """Append a sampled token; end at an end token, a stop string or the maximum length."""
        params = self.params
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        if self.logprobs is not None:
            self.logprobs.append(logprobs or {})
        if token_id in self.stop_ids:
            self._num_hidden = int(not params.include_stop_str_in_output)
            self.finish(FinishReason.STOP, token_id if token_id in params.stop_token_ids else None)
        elif self.detokenizer is not None and params.stop and self._read().stopped is not None:
            self.finish(FinishReason.STOP, self.detokenizer.stopped)
        elif self.num_tokens >= self.max_length:
            self.finish(FinishReason.LENGTH)
            if self.detokenizer is not None and params.stop and self._read().stopped is not None:
                self.finish(
                    FinishReason.STOP, self.detokenizer.stopped
                )  # completed by the very end of the text

    def change_weights(self, version: str) -> None:
        """Note the version of the next tokens; of all tokens, if none is computed yet."""
        before = self.weights if self.num_computed or self.num_tokens > self.num_prompt else ()
        self.weights = (*before, (self.num_tokens - self.num_prompt, version))

    def forget_scores(self) -> None:
        """Let the prompt be scored from its start again, if it is scored."""
        if self.scores:
            self.num_scored = 0
            self.request.prompt_logprobs = [None]

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the sequence.

        ``stop_reason``: the stop string or token id that matched, or the cause of an abort.
        """
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def output(self) -> CompletionOutput:
        """Return the sample so far."""
        text = "" if self.detokenizer is None else self._read().text
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return self._output(text, self.token_ids, logprobs)

    def delta(self) -> CompletionOutput:
        """Return the part of the sample that is new since the last call."""
        first = self._num_shown
        self._num_shown = self.num_tokens - self.num_prompt
        ids = self.tokens[self.num_prompt + first : self.num_tokens].tolist()
        logprobs = None if self.logprobs is None else self.logprobs[first:]
        text = "" if self.detokenizer is None else self._read().take()
        return self._output(text, ids, logprobs)

    def _output(
        self, text: str, token_ids: list[int], logprobs: list[Logprobs] | None
    ) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            weights=self.weights,
        )

    def is_due(self, interval: int) -> bool:
        """Whether a delta is due: at the first token, at the end, and every ``interval`` tokens."""
        first = not self._num_shown or self.finish_reason is not None
        return self.num_tokens - self.num_prompt - self._num_shown >= (1 if first else interval)

    def _read(self) -> Detokenizer:
        """Detokenize the new tokens.

        Stop strings need that at every step; otherwise it waits for an output.
        """
        assert self.detokenizer is not None
        first, last = self.num_prompt + self._num_read, self.num_tokens - self._num_hidden
        for token_id in self.tokens[first:last].tolist():
            self.detokenizer.add(token_id)
            self._num_read += 1
        if self.finish_reason is not None and not self._flushed:
            self.detokenizer.finish()  # nothing can follow: what was held back is text
            self._flushed = True
        return self.detokenizer


class Request:
    """A request while it runs, and its samples.

    ``max_tokens`` is resolved against the context. Of requests with equal priority the one with the
    smaller ``arrival`` goes first. ``deadline``: when it must have ended, in seconds of
    time.monotonic().
    """

    def __init__(
        self,
        request_id: str,
        spec: RequestSpec,
        max_tokens: int,
        *,
        arrival: int = 0,
        deadline: float = math.inf,
    ):
        self.request_id = request_id
        self.spec = spec
        self.max_tokens = max_tokens
        self.arrival = arrival
        self.deadline = deadline
        self.copy = 0  # of the weights, where it runs
        self.hidden: np.ndarray | None = None
        self.rules: Any = None  # logit_rules.Rules, where its parameters change logits
        self.sequences: list[Sequence] = []
        self.prompt_logprobs: list[Logprobs | None] | None = (
            None if spec.params.prompt_logprobs is None else [None]
        )
        self.arrived_at = time.monotonic()
        self.first_token_at = math.nan
        self._shown = list(
            spec.token_ids
        )  # in outputs; one list for all of them, so that a token's cost is constant

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def has_begun(self) -> bool:
        """Whether any sample has run."""
        return any(sequence.num_cached is not None for sequence in self.sequences)

    @property
    def num_cached(self) -> int:
        """Number of its prompt's tokens that the cache held when it first ran."""
        return (self.sequences[0].num_cached or 0) if self.sequences else 0

    @property
    def draft_counts(self) -> DraftCounts:
        """Sums of speculation over all its samples."""
        found = DraftCounts()
        for sequence in self.sequences:
            found = found.plus(sequence.draft_counts)
        return found

    @property
    def num_generated(self) -> int:
        """Number of output tokens of all its samples."""
        return sum(sequence.num_tokens - sequence.num_prompt for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """Return the request so far; once all samples have ended, the likeliest n of best_of."""
        sequences, n = self.sequences, self.spec.params.n
        if len(sequences) > n and self.finished:
            sequences = sorted(sequences, key=lambda sequence: -sequence.cumulative_logprob)
        outputs = [sequence.output() for sequence in sequences[:n]]
        if len(self.sequences) > n:
            outputs = [
                dataclasses.replace(output, index=index) for index, output in enumerate(outputs)
            ]
        return self._around(outputs)

    def is_due(self, interval: int) -> bool:
        """Whether it has ended, or a delta of a sample is due.

        ``interval``: EngineConfig.stream_interval.
        """
        return self.finished or any(sequence.is_due(interval) for sequence in self.sequences)

    def deltas(self) -> list[CompletionOutput]:
        """Return the new part of each sample since the last call."""
        return [sequence.delta() for sequence in self.sequences]

    def delta(self) -> RequestOutput:
        """Return ``deltas`` with the fields of the request."""
        return self._around(self.deltas())

    def _around(self, outputs: list[CompletionOutput]) -> RequestOutput:
        scored = None if self.prompt_logprobs is None else list(self.prompt_logprobs)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.spec.prompt,
            prompt_token_ids=self._shown,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=scored,
            num_cached_tokens=self.num_cached,
            hidden=self.hidden,
            drafts=self.draft_counts,
        )
