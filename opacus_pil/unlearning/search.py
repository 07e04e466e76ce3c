"""Searching for the fewest steps, with a sign of life: a bar that counts looks at a certificate.

Knows that a search tells of each look; not how many there will be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..accounting.shown import rounded_up
from ..certificates import OnProbe

_PATIENCE = 1.0  # seconds before the bar appears


@contextmanager
def searching(*, progress: bool) -> Iterator[OnProbe]:
    """Give what a search calls at each ε: it moves a bar.

    Args:
        progress: Show the bar when the output is a terminal and the search takes long; it goes
            when the search ends.
    """
    disable = None if progress else True
    with tqdm(desc="planning", unit=" ε", disable=disable, leave=False, delay=_PATIENCE) as bar:

        def looked(steps: int, epsilon: float) -> None:
            bar.set_postfix_str(f"{steps} steps, ε {rounded_up(epsilon)}", refresh=False)
            bar.update()

        yield looked
