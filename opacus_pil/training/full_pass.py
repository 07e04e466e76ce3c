"""A full pass inside of a training, held against what the step itself has seen.

Knows one step and what a pass found; charges nobody.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .._validate import FloatArray
from ..capture.recorder import Fact, StepRecord
from ..capture.sweep import Sweep
from .norms import ROUNDING_STEPS
from .probe import explained

# Norms of the same batch by two exact methods agree far better than this in float32.
_SAME_NORM = 1e-3


def attempted(measure: Callable[[], Sweep]) -> Sweep | Fact:
    """Return what a full pass found, or the fact that it failed: training goes on all the same."""
    try:
        return measure()
    except Exception as error:  # a foreign model, loss or data set may fail in any way
        words = str(error).splitlines()[0] if str(error) else "no message"
        return Fact("not_measured", f"{type(error).__name__}: {words[:200]}")


def differing(record: StepRecord, found: Sweep, known: FloatArray) -> Fact | None:
    """Return how the norms of a pass are not those of the step's own rows; None: they are.

    Args:
        record: The step.
        found: The pass.
        known: Shape (instances,), what it has found of those that are charged by it.
    """
    fact = _compared(record, known, record.norms)
    if fact is None and record.whole is not None:  # what clipping layers has left hides a factor
        whole = np.full(len(known), np.inf)
        whole[found.indices] = found.whole
        fact = _compared(record, whole, record.whole.to("cpu", torch.float64).numpy())
    return fact


def _compared(record: StepRecord, swept: FloatArray, ran: FloatArray) -> Fact | None:
    """Hold norms in a step against those of a full pass, each row's by itself.

    Args:
        record: The step.
        swept: Shape (instances,), of the full pass.
        ran: Shape (batch,), of the step. Whose is whose matters where it is known.
    """
    if record.drawn is None or len(ran) != len(record.drawn):
        return None
    ordered = record.indices is not None
    swept = swept[record.indices if ordered else record.drawn]
    ran, swept = (ran, swept) if ordered else (np.sort(ran), np.sort(swept))
    tolerance = max(_SAME_NORM, ROUNDING_STEPS * record.rounding)
    with np.errstate(invalid="ignore"):
        same = (swept == ran) | (
            np.abs(swept - ran) <= tolerance * (np.abs(ran) + record.max_grad_norm)
        )
    differ = np.isfinite(ran) & ~same
    if not differ.any():
        return None
    return Fact(*explained(ran[differ], swept[differ], tolerance=tolerance))
