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
from .certificate import Certificate
from .gaussian import gaussian_delta, gaussian_epsilon
from .hull import Hull, lower_hull

# Room for a clipped gradient that float32 leaves some ulps (6e-8) above its cap.
SHIFT_ROUND_UP = 1.0 + 1e-5


@dataclass(frozen=True)
class ContractionCertificate(Certificate):
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
            (2021), arXiv:2006.06783, re-derived for Opacus's clip factor in the comment below.
        """
        # Opacus multiplies the per-sample gradient d·x, d = ℓ', by min(1, κ/(|d|·‖x‖ + e)) with
        # κ = cap·C and e = 1e-6. So d becomes h(d) = d·min(1, κ/(|d|·‖x‖ + e)), odd, continuous,
        # of slope 1 where the factor is 1 and κe/(|d|·‖x‖ + e)² elsewhere. There |d|·‖x‖ + e is
        # above κ and at least e, so the slope is in [0, 1), for every κ >= 0: h is nondecreasing
        # and 1-Lipschitz, h∘ℓ' is the derivative of a convex function as smooth as ℓ. And
        # |h(d)|·‖x‖ <= κ: the clipped gradient moves the sum by at most κ.
        limits = _validate.real_array("caps", caps, low=0.0, high=1.0)
        if limits.ndim != 1 or limits.size == 0:
            raise ValueError(
                _validate.expected("caps", "to be one value per member of the forget set", caps)
            )
        clip = _validate.real("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        eta = _validate.real("step_size", step_size, low=0.0, open_low=True)
        decay = _validate.real("weight_decay", weight_decay, low=0.0)
        norm = _validate.real("feature_norm", feature_norm, low=0.0, open_low=True)
        noise = _validate.real("noise_multiplier", noise_multiplier, low=0.0)
        batch = _validate.real("expected_batch_size", expected_batch_size, low=0.0, open_low=True)
        size = _validate.integer("num_instances", num_instances, low=1)
        steps = _validate.integer("training_steps", training_steps, low=0)
        smooth = _validate.real("loss_smoothness", loss_smoothness, low=0.0)
        if _validate.probability("sample_rate", sample_rate) != 1.0:
            raise CertificateError(
                f"Expected sample_rate = 1, got sample_rate={sample_rate!r}. Poisson batches of "
                "varying size are not one fixed map: a batch larger than expected may expand "
                "distances. Train with full batches."
            )
        total = math.fsum(limits.tolist())
        beta = smooth * norm * norm * size / batch
        contraction = full_batch_factor(step_size=eta, weight_decay=decay, smoothness=beta)
        if contraction >= 1.0:
            cure = "Pass weight_decay > 0" if decay == 0.0 else "Pass"
            join = " and" if decay == 0.0 else ""
            raise CertificateError(
                f"Expected max(|1 - ηλ|, |1 - η(λ + β)|) < 1, got {contraction:.6g} from "
                f"step_size η={eta!r}, weight_decay λ={decay!r} and smoothness β={beta:.6g}. "
                f"{cure}{join} step_size < 2 / (λ + β) = {2.0 / (decay + beta):.6g}."
            )
        shift = eta * clip / batch * total * SHIFT_ROUND_UP
        return cls(
            contraction,
            eta * noise * clip / batch,
            shifts=(shift,) * steps,
            context=(
                assumption("one_linear_output", feature_norm=norm),
                assumption("smooth_convex_loss", loss_smoothness=smooth),
                assumption(
                    "capped_gradients", max_grad_norm=clip, members=limits.size, cap_sum=total
                ),
                assumption(
                    "full_batch",
                    num_instances=size,
                    expected_batch_size=batch,
                    noise_multiplier=noise,
                    max_grad_norm=clip,
                ),
                assumption("decoupled_decay", weight_decay=decay, step_size=eta),
            ),
        )

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        c, noise = self._unlearning
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
            *self._of_context(),
        )

    def mu(self, steps: int) -> float:
        """Distance μ of the two unit Gaussians after `steps` unlearning steps, rounded up."""
        steps = _validate.integer("steps", steps, low=0)
        contraction, noise_std = self._unlearning
        return self._hull.mu(steps, contraction=contraction, noise_std=noise_std)

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


def full_batch_factor(*, step_size: float, weight_decay: float, smoothness: float) -> float:
    """Return max(|1 − ηλ|, |1 − η(λ + β)|), the Lipschitz constant of a step, rounded up."""
    first = abs(1.0 - step_size * weight_decay)
    factor = max(first, abs(1.0 - step_size * (weight_decay + smoothness)))
    return factor + 4.0 * math.ulp(max(1.0, factor))


def _span(value: float | Sequence[float]) -> Span:
    """The range of a scalar or sequence, for a sentence."""
    values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if values.size == 0:
        return Span(math.nan, math.nan)
    return Span(float(values.min()), float(values.max()))
