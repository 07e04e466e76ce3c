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
from .capture.norms import StepRecord
from .capture.sweep import Sweep
from .errors import LedgerError, UnsupportedError

NORM_POLICIES = ("worst_case", "last_seen", "refresh", "capped")

# Float32 norms err by a few units in the last place; charged sensitivities are raised by as many.
_ROUNDING_STEPS = 16
# Norms of the same batch by two exact methods agree far better than this in float32.
_SAME_NORM = 1e-3


def checked_policy(
    norm_policy: str, *, refresh_every: int | None, caps: object | None
) -> tuple[str, int | None]:
    """Return the policy and its refresh interval, or raise if its arguments do not fit it."""
    if norm_policy in ("full", "participation"):
        raise UnsupportedError(
            f"Expected norm_policy to be one of {', '.join(NORM_POLICIES)}, got norm_policy="
            f"{norm_policy!r}. Use 'refresh' with refresh_every=1 for a full pass at every step."
        )
    policy = check.choice("norm_policy", norm_policy, NORM_POLICIES)
    if (policy == "refresh") != (refresh_every is not None):
        raise ValueError(
            f"Expected refresh_every with norm_policy='refresh' only, got {refresh_every=} with "
            f"{norm_policy=}. Pass both or neither."
        )
    if (policy == "capped") != (caps is not None):
        raise ValueError(
            f"Expected caps with norm_policy='capped' only, got "
            f"{'caps' if caps is not None else 'none'} with {norm_policy=}. Pass both or neither."
        )
    if refresh_every is not None:
        refresh_every = check.integer("refresh_every", refresh_every, low=1)
    return policy, refresh_every


def raised(values: FloatArray, *, rounding: float) -> FloatArray:
    """Raise sensitivities by a few rounding errors, to at most 1; exact zeros stay zero."""
    return np.minimum(values * (1.0 + _ROUNDING_STEPS * rounding), 1.0)


class Charger:
    """Charges a PerInstanceAccountant once per noisy step, by one norm policy.

    Guarantee: the label of every charge is at most what was measured. worst_case and capped:
        "bound". refresh at every step with a deterministic model: "output_specific". Everything
        else: "estimate".
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
        self._warned: set[str] = set()

    def charge(
        self,
        record: StepRecord,
        *,
        noise_std: float,
        sample_rate: float,
        measure: Callable[[], tuple[Sweep, bool]],
    ) -> None:
        """Charge everyone for one step.

        Args:
            record: Rows, norms and clip bound of the step.
            noise_std: Std of the noise that was added to the gradient sum.
            sample_rate: Probability that an instance was drawn.
            measure: Runs a full pass at the current parameters; also says whether the training
                forward is random.
        """
        noise_multiplier = noise_std / record.max_grad_norm
        self._rounding = max(self._rounding, record.rounding)
        everyone: dict[str, Any] = {"indices": [], "sensitivities": []}
        kernel = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate}
        if self.norm_policy == "capped":
            self.accountant.step(**everyone, **kernel, guarantee="bound")
            return
        if self.norm_policy == "worst_case":
            label = "bound"
            if self._norms is not None:  # a fork of an engine that had moved the levels
                self.accountant.observe_all(np.ones(self.accountant.num_instances))
                label = "output_specific"
            self.accountant.step(**everyone, **kernel, guarantee=label)
            return
        self._follow_clip_bound(record.max_grad_norm)
        label, refreshed = "estimate", False
        if self.refresh_every is not None:
            refreshed = self._since_refresh % self.refresh_every == 0
            label = self._refresh(record, measure) if refreshed else label
            self._since_refresh += 1
        if record.indices is None:
            self.warn(
                "unattributed",
                "A step could not be matched with rows of the data set "
                f"({record.mismatch}): every instance is charged the worst case for it. "
                "See per_instance.unattributed_steps.",
            )
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

    def observe(self, found: Sweep, *, max_grad_norm: float) -> None:
        """Set every measured instance's level from a full pass."""
        self._max_grad_norm = max_grad_norm
        self._rounding = max(self._rounding, float(np.finfo(np.float32).eps))
        self._known()[found.indices] = found.norms
        self._set_levels()

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
        return raised(np.minimum(norms, bound) / bound, rounding=self._rounding)

    def _set_levels(self) -> None:
        self.accountant.observe_all(self._sensitivities(self._known()))

    def _follow_clip_bound(self, max_grad_norm: float) -> None:
        """Levels are in units of the clip bound: restate them when a schedule changes it."""
        changed = self._max_grad_norm not in (0.0, max_grad_norm)
        self._max_grad_norm = max_grad_norm
        if changed and self._norms is not None:
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
