"""What a certificate's constants count of a run, and whether that is the run of a record.

Knows numbers only. Some certificates count training steps or forgotten instances, some do not; what
is not counted is as whoever wrote the file says, and no check can hold it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .certificate import Certificate
from .chien2024 import Chien2024Certificate
from .contraction import ContractionCertificate
from .derivation import context_numbers
from .methods import CLIPS_FIRST, members_of
from .mini_batches import PoissonContractionCertificate


class Counted(NamedTuple):
    """Steps before this request's, and instances forgotten up to it; None: not counted.

    `phases` are the steps of training and of each earlier request, where they are told apart;
    `alike` is how many of the first steps every forgotten instance took part in.
    """

    steps: int | None
    forgotten: int | None
    phases: tuple[int, ...] | None
    alike: int | None


class Run(NamedTuple):
    """What a record says of its run; `earlier_*` None: it does not say."""

    steps: int
    training_steps: int
    forgotten: int
    earlier_requests: int
    earlier_steps: int | None
    earlier_forgotten: int | None


def counted(certificate: Certificate) -> Counted:
    """Return what the constants count.

    Raises:
        ValueError: The certificates that a BestCertificate compares count differently.
    """
    found = [_counted(member) for member in members_of(certificate)]
    return Counted(*(_one(values) for values in zip(*found, strict=True)))


def count_mismatch(certificate: Certificate, run: Run, *, exact: bool = True) -> str | None:
    """Return where a run is another than the constants count; None: nowhere.

    Args:
        exact: Whether the run says what earlier requests add. If it does not, as in version 1 of
            the file, the constants must count at least this request's, since more steps and
            instances than there were make no certificate untrue.
    """
    try:
        own = counted(certificate)
    except ValueError as error:
        return str(error)
    before = bool(run.earlier_requests)
    for name, count, said, earlier in (
        ("training steps", own.steps, run.training_steps, run.earlier_steps),
        ("forgotten instances", own.forgotten, run.forgotten, run.earlier_forgotten),
    ):
        if exact:
            wrong = _other_than(name, count, said, earlier, before=before)
        else:
            wrong = _less_than(name, count, said, before=before)
        if wrong is not None:
            return wrong
    return _order_mismatch(own, run)


def _other_than(
    name: str, count: int | None, said: int, earlier: int | None, *, before: bool
) -> str | None:
    """Return how a count contradicts a file that says what earlier requests add."""
    if earlier and not before:
        return f"{earlier} {name} of earlier requests, of which there are none"
    if count is None and earlier is not None:
        return f"{earlier} earlier {name}, which nothing in the constants counts"
    if count is not None and count != said + (earlier or 0):
        return f"{count} {name} in the constants; the file says {said} + {earlier or 0}"
    return None


def _less_than(name: str, count: int | None, said: int, *, before: bool) -> str | None:
    """Return how a count contradicts a file that does not say what earlier requests add."""
    if count is not None and (count < said or (count != said and not before)):
        return f"{count} {name} in the constants; the file says {said}"
    return None


def _order_mismatch(own: Counted, run: Run) -> str | None:
    """Return how the order of steps contradicts the file."""
    if own.phases is not None and (
        len(own.phases) != run.earlier_requests + 1 or own.phases[0] != run.training_steps
    ):
        return f"phases of {own.phases} steps; the file says {run.training_steps} and then others"
    if own.alike is not None and own.alike < run.training_steps:
        return f"shifts that fall after {own.alike} of {run.training_steps} training steps"
    return None


def model_mismatch(*, method: str, steps: int, before: str, after: str) -> str | None:
    """Return why these two model hashes cannot be of a run of so many noisy steps."""
    if steps > 0 and before == after:
        return f"one model before and after {steps} noisy steps"
    if steps == 0 and before != after and method not in CLIPS_FIRST:
        return "another model after no step"
    return None


def _counted(certificate: Certificate) -> Counted:
    numbers = context_numbers(certificate)
    if isinstance(certificate, ContractionCertificate):
        shifts, members = certificate.shifts, numbers.get("members")
        alike = None if members is None else sum(shift == shifts[0] for shift in shifts)
        return Counted(len(shifts) or None, members, numbers.get("phase_steps"), alike)
    if isinstance(certificate, PoissonContractionCertificate):
        return Counted(certificate.training_steps, len(certificate.gradient_bounds), None, None)
    if isinstance(certificate, Chien2024Certificate):
        return Counted(None, certificate.num_deleted, None, None)
    return Counted(None, numbers.get("num_deleted"), None, None)


def _one(values: Iterable[Any]) -> Any:
    found = {value for value in values if value is not None}
    if len(found) > 1:
        raise ValueError(f"certificates of different runs: {' and '.join(map(str, found))} counted")
    return found.pop() if found else None
