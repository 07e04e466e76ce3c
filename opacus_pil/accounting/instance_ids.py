"""InstanceIds: the names that people have for rows of a data set, and back.

Knows ids and row numbers; no data.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import IntArray

_MOST_COMPARED = 20_000  # ids that an unknown one is held against letter by letter, in a second


class InstanceIds:
    """Stable ids of the rows of one data set: texts or integers, each once.

    Where ids are given, whatever asks "which instances" takes ids, and rows only by `rows=`; where
    none are given the rows are the ids.

    Args:
        ids: Shape (rows,), texts or integers. None: the rows are the ids.
        groups: Shape (rows,), texts or integers: whose row each one is, where a person has several.
            Whatever asks "which instances" then takes persons, and means all of their rows.

    Raises:
        TypeError: Something else than texts or integers.
        ValueError: An id twice, or an empty text.

    >>> ids = InstanceIds(["ann", "bob", "cy"])
    >>> ids.rows(["cy", "ann"]), ids.of([1])
    (array([2, 0]), ['bob'])
    """

    def __init__(
        self, ids: npt.ArrayLike | None = None, *, groups: npt.ArrayLike | None = None
    ) -> None:
        self._ids = None if ids is None else _checked(ids)
        self._groups = None if groups is None else _named("groups", groups)
        self._place: dict[Any, int] = {}

    @property
    def given(self) -> bool:
        """Whether the caller gave ids."""
        return self._ids is not None

    @property
    def grouped(self) -> bool:
        """Whether the caller said whose rows are whose."""
        return self._groups is not None

    @cached_property
    def members(self) -> dict[Any, IntArray]:
        """Person -> rows, ascending; persons in the order in which they first come."""
        assert self._groups is not None
        found: dict[Any, list[int]] = {}
        for row, name in enumerate(self._groups.tolist()):
            found.setdefault(name, []).append(row)
        return {name: np.array(rows, dtype=np.int64) for name, rows in found.items()}

    @property
    def array(self) -> npt.NDArray[Any] | None:
        """The ids, shape (rows,); None: rows are the ids."""
        return self._ids

    def require_size(self, size: int) -> None:
        """Raise unless there is an id for every row of a data set of this size."""
        if self._ids is not None and len(self._ids) != size:
            raise ValueError(
                f"Expected instance_ids to have one id per row of the data set ({size}), got "
                f"{len(self._ids)}. Pass them in the order of its rows."
            )
        if self._groups is not None and len(self._groups) != size:
            raise ValueError(
                f"Expected groups to say whose row each of {size} is, got {len(self._groups)}. "
                "Pass one name per row, in the order of the data set."
            )

    def rows(
        self, ids: Any = None, *, rows: Any = None, size: int | None = None, name: str = "indices",
        persons: bool = True,
    ) -> IntArray:  # fmt: skip
        """Return the rows that a caller names, by ids or by `rows`, each once.

        Args:
            ids: Ids, or a boolean mask over all rows; rows where no ids were given; persons where
                rows have groups.
            rows: Rows in their place.
            size: Of the data set; needed where no ids were given.
            name: How the argument is called.
            persons: Where rows have groups, take persons; else single rows are meant all the same.

        Raises:
            TypeError: Neither or both; or another kind of values.
            ValueError: An id that nobody has, a row outside the data set, or one twice.
        """
        if (ids is None) == (rows is None):
            raise TypeError(
                f"Expected {name} or rows=, got {'neither' if ids is None else 'both'}. Pass one."
            )
        total = len(self._ids) if self._ids is not None else size
        assert total is not None
        if rows is not None:
            return check.index_array("rows", rows, size=total)
        if np.asarray(ids).dtype == np.bool_:
            return check.index_array(name, ids, size=total)
        if self._groups is not None and persons:
            return self._rows_of_persons(ids, name)
        if self._ids is None:
            return check.index_array(name, ids, size=total)
        return self._found(ids, name)

    def of(self, rows: npt.ArrayLike | Sequence[int]) -> list[Any]:
        """Return the ids of rows, as plain texts or integers."""
        found = np.asarray(rows, dtype=np.int64)
        chosen: list[Any] = (found if self._ids is None else self._ids[found]).tolist()
        return chosen

    def _rows_of_persons(self, persons: Any, name: str) -> IntArray:
        wanted = _plain(persons, name)
        unknown = [one for one in wanted if one not in self.members]
        if unknown or len(set(wanted)) < len(wanted):
            problem = f"nobody called {unknown[0]!r}" if unknown else "one of them twice"
            hint = f"{id_hint(unknown[0], self.members)} " if unknown else ""
            raise ValueError(
                f"Expected {name} to be persons of groups=, each once, got {problem}. {hint}Rows "
                "are passed by rows=."
            )
        found: IntArray = np.concatenate(
            [np.empty(0, dtype=np.int64), *(self.members[one] for one in wanted)]
        )
        return found

    def _found(self, ids: Any, name: str) -> IntArray:
        assert self._ids is not None
        if not self._place:
            self._place = {value: row for row, value in enumerate(self._ids.tolist())}
        wanted = _plain(ids, name)
        unknown = [item for item in wanted if item not in self._place]
        if unknown:
            few = ", ".join(map(repr, unknown[:5]))
            kind = "integers" if self._ids.dtype.kind in "iu" else "texts"
            raise ValueError(
                f"Expected {name} to be ids of instances ({kind}), got {len(unknown)} of "
                f"{len(wanted)} that nobody has: {few}. {id_hint(unknown[0], self._place)} Rows "
                "are passed by rows=."
            )
        found = np.array([self._place[item] for item in wanted], dtype=np.int64)
        return check.index_array(name, found, size=len(self._ids))


def id_hint(wanted: Any, known: Iterable[Any]) -> str:
    """Say what ids look like, and which of them was meant where one is near: in case, or in kind.

    >>> id_hint(17, ["p0", "p17"])
    "Ids look like 'p0'. Did you mean 'p17'?"
    """
    ids = list(known)
    if not ids:
        return "There is none."
    text = str(wanted).casefold()
    near = [one for one in ids if str(one).casefold() == text]
    if not near and isinstance(ids[0], str) and len(ids) <= _MOST_COMPARED:
        near = difflib.get_close_matches(str(wanted), ids, n=1)
    question = f" Did you mean {near[0]!r}?" if near else ""
    return f"Ids look like {ids[0]!r}.{question}"


def _plain(ids: Any, name: str) -> list[Any]:
    """Return a sequence of ids as plain texts or integers."""
    if isinstance(ids, str | bytes) or np.ndim(ids) != 1:
        raise TypeError(check.expected(name, "to be a sequence of instance ids", ids))
    return [item.item() if isinstance(item, np.generic) else item for item in ids]


def _named(name: str, ids: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return names of rows, texts or integers."""
    array = np.array(ids)
    if array.dtype.kind == "O" and all(isinstance(item, str) for item in array.ravel()):
        array = array.astype(np.str_)  # pandas' texts
    if array.dtype.kind not in "iuU" or array.ndim != 1:
        raise TypeError(check.expected(name, "to be a vector of integers or texts", ids))
    return array


def _checked(ids: npt.ArrayLike) -> npt.NDArray[Any]:
    array = _named("instance_ids", ids)
    values, counts = np.unique(array, return_counts=True)
    if len(values) != len(array):
        twice = values[counts > 1][0].item()
        raise ValueError(
            f"Expected instance_ids without repetition, got {twice!r} {int(counts.max())} times. "
            "A person with several rows needs an id per row, and groups= to say whose they are."
        )
    if array.dtype.kind == "U" and "" in values:
        raise ValueError("Expected instance_ids to be texts with a letter at least, got ''.")
    return array
