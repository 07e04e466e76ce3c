"""Unlearning by contraction where every batch is known before the run.

Turns lists of rows into the factors and shifts of a `ContractionCertificate`; knows no sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import _validate
from .assumptions import assumption
from .batch_laws import step_factor
from .contraction import ContractionCertificate


def known_batches(
    batches: Sequence[npt.ArrayLike],
    *,
    forget: npt.ArrayLike,
    gradient_bounds: npt.ArrayLike,
    noise_std: float,
    step_size: float,
    weight_decay: float,
    smoothness: float,
    expected_batch_size: float,
    unlearning_batch_size: int | None = None,
) -> ContractionCertificate:
    """Certificate of noisy training on batches that were fixed before the run, cyclic for example.

    Guarantee: as `ContractionCertificate`; the run without the forget set uses the same batches
        with the forgotten rows left out, and the same divisor.

    Args:
        batches: For every training step the rows in its batch, each once, forgotten ones included.
        forget: (members,) forgotten rows, each once.
        gradient_bounds: (members,) supremum over all models of each one's (clipped) gradient norm.
            >= 0.
        noise_std: ζ, noise on the parameters at every step, of training and unlearning. >= 0.
        step_size: η. > 0.
        weight_decay: λ, decoupled from clipping. >= 0.
        smoothness: β, Lipschitz constant of one retained instance's gradient as it enters the sum.
            >= 0.
        expected_batch_size: b, the normaliser of every gradient sum. > 0.
        unlearning_batch_size: Most retained rows in a batch while unlearning. Default: the most in
            a batch of training.

    Returns:
        The certificate; steps with large batches may have a factor above 1.

    Raises:
        ValueError: A value outside its range, a row twice.

    Edge cases (first match wins):
        no batches                         no shift: every divergence is 0
        no forgotten row in any batch      the same
        a batch without retained rows      factor |1 − ηλ|

    Source: Bok, Su, Altschuler (2024), arXiv:2403.00278 (shifted interpolation), with the factor
        max(|1 − ηλ|, |1 − η(λ + β·rows/b)|) of each batch, which may exceed 1.

    >>> known_batches(
    ...     [[0, 1], [2, 3]], forget=[3], gradient_bounds=[1.0], noise_std=1.0, step_size=0.5,
    ...     weight_decay=0.1, smoothness=0.25, expected_batch_size=2,
    ... ).shifts
    (0.0, 0.25)
    """
    eta = _validate.real("step_size", step_size, low=0.0, open_low=True)
    decay = _validate.real("weight_decay", weight_decay, low=0.0)
    smooth = _validate.real("smoothness", smoothness, low=0.0)
    divisor = _validate.real("expected_batch_size", expected_batch_size, low=0.0, open_low=True)
    end = np.iinfo(np.int64).max
    members = _validate.index_array("forget", forget, size=end)
    bounds = _validate.real_array("gradient_bounds", gradient_bounds, low=0.0)
    _validate.same_length("gradient_bounds", bounds, "forget", len(members))
    by_row = dict(zip(members.tolist(), bounds.tolist(), strict=True))
    sizes, shifts = [], []
    for batch in batches:
        rows = _validate.index_array("batches", batch, size=end).tolist()
        present = [by_row[row] for row in rows if row in by_row]
        sizes.append(len(rows) - len(present))
        shifts.append(eta / divisor * math.fsum(present))
    largest = max(sizes, default=0)
    if unlearning_batch_size is not None:
        largest = _validate.integer("unlearning_batch_size", unlearning_batch_size, low=0)
    factors = step_factor(
        [*sizes, largest],
        step_size=eta,
        weight_decay=decay,
        smoothness=smooth,
        expected_batch_size=divisor,
    ).tolist()
    return ContractionCertificate(
        factors[:-1],
        noise_std,
        shifts,
        unlearning_contraction=factors[-1],
        context=(
            "batches_fixed_before",
            assumption(
                "constant_divisor", expected_batch_size=divisor, weight_decay=decay, step_size=eta
            ),
            assumption("convex_retained", smoothness=smooth, unlearning_batch_size=largest),
        ),
    )
