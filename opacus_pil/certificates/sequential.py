"""One certificate for several deletion requests that were served one after the other.

Knows only which request still takes part in which phase; the rest is `ContractionCertificate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy.typing as npt

from .. import _validate
from .assumptions import assumption
from .contraction import ContractionCertificate


def sequential_requests(
    contraction: float,
    *,
    noise_std: float,
    phase_steps: Sequence[int],
    request_shifts: npt.ArrayLike,
) -> ContractionCertificate:
    """Certificate that the members of all requests together are forgotten.

    Guarantee: as `ContractionCertificate`, for the union of the requests' forget sets and the
        steps of the last request; sharper than composing distances, Z ← c^K·Z + shift, because the
        noise of the earlier phases counts as well.

    Args:
        contraction: c of every step, of training and all unlearning. >= 0.
        noise_std: ζ of every step, on the parameters. >= 0.
        phase_steps: (requests,) steps of training, of unlearning the first request, …, of
            unlearning the last but one. Integers >= 0.
        request_shifts: (requests,) for each request, in the order served, the most by which its
            members move the result of a step in which they take part. >= 0.

    Returns:
        The certificate; its `steps` are those that unlearn the last request.

    Raises:
        ValueError: A value outside its range, lengths that differ.

    Edge cases (first match wins):
        one request           `ContractionCertificate` with its shift at every training step
        all shifts 0          every divergence is 0
        a phase of 0 steps    adds nothing

    Source: shifted interpolation, Bok, Su, Altschuler (2024), arXiv:2403.00278: request j
        shifts every step of training and of unlearning the requests before it, and none later.

    >>> certificate = sequential_requests(
    ...     0.9, noise_std=1.0, phase_steps=(2, 3), request_shifts=(1.0, 0.5)
    ... )
    >>> certificate.shifts
    (1.5, 1.5, 0.5, 0.5, 0.5)
    """
    shifts = _validate.real_array("request_shifts", request_shifts, low=0.0)
    lengths = [_validate.integer("phase_steps", steps, low=0) for steps in phase_steps]
    _validate.same_length("request_shifts", shifts, "phase_steps", len(lengths))
    return ContractionCertificate(
        _validate.real("contraction", contraction, low=0.0),
        _validate.real("noise_std", noise_std, low=0.0),
        [
            math.fsum(shifts[phase:].tolist())  # those that are still in the training set
            for phase, steps in enumerate(lengths)
            for _ in range(steps)
        ],
        context=(
            assumption("requests_in_turn", requests=len(lengths)),
            assumption("phase_steps", phase_steps=tuple(lengths)),
        ),
    )
