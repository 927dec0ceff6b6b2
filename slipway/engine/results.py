"""Results of a step for its requests: log probabilities, scored prompts, pooled hidden states.

Not here: the computation of the log probabilities (sample.py), sampled tokens (engine.py).
"""

import dataclasses
from collections.abc import Sequence as Many

import jax
import numpy as np

from slipway.engine.batch import Bucket
from slipway.engine.drafts.rounds_program import RoundsOutput
from slipway.engine.request import Logprob, Logprobs, Request, Sequence
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A call on the device: the chunks of each copy of the weights, and the results to come.

    ``num_steps``: decode steps, or rounds of speculation, in it; their results follow each other.
    ``x_TD``: the hidden states, None if there are several steps. ``rounds``: numbers of tokens, if
    they are rounds. ``drafts_BK``: drafts of the tokens that follow those of the results, of which
    ``num_drafts`` count, if the device made some. ``at``: when it was dispatched, in seconds of
    time.perf_counter(). ``follows``: whether it was dispatched without a pause after the call
    before, so that it ends one call's time after that.
    """

    chunks: list[list[Chunk]]
    bucket: Bucket
    num_steps: int
    sampled: Sampled
    at: float
    follows: bool
    x_TD: jax.Array | None = None
    rounds: RoundsOutput | None = None
    drafts_BK: jax.Array | None = None
    num_drafts: int = 0

    @property
    def shape(self) -> tuple[Bucket, int]:
        """Bucket and number of steps, on which the time of the call depends."""
        return self.bucket, self.num_steps

    @property
    def only_decodes(self) -> bool:
        """Whether no chunk is part of a prompt."""
        return all(chunk.decodes for chunks in self.chunks for chunk in chunks)

    @property
    def has_drafts(self) -> bool:
        """Whether it verifies drafts: the next call depends on its results."""
        if self.rounds is not None:
            return True
        return any(chunk.drafts for chunks in self.chunks for chunk in chunks)


# Rows of the results with the tokens that a sequence gets, and for each verification the numbers of
# drafts that were verified and accepted.
Found = tuple[Many[int], Many[tuple[int, int]]]


class Taken:
    """Results of a call, in the host's memory."""

    def __init__(self, step: Dispatched):
        """Wait for the results."""
        self._step = step
        asked = [chunk.sequence for chunks in step.chunks for chunk in chunks]
        self.sampled = step.sampled
        # Lists, not generators: half the cost for many rows.
        if any([sequence.wants_logprobs for sequence in asked]):
            self.sampled = jax.tree.map(np.asarray, step.sampled)
        self.tokens: list[int] = np.asarray(self.sampled.token_B).tolist()
        is_pooled = any([sequence.pooling for sequence in asked])
        self.x_TD = np.asarray(step.x_TD, np.float32) if is_pooled else None
        self._drafts = None if step.drafts_BK is None else np.asarray(step.drafts_BK).tolist()
        if step.rounds is not None:
            shape = (-1, len(step.chunks), step.bucket.num_rows)
            self._counts = np.asarray(step.rounds.counts_B).reshape(shape)
            self._new = np.asarray(step.rounds.new_B).reshape(shape)

    def of(self, rank: int, index: int, first: int) -> Found:
        """Return what the chunk ``index`` of a copy gets; ``first``: its first row of results.

        In rounds, ``first`` is not used: the rows depend on the accepted drafts.
        """
        step = self._step
        chunk = step.chunks[rank][index]
        if step.rounds is not None:
            return self._of_rounds(rank, index)
        start = first + len(chunk.scored)
        if step.num_steps == 1:
            rows = range(start, first + chunk.num_rows)
            if not chunk.drafts:
                return rows, ()
            right = accepted(chunk.drafts, [self.tokens[row] for row in rows])
            return rows[: 1 + right], ((len(chunk.drafts), right),)
        stride = len(step.chunks) * step.bucket.num_rows
        return range(start, start + step.num_steps * stride, stride), ()

    def drafts(self, rank: int, index: int) -> list[int] | None:
        """Return drafts of the tokens that follow those of a chunk, None if none were made."""
        if self._drafts is None:
            return None
        row = rank * self._step.bucket.num_rows + index
        return self._drafts[row][: self._step.num_drafts]

    def _of_rounds(self, rank: int, index: int) -> Found:
        step = self._step
        rows, verified = list[int](), list[tuple[int, int]]()
        for number in range(step.num_steps):
            count, new = (int(each[number, rank, index]) for each in (self._counts, self._new))
            before = int(self._counts[number, rank, :index].sum())
            first = (number * len(step.chunks) + rank) * step.bucket.num_tokens + before
            rows += range(first, first + new)
            if new and count > 1:
                verified.append((count - 1, new - 1))
        return rows, verified


def accepted(drafts: Many[int], tokens: Many[int]) -> int:
    """Return how many leading drafts equal the tokens that were sampled in their places."""
    right = [draft == token for draft, token in zip(drafts, tokens)]
    return right.index(False) if False in right else len(right)


def logprobs(sampled: Sampled, row: int, top: int) -> Logprobs:
    """Return the sampled token and the ``top`` likeliest, with ranks; ``top`` -1: all of them."""
    top = sampled.top_id_BX.shape[1] if top < 0 else top
    ids, values = sampled.top_id_BX[row, :top].tolist(), sampled.top_logprob_BX[row, :top].tolist()
    found = {token: Logprob(value, rank) for rank, (token, value) in enumerate(zip(ids, values), 1)}
    chosen = int(sampled.token_B[row])
    return {chosen: Logprob(float(sampled.logprob_B[row]), int(sampled.rank_B[row]))} | found


def score(request: Request, sampled: Sampled, row: int, chunk: Chunk) -> None:
    """Append the log probabilities of prompt tokens that a chunk scored to ``prompt_logprobs``.

    ``row``: the chunk's first row of results.
    """
    assert request.prompt_logprobs is not None and request.spec.params.prompt_logprobs is not None
    for index in range(len(chunk.scored)):
        request.prompt_logprobs.append(
            logprobs(sampled, row + index, request.spec.params.prompt_logprobs)
        )


def pool(sequence: Sequence, x_CD: np.ndarray, chunk: Chunk) -> None:
    """Add the hidden states [C, D] of a chunk to the request's pooled one.

    Pooling is that of the request: the state of the last token, or the mean over the prompt.
    """
    request = sequence.request
    if request.spec.pooling == "mean":
        before_1D = () if chunk.start == 0 or request.hidden is None else (request.hidden[None],)
        # The sum takes one token after the other, so that it does not depend on the chunks.
        request.hidden = np.concatenate([*before_1D, x_CD]).sum(axis=0, dtype=np.float32)
        if chunk.samples:
            request.hidden = request.hidden / sequence.num_prompt
    elif chunk.samples:
        request.hidden = x_CD[-1]
