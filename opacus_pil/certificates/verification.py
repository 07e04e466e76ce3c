"""Whether a certificate record holds: every number recomputed from the recorded constants.

What cannot be seen from a file: a forgery whose numbers agree with each other. There is no
signature, so whoever may write the file may write another certificate, with other constants, ids,
times and versions, and compute its checksum; or change a constant that this ε does not come from,
such as a curve's value at another order. Whether the constants are those of the run, and the
assumptions true, is for whoever ran it to show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__, _validate
from ..errors import CertificateError
from .best import BestCertificate
from .certificate_record import (
    DIRECTIONS,
    TOLERANCE,
    CertificateRecord,
    hashed_id,
    is_sha256,
    method_mismatch,
)
from .chien2024 import Chien2024Certificate
from .contraction import ContractionCertificate
from .fields import REFUSALS
from .mini_batches import PoissonContractionCertificate
from .record import Certificate


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


@dataclass(frozen=True)
class VerificationReport:
    """All questions and answers.

    Attributes:
        checks: In a fixed order.
    """

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing failed; what could not be asked is no failure, see the checks."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        """Return one line per check, and the verdict."""
        mark = {True: "ok  ", False: "FAIL", None: "--  "}
        lines = [f"{mark[c.passed]} {c.name:<14} {c.detail}" for c in self.checks]
        verdict = "The certificate holds." if self.holds else "The certificate does NOT hold."
        return "\n".join([*lines, verdict])


def verify_certificate(
    record: CertificateRecord,
    *,
    model_sha256: str | None = None,
    key: bytes | None = None,
    ids: Sequence[str | int] | None = None,
) -> VerificationReport:
    """Recompute what a certificate says, and compare.

    Guarantee: if it holds, the recorded constants give at most the recorded ε (up to 1e-9
        relatively) at the recorded δ and steps, under the recorded assumptions, and ε is at most
        the target. Nothing is claimed about where the constants come from.

    Args:
        record: From `read_certificate`.
        model_sha256: Hash of the model that is held against the one after unlearning.
        key: The key of the hashed ids.
        ids: Ids that should be among the forgotten ones.

    Returns:
        The report. Nothing is raised, whatever numbers the record holds.

    Raises:
        TypeError: Not a record.

    Edge cases (first match wins):
        no model, no ids given          that check says None
        ids are hashed, no key given    the same
        another release wrote it        its ε may be larger than the recomputed one

    Source: the formulas of the certificate's class.
    """
    if not isinstance(record, CertificateRecord):
        raise TypeError(_validate.expected("record", "to be a CertificateRecord", record))
    checks = [_checksum(record)]
    try:
        certificate = record.certificate
    except CertificateError as error:
        checks.append(Check("constants", False, str(error)))
        later = ("assumptions", "direction", "epsilon", "target", "run")
        checks += [Check(name, None, "not asked: there is no certificate") for name in later]
    else:
        checks += [
            Check("constants", True, f"{record.certificate_class} was rebuilt from them"),
            _assumptions(record, certificate),
            _direction(record, certificate),
            *_epsilon(record, certificate),
            _run(record, certificate),
        ]
    checks += [_forgotten(record), _ids(record, key, ids), _model(record, model_sha256)]
    return VerificationReport(tuple(checks))


def _checksum(record: CertificateRecord) -> Check:
    good = record.computed_checksum() == record.checksum
    return Check("checksum", good, "of all fields" if good else "the file was edited or damaged")


def _assumptions(record: CertificateRecord, certificate: Certificate) -> Check:
    own = tuple(certificate.assumptions)
    if own == record.assumptions:
        return Check("assumptions", True, f"{len(own)} sentences, as the constants give them")
    wrong = next(
        (s for s in record.assumptions if s not in own), f"{len(record.assumptions)} of {len(own)}"
    )
    return Check("assumptions", False, f"not what the constants give: {wrong}")


def _direction(record: CertificateRecord, certificate: Certificate) -> Check:
    own = DIRECTIONS[0 if certificate.two_sided else 1]
    return Check("direction", own == record.direction, f"{own}; the file says {record.direction}")


def _epsilon(record: CertificateRecord, certificate: Certificate) -> list[Check]:
    """Hold ε against the constants', and the target against ε."""
    try:
        own = certificate.epsilon(delta=record.delta, steps=record.steps)
    except REFUSALS as error:
        return [Check("epsilon", False, str(error)), Check("target", None, "not asked: no ε")]
    said = f"{own:.10g} at delta={record.delta:.10g} after {record.steps} steps"
    said += f"; the file says {record.epsilon:.10g}"
    good = record.epsilon >= own * (1.0 - TOLERANCE)
    # A later release may compute less, and then the larger recorded number is still true.
    if good and record.software.get("opacus_pil") == __version__:
        good = record.epsilon <= own * (1.0 + TOLERANCE)
    target = record.target_epsilon * (1.0 + TOLERANCE)
    reached = max(own, record.epsilon) <= target
    return [
        Check("epsilon", good, said),
        Check("target", reached, f"asked for {record.target_epsilon:.10g}"),
    ]


def _run(record: CertificateRecord, certificate: Certificate) -> Check:
    """Hold training steps and number of instances against the constants, where they hold them."""
    members = certificate.members if isinstance(certificate, BestCertificate) else (certificate,)
    for member in members:
        steps = number = None
        if isinstance(member, ContractionCertificate):
            steps = len(member.shifts) or None
        elif isinstance(member, PoissonContractionCertificate):
            steps, number = member.training_steps, len(member.gradient_bounds)
        elif isinstance(member, Chien2024Certificate):
            number = member.num_deleted
        for name, own, said in (
            ("training steps", steps, record.training_steps),
            ("forgotten instances", number, record.number_forgotten),
        ):
            # Earlier requests add their steps and instances to the certificate's.
            if own not in (None, said) and not record.earlier_requests:
                wrong = f"{own} {name} in the constants; the file says {said}"
                return Check("run", False, wrong)
    if not record.method:
        return Check("run", False, "the file names no method")
    unfit = method_mismatch(certificate, record.method)
    if unfit is not None:
        return Check("run", False, unfit)
    where = f"{record.training_steps} steps of training, then {record.steps} by {record.method}"
    return Check("run", True, where)


def _forgotten(record: CertificateRecord) -> Check:
    """Ask whether the list of ids is as long as it says, without repetition, hashed or not."""
    ids, number = record.forgotten, record.number_forgotten
    if not number or not len({str(item) for item in ids}) == len(ids) == number:
        return Check("forgotten", False, f"{len(ids)} ids; the file says {number}, each once")
    if record.ids_hashed != is_sha256(record.key_sha256) or (
        record.ids_hashed and not all(is_sha256(item) for item in ids)
    ):
        return Check("forgotten", False, "ids are not hashed as the file says")
    return Check(
        "forgotten", True, f"{number} ids, {'hashed' if record.ids_hashed else 'in plain'}"
    )


def _ids(record: CertificateRecord, key: bytes | None, ids: Sequence[str | int] | None) -> Check:
    given = None if key is None else hashlib.sha256(key).hexdigest()
    if record.ids_hashed and given not in (None, record.key_sha256):
        return Check("ids", False, "the key is another certificate's")
    if ids is None:
        return Check("ids", None, "not asked: no ids given")
    known = {str(item) for item in record.forgotten}
    if record.ids_hashed:
        if key is None:
            return Check("ids", None, "not asked: they are hashed, and no key is given")
        absent = [item for item in ids if hashed_id(item, key=key) not in known]
    else:
        absent = [item for item in ids if str(item) not in known]
    if absent:
        few = ", ".join(map(str, absent[:5]))
        return Check("ids", False, f"{len(absent)} of {len(ids)} not forgotten here: {few}")
    return Check("ids", True, f"all {len(ids)} given are among the {record.number_forgotten}")


def _model(record: CertificateRecord, given: str | None) -> Check:
    if not (is_sha256(record.model_before) and is_sha256(record.model_after)):
        return Check("model", False, "the file holds no SHA-256 of the models")
    if given is None:
        return Check("model", None, f"not asked: no model given; it is {record.model_after[:12]}…")
    if given == record.model_after:
        return Check("model", True, f"{given[:12]}…, the model after unlearning")
    if given == record.model_before:
        return Check("model", False, "this is the model before unlearning")
    return Check("model", False, f"{given[:12]}… is neither the model before nor after unlearning")
