"""From a certificate and the run that it speaks about to the record of both.

Refuses to write what `verification` would call broken. Knows no model: its hashes are given.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from .. import __version__, _validate
from ..errors import CertificateError
from .certificate import Certificate
from .certificate_record import DIRECTIONS, TOLERANCE, CertificateRecord, hashed_id, is_hex
from .counted import Run, count_mismatch, counted, model_mismatch
from .derivation import derivation_mismatch
from .fields import constants_of
from .methods import method_mismatch

SOFTWARE = ("opacus_pil", "python", "torch", "opacus", "numpy", "scipy")
NO_VERSION = ("not installed", "unknown")
# A release, and what builds append: 2.13.0, 2.6.0a0+ecf3bae.nv25.1, 3.13.0rc1, 3.12.1+.
VERSION_LIKE = re.compile(
    r"(\d{1,4}!)?\d{1,8}(\.\d{1,8}){0,4}((a|b|rc|\.?post|\.?dev)\d{1,12}){0,3}"
    r"(\+[0-9a-z]{0,40}(\.[0-9a-z]{1,12}){0,3})?",
    re.ASCII,
)


def certificate_record(
    certificate: Certificate,
    *,
    forgotten: Sequence[str | int],
    method: str,
    steps: int,
    training_steps: int,
    epsilon: float,
    delta: float,
    target_epsilon: float,
    model_before: str,
    model_after: str,
    earlier_requests: int = 0,
    earlier_steps: int | None = None,
    earlier_forgotten: int | None = None,
    plain_ids: bool = False,
) -> CertificateRecord:
    """Put a certificate and the run that it speaks about on one page.

    Guarantee: the record's ε is at least the certificate's own at `delta` and `steps`, and at most
        `target_epsilon`; what the certificate counts of the run is what the record says.

    Args:
        certificate: One of the package's own, without functions among its constants.
        forgotten: Ids of this request's instances, each once, at least one.
        method: Name of the unlearning method, one that the certificate can speak of.
        steps: Unlearning steps that were run. >= 0.
        training_steps: Steps of training. >= 0.
        epsilon: In nats, >= 0.
        delta: In (0, 1).
        target_epsilon: What was asked for, >= epsilon.
        model_before: SHA-256 of the trained model, 64 hexadecimal digits.
        model_after: SHA-256 of the unlearned model; another one if there was a step.
        earlier_requests: Requests served before this one. >= 0.
        earlier_steps: Steps of theirs that the certificate counts beside training. Default: what
            its constants count beyond `training_steps`. Not recorded where they count no steps.
        earlier_forgotten: The same for their instances.
        plain_ids: Write ids as they are, for everybody who sees the file.

    Returns:
        The record, with a fresh key unless `plain_ids`.

    Raises:
        CertificateError: The certificate cannot be written, or does not give this ε, or ε is above
            the target, or it is of another run.
        ValueError: A value outside its range.
        TypeError: Not a certificate.

    Edge cases (first match wins):
        ids 3 and "3"   the same id, refused as repeated

    Source: HMAC, RFC 2104, with SHA-256; a plain or openly salted hash of a small integer is
        undone by trying all of them.
    """
    if not isinstance(certificate, Certificate):
        raise TypeError(
            _validate.expected(
                "certificate",
                "to be a certificate",
                type(certificate).__name__,
                "Nothing is proved about other runs, and nothing can be written about them.",
            )
        )
    ids = _identifiers(forgotten)
    _require_hashes(model_before=model_before, model_after=model_after)
    claimed, target = _checked_epsilon(epsilon, target_epsilon)
    own = certificate.epsilon(delta=delta, steps=steps)
    if not own * (1.0 - TOLERANCE) <= claimed <= target * (1.0 + TOLERANCE):
        raise CertificateError(
            f"Expected epsilon between the certificate's own, {own!r}, and target_epsilon="
            f"{target!r}, got epsilon={claimed!r}. Run the steps of the plan."
        )
    name, constants = constants_of(certificate)
    run = _run(
        certificate,
        steps=_validate.integer("steps", steps, low=0),
        training_steps=_validate.integer("training_steps", training_steps, low=0),
        forgotten=len(ids),
        earlier_requests=_validate.integer("earlier_requests", earlier_requests, low=0),
        earlier_steps=earlier_steps,
        earlier_forgotten=earlier_forgotten,
    )
    for wrong in (
        method_mismatch(certificate, method),
        derivation_mismatch(certificate),
        count_mismatch(certificate, run),
        model_mismatch(method=method, steps=steps, before=model_before, after=model_after),
    ):
        if wrong is not None:
            raise CertificateError(f"Expected the certificate of this run, got {wrong}.")
    key = None if plain_ids else secrets.token_bytes(32)
    record = CertificateRecord(
        forgotten=_written_ids(ids, key),
        ids_hashed=not plain_ids,
        key_mac=None,
        number_forgotten=len(ids),
        method=method,
        steps=run.steps,
        training_steps=run.training_steps,
        earlier_requests=run.earlier_requests,
        earlier_steps=run.earlier_steps,
        earlier_forgotten=run.earlier_forgotten,
        epsilon=claimed,
        delta=_validate.delta(delta),
        target_epsilon=target,
        direction=DIRECTIONS[0 if certificate.two_sided else 1],
        certificate_class=name,
        constants=constants,
        assumption_codes=tuple(one.code for one in certificate.assumption_codes),
        model_before=model_before,
        model_after=model_after,
        software=_software(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checksum="",
        key=key,
    )
    if key is not None:
        record = dataclasses.replace(record, key_mac=record.computed_mac(key=key))
    return dataclasses.replace(record, checksum=record.computed_checksum())


def _require_hashes(**models: str) -> None:
    for name, value in models.items():
        if not is_hex(value):
            raise ValueError(
                _validate.expected(
                    name, "to be a SHA-256 in hex", value, "Use unlearning.model_hash."
                )
            )


def _checked_epsilon(epsilon: float, target: float) -> tuple[float, float]:
    """Return ε and the target that it was asked for."""
    if epsilon == math.inf:
        raise CertificateError(
            "Expected a finite epsilon to certify, got inf. It says nothing: run more steps."
        )
    return _validate.epsilon(epsilon), _validate.real("target_epsilon", target, low=0.0)


def _written_ids(ids: Sequence[str | int], key: bytes | None) -> tuple[str | int, ...]:
    """Return ids in plain in their order, or hashed in that of the hashes, which tells nothing."""
    return tuple(ids) if key is None else tuple(sorted(hashed_id(one, key=key) for one in ids))


def _run(certificate: Certificate, **said: Any) -> Run:
    """Return the run, with what earlier requests add where the constants count it."""
    try:
        own = counted(certificate)
    except ValueError as error:
        raise CertificateError(f"Expected the certificate of this run, got {error}.") from error
    for name, count, mine in (
        ("earlier_steps", own.steps, said["training_steps"]),
        ("earlier_forgotten", own.forgotten, said["forgotten"]),
    ):
        if count is None:
            said[name] = None
        elif said[name] is None:
            said[name] = max(count - mine, 0) if said["earlier_requests"] else 0
        else:
            said[name] = _validate.integer(name, said[name], low=0)
    return Run(**said)


def _identifiers(forgotten: Sequence[str | int]) -> list[str | int]:
    ids = [_identifier(item) for item in forgotten]
    if not ids or len({str(item) for item in ids}) != len(ids):
        raise ValueError(
            f"Expected forgotten to hold ids, each once, got {len(ids)} of which "
            f"{len({str(item) for item in ids})} differ. Pass each forgotten instance once."
        )
    return ids


def _identifier(value: Any) -> str | int:
    if isinstance(value, str):
        return value
    return _validate.integer("forgotten", value, low=-(2**63))


def _software() -> dict[str, str]:
    """Versions of what computed the numbers; torch is looked up, never loaded."""
    found = {"opacus_pil": __version__, "python": platform.python_version()}
    for name in SOFTWARE[2:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = NO_VERSION[0]
    return {n: v if VERSION_LIKE.fullmatch(v) else NO_VERSION[1] for n, v in found.items()}
