"""Unlearning by contraction: strongly convex or convex training with noise at every step.

Does not know the loss: it is given how far one step brings two models together, how far the
forget set pushes them apart, and the noise. `one_output_glm` derives these three from the settings
of a full-batch DP-SGD run.
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
from .assumptions import Assumption, Context, Span, assumption, checked_context
from .capped_glm import CappedGlm
from .certificate import Certificate
from .gaussian import gaussian_delta, gaussian_epsilon
from .hull import Hull, lower_hull
from .of_capped_glm import OfCappedGlm


@dataclass(frozen=True)
class ContractionCertificate(OfCappedGlm, Certificate):
    """Two noisy runs that share all steps but the forget set's shifts become indistinguishable.

    Guarantee: unlearned and retrained model are at most as distinguishable, in both directions, as
        N(0, 1) and N(μ, 1), with μ² = min Σ a_t²/ζ_t² subject to z_0 = initial_distance,
        z_t = c_t·z_{t−1} + s_t − a_t >= 0, z_N = 0. μ does not grow with the number of steps: a
        plan that ends with z = 0 stays there for free. Exact for linear-Gaussian chains whose
        shifts are collinear and whose hull is one chord.

    Args:
        contraction: c_t, Lipschitz constant of the noiseless step. Scalar (every training step and
            unlearning) or (training_steps,). >= 0, above 1 allowed.
        noise_std: ζ_t, noise on the parameters per step. Scalar or (training_steps,). >= 0.
        shifts: (training_steps,) s_t, the most by which the forget set moves the result of a
            training step, over all models. >= 0.
        initial_distance: Almost-sure bound, under a coupling, on the distance of the two runs
            before the first step. >= 0.
        unlearning_contraction: c of every unlearning step. Needed where contraction is an array.
        unlearning_noise_std: ζ of every unlearning step. Needed where noise_std is an array.
        first_unlearning_noise_std: ζ of the first unlearning step where it is another one; see
            `burst.with_burst`.
        context: Codes of further assumptions (`certificates.sentences.CONTEXT`), from whoever
            derived the constants.

    Raises:
        ValueError: A value outside its range, lengths that differ, a missing unlearning value.
        CertificateError: Free text or an unknown code in context.

    Edge cases of `mu` (first match wins):
        no positive shift or initial distance    0
        contraction 0 in an unlearning step      0
        no noise after the last positive shift   inf
        smaller than 1e-150                      1e-150

    Source: Bok, Su, Altschuler (2024), arXiv:2403.00278 (shifted interpolation), there for constant
        c, s and ζ; here μ by the lower hull of (W_t, S_t), because the one chord S_N/√W_N is below
        the truth where it passes above a point.

    >>> ContractionCertificate(0.9, 1.0, shifts=(0.0, 0.0, 1.0)).mu(0).__round__(9)
    1.0
    """

    contraction: float | Sequence[float]
    noise_std: float | Sequence[float]
    shifts: Sequence[float] = field(default=(), repr=False)
    initial_distance: float = 0.0
    unlearning_contraction: float | None = None
    unlearning_noise_std: float | None = None
    first_unlearning_noise_std: float | None = None
    context: Context = field(default=(), kw_only=True)

    two_sided = True

    def __post_init__(self) -> None:
        """Check every field; sequences become tuples."""
        shifts = _validate.real_array("shifts", self.shifts, low=0.0)
        if shifts.ndim != 1:
            raise ValueError(
                _validate.expected("shifts", "to be one value per training step", self.shifts)
            )
        checked: dict[str, object] = {"shifts": tuple(shifts.tolist())}
        for name in ("contraction", "noise_std"):
            value, later = getattr(self, name), getattr(self, f"unlearning_{name}")
            if np.ndim(value) == 0:
                checked[name] = _validate.real(name, value, low=0.0)
            else:
                array = _validate.real_array(name, value, low=0.0)
                _validate.same_length(name, array, "shifts", len(shifts))
                checked[name] = tuple(array.tolist())
                if later is None:
                    raise ValueError(
                        f"Expected unlearning_{name} to be given where {name} has one value per "
                        f"training step, got unlearning_{name}=None. Pass the value of the "
                        "unlearning steps."
                    )
            if later is not None:
                later = _validate.real(f"unlearning_{name}", later, low=0.0)
            checked[f"unlearning_{name}"] = later
        first = self.first_unlearning_noise_std
        if first is not None:
            first = _validate.real("first_unlearning_noise_std", first, low=0.0)
        checked["first_unlearning_noise_std"] = first
        checked["initial_distance"] = _validate.real(
            "initial_distance", self.initial_distance, low=0.0
        )
        checked["context"] = checked_context(self.context)
        for name, result in checked.items():
            object.__setattr__(self, name, result)

    @classmethod
    def one_output_glm(
        cls,
        *,
        caps: npt.ArrayLike,
        max_grad_norm: float,
        step_size: float,
        weight_decay: float,
        feature_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        num_instances: int,
        training_steps: int,
        loss_smoothness: float = 0.25,
        sample_rate: float = 1.0,
    ) -> ContractionCertificate:
        """Certificate of full-batch DP-SGD with fixed caps on a model with one linear output.

        Guarantee: as the class, for a loss ℓ(⟨θ, x⟩, y), convex in its first argument (logistic,
            squared, Huber), trained by θ ← (1 − ηλ)θ − (η/b)(Σ clipped gradients + N(0, (zC)²I)).

        Args:
            caps: (members,) clipping bounds of the forget set's members, in units of
                max_grad_norm. In [0, 1].
            max_grad_norm: C. > 0.
            step_size: η. > 0.
            weight_decay: λ, decoupled (SGD's own weight_decay). >= 0.
            feature_norm: Bound on ‖x‖ over all records, the constant feature of a bias included.
                > 0.
            noise_multiplier: z, noise std on the gradient sum / max_grad_norm. Unitless, >= 0.
            expected_batch_size: b, the normaliser of the gradient sum. > 0.
            num_instances: Size of the training set, forget set included. >= 1.
            training_steps: T >= 0.
            loss_smoothness: Lipschitz constant of ℓ' in the linear output; logistic: 1/4. >= 0.
            sample_rate: Must be 1.

        Returns:
            The certificate, with contraction max(|1 − ηλ|, |1 − η(λ + β)|),
            β = loss_smoothness · feature_norm² · num_instances / b.

        Raises:
            CertificateError: sample_rate below 1, or a contraction that is not below 1.
            ValueError: A value outside its range.

        Source: clipping of a one-output GLM keeps convexity, Song, Steinke, Thakkar, Thakurta
            (2021), arXiv:2006.06783, re-derived for Opacus's clip factor in `capped_glm.CappedGlm`.
        """
        run = CappedGlm.checked(
            caps=caps, max_grad_norm=max_grad_norm, step_size=step_size,
            weight_decay=weight_decay, feature_norm=feature_norm,
            noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size,
            loss_smoothness=loss_smoothness,
        )  # fmt: skip
        return cls._of_glm(
            run, num_instances=num_instances, training_steps=training_steps,
            sample_rate=sample_rate,
        )  # fmt: skip

    @classmethod
    def _of_glm(
        cls, run: CappedGlm, *, num_instances: int, training_steps: int, sample_rate: float
    ) -> ContractionCertificate:
        size = _validate.integer("num_instances", num_instances, low=1)
        steps = _validate.integer("training_steps", training_steps, low=0)
        if _validate.probability("sample_rate", sample_rate) != 1.0:
            raise CertificateError(
                f"Expected sample_rate = 1, got sample_rate={sample_rate!r}. Poisson batches of "
                "varying size are not one fixed map: a batch larger than expected may expand "
                "distances. Train with full batches."
            )
        total = run.cap_sum
        return cls(
            run.full_batch_factor(num_instances=size),
            run.noise_std,
            shifts=(run.shift(total),) * steps,
            context=(
                *run.context(cap_sum=total),
                assumption(
                    "full_batch",
                    num_instances=size,
                    expected_batch_size=run.expected_batch_size,
                    noise_multiplier=run.noise_multiplier,
                    max_grad_norm=run.clip,
                ),
                assumption(
                    "decoupled_decay", weight_decay=run.weight_decay, step_size=run.step_size
                ),
            ),
        )

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        c, noise = self._unlearning
        first = self.first_unlearning_noise_std
        return (
            assumption(
                "contracting_steps", contraction=_span(self.contraction), unlearning_contraction=c
            ),
            assumption(
                "noise_every_step", noise_std=_span(self.noise_std), unlearning_noise_std=noise
            ),
            assumption(
                "bounded_shifts",
                shifts=len(self.shifts),
                largest=max(self.shifts, default=0.0),
                total=math.fsum(self.shifts),
            ),
            assumption("initial_distance", initial_distance=self.initial_distance),
            assumption("reference_all_steps"),
            assumption("same_constants"),
            assumption("memoryless_steps"),
            assumption("not_adaptive"),
            *([] if first is None else [assumption("first_step_noise", first_noise_std=first)]),
            *self._of_context(),
        )

    def mu(self, steps: int) -> float:
        """Distance μ of the two unit Gaussians after `steps` unlearning steps, rounded up."""
        steps = _validate.integer("steps", steps, low=0)
        contraction, noise_std = self._unlearning
        return self._hull.mu(
            steps, contraction=contraction, noise_std=noise_std,
            first_noise_std=self.first_unlearning_noise_std,
        )  # fmt: skip

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound αμ²/2 in nats after `steps` steps, shape (orders,)."""
        mu = self.mu(steps)
        return _validate.orders(orders) * (mu * mu / 2.0)

    def delta(self, *, epsilon: float, steps: int) -> float:
        """Smallest δ of the exact Gaussian curve at `epsilon` after `steps` steps, rounded up."""
        return gaussian_delta(self.mu(steps), epsilon=_validate.epsilon(epsilon))

    def epsilon(self, *, delta: float, steps: int) -> float:
        """Smallest ε of the exact Gaussian curve at `delta` (not through Rényi), rounded up."""
        return gaussian_epsilon(self.mu(steps), delta=_validate.delta(delta))

    @property
    def _unlearning(self) -> tuple[float, float]:
        """Contraction and noise of every unlearning step: the scalars unless given."""
        c, noise = self.unlearning_contraction, self.unlearning_noise_std
        return (
            c if c is not None else float(np.asarray(self.contraction)),
            noise if noise is not None else float(np.asarray(self.noise_std)),
        )

    @cached_property
    def _hull(self) -> Hull:
        """Lower hull of the training steps; independent of the number of unlearning steps."""
        shape = (len(self.shifts),)
        return lower_hull(
            np.broadcast_to(np.asarray(self.contraction), shape),
            np.broadcast_to(np.asarray(self.noise_std), shape),
            np.asarray(self.shifts),
            initial_distance=self.initial_distance,
        )


def _span(value: float | Sequence[float]) -> Span:
    """The range of a scalar or sequence, for a sentence."""
    values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if values.size == 0:
        return Span(math.nan, math.nan)
    return Span(float(values.min()), float(values.max()))
