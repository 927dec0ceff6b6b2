"""Results of a step for its requests: log probabilities, scored prompts, pooled hidden states.

Not here: the computation of the log probabilities (sample.py), sampled tokens (engine.py).
"""

import dataclasses
from collections.abc import Sequence as Many

import jax
import numpy as np

from slipway.engine.batch import Bucket
from slipway.engine.request import Logprob, Logprobs, Request, Sequence
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step on the device: the chunks of each copy of the weights, and the results to come.

    ``num_steps``: decode steps in its call; their results follow each other. ``x_TD``: the hidden
    states, None if there are several steps. ``drafts_BK``: drafts of the tokens that follow those
    of the results, of which ``num_drafts`` count, if the device made some. ``at``: when it was
    dispatched, in seconds of time.perf_counter(). ``follows``: whether it was dispatched without a
    pause after the step before, so that it ends one step's time after that.
    """

    chunks: list[list[Chunk]]
    bucket: Bucket
    num_steps: int
    sampled: Sampled
    x_TD: jax.Array | None
    drafts_BK: jax.Array | None
    num_drafts: int
    at: float
    follows: bool

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
        """Whether the step verifies drafts: the next step depends on its results."""
        return any(chunk.drafts for chunks in self.chunks for chunk in chunks)

    def rows(self, first: int, chunk: Chunk) -> range:
        """Return the rows of results with the sampled tokens of a chunk.

        One for each step, or one for each draft and one more; none if the chunk does not sample.
        ``first``: the chunk's first row of results.
        """
        start = first + len(chunk.scored)
        if self.num_steps == 1:
            return range(start, first + chunk.num_rows)
        stride = len(self.chunks) * self.bucket.num_rows
        return range(start, start + self.num_steps * stride if chunk.samples else start, stride)


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
