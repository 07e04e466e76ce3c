"""Noisy fine-tuning with clipped model and clipped averaged gradient, for any loss.

Does not look at the loss, the training run or the forget set: it asks for noise of the order of
the weights. Through the noise of per-sample DP-SGD on a network its ε is vacuous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..errors import CertificateError
from .assumptions import Assumption, Context, assumption, checked_context
from .certificate import Certificate
from .gaussian import gaussian_epsilon

_ROUND_UP = 1.0 + 1e-11  # a dozen roundings; the exponents K·log(1 − ηλ) cost up to 745 ulps each
_SMALLEST = 1e-300  # a smaller ρ is reported as this: its square root and shifts may underflow


@dataclass(frozen=True)
class NoisyFineTuningCertificate(Certificate):
    """θ ← (1 − ηλ)θ − η·clip(g, C1) + N(0, ζ²I) on the retain set, from a model clipped to norm C0.

    Guarantee: the fine-tuned model and one retrained in any way whatever (same model clip),
        fine-tuned alike, are at most as distinguishable, in both directions, as N(0, 1) and
        N(μ, 1), μ² = 2ρ; in particular D_α <= α·ρ. For any loss and any forget set. Attained at
        the first step, and at every step if gradient_clip = 0.

    Args:
        model_clip: C0, norm to which the model is projected before the first step. >= 0.
        gradient_clip: C1, norm to which the *averaged* batch gradient is clipped. >= 0.
        step_size: η. > 0.
        weight_decay: λ, decoupled. >= 0, with ηλ <= 1.
        noise_std: ζ, noise on the parameters per step (not on the gradient). > 0. Or a schedule,
            one value per step, >= 0 and not all 0: whatever fine-tuning on the retain set follows
            the last of them, noisy or not, is data processing and changes no number.
        initial_distance: Almost-sure bound, under a coupling, on the distance of the two models at
            the start; 2·C0 still holds beside it. >= 0, or None for 2·C0 alone.
        context: Codes of further assumptions (`certificates.sentences.CONTEXT`).

    Raises:
        ValueError: A value outside its range.
        CertificateError: ηλ > 1; free text or an unknown code in context.

    Edge cases of `.rdp` (first match wins):
        distance at the start = 0   0
        steps = 0                   inf
        no noise in the schedule's first `steps` values   inf
        ρ below 1e-300              1e-300

    Source: Koloskova et al. (2025), arXiv:2506.06985, gradient clipping, re-derived: the two runs
        share the kernel, so steps after the k-th are data processing and ρ_k holds at any K >= k.
        The Gaussian curve: Bok, Su, Altschuler (2024),
        arXiv:2403.00278, shifted interpolation; see `mu` for the proof.

    >>> certificate = NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.0, 2.0)
    >>> certificate.rdp([2.0], steps=10).round(6)  # 2·(2 + 2)²/(2·10·2²)
    array([0.4])
    """

    model_clip: float
    gradient_clip: float
    step_size: float
    weight_decay: float
    noise_std: float | Sequence[float]
    initial_distance: float | None = None
    context: Context = field(default=(), kw_only=True)

    two_sided = True

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("model_clip", "gradient_clip", "step_size", "weight_decay"):
            positive = name == "step_size"
            value = _validate.real(name, getattr(self, name), low=0.0, open_low=positive)
            object.__setattr__(self, name, value)
        cure = "Fine-tuning without noise has no certificate."
        noise: float | tuple[float, ...]
        if np.ndim(self.noise_std) == 0:
            noise = _validate.real("noise_std", self.noise_std, low=0.0, open_low=True, cure=cure)
        else:
            schedule = _validate.real_array("noise_std", self.noise_std, low=0.0, cure=cure)
            if schedule.ndim != 1 or not schedule.any():
                raise ValueError(
                    _validate.expected(
                        "noise_std",
                        "to be one value per step, not all 0,",
                        self.noise_std,
                        cure,
                    )
                )
            noise = tuple(schedule.tolist())
        object.__setattr__(self, "noise_std", noise)
        if self.initial_distance is not None:
            distance = _validate.real("initial_distance", self.initial_distance, low=0.0)
            object.__setattr__(self, "initial_distance", distance)
        object.__setattr__(self, "context", checked_context(self.context))
        if self.step_size * self.weight_decay > 1.0:
            raise CertificateError(
                f"Expected step_size * weight_decay <= 1, got step_size={self.step_size!r} and "
                f"weight_decay={self.weight_decay!r}. Lower one of them."
            )

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        start = assumption("model_clipped", model_clip=self.model_clip)
        if self.initial_distance is not None:
            start = assumption(
                "model_clipped_near",
                model_clip=self.model_clip,
                initial_distance=self.initial_distance,
            )
        if isinstance(self.noise_std, float):
            noise = assumption("constant_noise", noise_std=self.noise_std)
        else:
            least, most = min(self.noise_std), max(self.noise_std)
            values = len(self.noise_std)
            noise = assumption("noise_schedule", least=least, most=most, values=values)
        return (
            start,
            assumption(
                "averaged_gradient_clipped",
                gradient_clip=self.gradient_clip,
                step_size=self.step_size,
            ),
            assumption(
                "shrinking_model",
                weight_decay=self.weight_decay,
                factor=1.0 - self.step_size * self.weight_decay,
            ),
            noise,
            assumption("nothing_carried"),
            assumption("blind_batches"),
            assumption("reference_any_training"),
            assumption("public_settings"),
            *self._of_context(),
        )

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats after `steps` steps, shape (orders,)."""
        asked = _validate.orders(orders)
        return asked * self._rho(_validate.integer("steps", steps, low=0))

    def mu(self, steps: int) -> float:
        """Distance μ = √(2ρ) of the two unit Gaussians after `steps` steps, rounded up.

        Proof that (ε, δ) is theirs, not only Rényi: follow a third run U between the model X and
        the reference X', from U = X', with |X − U| <= z and X' to U at most N(0, 1) to N(w, 1). A
        step takes X and U to points at most z' = (1 − ηλ)z + 2ηC1 apart; moving U's by a <= z'
        towards X's before both add the *same* noise leaves |X − U| <= z' − a and, given the past,
        costs U against X' a Gaussian shift of at most a/ζ, so w² grows by a²/ζ² (adaptive
        composition, Dong, Roth, Su 2019, arXiv:1905.02383, Cor. 3.3; a mixture of shifts is no
        worse than the largest). Where z has become 0, U is X.
        """
        rho = self._rho(_validate.integer("steps", steps, low=0))
        return math.sqrt(2.0 * rho) * (1.0 + 1e-15)

    def epsilon(self, *, delta: float, steps: int) -> float:
        """Smallest ε of the exact Gaussian curve at `delta` (not through Rényi), rounded up."""
        delta = _validate.delta(delta)
        return gaussian_epsilon(self.mu(steps), delta=delta)

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
        if not isinstance(self.noise_std, float):
            return self._schedule[min(steps, len(self._schedule)) - 1]
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

    @cached_property
    def _schedule(self) -> list[float]:
        """Least ρ_k over k <= K for K = 1, 2, … along the noise schedule, rounded up.

        ρ_k is one chord, S_k²/(2W_k), of the shift and the noise variance collected until k. The
        hull at k costs more where that chord is infeasible, but then its first vertex j < k has
        S_j <= S_k and S_j/W_j <= S_k/W_k: the least chord is feasible, hence is the least hull.
        """
        assert not isinstance(self.noise_std, float)
        decay = min(1.0, 1.0 - self.step_size * self.weight_decay + math.ulp(1.0))
        push = 2.0 * self.step_size * self.gradient_clip
        scale = max(self.noise_std)  # noise in units of its maximum: squares do not overflow
        shift, variance, least = self._start(), 0.0, math.inf
        result: list[float] = []
        for noise in self.noise_std:
            shift = decay * shift + push
            variance = decay * decay * variance + (noise / scale) ** 2
            if variance > 0.0:
                ratio = shift / scale / math.sqrt(variance)
                # the sums lose some ulps per step
                slack = 1.0 + 8.0 * (len(result) + 16) * math.ulp(1.0)
                least = min(least, max(ratio * ratio / 2.0 * slack, _SMALLEST))
            result.append(least)
        return result

    def _raw_rho(self, steps: int) -> float:
        """ρ when exactly the first `steps` steps hide the whole shift, rounded up."""
        assert isinstance(self.noise_std, float)
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
        return max(ratio * ratio / (2.0 * variance) * _ROUND_UP, _SMALLEST)
