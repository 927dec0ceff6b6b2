"""Input of one step of a model: token ids, positions, rows and pages of a ragged batch.

Not here: how the engine fills it from scheduled requests (engine/batch.py).
"""

from typing import Any

import jax

from slipway.tree import module

Array = Any  # NumPy on the host, a JAX array inside a step


@module
class PageMap:
    """Places of a step's tokens in the caches that share one numbering of pages. All int32.

    ``slots_T``: page * page_size + offset, where a token's keys and values are written; the slot of a padding token
    lies outside the cache. ``page_table_BM``: the pages of each row's sequence, in order of their tokens; entries of
    pages that lie before a sliding window are stale and never used.
    """

    slots_T: Array
    page_table_BM: Array


@module
class StepInput:
    """The T flat tokens of a step, in B rows with one sequence each. All int32 but the angles.

    Row b owns the ``counts_B[b]`` tokens from ``starts_B[b]`` on; after this step its sequence has ``lengths_B[b]``
    tokens in the cache. An unused row counts 0. Tokens from ``num_tokens`` on are padding. Each array has the same
    meaning on every copy of the weights; copies lie one after the other along the first axis.
    """

    num_tokens_1: Array
    ids_T: Array  # token ids; before a step resolves them also -1 - row of the last step's results
    positions_T: Array  # of each token in its sequence
    contexts_T: Array  # tokens shown with it: the prompt's length, or position + 1 of a generated one
    row_T: Array  # the row that owns each token; 0 for padding
    starts_B: Array
    counts_B: Array
    lengths_B: Array
    pages: tuple[PageMap, ...]  # one for each numbering of pages (kv_cache.page_windows)
    num_samples_1: Array
    sample_at_B: Array  # the tokens with hidden states that become logits; ``num_samples_1`` of them
    angles: tuple[tuple[jax.Array, jax.Array], ...] = ()  # cosines and sines [T, head_dim / 2] of each Rope of a model

    @property
    def num_tokens(self) -> Array:
        """The number of tokens that are not padding, without dimensions."""
        return self.num_tokens_1[0]
