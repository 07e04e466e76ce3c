"""From a certified plan that was run to the page that says so.

Takes certified plans only: about other runs nothing is proved, so nothing can be written.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import _validate
from ..certificates import CertificateRecord, certificate_record
from .plan import CertifiedPlan


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
