"""SplitRows: which rows of a table are private, which public, and what all of them are called.

Knows arrays that scikit-learn has validated; no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from .. import _validate as check
from .._validate import FloatArray, IntArray

Table = tuple[FloatArray, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Private and public rows, with class numbers in place of labels.

    Attributes:
        classes: Labels, ascending; a class number is a place among them.
        rows, numbers: The private ones: shape (rows, columns), and (rows,).
        public_rows, public_numbers: Likewise; None: there are no public rows.
        names: What the private rows are called, shape (rows,). None: by their number.
        start: Number of the first private row in the caller's table.
    """

    classes: npt.NDArray[Any]
    rows: FloatArray
    numbers: torch.Tensor
    public_rows: FloatArray | None
    public_numbers: torch.Tensor | None
    names: npt.NDArray[Any] | None
    start: int

    @classmethod
    def of(
        cls, table: Table, *, ids: npt.ArrayLike | None, public: Table | None,
        public_size: int | None, classes: Sequence[Any] | None,
    ) -> Self:  # fmt: skip
        """Split a table as the caller says.

        Args:
            table: Rows and labels.
            ids: One per row of the table, or None.
            public: Other rows and labels, which are public.
            public_size: In its place: so many rows at the table's beginning are.
            classes: All labels. None: the public rows', or without public rows the table's.

        Raises:
            TypeError, ValueError: What contradicts itself, or a label that is not among them.
        """
        rows, labels = table
        start = 0
        if public_size is not None:
            start = check.integer("public_size", public_size, low=1, high=len(rows) - 1)
            if public is not None:
                raise TypeError("Expected public or public_size, got both. Pass one.")
            public = rows[:start], labels[:start]
        names = None if ids is None else _checked_names(ids, rows=len(rows))
        if names is None and start:
            names = np.arange(len(rows))  # a row keeps the number that it has in the table
        seen = labels if public is None else public[1]
        known: npt.NDArray[Any] = np.unique(seen if classes is None else np.asarray(classes))
        if len(known) < 2:
            raise ValueError(
                f"Expected at least 2 classes, got {len(known)} class. Name all labels by classes=."
            )
        return cls(
            classes=known,
            rows=rows[start:],
            numbers=_numbers(labels[start:], known, name="y"),
            public_rows=None if public is None else public[0],
            public_numbers=None if public is None else _numbers(public[1], known, name="public"),
            names=None if names is None else names[start:],
            start=start,
        )


def private_rows(rows: npt.ArrayLike, *, start: int, private: int) -> IntArray:
    """Return which private rows those of a table are, of which the first `start` are public."""
    found = check.index_array("rows", rows, size=start + private)
    if len(found) and found.min() < start:
        raise ValueError(
            f"Expected rows to be private, got row {int(found.min())}, one of the first {start}, "
            "which are public. They were not trained on, and cannot be forgotten."
        )
    return found - start


def _numbers(labels: npt.NDArray[Any], known: npt.NDArray[Any], *, name: str) -> torch.Tensor:
    """Return the place of each label among the known ones."""
    unknown = np.flatnonzero(~np.isin(labels, known))
    if len(unknown):
        raise ValueError(
            f"Expected {name} labels to be among the {len(known)} known classes, got "
            f"{len(unknown)} of {len(labels)} others (first: row {unknown[0]}). Name all labels "
            "by classes=."
        )
    return torch.as_tensor(np.searchsorted(known, labels), dtype=torch.int64)


def _checked_names(ids: npt.ArrayLike, *, rows: int) -> npt.NDArray[Any]:
    names = np.asarray(ids)
    if names.shape != (rows,):
        raise ValueError(
            check.expected("ids", f"to be one per row of X, shape ({rows},)", names.shape)
        )
    return names
