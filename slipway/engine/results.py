"""What a step found, as requests are given it: log probabilities, a scored prompt, a pooled hidden state; no device."""

import dataclasses

import jax
import numpy as np

from slipway.engine.batch import Bucket
from slipway.engine.request import Logprob, Logprobs, Request, Sequence
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step on the device: what each copy of the weights was asked, and where its results will be."""

    chunks: list[list[Chunk]]
    bucket: Bucket
    num_steps: int  # in one call; results of each, one after the other
    sampled: Sampled
    x_TD: jax.Array | None  # where there is one step
    at: float  # seconds of time.perf_counter()

    @property
    def shape(self) -> tuple[Bucket, int]:
        """What its time depends on."""
        return self.bucket, self.num_steps

    def rows(self, first: int, chunk: Chunk) -> range:
        """The rows of results with the tokens that a chunk gives, one for each step; ``first``: its first row."""
        stride = len(self.chunks) * self.bucket.num_rows
        start = first + len(chunk.scored)
        return range(start, start + self.num_steps * stride if chunk.samples else start, stride)


def logprobs(sampled: Sampled, row: int, top: int) -> Logprobs:
    """Return the chosen token and the ``top`` likeliest, each with its rank; -1: all that there are."""
    top = sampled.top_id_BX.shape[1] if top < 0 else top
    ids, values = sampled.top_id_BX[row, :top].tolist(), sampled.top_logprob_BX[row, :top].tolist()
    found = {token: Logprob(value, rank) for rank, (token, value) in enumerate(zip(ids, values), 1)}
    chosen = int(sampled.token_B[row])
    return {chosen: Logprob(float(sampled.logprob_B[row]), int(sampled.rank_B[row]))} | found


def score(request: Request, sampled: Sampled, row: int, chunk: Chunk) -> None:
    """Log probabilities of the prompt's tokens that follow the scored ones."""
    assert request.prompt_logprobs is not None and request.spec.params.prompt_logprobs is not None
    for index in range(len(chunk.scored)):
        request.prompt_logprobs.append(logprobs(sampled, row + index, request.spec.params.prompt_logprobs))


def pool(sequence: Sequence, x_CD: np.ndarray, chunk: Chunk) -> None:
    """Take in the hidden states of a chunk of the prompt: of its last token, or the mean of all."""
    request = sequence.request
    if request.spec.pooling == "mean":
        before_1D = () if chunk.start == 0 or request.hidden is None else (request.hidden[None],)
        # one token after the other, so that the sum does not depend on where the prompt is cut into chunks
        request.hidden = np.concatenate([*before_1D, x_CD]).sum(axis=0, dtype=np.float32)
        if chunk.samples:
            request.hidden = request.hidden / sequence.num_prompt
    elif chunk.samples:
        request.hidden = x_CD[-1]
