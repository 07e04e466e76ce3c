"""What an unlearning run left behind. A result with an ε is another type than one without."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.nn as nn

from ..certificates import Certificate, CertificateRecord
from ..errors import CertificateError
from .certified_record import certified_record, uncertified_message
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
