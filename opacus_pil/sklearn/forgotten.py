"""Forgotten: what one call of `forget` did, and the certificate of it.

Knows a finished run; no data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..certificates import Certificate, CertificateRecord, VerificationReport, verify_certificate
from ..certificates.certificate_file import write_certificate
from ..files.model_hash import model_hash
from ..unlearning.plan import CertifiedPlan


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """Who was forgotten, in how many steps, and what is proved about it.

    Attributes:
        plan: The plan that was carried out; printed, it lists the assumptions.
        record: The certificate as it is filed, with hashed ids and the key of the hashes.

    Privacy: the steps show how much the forgotten rows weighed.
    """

    plan: CertifiedPlan
    record: CertificateRecord

    @property
    def ids(self) -> tuple[Any, ...]:
        """Who was forgotten."""
        return self.plan.ids

    @property
    def certificate(self) -> Certificate:
        """The certificate that the run satisfies."""
        return self.plan.certificate

    @property
    def epsilon(self) -> float:
        """ε of the certificate, at most what was asked for."""
        return self.plan.epsilon

    @property
    def delta(self) -> float:
        """Its δ."""
        return self.plan.delta

    @property
    def steps(self) -> int:
        """Steps that were run."""
        return self.plan.steps

    def verify(
        self, *, model: nn.Module | Any = None, ids: Sequence[str | int] | None = None
    ) -> VerificationReport:
        """Recompute what the certificate says; `holds`, `covers`, and every check by name.

        Args:
            model: Held against the model after this run: the classifier, or its `head_`. It is
                another one after the next `forget`.
            ids: Who is looked for among the forgotten.
        """
        module = getattr(model, "head_", model)
        return verify_certificate(
            self.record,
            model_sha256=None if module is None else model_hash(module),
            key=self.record.key,
            ids=ids,
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate to a file that `opacus-pil verify` reads, its key beside it.

        Raises:
            FileExistsError: There is one.
        """
        write_certificate(self.record, path=path)
