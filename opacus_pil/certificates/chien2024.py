"""The Langevin unlearning numbers of Chien et al. (2024), in the authors' own constants.

Kept to compare with what they published. It does not use the sharp rate, which is more than twice
theirs, nor the tighter conversion: those are `LangevinCertificate.strongly_convex`, whose constants
for the same setting are `sharp_constants`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from .. import _validate
from .._validate import FloatArray
from ..accounting.quadrature import SMALLEST
from ..errors import CertificateError, OutOfReachError
from .assumptions import Assumption, Context, assumption, checked_context
from .certificate import Certificate, OnProbe

_ROUND_UP = 1.0 + 1e-14  # a dozen roundings; the exponential adds its exponent's ulps
_ROUND_DOWN = 1.0 - 1e-15
_POSITIVE = ("strong_convexity", "smoothness", "step_size", "langevin_sigma")


@dataclass(frozen=True, kw_only=True)
class Chien2024Certificate(Certificate):
    """Full-batch projected noisy gradient descent on a strongly convex loss, as published.

    Guarantee: D_α(unlearned ‖ stationary law of the retained data) is at most
        e^{−Kηm/α}·4αS²M²/(mσ²n²), both directions, for S records *replaced*. Loose: the exact
        value for two Gaussian chains is about half as large at K = 0 and then falls like e^{−2Kηm}.

    Args:
        num_instances: n, size of the training set. >= 1.
        num_deleted: S, records replaced. In [0, num_instances].
        strong_convexity: m of the averaged loss. > 0.
        smoothness: L of the averaged loss. >= m.
        step_size: η. > 0, with η(m + L) <= 2.
        langevin_sigma: σ; a step adds N(0, 2ησ²) to every parameter. > 0.
        gradient_bound: M, norm bound of one record's gradient, the regulariser excluded. >= 0.
        step_grid: `steps_for` tries K = 1, 1 + step_grid, 1 + 2·step_grid, …; the published K
            have step_grid = 10. >= 1.
        context: Codes of further assumptions (`certificates.sentences.CONTEXT`).

    Raises:
        ValueError: A value outside its range.
        CertificateError: η(m + L) > 2, where the step is not known to contract by 1 − ηm; free
            text or an unknown code in context.

    Edge cases of `.rdp` (first match wins):
        num_deleted = 0 or gradient_bound = 0   0
        decayed below 1e-290                    1e-290

    Source: Chien, Wang, Chen, Li (2024), arXiv:2401.10371, rate and conversion as in the authors'
        code (Graph-COM/Langevin_unlearning at 5f8e712).
    """

    num_instances: int
    num_deleted: int
    strong_convexity: float
    smoothness: float
    step_size: float
    langevin_sigma: float
    gradient_bound: float
    step_grid: int = 1
    context: Context = ()

    # The data sets may swap roles: both laws have the constants, and the sharp value at the start,
    # symmetric in them, is below the authors'.
    two_sided = True
    reference = "stationary"

    def __post_init__(self) -> None:
        """Check every field."""
        size = _validate.integer("num_instances", self.num_instances, low=1)
        checked: dict[str, object] = {
            "num_instances": size,
            "num_deleted": _validate.integer("num_deleted", self.num_deleted, low=0, high=size),
            "step_grid": _validate.integer("step_grid", self.step_grid, low=1),
            "gradient_bound": _validate.real("gradient_bound", self.gradient_bound, low=0.0),
        }
        for name in _POSITIVE:
            checked[name] = _validate.real(name, getattr(self, name), low=0.0, open_low=True)
        checked["context"] = checked_context(self.context)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.strong_convexity > self.smoothness:
            raise ValueError(
                f"Expected strong_convexity <= smoothness, got strong_convexity="
                f"{self.strong_convexity!r} and smoothness={self.smoothness!r}. Check which is "
                "which."
            )
        total = self.strong_convexity + self.smoothness
        if self.step_size * total > 2.0:
            raise CertificateError(
                f"Expected step_size <= 2 / (strong_convexity + smoothness) = {2.0 / total:.6g}, "
                f"got step_size={self.step_size!r}. Lower it: the step is not known to contract "
                "by 1 - ηm."
            )

    @property
    def setting(self) -> tuple[Assumption, ...]:
        """The assumptions on data, loss and steps."""
        return (
            assumption(
                "replaced_records",
                num_instances=self.num_instances,
                strong_convexity=self.strong_convexity,
                smoothness=self.smoothness,
                num_deleted=self.num_deleted,
                gradient_bound=self.gradient_bound,
            ),
            assumption(
                "full_batch_descent", step_size=self.step_size, langevin_sigma=self.langevin_sigma
            ),
            assumption("stationary_start"),
        )

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        return (
            *self.setting,
            assumption("published_rate"),
            assumption("step_grid", step_grid=self.step_grid),
            assumption("not_adaptive"),
            *self._of_context(),
        )

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats after `steps` steps, shape (orders,)."""
        asked = _validate.orders(orders)
        exponent = _validate.integer("steps", steps, low=0) * self.step_size * self.strong_convexity
        if self.num_deleted == 0 or self.gradient_bound == 0.0:
            return np.zeros_like(asked)
        per_record = self.num_deleted * self.gradient_bound / self.num_instances
        ratio = per_record / self.langevin_sigma
        with np.errstate(under="ignore", over="ignore"):
            start = asked * (4.0 * ratio * ratio / self.strong_convexity)
            value = np.exp(-exponent / asked) * start * _ROUND_UP
            return np.maximum(value * (1.0 + 1e-15 * exponent / asked), SMALLEST)

    def epsilon(self, *, delta: float, steps: int) -> float:
        """ε by the authors' conversion, D_α + log(1/δ)/(α − 1) at the α their search finds."""
        return self._minimum(delta, steps)[0]

    def order(self, *, delta: float, steps: int) -> float:
        """The order α at which `epsilon` is attained."""
        return self._minimum(delta, steps)[1]

    def steps_for(
        self,
        *,
        epsilon: float,
        delta: float,
        max_steps: int = 1_000_000,
        on_probe: OnProbe | None = None,
    ) -> int:
        """Smallest K on the grid 1, 1 + step_grid, … whose reported ε is at most `epsilon`.

        Guarantee: `self.epsilon(delta=delta, steps=K) <= epsilon` for the returned K, and not for
            the number before it on the grid.

        Args:
            epsilon: Target in nats, finite, >= 0.
            delta: In (0, 1).
            max_steps: The most steps worth considering, an integer >= 1.
            on_probe: Called with (steps, ε) after each evaluation.

        Returns:
            K in [1, max_steps].

        Raises:
            CertificateError: No K on the grid up to max_steps reaches the target.
            ValueError: An argument outside its range.
        """
        epsilon, delta = _validate.epsilon(epsilon), _validate.delta(delta)
        max_steps = _validate.integer("max_steps", max_steps, low=1)
        low, high = -1, (max_steps - 1) // self.step_grid
        best = self._probed(delta, 1 + high * self.step_grid, on_probe)
        if best > epsilon:
            raise OutOfReachError(
                f"Expected a target that unlearning reaches within max_steps={max_steps}, got "
                f"epsilon={epsilon!r} at delta={delta!r}; the best is epsilon={best:.6g}. "
                "Relax the target or retrain instead.",
                best,
                max_steps,
            )
        while high - low > 1:  # D falls in K at every order, hence ε does
            middle = (low + high) // 2
            if self._probed(delta, 1 + middle * self.step_grid, on_probe) <= epsilon:
                high = middle
            else:
                low = middle
        return 1 + high * self.step_grid

    def _minimum(self, delta: float, steps: int) -> tuple[float, float]:
        """Smallest ε over the order, and the order. The objective is convex in it."""
        log_term = -math.log(_validate.delta(delta))
        steps = _validate.integer("steps", steps, low=0)

        def objective(order: float) -> float:
            return float(self.rdp([order], steps=steps)[0]) + log_term / (order - 1.0)

        # Bounds and default tolerance are the authors'; any order the search stops at is valid.
        found = minimize_scalar(objective, bounds=(1.0, 10_000.0), method="bounded")
        return float(found.fun) * _ROUND_UP, float(found.x)


class SharpConstants(NamedTuple):
    """What a Langevin certificate needs, each rounded to the safe side."""

    rdp_per_order: float
    lipschitz: float
    noise_std: float
    lsi_constant: float


def sharp_constants(setting: Chien2024Certificate) -> SharpConstants:
    """Constants of the stationary laws: of two Gaussian chains a shift apart, which attain them.

    ℓ = 1 − ηm, C = ζ²/(1 − ℓ²) is the fixed point of C → ℓ²C + ζ², and D_α = αZ²/(2C) with
    Z = 2ηSM/(n(1 − ℓ)) by contraction for T → ∞ (Bok, Su, Altschuler 2024, arXiv:2403.00278).
    """
    gap = setting.step_size * setting.strong_convexity * _ROUND_DOWN  # 1 − ℓ
    variance = 2.0 * setting.step_size * setting.langevin_sigma**2
    per_record = setting.num_deleted * setting.gradient_bound / setting.num_instances
    ratio = per_record / setting.langevin_sigma
    # Z²/(2C) = (2ηSM/n)²·(2 − gap)/(2ζ²·gap) = (SM/(nσ))²·η·(2 − gap)/gap
    slope = ratio * ratio * setting.step_size * (2.0 - gap) / gap * _ROUND_UP
    return SharpConstants(
        rdp_per_order=max(slope, SMALLEST) if per_record > 0.0 else 0.0,
        lipschitz=math.nextafter(1.0 - gap, 2.0),
        noise_std=math.sqrt(variance) * _ROUND_DOWN,
        lsi_constant=variance / (gap * (2.0 - gap)) * _ROUND_UP,
    )
