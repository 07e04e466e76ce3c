"""Report: what a page of the family says, in reading order, as plain records.

Verdict, who is exposed, upper beside lower, forgetting, certificates, constants, glossary. Knows no
engine, no audit and no model: whoever has a result puts it into these records. Computes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ..files.container import write_atomic
from .exposed import Exposed
from .templates import rendered

TONES = ("good", "careful", "bad")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts. A column named "label" holds one of LABELS, or nothing.

    Attributes:
        caption: Says what the numbers are.
        head: One text per column.
        rows: One text per cell; the first names the row.
        words: Columns that are read, not compared: aligned to the left.
        note: Under the table.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One deletion: what was asked for, what ran, and how close it came.

    Attributes:
        title: For example the method and the number of instances.
        claim: "certified", "predicted" or "no claim", with its words.
        facts: (name, value) pairs.
        tables: Measurements.
        notes: A sentence each.
    """

    title: str
    claim: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """First word of the claim: how it is coloured."""
        return self.claim.split(maxsplit=1)[0].rstrip(":,")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A certificate on the page.

    Attributes:
        title: Of the request it belongs to.
        kind: The certificate's type.
        statement: What it claims, a sentence.
        assumptions: A sentence each.
    """

    title: str
    kind: str
    statement: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page of the family.

    Attributes:
        title: Heading.
        subtitle: Under it.
        verdict: Three (question, one sentence).
        tone: One of TONES: the colour beside the verdict.
        facts: (name, number) pairs that are seen first.
        exposed: Everybody's ε; None: not on this page.
        evidence: Upper numbers beside lower ones, and what was seen.
        reasons: Why the label is not a stronger one, a sentence each.
        requests: Deletions, oldest first.
        claims: Their certificates.
        constants: (name, value) pairs: settings, versions, hashes.
        limits: What the page does not show, a sentence each.
        public: Constants only, so that the page may be shown.
        depends: What on a public page depends on the data nevertheless, a sentence.
    """

    title: str
    subtitle: str
    verdict: tuple[tuple[str, str], ...]
    tone: str = "careful"
    facts: tuple[tuple[str, str], ...] = ()
    exposed: Exposed | None = None
    evidence: tuple[Table, ...] = ()
    reasons: tuple[str, ...] = ()
    requests: tuple[Request, ...] = ()
    claims: tuple[Claim, ...] = ()
    constants: tuple[tuple[str, str], ...] = ()
    limits: tuple[str, ...] = ()
    public: bool = False
    depends: str = ""

    @property
    def shared(self) -> tuple[str, ...]:
        """Assumptions that every certificate of the page makes, in the first one's order."""
        if not self.claims:
            return ()
        first, *others = (claim.assumptions for claim in self.claims)
        return tuple(line for line in first if all(line in other for other in others))


def render_page(report: Report) -> str:
    """Return the report as one HTML page that loads nothing from outside.

    Privacy: unless it is `public` the page shows values that no ε covers, and says so at its top.
    """
    return rendered("page.html.j2", report=report, shared=report.shared)


def write_page(path: str | os.PathLike[str], report: Report) -> None:
    """Write `render_page` to a file that only its owner may read (mode 0600), whole or not at all.

    The day of writing (UTC) joins the constants.

    Raises:
        OSError: The folder is missing or not writable.
    """
    # Ids are anybody's texts: a lone surrogate has no UTF-8 and must not cost the report.
    day = datetime.now(UTC).date().isoformat()
    report = replace(report, constants=(*report.constants, ("written (UTC)", day)))
    page = render_page(report).encode("utf-8", errors="backslashreplace")
    write_atomic(path, page, private=True)


def pairs(named: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (name, text) pairs; what is None is left out."""
    return tuple((name, str(value)) for name, value in named.items() if value is not None)


def listed(sentences: Sequence[str]) -> str:
    """Join half sentences."""
    return "; ".join(sentence.rstrip(".") for sentence in sentences)
