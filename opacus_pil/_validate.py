"""Every argument check of the package, in one wording: name, domain, value, cure.

Knows numpy only. Each function returns the checked value in the type the caller computes with.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def expected(name: str, domain: str, value: object, cure: str = "") -> str:
    """Word an error message: what was expected, what came, what to do."""
    message = f"Expected {name} {domain}, got {name}={value!r}."
    return f"{message} {cure}" if cure else message


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return a question that names the closest known word, or nothing where none is close."""
    words = {str(one).casefold(): one for one in known}
    close = difflib.get_close_matches(str(word).casefold(), words, n=1)
    return f"Did you mean {words[close[0]]!r}?" if close else ""


def known_keywords(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function name the closest of its keywords where it is given one that it has not.

    Signature, types and docstring stay; a call costs one look at each keyword.
    """
    named = [
        name
        for name, one in inspect.signature(function).parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and name != "self"
    ]
    owner, _, last = function.__qualname__.rpartition(".")
    called = owner if last == "__init__" else last
    known = frozenset(named)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(unknown_keyword(called, unknown[0], named))
        return function(*args, **kwargs)

    return call


def unknown_keyword(called: str, name: str, known: Iterable[str], cure: str = "") -> str:
    """Word the error of a keyword that a call does not take."""
    cure = cure or did_you_mean(name, known) or "Leave it out."
    return f"Expected keywords of {called}, got an unknown one: {name!r}. {cure}"


def real(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    cure: str = "",
) -> float:
    """Return `value` as a finite float inside the interval, or raise."""
    left = "(" if open_low else "["
    right = ")" if open_high else "]"
    if low == -math.inf and high == math.inf:
        domain = "to be a finite number"
    elif high == math.inf:
        domain = f"to be a finite number {'>' if open_low else '>='} {low:g}"
    else:
        domain = f"in {left}{low:g}, {high:g}{right}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real | np.number):
        raise TypeError(expected(name, domain, value, cure))
    number = float(value)
    below = number <= low if open_low else number < low
    above = number >= high if open_high else number > high
    if not math.isfinite(number) or below or above:
        raise ValueError(expected(name, domain, number, cure))
    return number


def integer(name: str, value: Any, *, low: int, high: int | None = None, cure: str = "") -> int:
    """Return `value` as an int inside [low, high], or raise."""
    domain = (
        f"to be an integer >= {low}" if high is None else f"to be an integer in [{low}, {high}]"
    )
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(expected(name, domain, value, cure))
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(expected(name, domain, number, cure))
    return number


def choice(name: str, value: Any, choices: Sequence[str], cure: str = "") -> str:
    """Return `value` if it is one of `choices`, or raise."""
    if value not in choices:
        cure = " ".join(filter(None, (did_you_mean(value, choices), cure)))
        raise ValueError(expected(name, "to be one of " + ", ".join(choices), value, cure))
    return str(value)


def probability(name: str, value: Any, cure: str = "") -> float:
    """Return a probability in [0, 1]."""
    return real(name, value, low=0.0, high=1.0, cure=cure)


def delta(value: Any) -> float:
    """Return the δ of an (ε, δ) statement, strictly between 0 and 1."""
    return real(
        "delta", value, low=0.0, high=1.0, open_low=True, open_high=True,
        cure="Pass a small probability such as 1 / number of instances.",
    )  # fmt: skip


def epsilon(value: Any) -> float:
    """Return the ε of an (ε, δ) statement, finite and >= 0."""
    return real("epsilon", value, low=0.0, cure="Pass the privacy target in nats, for example 1.0.")


def noise_multiplier(value: Any) -> float:
    """Return the noise of a step in units of the clip bound, finite and >= 0."""
    return real(
        "noise_multiplier", value, low=0.0,
        cure="Pass noise std on the gradient sum / max_grad_norm.",
    )  # fmt: skip


def sample_rate(value: Any) -> float:
    """Return the probability that an instance is drawn into a batch, in [0, 1]."""
    return probability("sample_rate", value, "Pass expected batch size / len(dataset).")


def orders(value: Any) -> FloatArray:
    """Return Rényi orders as a float64 vector, each finite and > 1."""
    array = np.atleast_1d(real_array("orders", value, low=1.0, open_low=True))
    if array.ndim != 1 or array.size == 0:
        raise ValueError(expected("orders", "to be a non-empty sequence", value))
    return array


def real_array(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    allow_infinite: bool = False,
    cure: str = "",
) -> FloatArray:
    """Return `value` as a float64 array with every entry in [low, high], or name the first bad row.

    NaN is always refused; `allow_infinite` admits +inf (a Rényi divergence may be infinite).
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(expected(name, "to be numbers", value, cure)) from error
    if array.size:  # in order, as nearly always: two readings; NaN compares false
        least, most = float(array.min()), float(array.max())
        above_low = least > low if open_low else least >= low
        if above_low and most <= high and (allow_infinite or math.isfinite(most - least)):
            return array
    below = array <= low if open_low else array < low
    bad = np.isnan(array) | below | (array > high)
    if not allow_infinite:
        bad |= np.isinf(array)
    if bad.any():
        first = int(np.flatnonzero(bad.reshape(-1))[0])
        lower = f"{'>' if open_low else '>='} {low:g}" if low > -math.inf else ""
        upper = f"<= {high:g}" if high < math.inf else ""
        limits = " and ".join(part for part in (lower, upper) if part)
        kind = "not NaN" if allow_infinite else "finite"
        message = (
            f"Expected {name} {kind}{' and ' + limits if limits else ''}, got {name} with "
            f"{int(bad.sum())} of {array.size} outside "
            f"(first: row {first}, value {float(array.reshape(-1)[first])!r})."
        )
        raise ValueError(f"{message} {cure}" if cure else message)
    return array


def index_array(
    name: str, value: Any, *, size: int, unique: bool = True, cure: str = ""
) -> IntArray:
    """Return `value` as int64 indices into [0, size), or name the first bad entry.

    A boolean mask with one entry for each of the `size` rows stands for the rows where it is true.
    """
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return _rows_of_mask(name, array, size=size)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            expected(name, "to be a 1-D sequence of integers, or a boolean mask", value,
                     cure or "Pass row numbers, or a mask with one entry per row.")
        )  # fmt: skip
    array = array.astype(np.int64)
    if array.size == 0:
        return array
    if int(array.min()) < 0 or int(array.max()) >= size:
        bad = (array < 0) | (array >= size)
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"Expected {name} in [0, {size - 1}], got {int(bad.sum())} of {array.size} outside "
            f"(first: position {first}, index {int(array[first])}). {cure}".rstrip()
        )
    # Sorting a batch costs a third of np.unique, which only the message needs.
    if unique and _repeats(array):
        values, counts = np.unique(array, return_counts=True)
        twice = int(values[counts > 1][0])
        raise ValueError(
            f"Expected {name} without repetition, got index {twice} "
            f"{int(counts.max())} times. Pass each index once. {cure}".rstrip()
        )
    return array


def _rows_of_mask(name: str, mask: npt.NDArray[Any], *, size: int) -> IntArray:
    """Return the rows where a mask is true; one of another length belongs to other rows."""
    if mask.shape != (size,):
        raise ValueError(
            f"Expected {name} to be row numbers, or a boolean mask with one entry for each of "
            f"{size} rows, got a mask of shape {mask.shape} with {int(mask.sum())} true. Pass a "
            "mask over all rows, or the numbers of the rows: numpy.flatnonzero(mask)."
        )
    return np.flatnonzero(mask).astype(np.int64)


def _repeats(array: IntArray) -> bool:
    ordered = np.sort(array)
    return bool((ordered[1:] == ordered[:-1]).any())


def same_length(name: str, array: npt.NDArray[Any], other: str, length: int) -> None:
    """Raise unless `array` is a vector of `length` entries, as many as `other` has."""
    if array.ndim != 1 or len(array) != length:
        raise ValueError(
            f"Expected {name} to have one entry per entry of {other} ({length}), "
            f"got {name} of shape {array.shape}. Pass arrays of the same length."
        )
