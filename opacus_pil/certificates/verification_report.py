"""What verification found, as a page: checks, and the words that the codes stand for.

Every word of the page is generated here or in the table of sentences; what a file says enters as a
number, a name out of a list, or escaped. Asks nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..accounting.shown import rounded_up
from .certificate import Certificate
from .certificate_record import DIRECTIONS, CertificateRecord
from .methods import METHOD_WORDS

_LONGEST = 400  # characters of a detail: a page, not a flood


@dataclass(frozen=True)
class Check:
    """One question to a certificate.

    Attributes:
        name: What was asked.
        passed: The answer; None where something needed for it was not given.
        detail: The numbers behind it, in a sentence.
    """

    name: str
    passed: bool | None
    detail: str

    def __post_init__(self) -> None:
        """Escape what a terminal or a reader would take for something else."""
        object.__setattr__(self, "detail", printable(self.detail))


@dataclass(frozen=True)
class VerificationReport:
    """All questions and answers, and what the certificate says if it holds.

    Attributes:
        checks: In a fixed order.
        covers: Whether all ids that were asked for are in it; None: none was asked for, or it could
            not be told. An id that is not in it does not break a certificate.
        missing: The ids that were asked for and are not in it.
        statement: What it claims, in generated sentences; empty if it does not hold.
        assumptions: Code and generated sentence of each assumption; empty if it does not hold.
    """

    checks: tuple[Check, ...]
    covers: bool | None = None
    missing: tuple[str, ...] = ()
    statement: tuple[str, ...] = ()
    assumptions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Escape as in checks: time and versions of a record that was not read are any text."""
        object.__setattr__(self, "statement", tuple(map(printable, self.statement)))

    @property
    def holds(self) -> bool:
        """Whether nothing failed; what could not be asked is no failure, see the checks."""
        return all(check.passed is not False for check in self.checks)

    @property
    def verdict(self) -> str:
        """The last line."""
        if not self.holds:
            return "The certificate does NOT hold."
        if self.covers is False:
            which = "this id is" if len(self.missing) == 1 else "these ids are"
            return f"The certificate holds; {which} not in it: {shortened(self.missing)}."
        return "The certificate holds."

    def to_json(self) -> dict[str, Any]:
        """The report in JSON values."""
        return {
            "holds": self.holds,
            "covers": self.covers,
            "missing": list(self.missing),
            "verdict": self.verdict,
            "checks": [vars(check) for check in self.checks],
            "statement": list(self.statement),
            "assumptions": [{"code": c, "sentence": s} for c, s in self.assumptions],
        }

    def __str__(self) -> str:
        """Return one line per check, what the certificate says, and the verdict."""
        mark = {True: "ok  ", False: "FAIL", None: "--  "}
        lines = [f"{mark[c.passed]} {c.name:<14} {c.detail}" for c in self.checks]
        if self.statement:
            lines += ["", "It says:", *(f"  {line}" for line in self.statement)]
            lines += ["It assumes:", *(f"  - {words}" for _, words in self.assumptions), ""]
        return "\n".join([*lines, self.verdict])


def statement_of(record: CertificateRecord, certificate: Certificate) -> tuple[str, ...]:
    """Return the claim of a record that holds, in generated sentences."""
    both = record.direction == DIRECTIONS[0]
    return (
        f"Forgotten: {_many(record.number_forgotten, 'instance')}, "
        f"{'named by keyed hashes' if record.ids_hashed else 'named in plain'}.",
        f"After {_many(record.steps, 'step')} of {record.method}: {METHOD_WORDS[record.method]}.",
        _history(record),
        f"The model then and its reference are, "
        f"{'in both directions' if both else 'in one direction, from model to reference'}, "
        f"indistinguishable up to epsilon = {rounded_up(record.epsilon, digits=10)} at delta = "
        f"{rounded_up(record.delta, digits=10)}; "
        f"asked for was {rounded_up(record.target_epsilon, digits=10)}.",
        f"Proved by: {type(certificate).__name__}, if what it assumes is true.",
        f"Written, as the file says, at {record.created} by opacus_pil "
        f"{record.software.get('opacus_pil', 'unknown')}.",
    )


def printable(text: str) -> str:
    """Return a text on one line that shows what a terminal would act upon, cut if it is long."""
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text[: _LONGEST + 1]
    )
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def shortened(ids: Sequence[str]) -> str:
    """Return the first few ids, quoted."""
    few = [printable(repr(item)) for item in ids[:5]]
    return ", ".join(few) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _history(record: CertificateRecord) -> str:
    """Say what came before, and how much of it the constants count."""
    trained = f"Before: {_many(record.training_steps, 'step')} of training"
    if not record.earlier_requests:
        return f"{trained}, and no earlier request."
    earlier = f"{trained}, and {_many(record.earlier_requests, 'earlier request')}"
    if record.version == 1:
        return f"{earlier}; how much of theirs the constants count is not told."
    counts = [
        _many(number, noun)
        for number, noun in (
            (record.earlier_forgotten, "instance"),
            (record.earlier_steps, "step"),
        )
        if number is not None
    ]
    return f"{earlier}, of which the constants count {' and '.join(counts) or 'nothing'}."


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
