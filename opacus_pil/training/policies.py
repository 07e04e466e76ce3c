"""The norm policies: how an instance's sensitivity at a step is found, one small class for each.

What a label may say is not decided here but in `evidence.py`, by the name in `judged_as`. Knows how
a step is charged; no optimizer, loader or engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import _validate as check
from ..capture.recorder import Fact
from ..errors import UnsupportedError
from .charger import Charger
from .step import Step
from .verdict import Verdict


@dataclass(frozen=True)
class NormPolicy:
    """What all policies have; by default one that charges the norms it has seen.

    Attributes:
        name: As callers write it.
        refresh_every: Steps between two full passes; None: there are none.
        measured: Whether it charges norms, so that a full pass says something.
        enforced: Whether gradients are clipped to caps, which a step must not break.
        certifiable: Whether a certificate may rest on its label.
        probed: Whether a look at some rows can take its label away; else it is an estimate anyway.
        whole_rows: Whether it matters that an item is the same when it is asked for again.
        attributed: Whether a strong label of its own speaks of rows by their place.
        fixed_batches: Whether it is for batches that are not drawn by coins.
    """

    refresh_every: int | None = None

    name: ClassVar[str] = ""
    measured: ClassVar[bool] = True
    enforced: ClassVar[bool] = False
    certifiable: ClassVar[bool] = False
    probed: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False
    attributed: ClassVar[bool] = False
    fixed_batches: ClassVar[bool] = False

    @property
    def judged_as(self) -> str:
        """The policy by whose rules of `evidence.py` labels are judged."""
        return self.name

    def history(self, charges: Charger) -> list[Fact]:
        """Return what the policy's own history takes away from the label."""
        return []

    def charge(self, charges: Charger, step: Step, verdict: Verdict) -> Verdict:
        """Charge everyone for one step; return what may be claimed for it."""
        return charges.at_norms(step, verdict)

    def require_clipping(self, clipping: str) -> None:
        """Raise for a kind of clipping under which the policy bounds nothing."""

    def require_batches(self, *, poisson_sampling: bool) -> None:
        """Raise for the kind of batches that it is not for.

        Raises:
            UnsupportedError: Says which go together.
        """
        if poisson_sampling == self.fixed_batches:
            raise UnsupportedError(
                "Expected poisson_sampling=False with norm_policy='participation' and only there, "
                f"got {poisson_sampling=} with norm_policy={self.name!r}. Shuffled batches get no "
                "amplification by sampling: only who is in the batch is charged. Change one of the "
                "two, or use another engine for the other kind of batches."
            )


class LastSeen(NormPolicy):
    """The norm of the last batch that an instance was in."""

    name = "last_seen"


class Refresh(NormPolicy):
    """Likewise, with a full pass every so many steps."""

    name = "refresh"

    @property
    def judged_as(self) -> str:
        """A full pass at every step is "full"."""
        return Full.name if self.refresh_every == 1 else self.name

    @property
    def probed(self) -> bool:  # type: ignore[override]
        """As "full", if it is that."""
        return self.refresh_every == 1

    @property
    def whole_rows(self) -> bool:  # type: ignore[override]
        """As "full", if it is that."""
        return self.refresh_every == 1

    @property
    def attributed(self) -> bool:  # type: ignore[override]
        """As "full", if it is that."""
        return self.refresh_every == 1


class Full(NormPolicy):
    """A full pass at every step: what every instance's gradient really was."""

    name, probed, whole_rows, attributed = "full", True, True, True


class WorstCase(NormPolicy):
    """Everybody's gradient may be as long as the clip bound."""

    name, measured, certifiable, probed = "worst_case", False, True, True

    def history(self, charges: Charger) -> list[Fact]:
        """Return the fact that another policy has moved the levels before."""
        return [] if charges.norms.seen is None else [Fact("levels_changed")]

    def charge(self, charges: Charger, step: Step, verdict: Verdict) -> Verdict:
        """Charge everyone the clip bound, or as many as may be in the step."""
        if charges.norms.seen is not None:  # a fork of an engine that had moved the levels
            accountant = charges.accountant
            accountant.observe_all(np.full(accountant.num_instances, accountant.levels[-1]))
        if verdict.unamplified or max(step.record.draws, step.record.copies) > 1:
            charges.at_top(step, verdict)
        else:
            charges.at_levels(step, verdict)
        return verdict


class Capped(NormPolicy):
    """Each instance is clipped to its own cap, or to 0 once its budget is spent."""

    name, measured, enforced = "capped", False, True
    certifiable, probed, attributed = True, True, True

    def history(self, charges: Charger) -> list[Fact]:
        """Return the fact that caps were changed after the first step."""
        return [Fact("caps_changed")] if charges.caps_changed else []

    def charge(self, charges: Charger, step: Step, verdict: Verdict) -> Verdict:
        """Charge everyone their cap."""
        charges.at_levels(step, verdict)
        return verdict

    def require_clipping(self, clipping: str) -> None:
        """Raise for other than flat clipping.

        Raises:
            UnsupportedError: Says what a cap bounds.
        """
        if clipping == "adaptive":
            raise UnsupportedError(
                "Expected flat clipping with norm_policy='capped', got clipping='adaptive'. The "
                "count that adaptive clipping releases is not bounded by a cap."
            )
        if clipping != "flat":
            raise UnsupportedError(
                f"Expected clipping='flat' with norm_policy='capped', got {clipping=}. A cap "
                "bounds the whole gradient of an instance."
            )


class Participation(NormPolicy):
    """Whoever is in a batch is charged, without amplification by sampling."""

    name, fixed_batches = "participation", True
    probed, whole_rows, attributed = True, True, True

    def charge(self, charges: Charger, step: Step, verdict: Verdict) -> Verdict:
        """Charge the rows of the batch."""
        charges.participants(step, verdict)
        return verdict


_POLICIES: dict[str, type[NormPolicy]] = {
    kind.name: kind for kind in (WorstCase, LastSeen, Refresh, Full, Capped, Participation)
}
NORM_POLICIES = tuple(_POLICIES)
DEFAULT, DEFAULT_OF_FIXED = LastSeen.name, Participation.name


def policy_of(
    norm_policy: str,
    *,
    refresh_every: int | None = None,
    caps: object | None = None,
    budget: object | None = None,
) -> NormPolicy:
    """Return the policy of a name.

    Raises:
        ValueError, TypeError: An unknown name, or arguments that do not fit it.
    """
    kind = _POLICIES[check.choice("norm_policy", norm_policy, NORM_POLICIES)]
    if (kind is Refresh) != (refresh_every is not None):
        raise ValueError(
            f"Expected refresh_every with norm_policy='refresh' only, got {refresh_every=} with "
            f"{norm_policy=}. Pass both or neither."
        )
    given = [n for n, v in (("caps", caps), ("budget", budget)) if v is not None]
    if kind.enforced != bool(given):
        raise ValueError(
            f"Expected caps or budget with norm_policy='capped' only, got "
            f"{' and '.join(given) or 'none'} with {norm_policy=}. Pass them together."
        )
    if kind is Full:
        return Full(1)
    if refresh_every is None:
        return kind()
    return kind(check.integer("refresh_every", refresh_every, low=1))
