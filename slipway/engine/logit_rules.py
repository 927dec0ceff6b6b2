"""Logit rules: the bans, biases and penalties of requests, and their arrays for a step.

Not here: their application to the logits (sample.py), their ranges (params.py).

Most steps change no logits: they pass arrays that lie on the device already.
"""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from slipway.codec.reasoning import Constraint
from slipway.codec.tokenizer import Tokenizer
from slipway.engine.params import MAX_LOGIT_BIAS, SamplingParams
from slipway.engine.request import Sequence
from slipway.engine.scheduler import Chunk
from slipway.errors import InvalidRequest, Shown
from slipway.tree import module

Array = Any  # a NumPy array on the host, a traced JAX array inside the step
WORD_BITS = 32


@module
class Edits:
    """Changes to the logits of each row: allowed tokens, biases, penalties, and the tokens so far.

    ``any_1``: whether any row has any change. ``allowed_BW``: one bit for each token of the
    vocabulary. ``bias_id_BX``: unused entries are the size of the vocabulary. ``history_BC``: the
    tokens of the sequence, which the penalties count.
    """

    any_1: Array
    allowed_BW: Array
    bias_id_BX: Array
    bias_BX: Array
    repetition_B: Array
    frequency_B: Array
    presence_B: Array
    num_prompt_B: Array
    history_BC: Array


class Rules:
    """Rules of one request: the tokens that it bans and the biases that it adds.

    Made once, when the request is admitted.

    Raises InvalidRequest, naming the field, for token ids outside the vocabulary, for bad words
    without a tokenizer, and where no token is left to choose.
    """

    def __init__(
        self,
        params: SamplingParams,
        stop_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        vocab_size: int,
    ):
        self.params = params
        self._stop_ids = np.array(sorted(t for t in stop_ids if t < vocab_size), np.int64)
        listed = {
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": params.logit_bias,
        }
        for field, ids in listed.items():
            if outside := [token for token in ids if token >= vocab_size]:
                got = Shown(", ".join(map(str, outside)))
                raise InvalidRequest(field, got, f"token ids from 0 to {vocab_size - 1}")
        if params.bad_words and tokenizer is None:
            raise InvalidRequest(
                "bad_words", params.bad_words, "none without a tokenizer (skip_tokenizer_init)"
            )
        spelled = [ids for word in params.bad_words for ids in _spellings(word, tokenizer)]
        self._endings = [(ids[:-1], ids[-1]) for ids in spelled if len(ids) > 1]
        self._fixed = np.ones(-(-vocab_size // WORD_BITS) * WORD_BITS, bool)
        self._fixed[vocab_size:] = False
        if params.allowed_token_ids is not None:
            self._fixed[:] = False
            self._fixed[list(params.allowed_token_ids)] = True
        self._fixed[[ids[0] for ids in spelled if len(ids) == 1]] = False
        if not self._mask(params.min_tokens > 0).any():
            raise InvalidRequest(
                "allowed_token_ids", params.allowed_token_ids, "one that nothing else bans"
            )
        self._masks = {early: _bits(self._mask(early)) for early in {False, params.min_tokens > 0}}

    def allowed(self, sequence: Sequence, length: int, matcher: Constraint | None) -> np.ndarray:
        """Return the bits [W] of the tokens that may follow the first ``length`` tokens.

        ``sequence.tokens`` holds these tokens, and ``matcher`` has accepted the output among them.
        Where the grammar and the other rules have no token in common, the grammar decides.
        """
        bits = self._masks[length - sequence.num_prompt < self.params.min_tokens]
        banned = [last for ids, last in self._endings if _ends_with(sequence, length, ids)]
        if banned:
            bits = bits.copy()
            for token in banned:
                bits[token // WORD_BITS] &= ~np.uint32(1 << token % WORD_BITS)
        if matcher is not None:
            grammatical = matcher.allowed()
            bits = bits & grammatical if (bits & grammatical).any() else grammatical
        return bits

    def _mask(self, early: bool) -> np.ndarray:
        """Return which tokens the rules that never change allow; ``early``: before min_tokens."""
        mask = self._fixed.copy()
        if early:
            mask[self._stop_ids] = False
        return mask


def needed(params: SamplingParams) -> bool:
    """Whether any parameter of a request changes logits."""
    return bool(
        params.penalizes
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.is_guided
    )


def empty(num_rows: int, vocab_size: int, max_model_len: int) -> Edits:
    """Return edits of ``num_rows`` rows that change nothing."""
    B, words = num_rows, -(-vocab_size // WORD_BITS)
    return Edits(
        any_1=np.zeros(1, np.bool_),
        allowed_BW=np.full((B, words), 2**WORD_BITS - 1, np.uint32),
        bias_id_BX=np.full((B, MAX_LOGIT_BIAS), vocab_size, np.int32),
        bias_BX=np.zeros((B, MAX_LOGIT_BIAS), np.float32),
        repetition_B=np.ones(B, np.float32),
        frequency_B=np.zeros(B, np.float32),
        presence_B=np.zeros(B, np.float32),
        num_prompt_B=np.zeros(B, np.int32),
        history_BC=np.zeros((B, max_model_len), np.int32),
    )


def edited(chunks: Many[Many[Chunk]], num_rows: int) -> list[tuple[int, Chunk]]:
    """Return each chunk that samples by rules, with its last row of results."""
    return [
        (rank * num_rows + chunk.sequence.last_row, chunk)
        for rank, of_rank in enumerate(chunks)
        for chunk in of_rank
        if chunk.samples and chunk.sequence.request.rules is not None
    ]


def build(edits: Edits, rows: Many[tuple[int, Chunk]]) -> Edits:
    """Fill the ``rows`` of ``edited`` into empty ``edits`` and return these.

    Bans and grammars may depend on the newest token of a sequence, so the host must have it;
    penalties read that token on the device. A row after a draft gets the rules that hold if the
    sequence continues with the chunk's drafts up to there.
    """
    edits.any_1[:] = True
    for last_row, (sequence, start, count, _, _, drafts) in rows:
        if sequence.finish_reason is not None:
            continue
        matcher = sequence.matcher
        if drafts and matcher is not None:
            matcher = matcher.fork()
        first = start + count - len(drafts)
        for index in range(len(drafts) + 1):
            row = last_row - len(drafts) + index
            _build_row(edits, row, sequence, length=first + index, matcher=matcher)
            if index == len(drafts) or matcher is None:
                continue
            # No token follows a draft that the grammar excludes or that completes the output.
            if not matcher.accept(drafts[index]) or matcher.is_done:
                break
    return edits


def _build_row(
    edits: Edits, row: int, sequence: Sequence, *, length: int, matcher: Constraint | None
) -> None:
    """Fill in the rules of the row that samples after the first ``length`` tokens of a sequence."""
    rules = sequence.request.rules
    params = rules.params
    edits.allowed_BW[row] = rules.allowed(sequence, length, matcher)
    edits.bias_id_BX[row, : len(params.logit_bias)] = list(params.logit_bias)
    edits.bias_BX[row, : len(params.logit_bias)] = list(params.logit_bias.values())
    if params.penalizes:
        edits.repetition_B[row] = params.repetition_penalty
        edits.frequency_B[row] = params.frequency_penalty
        edits.presence_B[row] = params.presence_penalty
        edits.num_prompt_B[row] = sequence.num_prompt
        edits.history_BC[row, :length] = sequence.tokens[:length]


def _ends_with(sequence: Sequence, length: int, ids: list[int]) -> bool:
    """Whether the output among the first ``length`` tokens of a sequence ends with ``ids``."""
    first = length - len(ids)
    return first >= sequence.num_prompt and sequence.tokens[first:length].tolist() == ids


def _spellings(word: str, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Return the token ids of a word: at the start of a text, and after a space.

    The second is left out unless it has as many tokens and another first token.
    """
    assert tokenizer is not None
    bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
    spaced = tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False)
    found = [bare] if bare else []
    return [*found, spaced] if len(spaced) == len(bare) and spaced[:1] != bare[:1] else found


def _bits(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little").view(np.uint32)
