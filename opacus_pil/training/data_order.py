"""DataOrder: are the rows of a data set still where they were when training began?

Knows a data set and what it held; no step and no label.
"""

from __future__ import annotations

from typing import Any

from ..files.fingerprint import Fingerprint, dataset_fingerprint, quick_mark


class DataOrder:
    """Asked at every step, reads the data only where a quick look says that something moved.

    Args:
        dataset: The rows.
        began: What they were; None: it is not asked whether that changes.
    """

    def __init__(self, dataset: Any, began: Fingerprint | None) -> None:
        self._dataset, self._began = dataset, began
        self._mark, self._moved = quick_mark(dataset), False

    def moved(self) -> bool:
        """Whether the same rows have been put into another order since."""
        if self._began is None:
            return False
        mark = quick_mark(self._dataset)
        if mark != self._mark:
            self._mark = mark
            self._moved |= self._began.reordered(dataset_fingerprint(self._dataset))
        return self._moved
