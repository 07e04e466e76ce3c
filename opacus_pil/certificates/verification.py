"""Whether a certificate record holds: every number recomputed, every word generated.

What holds each field is in docs/signing.md. What cannot be seen from a file without a signature: a
forgery whose numbers agree with each other. Whoever may write the file may write another one, with
other constants, ids, times and versions, leave out a context, and compute its checksum. Whether the
constants are those of the run, and the assumptions true, is for whoever ran it to show.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from .. import __version__, _validate
from ..accounting.shown import rounded_up
from .certificate import Certificate
from .certificate_record import DIRECTIONS, TOLERANCE, CertificateRecord, hashed_id, is_hex
from .counted import Run, count_mismatch, counted, model_mismatch
from .derivation import derivation_mismatch
from .fields import REFUSALS
from .methods import method_mismatch
from .signature import has_valid_signature
from .verification_report import Check, VerificationReport, shortened, statement_of
from .version1 import words_mismatch


def verify_certificate(
    record: CertificateRecord,
    *,
    model_sha256: str | None = None,
    key: bytes | None = None,
    ids: Sequence[str | int] | None = None,
    signed_by: str | None = None,
) -> VerificationReport:
    """Recompute what a certificate says, and compare.

    Guarantee: if it holds, the recorded constants give at most the recorded ε (up to 1e-9
        relatively) at the recorded δ and steps, under the assumptions that the report prints, and
        ε is at most the target. Nothing is claimed about where the constants come from, unless by
        a signature: then by whoever has the private key.

    Args:
        record: From `read_certificate`.
        model_sha256: Hash of the model that is held against the one after unlearning.
        key: The key of the hashed ids.
        ids: Ids that are looked up among the forgotten ones.
        signed_by: Public key that must have signed it, 32 bytes in hex (`read_public_key`).

    Returns:
        The report. Nothing is raised, whatever numbers the record holds.

    Raises:
        TypeError: Not a record.
        ValueError: signed_by is no public key in hex.
        ImportError: signed_by is given, and the library `cryptography` is not installed.

    Edge cases (first match wins):
        no model, no ids given          that check says None
        ids are hashed, no key given    the same
        an id that is not in it         the certificate holds, `covers` is False
        another release wrote it        its ε may be larger than the recomputed one

    Source: the formulas of the certificate's class; docs/signing.md for the signature.
    """
    if not isinstance(record, CertificateRecord):
        raise TypeError(_validate.expected("record", "to be a CertificateRecord", record))
    if signed_by is not None and not is_hex(signed_by):
        raise ValueError(
            _validate.expected(
                "signed_by", "to be a public key in hex", signed_by, "Use read_public_key."
            )
        )
    certificate, recomputed = _recomputed(record)
    fits = _key(record, key)
    found, missing = _ids(record, key if fits.passed is not False else None, ids)
    checks = (
        _checksum(record),
        *recomputed,
        _forgotten(record),
        fits,
        found,
        _model(record, model_sha256),
        _signature(record, signed_by),
    )
    covers = None if missing is None else not missing
    report = VerificationReport(checks, covers, missing or ())
    if certificate is None or not report.holds:
        return report
    return dataclasses.replace(
        report,
        statement=statement_of(record, certificate),
        assumptions=tuple((one.code, one.sentence) for one in certificate.assumption_codes),
    )


def _recomputed(record: CertificateRecord) -> tuple[Certificate | None, list[Check]]:
    """Rebuild the certificate and compare what its constants give; None: it cannot be rebuilt."""
    try:
        certificate = record.certificate
    except REFUSALS as error:
        later = ("assumptions", "direction", "epsilon", "target", "run")
        unasked = [Check(name, None, "not asked: there is no certificate") for name in later]
        return None, [Check("constants", False, str(error)), *unasked]
    return certificate, [
        Check("constants", True, f"{record.certificate_class} was rebuilt from them"),
        _assumptions(record, certificate),
        *_words(record, certificate),
        _direction(record, certificate),
        *_epsilon(record, certificate),
        _run(record, certificate),
    ]


def _checksum(record: CertificateRecord) -> Check:
    try:
        good = record.computed_checksum() == record.checksum
    except REFUSALS:  # NaN, or constants that are no JSON
        good = False
    return Check("checksum", good, "of all fields" if good else "the file was edited or damaged")


def _assumptions(record: CertificateRecord, certificate: Certificate) -> Check:
    """Hold codes and contexts against what the constants give."""
    own = tuple(one.code for one in certificate.assumption_codes)
    try:
        contradiction = derivation_mismatch(certificate)
    except REFUSALS as error:
        contradiction = str(error)
    if contradiction is not None:
        return Check("assumptions", False, f"the constants have {contradiction}")
    if record.version == 1 or own == record.assumption_codes:
        return Check("assumptions", True, f"{len(own)}, their words generated from the constants")
    wrong = _first_odd(own, record.assumption_codes)
    return Check("assumptions", False, f"not what the constants give: {wrong}")


def _first_odd(own: Sequence[str], said: Sequence[str]) -> str:
    """Name a code that is on one side only; without any, how many there are."""
    odd = [code for code in said if code not in own]
    odd += [code for code in own if code not in said]
    return repr(odd[0]) if odd else f"{len(said)} of {len(own)}"


def _words(record: CertificateRecord, certificate: Certificate) -> Iterator[Check]:
    """Hold the words of version 1 against what the constants give; later files hold none."""
    if record.version1 is None:
        return
    other = words_mismatch(certificate, record.version1.sentences)
    if other is None:
        yield Check("words", True, "of version 1, as the constants give them")
    else:
        yield Check("words", False, f"not generated from the constants: {other!r}")


def _direction(record: CertificateRecord, certificate: Certificate) -> Check:
    own = DIRECTIONS[0 if certificate.two_sided else 1]
    said = record.direction
    return Check("direction", own == said, own if own == said else f"{own}; the file says {said!r}")


def _epsilon(record: CertificateRecord, certificate: Certificate) -> list[Check]:
    """Hold ε against the constants', and the target against ε."""
    try:
        own = certificate.epsilon(delta=record.delta, steps=record.steps)
        if not _same(record.epsilon, own):  # both bounds are true; files rest on either
            earlier = certificate.epsilon_of_earlier_releases(
                delta=record.delta, steps=record.steps
            )
            own = earlier if _same(record.epsilon, earlier) else min(own, earlier)
    except REFUSALS as error:
        return [Check("epsilon", False, str(error)), Check("target", None, "not asked: no ε")]
    claimed, target = record.epsilon, record.target_epsilon * (1.0 + TOLERANCE)
    shown, delta = (rounded_up(value, digits=10) for value in (claimed, record.delta))
    said = f"{shown} at delta {delta} after {record.steps} steps"
    good = own * (1.0 - TOLERANCE) <= claimed < float("inf")
    if not good:
        said += f"; the constants give {own:.10g}"
    elif claimed > own * (1.0 + TOLERANCE):
        writer = record.software.get("opacus_pil")
        said += f"; this release computes {own:.10g}"
        if writer == __version__:
            good, said = False, f"{said}, and so would the one that wrote it"
        else:
            said += f", {writer} wrote it"
    reached = max(own, claimed) <= target
    return [
        Check("epsilon", good, said),
        Check("target", reached, f"asked for {rounded_up(record.target_epsilon, digits=10)}"),
    ]


def _same(claimed: float, computed: float) -> bool:
    return computed * (1.0 - TOLERANCE) <= claimed <= computed * (1.0 + TOLERANCE)


def _run(record: CertificateRecord, certificate: Certificate) -> Check:
    """Hold method, steps, counts and models against each other and the constants."""
    run = Run(
        steps=record.steps,
        training_steps=record.training_steps,
        forgotten=record.number_forgotten,
        earlier_requests=record.earlier_requests,
        earlier_steps=record.earlier_steps,
        earlier_forgotten=record.earlier_forgotten,
    )
    for wrong in (
        method_mismatch(certificate, record.method),
        count_mismatch(certificate, run, exact=record.version != 1),
        model_mismatch(
            method=record.method,
            steps=record.steps,
            before=record.model_before,
            after=record.model_after,
        ),
    ):
        if wrong is not None:
            return Check("run", False, wrong)
    where = f"{record.training_steps} steps of training, then {record.steps} by {record.method}"
    own = counted(certificate)
    uncounted = [
        noun
        for number, noun in ((own.steps, "training steps"), (own.forgotten, "instances"))
        if number is None
    ]
    if uncounted:
        where += f"; the constants count no {' and no '.join(uncounted)}"
    return Check("run", True, where)


def _forgotten(record: CertificateRecord) -> Check:
    """Ask whether the list of ids is as long as it says, without repetition, hashed or not."""
    ids, number = record.forgotten, record.number_forgotten
    if not number or not len(set(map(str, ids))) == len(ids) == number:
        return Check("forgotten", False, f"{len(ids)} ids; the file says {number}, each once")
    if not _hashed_as_said(record):
        return Check("forgotten", False, "ids are not hashed as the file says")
    if record.ids_hashed and list(ids) != sorted(map(str, ids)):
        return Check("forgotten", False, "hashed ids are not in their order")
    return Check(
        "forgotten", True, f"{number} ids, {'hashed' if record.ids_hashed else 'in plain'}"
    )


def _hashed_as_said(record: CertificateRecord) -> bool:
    """Whether ids are hashes with the trace of a key, or in plain without one."""
    old = record.version1
    held = record.key_mac if old is None else old.key_sha256
    hashes = record.ids_hashed and all(map(is_hex, record.forgotten))
    return hashes == is_hex(held) == record.ids_hashed


def _key(record: CertificateRecord, key: bytes | None) -> Check:
    """Ask whether the key is this certificate's, and with version 2 whether nothing was edited."""
    if key is None:
        return Check("key", None, "not asked: no key given")
    if not record.ids_hashed:
        return Check("key", False, "there is a key, but ids are in plain: of another certificate")
    if record.version1 is not None:
        fits = hashlib.sha256(key).hexdigest() == record.version1.key_sha256
        return Check("key", fits, "its own" if fits else "the key is another certificate's")
    try:
        fits = record.computed_mac(key=key) == record.key_mac
    except REFUSALS:
        fits = False
    if fits:
        return Check("key", True, "its own; nothing was edited by anybody without it")
    return Check("key", False, "the key is another certificate's, or the file was edited")


def _ids(
    record: CertificateRecord, key: bytes | None, ids: Sequence[str | int] | None
) -> tuple[Check, tuple[str, ...] | None]:
    """Look ids up; return those that are not in it, which are no fault of the certificate."""
    if not ids:
        return Check("ids", None, "not asked: no ids given"), None
    known = {str(item) for item in record.forgotten}
    if not record.ids_hashed:
        absent = [item for item in ids if str(item) not in known]
    elif key is None:
        return Check("ids", None, "not asked: they are hashed, and no key of theirs is given"), None
    else:
        absent = [item for item in ids if hashed_id(item, key=key) not in known]
    missing = tuple(map(str, absent))
    if missing:
        told = f"{len(missing)} of {len(ids)} not in it: {shortened(missing)}"
        return Check("ids", None, told), missing
    among = f"all {len(ids)} given are among the {record.number_forgotten}"
    return Check("ids", True, among), ()


def _model(record: CertificateRecord, given: str | None) -> Check:
    if not (is_hex(record.model_before) and is_hex(record.model_after)):
        return Check("model", False, "the file holds no SHA-256 of the models")
    if given is None:
        return Check("model", None, f"not asked: no model given; it is {record.model_after[:12]}…")
    if given == record.model_after:
        return Check("model", True, f"{given[:12]}…, the model after unlearning")
    if given == record.model_before:
        return Check("model", False, "this is the model before unlearning")
    return Check("model", False, f"{given[:12]}… is neither the model before nor after unlearning")


def _signature(record: CertificateRecord, asked: str | None) -> Check:
    if record.signature is None:
        words = "nobody signed it: anybody may have written this file"
        return Check("signature", None if asked is None else False, words)
    try:
        valid = has_valid_signature(record)
    except ImportError:
        if asked is not None:
            raise
        words = "signed, not checked: the library cryptography is not installed"
        return Check("signature", None, words)
    except REFUSALS:
        valid = False
    if not valid:
        return Check("signature", False, "not of this content by the key that it names")
    if asked is None:
        words = f"by the key {record.signed_by}; whose that is was not asked (signed_by)"
        return Check("signature", None, words)
    if asked != record.signed_by:
        return Check("signature", False, f"by another key, {record.signed_by}")
    return Check("signature", True, f"by the key that was asked for, {asked}")
