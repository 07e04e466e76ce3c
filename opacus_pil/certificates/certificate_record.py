"""A served deletion request on paper: what was forgotten, what is claimed, what it rests on.

Knows no files and no model: hashes of models are given. `certificate_file` writes and reads it,
`verification` says whether it holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import platform
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from .. import __version__, _validate
from ..errors import CertificateError
from .best import BestCertificate
from .data_processing import DataProcessingCertificate
from .fields import constants_of, rebuilt
from .noisy_finetuning import NoisyFineTuningCertificate
from .record import Certificate

FORMAT = "opacus_pil certificate"
VERSION = 1
DIRECTIONS = ("both", "unlearned_from_reference")
# Relative. The number was rounded up when written; the same formula on another machine or release
# of numpy and scipy differs by some ulps and a root-finder's last digits, far below this.
TOLERANCE = 1e-9
WITHOUT_NOISE = ("finetuning", "l1_sparse", "gradient_difference", "retraining")


@dataclass(frozen=True, kw_only=True)
class CertificateRecord:
    """What a certificate file says, field by field; read from a file it is not verified yet.

    The file is private (mode 0600): the constants hold the forgotten instances' caps, and the steps
    depend on them. Ids are hashed unless asked otherwise, with a random key that is written beside
    the certificate, not in it: without the key nobody can try out small numbers.

    Attributes:
        forgotten: One id per instance of this request: HMAC-SHA256 in hex, sorted; or plain.
        ids_hashed: Which of the two.
        key_sha256: SHA-256 of the key of the hashes; None for plain ids.
        number_forgotten: Instances of this request.
        method: How they were unlearned.
        steps: Unlearning steps that were run.
        training_steps: Steps of training.
        earlier_requests: Requests served before; the certificate covers their instances too.
        epsilon: ε after `steps`, in nats.
        delta: Its δ.
        target_epsilon: ε that was asked for.
        direction: "both", or "unlearned_from_reference" for D(unlearned ‖ reference) only.
        certificate_class: The certificate's class.
        constants: All it was made of, in JSON values.
        assumptions: One plain sentence each.
        model_before: SHA-256 of the trained model (`unlearning.model_hash`).
        model_after: SHA-256 of the unlearned model.
        software: Versions by name.
        created: Time in UTC, ISO 8601.
        checksum: SHA-256 of all of the above. It tells damage, not malice.
        key: Key of the hashes, 32 bytes; never in the certificate. None where it is not known.
    """

    forgotten: tuple[str | int, ...]
    ids_hashed: bool
    key_sha256: str | None
    number_forgotten: int
    method: str
    steps: int
    training_steps: int
    earlier_requests: int
    epsilon: float
    delta: float
    target_epsilon: float
    direction: str
    certificate_class: str
    constants: dict[str, Any]
    assumptions: tuple[str, ...]
    model_before: str
    model_after: str
    software: dict[str, str]
    created: str
    checksum: str
    key: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def certificate(self) -> Certificate:
        """The certificate, rebuilt from the constants.

        Raises:
            CertificateError: It cannot be: an unknown class, or constants that it refuses.
        """
        return rebuilt(self.certificate_class, self.constants)

    def computed_checksum(self) -> str:
        """SHA-256 of everything but the checksum, as canonical JSON."""
        content = self.content()
        del content["checksum"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def content(self) -> dict[str, Any]:
        """Everything that is written, in JSON values."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for name in FIELDS:
            value = getattr(self, name)
            content[name] = list(value) if isinstance(value, tuple) else value
        return content


FIELDS = tuple(f.name for f in dataclasses.fields(CertificateRecord) if f.name != "key")


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
    plain_ids: bool = False,
) -> CertificateRecord:
    """Put a certificate and the run that it speaks about on one page.

    Guarantee: the record's ε is at least the certificate's own at `delta` and `steps`, and at most
        `target_epsilon`.

    Args:
        certificate: One of the package's own, without functions among its constants.
        forgotten: Ids of this request's instances, each once, at least one.
        method: Name of the unlearning method.
        steps: Unlearning steps that were run. >= 0.
        training_steps: Steps of training. >= 0.
        epsilon: In nats, >= 0.
        delta: In (0, 1).
        target_epsilon: What was asked for, >= epsilon.
        model_before: SHA-256 of the trained model, 64 hexadecimal digits.
        model_after: SHA-256 of the unlearned model.
        earlier_requests: Requests served before this one. >= 0.
        plain_ids: Write ids as they are, for everybody who sees the file.

    Returns:
        The record, with a fresh key unless `plain_ids`.

    Raises:
        CertificateError: The certificate cannot be written, or does not give this ε, or ε is above
            the target.
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
    ids = [_identifier(item) for item in forgotten]
    if not ids or len({str(item) for item in ids}) != len(ids):
        raise ValueError(
            f"Expected forgotten to hold ids, each once, got {len(ids)} of which "
            f"{len({str(item) for item in ids})} differ. Pass each forgotten instance once."
        )
    for name, value in (("model_before", model_before), ("model_after", model_after)):
        if not is_sha256(value):
            raise ValueError(
                _validate.expected(
                    name, "to be a SHA-256 in hex", value, "Use unlearning.model_hash."
                )
            )
    if epsilon == math.inf:
        raise CertificateError(
            "Expected a finite epsilon to certify, got inf. It says nothing: run more steps."
        )
    claimed = _validate.epsilon(epsilon)
    target = _validate.real("target_epsilon", target_epsilon, low=0.0)
    own = certificate.epsilon(delta=delta, steps=steps)
    if not own * (1.0 - TOLERANCE) <= claimed <= target * (1.0 + TOLERANCE):
        raise CertificateError(
            f"Expected epsilon between the certificate's own, {own!r}, and target_epsilon="
            f"{target!r}, got epsilon={claimed!r}. Run the steps of the plan."
        )
    wrong = method_mismatch(certificate, method)
    if wrong is not None:
        raise CertificateError(f"Expected the certificate's own method, got {wrong}.")
    key = None if plain_ids else secrets.token_bytes(32)
    name, constants = constants_of(certificate)
    record = CertificateRecord(
        forgotten=tuple(ids),
        ids_hashed=not plain_ids,
        key_sha256=None if key is None else hashlib.sha256(key).hexdigest(),
        number_forgotten=len(ids),
        method=str(method),
        steps=_validate.integer("steps", steps, low=0),
        training_steps=_validate.integer("training_steps", training_steps, low=0),
        earlier_requests=_validate.integer("earlier_requests", earlier_requests, low=0),
        epsilon=claimed,
        delta=_validate.delta(delta),
        target_epsilon=target,
        direction=DIRECTIONS[0 if certificate.two_sided else 1],
        certificate_class=name,
        constants=constants,
        assumptions=tuple(certificate.assumptions),
        model_before=model_before,
        model_after=model_after,
        software=_software(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checksum="",
        key=key,
    )
    if key is not None:
        hashes = sorted(hashed_id(item, key=key) for item in ids)
        record = dataclasses.replace(record, forgotten=tuple(hashes))
    return dataclasses.replace(record, checksum=record.computed_checksum())


def method_mismatch(certificate: Certificate, method: str) -> str | None:
    """Return why this certificate cannot speak of runs by `method`; None: nothing against it."""
    if method in WITHOUT_NOISE:
        return f"method {method!r}, which adds no noise"
    members = certificate.members if isinstance(certificate, BestCertificate) else (certificate,)
    for member in members:
        own = isinstance(member, NoisyFineTuningCertificate)
        if own != (method == "noisy_finetuning") and not isinstance(
            member, DataProcessingCertificate
        ):
            return f"method {method!r} with a {type(member).__name__}"
    return None


def hashed_id(identifier: str | int, *, key: bytes) -> str:
    """How `identifier` appears in a certificate with this `key`; 3 and "3" are the same."""
    return hmac.new(key, str(identifier).encode(), "sha256").hexdigest()


def is_sha256(value: object) -> bool:
    """Whether `value` is 32 bytes in lower-case hex."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _identifier(value: Any) -> str | int:
    if isinstance(value, str):
        return value
    return _validate.integer("forgotten", value, low=-(2**63))


def _software() -> dict[str, str]:
    """Versions of what computed the numbers; torch is looked up, never loaded."""
    found = {"opacus_pil": __version__, "python": platform.python_version()}
    for name in ("torch", "opacus", "numpy", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
