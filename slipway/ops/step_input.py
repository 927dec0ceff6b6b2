"""Input of one step of a model: token ids, positions, rows and pages of a ragged batch.

Not here: how the engine fills it from scheduled requests (engine/batch.py).
"""

from typing import Any

import jax

from slipway.tree import module

Array = Any  # a NumPy array on the host, a traced JAX array inside a step


@module
class PageMap:
    """Places of a step's tokens in the caches of one numbering (ops/kv_cache.py). All int32.

    ``slots_T``: page * page_size + offset, where a token's keys and values are written; the slot of
    a padding token lies outside the cache. ``page_table_BM``: the pages of each row's sequence, in
    order of their tokens; entries of pages that lie before a sliding window are stale and never
    used.
    """

    slots_T: Array
    page_table_BM: Array


@module
class StepInput:
    """The T tokens of a step, flat along one axis, in B rows with one sequence each.

    Row b has the ``counts_B[b]`` tokens from ``starts_B[b]`` on, 0 if the row is unused; after the
    step its sequence has ``lengths_B[b]`` tokens in the cache. Tokens from ``num_tokens`` on are
    padding. The arrays of the copies of the weights follow each other along the first axis. All are
    int32, except the angles.
    """

    num_tokens_1: Array
    # Token ids. Before the forward pass resolves it, -1 - r stands for the token that the last step
    # sampled in row r of its results.
    ids_T: Array
    # Position of each token in its sequence.
    positions_T: Array
    # Length of the prompt of each token's sequence: dynamic scaling of positions depends on it.
    prompt_lengths_T: Array
    # Row of each token, 0 for padding.
    row_T: Array
    starts_B: Array
    counts_B: Array
    lengths_B: Array
    # One for each numbering of pages (kv_cache.page_windows).
    pages: tuple[PageMap, ...]
    num_samples_1: Array
    # Index of the token of each row of results; the first ``num_samples_1`` entries count.
    sample_at_B: Array
    # Cosines and sines [T, head_dim / 2] of each Rope of a model.
    angles: tuple[tuple[jax.Array, jax.Array], ...] = ()

    @property
    def num_tokens(self) -> Array:
        """The number of tokens that are not padding, without dimensions."""
        return self.num_tokens_1[0]
