"""A full pass inside of a training, held against what the step itself has seen.

Knows one step and what a pass found; charges nobody.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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


def differing(record: StepRecord, known: FloatArray) -> Fact | None:
    """Return how the norms of a pass are not those of the step's own rows; None: they are.

    Each row's norm by itself; whose is whose matters where that is known.

    Args:
        record: The step.
        known: Shape (instances,), what the pass has found.
    """
    if record.drawn is None or len(record.norms) != len(record.drawn):
        return None
    ordered = record.indices is not None
    swept = known[record.indices if ordered else record.drawn]
    ran = record.norms if ordered else np.sort(record.norms)
    swept = swept if ordered else np.sort(swept)
    tolerance = max(_SAME_NORM, ROUNDING_STEPS * record.rounding)
    with np.errstate(invalid="ignore"):
        same = (swept == ran) | (
            np.abs(swept - ran) <= tolerance * (np.abs(ran) + record.max_grad_norm)
        )
    if same[np.isfinite(ran)].all():
        return None
    differ = np.isfinite(ran) & ~same
    return Fact(*explained(ran[differ], swept[differ], tolerance=tolerance))
