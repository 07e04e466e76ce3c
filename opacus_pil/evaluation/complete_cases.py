"""The instances that every score has a value for: NaN says that there was nothing to see.

Knows named vectors, one entry per instance. An infinite score is a score.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .. import _validate as check
from .._validate import FloatArray

NAN_POLICIES = ("raise", "omit")


def complete_cases(
    named: Iterable[tuple[str, npt.ArrayLike]], *, nan_policy: str
) -> list[FloatArray]:
    """Return vectors of one length without NaN, the same instances of each.

    "raise" refuses NaN and names array and first row. "omit" leaves an instance out of *every*
    array where one of them does not know it, so that a comparison is of the same instances.

    Args:
        named: Names, for messages, with vectors of one length, at least one.
        nan_policy: "raise" or "omit".

    Raises:
        ValueError: Lengths that differ, no instance, NaN under "raise", no instance that all
            arrays know under "omit".
    """
    check.choice("nan_policy", nan_policy, NAN_POLICIES)
    columns: list[FloatArray] = []
    unknown: list[npt.NDArray[np.bool_]] = []
    names: list[str] = []
    for name, values in named:
        column = _numbers(name, values)
        size = len(columns[0]) if columns else column.size
        check.same_length(name, column, names[0] if names else name, size)
        names.append(name)
        columns.append(column)
        unknown.append(np.isnan(column))
    check.integer("number of instances", len(columns[0]), low=1)
    known = ~np.any(unknown, axis=0)
    if nan_policy == "raise" or known.all():
        for name, column in zip(names, columns, strict=True):
            check.real_array(
                name, column, allow_infinite=True,
                cure='Leave such instances out of every array: nan_policy="omit" does.',
            )  # fmt: skip
        return columns
    if not known.any():
        counts = [int(missing.sum()) for missing in unknown]
        most = int(np.argmax(counts))
        raise ValueError(
            f"Expected instances that all of {', '.join(names)} have a value for, got none: "
            f"{names[most]} has none for {counts[most]} of {len(known)}. Leave that array out."
        )
    return [column[known] for column in columns]


def _numbers(name: str, values: npt.ArrayLike) -> FloatArray:
    """Return float64 numbers, NaN allowed."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return check.real_array(name, values)  # which words the error
