"""Noisy fine-tuning with clipped model and clipped averaged gradient, for any loss.

Does not look at the loss, the training run or the forget set: it asks for noise of the order of
the weights. Through the noise of per-sample DP-SGD on a network its ε is vacuous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..errors import CertificateError
from .record import Certificate

_ROUND_UP = 1.0 + 1e-11  # a dozen roundings; the exponents K·log(1 − ηλ) cost up to 745 ulps each


@dataclass(frozen=True)
class NoisyFineTuningCertificate(Certificate):
    """θ ← (1 − ηλ)θ − η·clip(g, C1) + N(0, ζ²I) on the retain set, from a model clipped to norm C0.

    Guarantee: D_α = α·ρ bounds both directions between the fine-tuned model and one retrained in
        any way whatever (same model clip), fine-tuned alike; for any loss and any forget set.

    Args:
        model_clip: C0, norm to which the model is projected before the first step. >= 0.
        gradient_clip: C1, norm to which the *averaged* batch gradient is clipped. >= 0.
        step_size: η. > 0.
        weight_decay: λ, decoupled. >= 0, with ηλ <= 1.
        noise_std: ζ, noise on the parameters per step (not on the gradient). > 0.
        initial_distance: Almost-sure bound, under a coupling, on the distance of the two models at
            the start; 2·C0 still holds beside it. >= 0, or None for 2·C0 alone.

    Raises:
        ValueError: A value outside its range.
        CertificateError: ηλ > 1.

    Edge cases of `.rdp` (first match wins):
        distance at the start = 0   0
        steps = 0                   inf

    Source: Koloskova et al. (2025), arXiv:2506.06985, gradient clipping, re-derived: the two runs
        share the kernel, so steps after the k-th are data processing and ρ_k holds at any K >= k.

    >>> certificate = NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.0, 2.0)
    >>> certificate.rdp([2.0], steps=10).round(6)  # 2·(2 + 2)²/(2·10·2²)
    array([0.4])
    """

    model_clip: float
    gradient_clip: float
    step_size: float
    weight_decay: float
    noise_std: float
    initial_distance: float | None = None

    two_sided = True

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("model_clip", "gradient_clip", "step_size", "weight_decay", "noise_std"):
            positive = name in ("step_size", "noise_std")
            cure = "Fine-tuning without noise has no certificate." if name == "noise_std" else ""
            value = _validate.real(name, getattr(self, name), low=0.0, open_low=positive, cure=cure)
            object.__setattr__(self, name, value)
        if self.initial_distance is not None:
            distance = _validate.real("initial_distance", self.initial_distance, low=0.0)
            object.__setattr__(self, "initial_distance", distance)
        if self.step_size * self.weight_decay > 1.0:
            raise CertificateError(
                f"Expected step_size * weight_decay <= 1, got step_size={self.step_size!r} and "
                f"weight_decay={self.weight_decay!r}. Lower one of them."
            )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """One plain sentence per assumption, with its numbers."""
        start = f"Before the first step the model is projected to norm {self.model_clip:g}"
        if self.initial_distance is not None:
            start += (
                f", and under a coupling the two models are almost surely at most "
                f"{self.initial_distance:g} apart"
            )
        return (
            start + "; so is the retrained one.",
            f"At each step the averaged batch gradient (not each sample's) is clipped to norm "
            f"{self.gradient_clip:g} and multiplied by the step size {self.step_size:g}.",
            f"Weight decay {self.weight_decay:g} is decoupled: the model shrinks by the factor "
            f"{1.0 - self.step_size * self.weight_decay:g} per step.",
            f"Each step adds fresh Gaussian noise of standard deviation {self.noise_std:g} to "
            "every parameter.",
            "No momentum and no other state is carried between unlearning steps.",
            "Batches come from the retained data by a rule that does not look at the model, so "
            "that both runs can draw the same ones.",
            "The reference is any model trained without the forgotten instances, then fine-tuned "
            "by the same steps.",
            "Step size, clips, noise and the number of steps do not depend on the forgotten data.",
        )

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats after `steps` steps, shape (orders,)."""
        asked = _validate.orders(orders)
        return asked * self._rho(_validate.integer("steps", steps, low=0))

    def _start(self) -> float:
        """Distance of the two models before the first step."""
        clipped = 2.0 * self.model_clip
        # Projection to a ball brings no two points further apart: both bounds hold together.
        return clipped if self.initial_distance is None else min(clipped, self.initial_distance)

    def _rho(self, steps: int) -> float:
        """Least raw ρ_k over k <= steps: once merged at k, two runs of one kernel stay merged."""
        if self._start() == 0.0:
            return 0.0
        if steps == 0:
            return math.inf
        turn = self._turning_point()
        if turn >= steps:
            return self._raw_rho(steps)
        near = {min(max(math.floor(turn) + i, 1), steps) for i in (-1, 0, 1, 2)}
        return min(self._raw_rho(k) for k in near)

    def _turning_point(self) -> float:
        """Real k up to which raw ρ_k falls and after which it rises.

        With x = r^k, r = 1 − ηλ, ρ is proportional to (A + Bx)²/(1 − x²), A = 2C1/λ, B = D − A;
        the derivative in x has the sign of B + Ax, which is zero at x = 1 − Dλ/(2C1).
        """
        distance, per_step = self._start(), 2.0 * self.step_size * self.gradient_clip
        decay = self.step_size * self.weight_decay
        if per_step == 0.0 or distance * decay >= per_step:
            return math.inf
        if decay == 0.0:
            return distance / per_step
        if decay == 1.0:
            return 1.0  # x = 0 from the first step on: ρ is constant
        return math.log1p(-distance * decay / per_step) / math.log1p(-decay)

    def _raw_rho(self, steps: int) -> float:
        """ρ when exactly the first `steps` steps hide the whole shift, rounded up."""
        decay = self.step_size * self.weight_decay
        if decay == 0.0:
            power, length, variance = 1.0, float(steps), float(steps)
        elif decay == 1.0:
            power, length, variance = 0.0, 1.0, 1.0
        else:
            log_power = steps * math.log1p(-decay)
            power = math.exp(log_power)
            length = -math.expm1(log_power) / decay  # Σ_{j<K} r^j
            variance = -math.expm1(2.0 * log_power) / (decay * (2.0 - decay))  # Σ_{j<K} r^{2j}
        shift = self._start() * power + 2.0 * self.step_size * self.gradient_clip * length
        ratio = shift / self.noise_std
        return max(ratio * ratio / (2.0 * variance) * _ROUND_UP, math.ulp(0.0))
