"""CappedGlm: DP-SGD with fixed caps on linear outputs, as the numbers that contraction needs.

Checks the settings of a run and gives the factor of a step, its noise and the forget set's shift;
one output and one-against-the-rest are the same formulas. Knows settings; no unlearning steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..errors import CertificateError
from .assumptions import Assumption, assumption

# Room for a clipped gradient that float32 leaves some ulps (6e-8) above its cap.
SHIFT_ROUND_UP = 1.0 + 1e-5


@dataclass(frozen=True, kw_only=True)
class CappedGlm:
    """Settings of a run; see `ContractionCertificate.one_output_glm` and `one_vs_rest_glm`.

    The proof, for one output. Opacus multiplies the per-sample gradient d·x, d = ℓ', by
    min(1, κ/(|d|·‖x‖ + e)) with κ = cap·C and e = 1e-6. So d becomes
    h(d) = d·min(1, κ/(|d|·‖x‖ + e)), odd, continuous, of slope 1 where the factor is 1 and
    κe/(|d|·‖x‖ + e)² elsewhere. There |d|·‖x‖ + e is above κ and at least e, so the slope is in
    [0, 1), for every κ >= 0: h is nondecreasing and 1-Lipschitz, h∘ℓ' is the derivative of a convex
    function as smooth as ℓ. And |h(d)|·‖x‖ <= κ: the clipped gradient moves the sum by at most κ.

    For several outputs, each with a parameter tensor, a loss and a clip of its own: a step is the
    one-output step on each block of the parameters, so that the joint map has the largest factor
    of any block, which is the same formula for all; noise is equal on all of them; and a set F
    moves block k by at most Σ_{x in F} cap_{x,k}·C_k, all blocks together by the root of the sum
    of squares. Clipping the joint gradient instead would couple the blocks, and is no contraction:
    for x̃ = 1, two outputs, y = (1, 0), C = .5, η = 7.5, λ = .001 the models (−6.50, .269) and
    (−7.06, .496) move apart by a factor 1.059.

    Attributes:
        caps: Shape (members, outputs), in units of each output's bound.
        bounds: Shape (outputs,), clip bound of each output.
        step_size: η. > 0.
        weight_decay: λ, decoupled. >= 0.
        feature_norm: Bound on the features' norm, a bias included. > 0.
        noise_multiplier: Noise std on the gradient sum / `clip`. >= 0.
        expected_batch_size: What the sum is divided by. > 0.
        loss_smoothness: Lipschitz constant of the loss's gradient in the outputs. >= 0.
        kind: "one" output, "separate" ones, or "unclipped": a loss that is convex in all outputs
            together and whose gradients never reach their clip.
        steepness: With "unclipped": most that the loss's gradient in the outputs is long.
    """

    caps: FloatArray
    bounds: FloatArray
    step_size: float
    weight_decay: float
    feature_norm: float
    noise_multiplier: float
    expected_batch_size: float
    loss_smoothness: float
    kind: str
    steepness: float = 0.0

    @classmethod
    def checked(
        cls,
        *,
        caps: npt.ArrayLike,
        max_grad_norm: npt.ArrayLike,
        kind: str = "one",
        **constants: float,
    ) -> CappedGlm:
        """Return the settings, or raise.

        Raises:
            ValueError: A value outside its range, or caps that do not fit the outputs.
            CertificateError: "unclipped", and a clip that gradients reach.
        """
        limits = _validate.real_array("caps", caps, low=0.0, high=1.0)
        bounds = _validate.real_array("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        apart = kind == "separate"
        if not apart and bounds.ndim == 0:
            limits, bounds = limits[..., None], bounds[None]
        wanted = "one row per member, one column per output" if apart else "one value per member"
        fits = limits.ndim == 2 and bounds.ndim == 1 and limits.shape[1] == len(bounds)
        if not fits or limits.size == 0:
            domain = f"to be {wanted} of the forget set"
            raise ValueError(_validate.expected("caps", domain, np.shape(caps)))
        positive = ("step_size", "feature_norm", "expected_batch_size")
        found = {
            name: _validate.real(name, value, low=0.0, open_low=name in positive)
            for name, value in constants.items()
        }
        run = cls(caps=limits, bounds=bounds, kind=kind, **found)
        longest = run.steepness * run.feature_norm + 1e-6  # Opacus adds as much to a norm
        if kind == "unclipped" and not run.clip >= longest:
            raise CertificateError(
                f"Expected max_grad_norm of at least {longest:g}, which "
                f"no gradient reaches, got {run.clip:g}. Clipping such a loss is no contraction."
            )
        return run

    @property
    def clip(self) -> float:
        """Bound on a whole gradient, over all outputs."""
        return float(self.bounds[0]) if len(self.bounds) == 1 else math.hypot(*self.bounds)

    @property
    def cap_sum(self) -> float:
        """What all members together move the gradient sum by at most, in units of `clip`."""
        sums = [math.fsum(column.tolist()) for column in self.caps.T]
        if len(sums) == 1:
            return sums[0]
        return self._up(math.hypot(*(s * float(b) for s, b in zip(sums, self.bounds, strict=True))))

    @property
    def joint_caps(self) -> FloatArray:
        """What each member moves the gradient sum by at most, in units of `clip`."""
        if len(self.bounds) == 1:
            return self.caps[:, 0]
        moved = [math.hypot(*row) for row in (self.caps * self.bounds).tolist()]
        return np.array([self._up(one) for one in moved])

    @property
    def noise_std(self) -> float:
        """Noise on the parameters at each step."""
        return self.step_size * self.noise_multiplier * self.clip / self.expected_batch_size

    @property
    def smoothness(self) -> float:
        """Lipschitz constant of one instance's gradient."""
        return self.loss_smoothness * self.feature_norm * self.feature_norm

    def shift(self, cap_sum: float) -> float:
        """Most that gradients of so many clip bounds together move the parameters by at a step."""
        return self.step_size * self.clip / self.expected_batch_size * cap_sum * SHIFT_ROUND_UP

    def full_batch_factor(self, *, num_instances: int) -> float:
        """Lipschitz constant of a step on all instances.

        Raises:
            CertificateError: It is not below 1.
        """
        beta = self.smoothness * num_instances / self.expected_batch_size
        eta, decay = self.step_size, self.weight_decay
        contraction = full_batch_factor(step_size=eta, weight_decay=decay, smoothness=beta)
        if contraction >= 1.0:
            cure = "Pass weight_decay > 0" if decay == 0.0 else "Pass"
            join = " and" if decay == 0.0 else ""
            raise CertificateError(
                f"Expected max(|1 - ηλ|, |1 - η(λ + β)|) < 1, got {contraction:.6g} from "
                f"step_size η={eta!r}, weight_decay λ={decay!r} and smoothness β={beta:.6g}. "
                f"{cure}{join} step_size < 2 / (λ + β) = {2.0 / (decay + beta):.6g}."
            )
        return contraction

    def context(self, *, cap_sum: float) -> tuple[Assumption, ...]:
        """Return what the numbers rest on.

        Args:
            cap_sum: What all members move the gradient sum by, as the certificate counts it.
        """
        numbers: dict[str, Any] = {
            "max_grad_norm": self.clip,
            "members": len(self.caps),
            "cap_sum": cap_sum,
        }
        if self.kind == "unclipped":
            loss = assumption(
                "clip_never_binds", feature_norm=self.feature_norm, steepness=self.steepness,
                loss_smoothness=self.loss_smoothness,
            )  # fmt: skip
            return loss, assumption("bounded_gradients", **numbers)
        one, smooth, capped = _SEPARATE if self.kind == "separate" else _ONE
        return (
            assumption(one, feature_norm=self.feature_norm),
            assumption(smooth, loss_smoothness=self.loss_smoothness),
            assumption(capped, **numbers),
        )

    def _up(self, moved: float) -> float:
        return moved / self.clip * (1.0 + 1e-14)  # some roundings


_ONE = ("one_linear_output", "smooth_convex_loss", "capped_gradients")
_SEPARATE = ("separate_linear_outputs", "smooth_convex_losses", "capped_outputs")


def full_batch_factor(*, step_size: float, weight_decay: float, smoothness: float) -> float:
    """Return max(|1 − ηλ|, |1 − η(λ + β)|), the Lipschitz constant of a step, rounded up."""
    first = abs(1.0 - step_size * weight_decay)
    factor = max(first, abs(1.0 - step_size * (weight_decay + smoothness)))
    return factor + 4.0 * math.ulp(max(1.0, factor))
