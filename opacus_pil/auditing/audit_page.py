"""The audit's report page: one HTML file whose first screen answers three questions.

Is the claimed ε true, who is exposed, what can be shown to others. Computes nothing: privacy
numbers that bound from above are rounded up, lower bounds down.
"""

from __future__ import annotations

import math
import os
from typing import Any

from .. import __version__
from ..files.container import write_atomic
from ..files.pages import template

_VERDICTS = {
    "consistent": "Nothing was found against the claim, by tests that could have found twice as "
    "much. That is evidence, not proof.",
    "red flag": "The claim does not hold for what ran. Do not rely on it; find the fault.",
    "no power": "Nothing can be concluded: these tests could not have found twice the claim.",
}
_SHOW = (
    "Show the claim with its neighbouring relation and δ, this verdict with its level, the "
    "conformance table and the hash of the model. What it rests on is listed below. Do not show "
    "values of single records: no ε covers them."
)


def write_page(audit: Any, path: str | os.PathLike[str]) -> None:
    """Write the page, mode 0600, whole or not at all.

    Raises:
        ImportError: jinja2 is missing.
        OSError: The folder is missing or not writable.
    """
    write_atomic(path, page(audit).encode("utf-8"), private=True)


def page(audit: Any) -> str:
    """Return the page.

    Privacy: it shows the spread of private values; of single records only what the audit keeps.
    """
    found = audit.to_json()
    return template("audit.html.j2").render(
        version=__version__,
        audit=found,
        meaning=_VERDICTS[audit.verdict],
        show=_SHOW,
        most=found["upper"]["most_exposed"],
        relation={"pairs": "one record exchanged", "canaries": "one record more or less"},
        up=_up,
        down=_down,
        number=_number,
    )


def _up(value: Any) -> str:
    """Print a number that bounds from above, rounded up."""
    return _rounded(value, math.ceil)


def _down(value: Any) -> str:
    """Print a number that bounds from below, rounded down."""
    return _rounded(value, math.floor)


def _rounded(value: Any, rounds: Any) -> str:
    if value is None:
        return "–"
    number = float(value)
    if not math.isfinite(number):
        return "∞" if number > 0 else "–"
    if number == 0.0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(abs(number))) - 3)
    return f"{rounds(number / unit) * unit:.6g}"


def _number(value: Any) -> str:
    """Print a measured number."""
    return "–" if value is None else f"{float(value):.4g}"
