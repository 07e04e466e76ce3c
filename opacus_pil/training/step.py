"""Step: one noisy step, ready to be charged; Policy: whoever says how.

Knows what was seen of a step; no ledger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..capture.recorder import Fact, StepRecord
from ..capture.sweep import Sweep
from .verdict import Verdict

_COARSE = 1e-4  # float32 and its sequences are far below, half precisions above


@dataclass(frozen=True)
class Step:
    """One noisy step, ready to be charged.

    Attributes:
        record: Rows, norms and clip bound of the step.
        verdict: What may be claimed for it, and whether it is charged as usual.
        noise_multiplier: Noise std on the gradient sum / the most that one row moves it by.
        sample_rate: Probability that an instance was drawn.
        measure: Runs a full pass at the current parameters.
        random_forward: Says whether the training's forward pass is random.
        released_count: Shift of a count that adaptive clipping releases at this step, which
            every drawn instance moves by 1: 1 / its noise std, in units of the gradient noise.
    """

    record: StepRecord
    verdict: Verdict
    noise_multiplier: float
    sample_rate: float
    measure: Callable[[], Sweep]
    random_forward: Callable[[], bool]
    released_count: float = 0.0


class Policy(Protocol):
    """How one norm policy charges a step; what they are is `policies.py`.

    Attributes:
        name: As callers write it.
        judged_as: By whose rules of `evidence.py` its labels are judged.
        refresh_every: Steps between two full passes; None: there are none.
        enforced: Whether caps or budgets hold: a step that would break them is refused.
        certifiable: Whether a certificate may rest on its label.
        probed: Whether a look at some rows can take its label away.
        whole_rows: Whether it matters that an item is the same when it is asked for again.
        fixed_batches: Whether it is for batches that are not drawn by coins.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def judged_as(self) -> str: ...  # noqa: D102
    @property
    def refresh_every(self) -> int | None: ...  # noqa: D102
    @property
    def enforced(self) -> bool: ...  # noqa: D102
    @property
    def certifiable(self) -> bool: ...  # noqa: D102
    @property
    def probed(self) -> bool: ...  # noqa: D102
    @property
    def whole_rows(self) -> bool: ...  # noqa: D102
    @property
    def fixed_batches(self) -> bool: ...  # noqa: D102

    def history(self, charges: Any) -> list[Fact]:
        """Return what the policy's own history takes away from the label."""

    def charge(self, charges: Any, step: Step, verdict: Verdict) -> Verdict:
        """Charge everyone for one step; return what may be claimed for it."""


def facts_of(record: StepRecord) -> list[Fact]:
    """Return what a step's record itself takes away from what may be claimed."""
    facts = list(record.facts)
    if record.noise_std is None:
        facts.append(Fact("noise_not_seen"))
    if not record.order.apart:
        facts.append(Fact("rows_not_apart", record.order.why))
    if record.indices is None:
        facts.append(Fact("order_unknown", record.mismatch))
    if record.unfinite is not None and record.unfinite.any():
        facts.append(Fact("gradient_not_finite"))
    if record.rounding > _COARSE:
        facts.append(Fact("coarse_rounding", f"rounded to {record.rounding:.1g}"))
    return facts
