"""What an unlearning run left behind, and the page that says so.

A result with an ε is another type than one without, and there is a page of certified plans only:
about other runs nothing is proved, so nothing can be written.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch.nn as nn

from .. import _validate
from ..certificates import Certificate, CertificateRecord, certificate_record
from ..errors import CertificateError
from .plan import CertifiedPlan, UnlearningPlan


@dataclass(frozen=True, kw_only=True)
class UnlearningResult(abc.ABC):
    """The unlearned model and what happened on the way.

    Attributes:
        module: A plain module without Opacus's hooks, on the device it was trained on.
        plan: What was asked for.
        steps: Steps that were run: `plan.steps`, or fewer where an adaptive run stopped.
        history: One entry per call of the caller's `on_step`, whatever it returned.
    """

    module: nn.Module
    plan: UnlearningPlan
    steps: int
    history: tuple[Any, ...]

    @property
    @abc.abstractmethod
    def certificate(self) -> Certificate | None:
        """The certificate the run satisfies, or None."""

    @property
    @abc.abstractmethod
    def epsilon(self) -> float | None:
        """ε of the certificate at the plan's δ, or None."""

    def write_report(
        self,
        path: str | os.PathLike[str],
        *,
        gap: Mapping[str, Any] | None = None,
        public: bool = False,
    ) -> None:
        """Write the deletion's evidence as a page: one HTML file that loads nothing, mode 0600.

        Plan, what ran, the certificate with its assumptions or "no claim", how close the model came
        to retrained ones, and what all this does not show.

        Args:
            path: Target file; the old one stays whole until the new one is complete.
            gap: `evaluation.oracle_gap` of this model; None: it was not measured.
            public: Constants only: method, the ε that was asked for, the claim and its assumptions
                without their numbers; nobody's id, no step count, no measurement. That page may be
                shown.

        Raises:
            ImportError: An extra is missing; install `report`.
            TypeError: `gap` holds something else; nothing is written.
            OSError: The folder is missing or not writable.

        Privacy: unless `public` the page shows ids, numbers of steps and measurements, which depend
            on the forgotten data.
        """
        from .reported import write_deletion  # the optional extra

        write_deletion(self, path, gap=gap, public=public)


@dataclass(frozen=True, kw_only=True)
class CertifiedResult(UnlearningResult):
    """A run that followed a certified plan to its last step.

    Attributes:
        model_before: `model_hash` of the model that the run started from.
        model_after: `model_hash` of `module` as the run left it.
    """

    plan: CertifiedPlan
    model_before: str
    model_after: str

    def __post_init__(self) -> None:
        """Refuse a run that left the model as it was: nothing was forgotten by it.

        Raises:
            CertificateError: Steps, and the same model before and after.
        """
        if self.steps and self.model_before == self.model_after:
            raise CertificateError(
                f"Expected {self.steps} steps to move the model, got the model that was there "
                "before. Nothing was forgotten."
            )

    @property
    def certificate(self) -> Certificate:
        """The plan's certificate."""
        return self.plan.certificate

    @property
    def epsilon(self) -> float:
        """ε after the plan's steps."""
        return self.plan.epsilon

    def record(
        self, *, instance_ids: Sequence[str | int] | None = None, plain_ids: bool = False
    ) -> CertificateRecord:
        """Return the page to file (`certificates.write_certificate`); see `certified_record`."""
        return certified_record(
            self.plan,
            before=self.model_before,
            after=self.model_after,
            instance_ids=instance_ids,
            plain_ids=plain_ids,
        )


@dataclass(frozen=True, kw_only=True)
class UncertifiedResult(UnlearningResult):
    """A run about which nothing is proved."""

    @property
    def certificate(self) -> None:
        """No certificate."""
        return

    @property
    def epsilon(self) -> None:
        """No ε."""
        return

    def record(self, **_: Any) -> NoReturn:
        """Refuse: there is nothing to certify."""
        raise TypeError(uncertified_message(self.plan))


@dataclass(frozen=True, kw_only=True)
class RetrainedResult(UncertifiedResult):
    """A model trained again from the start without the forget set.

    It forgets by construction: no forgotten instance was read. It needs no certificate, and has
    none; what was chosen with the forget set at hand (architecture, step size) is not covered.
    """


def certified_record(
    plan: CertifiedPlan,
    *,
    before: str,
    after: str,
    instance_ids: Sequence[str | int] | npt.NDArray[np.generic] | None = None,
    plain_ids: bool = False,
    earlier_steps: int | None = None,
    earlier_forgotten: int | None = None,
) -> CertificateRecord:
    """Return the certificate record of a plan whose steps were all run.

    Args:
        plan: The plan.
        before: `model_hash` of the model that the run started from.
        after: `model_hash` of the unlearned model.
        instance_ids: Id of every row of the data set. Default: the ids that the plan names, which
            are the row numbers where there are no others.
        plain_ids: Write ids as they are instead of hashing them.
        earlier_steps: Steps of earlier requests that the certificate counts, as whoever ran them
            knows; held against its constants. Default: what they count beyond training.
        earlier_forgotten: The same for the instances of earlier requests.

    Raises:
        TypeError: A plan or result without a certificate.
        CertificateError: The plan's certificate cannot be written, does not give its ε, or counts
            another run; or ε is infinite.
    """
    if not isinstance(plan, CertifiedPlan):
        raise TypeError(uncertified_message(plan))
    rows = plan.forget_set.tolist()
    if instance_ids is None:
        ids: list[str | int] = list(plan.ids) or rows
    else:
        known = np.asarray(instance_ids)
        if known.ndim != 1 or len(known) <= max(rows):
            raise ValueError(
                _validate.expected(
                    "instance_ids",
                    f"to be one id per row, at least {max(rows) + 1},",
                    known.shape,
                )
            )
        ids = known[rows].tolist()  # Python's own strings and integers, also out of objects
    return certificate_record(
        plan.certificate,
        forgotten=ids,
        method=plan.method,
        steps=plan.steps,
        training_steps=plan.steps_retrain,
        epsilon=plan.epsilon,
        delta=plan.delta,
        target_epsilon=plan.target_epsilon,
        model_before=before,
        model_after=after,
        earlier_requests=plan.requests_served,
        earlier_steps=earlier_steps,
        earlier_forgotten=earlier_forgotten,
        plain_ids=plain_ids,
    )


def uncertified_message(plan: object) -> str:
    """Word why a run without a certified plan has no certificate."""
    return (
        f"Expected a CertifiedPlan, got {type(plan).__name__}. Nothing is proved about such a run: "
        "it has no ε, and there is no certificate to write."
    )
