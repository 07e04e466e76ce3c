"""What one training step charges each instance: the policies that turn norms into sensitivities.

Here captured norms meet the accountant, as plain arrays. Knows no optimizer, loader or engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import _validate as check
from ._validate import FloatArray, IntArray
from .accounting import PerInstanceAccountant
from .capture.recorder import StepRecord
from .capture.sweep import Sweep
from .errors import LedgerError

NORM_POLICIES = ("worst_case", "last_seen", "refresh", "full", "capped", "participation")

# Float32 norms err by a few units in the last place; charged sensitivities are raised by as many.
_ROUNDING_STEPS = 16
# Norms of the same batch by two exact methods agree far better than this in float32.
_SAME_NORM = 1e-3


def checked_policy(
    norm_policy: str, *, refresh_every: int | None, caps: object | None, budget: object | None
) -> tuple[str, int | None]:
    """Return the policy and its refresh interval, or raise if its arguments do not fit it."""
    policy = check.choice("norm_policy", norm_policy, NORM_POLICIES)
    if (policy == "refresh") != (refresh_every is not None):
        raise ValueError(
            f"Expected refresh_every with norm_policy='refresh' only, got {refresh_every=} with "
            f"{norm_policy=}. Pass both or neither."
        )
    given = [n for n, v in (("caps", caps), ("budget", budget)) if v is not None]
    if (policy == "capped") != bool(given):
        raise ValueError(
            f"Expected caps or budget with norm_policy='capped' only, got "
            f"{' and '.join(given) or 'none'} with {norm_policy=}. Pass them together."
        )
    if policy == "full":
        return policy, 1
    if refresh_every is not None:
        refresh_every = check.integer("refresh_every", refresh_every, low=1)
    return policy, refresh_every


def raised(values: FloatArray, *, rounding: float) -> FloatArray:
    """Raise sensitivities by a few rounding errors, to at most 1; exact zeros stay zero."""
    return np.minimum(values * (1.0 + _ROUNDING_STEPS * rounding), 1.0)


class Charger:
    """Charges a PerInstanceAccountant once per noisy step, by one norm policy.

    Guarantee: the label of every charge is at most what was measured. worst_case and capped:
        "bound" (caps changed during the run without a budget: "output_specific"). full, and refresh
        at every step, with a deterministic model: "output_specific". participation with a
        deterministic forward pass: "output_specific". Everything else, and adaptive clipping
        always: "estimate".
    """

    def __init__(
        self, accountant: PerInstanceAccountant, *, norm_policy: str, refresh_every: int | None
    ) -> None:
        self.accountant = accountant
        self.norm_policy = norm_policy
        self.refresh_every = refresh_every
        self._norms: FloatArray | None = None  # last known per instance; inf: never seen
        self._rounding = 0.0
        self._max_grad_norm = 0.0  # clip bound that the accountant's levels are in units of
        self._since_refresh = 0
        self._caps_changed = False
        self._released_count = 0.0
        self.update = ""  # how a noisy gradient becomes a step; see `note_update`
        self._warned: set[str] = set()

    def charge(
        self,
        record: StepRecord,
        *,
        noise_std: float,
        sample_rate: float,
        measure: Callable[[], tuple[Sweep, bool]],
        random_forward: Callable[[], bool],
        released_count: float = 0.0,
    ) -> None:
        """Charge everyone for one step.

        Args:
            record: Rows, norms and clip bound of the step.
            noise_std: Std of the noise that was added to the gradient sum.
            sample_rate: Probability that an instance was drawn.
            measure: Runs a full pass at the current parameters; also says whether the training
                forward is random.
            random_forward: Says the latter without a pass.
            released_count: Shift of a count that adaptive clipping releases at this step, which
                every drawn instance moves by 1: 1 / its noise std, in units of the gradient noise.
        """
        noise_multiplier = noise_std / record.max_grad_norm
        self._rounding = max(self._rounding, record.rounding)
        self._released_count = released_count
        everyone: dict[str, Any] = {"indices": [], "sensitivities": []}
        kernel = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate}
        if self.norm_policy == "capped":
            label = "output_specific" if self._caps_changed else "bound"
            self.accountant.step(**everyone, **kernel, guarantee=label)
            return
        if self.norm_policy == "worst_case":
            label = "bound"
            if self._norms is not None:  # a fork of an engine that had moved the levels
                top = self.accountant.levels[-1]
                self.accountant.observe_all(np.full(self.accountant.num_instances, top))
                label = "output_specific"
            label = "estimate" if released_count else label
            self.accountant.step(**everyone, **kernel, guarantee=label)
            return
        self._follow_clip_bound(record.max_grad_norm)
        if self.norm_policy == "participation":
            self._participate(record, noise_multiplier, random_forward)
            return
        label, refreshed = "estimate", False
        if self.refresh_every is not None:
            refreshed = self._since_refresh % self.refresh_every == 0
            label = self._refresh(record, measure) if refreshed else label
            self._since_refresh += 1
        if record.indices is None:
            self._warn_unattributed(record)
            self.accountant.step(indices=None, sensitivities=None, **kernel, guarantee=label)
            return
        if refreshed:
            self.accountant.step(**everyone, **kernel, guarantee=label)  # just measured
            return
        self._known()[record.indices] = record.norms
        self.accountant.step(
            indices=record.indices,
            sensitivities=self._sensitivities(record.norms),
            **kernel,
            guarantee=label,
        )

    def set_caps(self, caps: FloatArray) -> None:
        """Charge at other caps from the next step on; they must be enforced from there on too."""
        self.accountant.set_caps(caps)
        # Under a budget caps need only be known before each step; without, before the run.
        self._caps_changed = self.accountant.steps > 0 and not self.accountant.budgeted

    def observe(self, found: Sweep, *, max_grad_norm: float) -> None:
        """Set every measured instance's level from a full pass."""
        self._max_grad_norm = max_grad_norm
        self._rounding = max(self._rounding, float(np.finfo(np.float32).eps))
        self._known()[found.indices] = found.norms
        self._set_levels()

    def note_update(self, update: str) -> None:
        """Remember how this step moves the model; "varied" once two steps did it differently.

        Certificates of the last model count every step at the settings of the last one.
        """
        if self.accountant.steps == 0 or self.update == "anew":
            self.update = update
        elif self.update != update:
            self.update = "varied"

    def note_new_model(self) -> None:
        """A model is trained from the start: what moved the old one is over."""
        self.update = "anew"

    def forget(self, rows: IntArray) -> None:
        """Charge these rows no more, and drop what was measured of them."""
        self.accountant.forget(rows)
        if self._norms is not None:
            self._norms[rows] = np.inf

    def active_rows(self) -> IntArray:
        """Return the rows still in the training set."""
        return np.flatnonzero(self.accountant.active)

    # --- inside -------------------------------------------------------------------------------

    def _known(self) -> FloatArray:
        if self._norms is None:
            self._norms = np.full(self.accountant.num_instances, np.inf)
        return self._norms

    def _sensitivities(self, norms: FloatArray) -> FloatArray:
        bound = self._max_grad_norm
        gradient = raised(np.minimum(norms, bound) / bound, rounding=self._rounding)
        if not self._released_count:
            return gradient
        # Gradient and count are released with independent noise: one vector, one joint shift.
        joint = np.hypot(gradient, self._released_count)
        return np.minimum(joint, self.accountant.levels[-1])

    def _participate(
        self, record: StepRecord, noise_multiplier: float, random_forward: Callable[[], bool]
    ) -> None:
        """Charge the batch's rows only: fixed batches are not amplified by sampling."""
        rows = record.indices
        label = "estimate" if random_forward() or self._released_count else "output_specific"
        if rows is None:
            self._warn_unattributed(record)
            sensitivities = None
        else:
            self._known()[rows] = record.norms
            sensitivities = self._sensitivities(record.norms)
        self.accountant.participate(
            indices=rows, sensitivities=sensitivities, noise_multiplier=noise_multiplier,
            guarantee=label,
        )  # fmt: skip

    def _warn_unattributed(self, record: StepRecord) -> None:
        self.warn(
            "unattributed",
            "A step could not be matched with rows of the data set "
            f"({record.mismatch}): every instance is charged the worst case for it. "
            "See per_instance.unattributed_steps.",
        )

    def _set_levels(self) -> None:
        self.accountant.observe_all(self._sensitivities(self._known()))

    def _follow_clip_bound(self, max_grad_norm: float) -> None:
        """Levels are in units of the clip bound: restate them when a schedule changes it."""
        changed = self._max_grad_norm not in (0.0, max_grad_norm)
        self._max_grad_norm = max_grad_norm
        if changed and self._norms is not None and self.norm_policy != "participation":
            self._set_levels()

    def _refresh(self, record: StepRecord, measure: Callable[[], tuple[Sweep, bool]]) -> str:
        """Measure everyone at the current parameters; return what may be claimed for this step."""
        found, random_forward = measure()
        known = self._known()
        known[found.indices] = found.norms
        exact = found.deterministic and not random_forward
        if record.indices is not None:
            swept = known[record.indices]
            if exact and not np.allclose(
                swept, record.norms, rtol=_SAME_NORM, atol=_SAME_NORM * record.max_grad_norm
            ):
                exact = False
                self.warn(
                    "criterion",
                    "The full pass finds other gradient norms than training did for the same "
                    "instances: refreshed norms are estimates. Pass make_private the criterion "
                    "that you train with.",
                )
            known[record.indices] = np.maximum(swept, record.norms)
        self._set_levels()
        return "output_specific" if exact and self.refresh_every == 1 else "estimate"

    def warn(self, kind: str, message: str) -> None:
        """Warn once per kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # --- saved form ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything later charges depend on: arrays and plain values."""
        return {
            "ledger": self.accountant.state_dict(),
            "norms": None if self._norms is None else self._norms.copy(),
            "rounding": self._rounding,
            "max_grad_norm": self._max_grad_norm,
            "since_refresh": self._since_refresh,
            "caps_changed": self._caps_changed,
            "released_count": self._released_count,
            "update": self.update,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            LedgerError: It does not fit these instances. Nothing is changed.
        """
        norms = state["norms"]
        if norms is not None and np.shape(norms) != (self.accountant.num_instances,):
            raise LedgerError(
                f"Expected norms of {self.accountant.num_instances} instances, got shape "
                f"{np.shape(norms)}. Load the ledger of the same data set."
            )
        self.accountant.load_state_dict(state["ledger"])
        self._norms = None if norms is None else np.array(norms, dtype=np.float64)
        self._rounding = float(state["rounding"])
        self._max_grad_norm = float(state["max_grad_norm"])
        self._since_refresh = int(state["since_refresh"])
        self._caps_changed = bool(state["caps_changed"])
        self._released_count = float(state["released_count"])
        self.update = str(state.get("update", ""))  # "": not known, where there are steps
