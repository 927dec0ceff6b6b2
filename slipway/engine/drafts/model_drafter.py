"""Drafts that a model on the device made, as the host keeps them for the next step.

Not here: the program that makes them (draft_program.py).
"""

from collections.abc import Sequence as Many

from slipway.engine.request import Sequence


class ModelDrafter:
    """Drafts of the last steps, by sequence: a step makes at most ``most`` for each."""

    def __init__(self, most: int):
        self.most = most
        # Number of tokens that the sequence had, and the drafts of the tokens after them.
        self._held: dict[Sequence, tuple[int, list[int]]] = {}

    def put(self, sequence: Sequence, drafts: list[int]) -> None:
        """Keep the drafts of the tokens that follow the newest token of a sequence."""
        self._held[sequence] = sequence.num_tokens, drafts

    def draft(self, sequences: Many[Sequence]) -> list[tuple[list[int], int]]:
        """Return the drafts of the tokens that follow the newest one of each sequence; basis 0."""
        found = (self._held.get(sequence, (0, [])) for sequence in sequences)
        return [
            (drafts if length == sequence.num_tokens else [], 0)
            for sequence, (length, drafts) in zip(sequences, found)
        ]

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._held.pop(sequence, None)
