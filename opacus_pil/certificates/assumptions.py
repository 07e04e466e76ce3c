"""An assumption: a code and its numbers; the words are generated from them.

Knows the table of sentences, and no certificate. Whether a number is the one that a certificate's
constants come from is asked by `derivation`.
"""

from __future__ import annotations

import math
import numbers
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ..errors import CertificateError
from .sentences import CONTEXT, SENTENCES


class Span(NamedTuple):
    """A number that differs from step to step: the least and the most; NaN for no step at all."""

    low: float
    high: float


class _Words(string.Formatter):
    """Numbers as sentences show them."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format one number, range or list."""
        if isinstance(value, Span):
            if math.isnan(value.low):
                return "(no step)"
            ends = [format(end, format_spec) for end in value]
            return ends[0] if value.low == value.high else " to ".join(ends)
        if isinstance(value, tuple):
            return ", ".join(map(str, value)) or "none"
        return format(value, format_spec)


class _Gaps(string.Formatter):
    """Sentences without their numbers."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Leave a number out."""
        return "…"


Value = float | int | Span | tuple[int, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Assumption:
    """One assumption of a certificate.

    Attributes:
        code: Its name in `certificates.sentences`.
        numbers: Name and value of each number in the sentence, in the sentence's order.
        of: Which of several certificates it belongs to; "" where there is one.

    Raises:
        CertificateError: An unknown code, a number missing, unknown or of another kind.
    """

    code: str
    numbers: tuple[tuple[str, Value], ...] = ()
    of: str = ""

    def __post_init__(self) -> None:
        """Hold code and numbers against the table."""
        if self.code not in SENTENCES:
            raise CertificateError(unknown_code(self.code))
        wanted = number_kinds(self.code)
        if [name for name, _ in self.numbers] != list(wanted):
            given = ", ".join(repr(name) for name, _ in self.numbers) or "none"
            raise CertificateError(
                f"Expected the numbers of {self.code!r} to be {', '.join(wanted) or 'none'}, got "
                f"{given}. Pass each by its name."
            )
        for name, value in self.numbers:
            if not _fits(value, wanted[name]):
                raise CertificateError(
                    f"Expected {name} of {self.code!r} to be a number of its kind, got "
                    f"{value!r}. See certificates.sentences."
                )

    @property
    def sentence(self) -> str:
        """The words."""
        words = _Words().vformat(SENTENCES[self.code], (), dict(self.numbers))
        return f"{self.of}: {words}" if self.of else words

    @property
    def without_numbers(self) -> str:
        """The words with … for each number: what does not depend on who is forgotten."""
        words = _Gaps().vformat(SENTENCES[self.code], (), dict(self.numbers))
        return f"{self.of}: {words}" if self.of else words


Context = tuple[str | Assumption, ...]  # a code without numbers is written as its name


def assumption(code: str, *, of: str = "", **values: Value) -> Assumption:
    """Return the assumption with this code and these numbers.

    Guarantee: none; a sentence is an assumption, and nothing is checked by writing it down.

    Args:
        code: Of `certificates.sentences`.
        of: Which of several certificates it belongs to.
        values: The sentence's numbers, by name.

    Returns:
        The assumption; `.sentence` is what it says.

    Raises:
        CertificateError: An unknown code, a number missing, unknown or of another kind.

    Edge cases (first match wins):
        a number that the sentence repeats   given once

    Source: the table of `certificates.sentences`.

    >>> assumption("decoupled_decay", weight_decay=0.01, step_size=2.0).sentence
    'Weight decay 0.01 is decoupled from clipping; the step size is 2.'
    """
    order = list(number_kinds(code)) if code in SENTENCES else []
    known = sorted(values, key=lambda name: order.index(name) if name in order else len(order))
    return Assumption(code, tuple((name, values[name]) for name in known), of)


def checked_context(context: Iterable[str | Assumption]) -> Context:
    """Return context codes, each once, in one form; refuse free text.

    Raises:
        CertificateError: A code that is not one of CONTEXT, or whose numbers do not fit.
        TypeError: Not a sequence of codes.
    """
    if isinstance(context, str) or not isinstance(context, Iterable):
        raise TypeError(
            f"Expected context to be a tuple of codes, got context={context!r}. Pass (code,)."
        )
    found: list[str | Assumption] = []
    for item in context:
        one = _checked_code(item)
        plain = one if one.numbers else one.code
        if plain not in found:
            found.append(plain)
    return tuple(found)


def _checked_code(item: object) -> Assumption:
    """Return one entry of a context as the assumption it stands for, or refuse it."""
    if not isinstance(item, str | Assumption):
        raise TypeError(f"Expected context to hold codes, got {item!r}. Pass them by name.")
    code = item if isinstance(item, str) else item.code
    if code not in CONTEXT:
        raise CertificateError(unknown_code(code))
    one = as_assumption(item)
    if one.of or not all(isinstance(v, tuple) or math.isfinite(v) for _, v in one.numbers):
        raise CertificateError(
            f"Expected a context code of one certificate with finite numbers, got {one!r}."
        )
    return one


def as_assumption(item: str | Assumption) -> Assumption:
    """Return a context code as the assumption it stands for."""
    return Assumption(item) if isinstance(item, str) else item


def unknown_code(code: object) -> str:
    """Word that a code is none that may be added, and what to do."""
    return (
        f"Expected a context code ({', '.join(CONTEXT)}), got {str(code)[:80]!r}. Certificates "
        "hold no free text: add a line to certificates/sentences.py for another assumption."
    )


@cache
def number_kinds(code: str) -> dict[str, str]:
    """Name of each number in a code's sentence, and its format: "g", "d", "list" or "names"."""
    found: dict[str, str] = {}
    for _, name, spec, _ in string.Formatter().parse(SENTENCES[code]):
        if name is not None:
            found.setdefault(name, str(spec).removeprefix(".6"))
    return found


def _fits(value: object, kind: str) -> bool:
    if kind == "d":
        return type(value) is int and 0 <= value < 2**63
    if kind in ("list", "names"):
        item_fits = _fits if kind == "list" else lambda item, _: isinstance(item, str)
        return isinstance(value, tuple) and all(item_fits(item, "d") for item in value)
    if isinstance(value, Span):
        return True
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and not math.isnan(float(value))  # type: ignore[arg-type]
