"""Phase: one stretch of a model's life that certificates count."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """Part of what has run so far.

    Attributes:
        steps: Its number of steps.
        forgotten: Rows that had been forgotten before it began.
        method: "training", or the method of unlearning.
        private_length: Whether its number of steps was taken from private data: an adaptive run, or
            a predicted number.
    """

    steps: int
    forgotten: frozenset[int]
    method: str
    private_length: bool = False
