"""Unlearning by contraction where training and unlearning draw Poisson mini-batches.

Does not know the loss: it is given its smoothness, a bound on each forgotten instance's gradient,
and the settings of the run. For batches that are known before the run see `known_batches`.
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
from ..accounting.rdp import DEFAULT_ORDERS, rdp_to_epsilon
from ..errors import CertificateError
from .assumptions import Assumption, Context, assumption, checked_context
from .batch_laws import Law, factor_law, largest_size, step_factor, sum_law
from .batch_moments import CURVE_ORDERS, BatchMoments
from .capped_glm import SHIFT_ROUND_UP, CappedGlm
from .causal_plan import step_by_step_curve
from .certificate import Certificate, OnProbe
from .contraction import ContractionCertificate
from .data_processing import DataProcessingCertificate
from .gaussian import gaussian_epsilon
from .of_capped_glm import OfCappedGlm
from .step_search import smallest_steps

_SIZE_SHARE = 0.01  # of δ, spent on batches so large that they are not followed
_COUNTED = 1_000_000  # unlearning steps that are counted; the rest is data processing
_LEVELS = 4096  # different shifts of a batch that are told apart


@dataclass(frozen=True)
class PoissonContractionCertificate(OfCappedGlm, Certificate):
    """Noisy Poisson mini-batch training contracts, in the mean over batches, towards retraining.

    Guarantee: D_α <= 1/(α−1) · log E exp(α(α−1)μ²/2), both directions, over the random batches,
        with μ as in `ContractionCertificate` given the batches: the runs share all batches, the
        one without the forgotten instances drops their rows and divides by the same number. The
        expectation is bounded by a plan that looks at past batches only; never above the bound
        with every forgotten instance in every batch. `epsilon` leaves batches of a size that occurs
        with probability below δ/100 aside and counts their probability.

    Args:
        gradient_bounds: (members,) for each forgotten instance the supremum of its (clipped)
            gradient's norm over all models. >= 0.
        sample_rate: q, probability that an instance is in a batch. In [0, 1].
        noise_std: ζ, noise on the parameters at every step, of training and unlearning. >= 0.
        training_steps: T >= 0.
        step_size: η. > 0.
        weight_decay: λ, decoupled from clipping. >= 0.
        smoothness: β, Lipschitz constant of one retained instance's gradient, as it enters the sum
            (after clipping, which only a model with one linear output survives). >= 0.
        expected_batch_size: b, the normaliser of the gradient sum, whatever was drawn. > 0.
        num_retained: Instances of the retain set. >= 0.
        context: Codes of further assumptions (`certificates.sentences.CONTEXT`), from whoever
            derived the constants.

    Raises:
        ValueError: A value outside its range.
        CertificateError: Free text or an unknown code in context.

    Edge cases of `.rdp` (first match wins):
        sample_rate, training_steps or all gradient_bounds 0   0
        noise_std = 0                                           inf

    Source: conditioning on the batches, then shifted interpolation (Bok, Su, Altschuler 2024,
        arXiv:2403.00278) with the factor max(|1 − ηλ|, |1 − η(λ + β|B|/b)|), which may exceed 1
        for a large batch B. A batch gives no amplification here: compare with
        `DataProcessingCertificate` by `best_of`.

    >>> ours = PoissonContractionCertificate((1.0,), 0.1, 1.0, 20, 0.5, 0.1, 0.2, 10.0, 99)
    >>> everywhere = ContractionCertificate(0.95, 1.0, shifts=(0.05,) * 20)
    >>> bool(2 * ours.epsilon(delta=1e-3, steps=5) < everywhere.epsilon(delta=1e-3, steps=5))
    True
    """

    gradient_bounds: Sequence[float]
    sample_rate: float
    noise_std: float
    training_steps: int
    step_size: float
    weight_decay: float
    smoothness: float
    expected_batch_size: float
    num_retained: int
    context: Context = field(default=(), kw_only=True)

    two_sided = True

    def __post_init__(self) -> None:
        """Check every field."""
        bounds = _validate.real_array("gradient_bounds", self.gradient_bounds, low=0.0)
        if bounds.ndim != 1:
            domain = "to be one value per forgotten instance"
            raise ValueError(_validate.expected("gradient_bounds", domain, bounds))
        checked: dict[str, object] = {"gradient_bounds": tuple(bounds.tolist())}
        checked["sample_rate"] = _validate.probability("sample_rate", self.sample_rate)
        positive = ("step_size", "expected_batch_size")
        for name in (*positive, "noise_std", "weight_decay", "smoothness"):
            open_low = name in positive
            checked[name] = _validate.real(name, getattr(self, name), low=0.0, open_low=open_low)
        for name in ("training_steps", "num_retained"):
            checked[name] = _validate.integer(name, getattr(self, name), low=0)
        checked["context"] = checked_context(self.context)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

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
        sample_rate: float,
        loss_smoothness: float = 0.25,
        num_outputs: int = 1,
        momentum: float = 0.0,
        sampling: str = "poisson",
        guarantee: str = "bound",
    ) -> PoissonContractionCertificate:
        """Certificate of Poisson DP-SGD with fixed caps on a model with one linear output.

        Guarantee: as the class, for the losses and the clipping of
            `ContractionCertificate.one_output_glm`, which explains the other arguments.

        Args:
            num_outputs: Must be 1: clipping breaks contraction for any other model.
            momentum: Must be 0: a step must depend on the model alone.
            sampling: Must be "poisson"; for batches fixed before the run see `known_batches`.
            guarantee: The ledger's label; must be "bound": caps that follow the model break it.

        Raises:
            CertificateError: An assumption does not hold; the message names it.
            ValueError: A value outside its range.
        """
        _require("num_outputs", num_outputs, 1, "Clipping breaks contraction for other models.")
        _require("momentum", momentum, 0.0, "Train and unlearn with plain SGD.")
        _require("sampling", sampling, "poisson", "Fixed batches: known_batches. Shuffled: none.")
        _require("guarantee", guarantee, "bound", "Fix caps before the run, from public data.")
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
    ) -> PoissonContractionCertificate:
        joint = run.joint_caps
        size = _validate.integer("num_instances", num_instances, low=len(joint))
        return cls(
            (joint * run.clip * SHIFT_ROUND_UP).tolist(),
            sample_rate,
            run.noise_std,
            training_steps,
            run.step_size,
            run.weight_decay,
            run.smoothness,
            run.expected_batch_size,
            size - len(joint),
            context=run.context(cap_sum=math.fsum(joint.tolist())),
        )

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        return (
            assumption("poisson_batches", sample_rate=self.sample_rate),
            assumption(
                "poisson_step",
                step_size=self.step_size,
                weight_decay=self.weight_decay,
                expected_batch_size=self.expected_batch_size,
                noise_std=self.noise_std,
            ),
            assumption(
                "retained_convex", num_retained=self.num_retained, smoothness=self.smoothness
            ),
            assumption(
                "forgotten_bounded",
                members=len(self.gradient_bounds),
                largest=max(self.gradient_bounds, default=0.0),
                total=math.fsum(self.gradient_bounds),
            ),
            assumption("reference_counted_steps", training_steps=self.training_steps),
            assumption("same_constants"),
            assumption("memoryless_steps"),
            assumption("not_adaptive"),
            *self._of_context(),
        )

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats after `steps` steps, shape (orders,)."""
        asked = _validate.orders(orders)
        steps = min(_validate.integer("steps", steps, low=0), _COUNTED)
        everyone, moments = self._followed(self.num_retained)
        mu = everyone.mu(steps)
        always = asked * (mu * mu / 2.0)
        if moments is None:
            return always
        curve = moments.rdp(CURVE_ORDERS, steps=steps)
        at_orders = DataProcessingCertificate(curve.tolist(), CURVE_ORDERS.tolist())
        return np.minimum(always, at_orders.rdp(asked, steps=steps))

    def epsilon(self, *, delta: float, steps: int) -> float:
        """ε of the (ε, δ) statement after `steps` unlearning steps; see `Certificate.epsilon`.

        The least of the conversion at orders of its own and the exact Gaussian curve with every
        forgotten instance in every batch, each at δ less the probability of too large a batch.
        """
        delta = _validate.delta(delta)
        steps = min(_validate.integer("steps", steps, low=0), _COUNTED)
        if (delta, steps) not in self._found:
            largest, rest = self._largest_batch(delta)
            everyone, moments = self._followed(largest)
            found = gaussian_epsilon(everyone.mu(steps), delta=rest)
            if moments is not None:
                found = min(found, moments.epsilon(delta=rest, steps=steps))
            self._found[delta, steps] = found
        return self._found[delta, steps]

    def epsilon_of_earlier_releases(self, *, delta: float, steps: int) -> float:
        """ε by a plan that takes every step of training by itself: slower, and mostly more.

        Args: as `Certificate.epsilon`.
        """
        delta = _validate.delta(delta)
        steps = min(_validate.integer("steps", steps, low=0), _COUNTED)
        largest, rest = self._largest_batch(delta)
        everyone, moments = self._followed(largest)
        found = gaussian_epsilon(everyone.mu(steps), delta=rest)
        if moments is None:
            return found
        curve = step_by_step_curve(
            DEFAULT_ORDERS,
            factors=self._factors(largest),
            shifts=sum_law(self._shifts / self.noise_std, self.sample_rate),
            training_steps=self.training_steps,
            unlearning_steps=steps,
        )
        return min(found, float(rdp_to_epsilon(curve, orders=DEFAULT_ORDERS, delta=rest)[0]))

    def _first(self, target: float, delta: float, high: int, on_probe: OnProbe | None) -> int:
        """Smallest K <= high with ε(K) <= target, given that `high` reaches it."""
        at_once = self._probed(delta, 0, on_probe)
        if at_once <= target:
            return 0
        return smallest_steps(
            lambda steps: self._probed(delta, steps, on_probe),
            target=target,
            at_once=at_once,
            high=high,
        )

    @cached_property
    def _found(self) -> dict[tuple[float, int], float]:
        """What was computed: the search for K and the report ask for the same K twice."""
        return {}

    def _followed(self, largest: int) -> tuple[ContractionCertificate, BatchMoments | None]:
        """The run with everyone forgotten in every batch, and the moments over batches.

        No batch retains more than `largest`. None: the first says all, that nothing is given away
        or that next to no noise hides it.
        """
        if largest not in self._by_size:
            shifts = (self._present,) * self.training_steps
            factor = float(self._factor(largest))
            everyone = ContractionCertificate(factor, self.noise_std, shifts)
            moments = None
            if shifts and self.noise_std > 1e-100 * self._present > 0.0:
                moments = BatchMoments(
                    self._factors(largest),
                    sum_law(self._shifts / self.noise_std, self.sample_rate, levels=_LEVELS),
                    training_steps=self.training_steps,
                )
            self._by_size[largest] = everyone, moments
        return self._by_size[largest]

    @cached_property
    def _by_size(self) -> dict[int, tuple[ContractionCertificate, BatchMoments | None]]:
        return {}

    def _largest_batch(self, delta: float) -> tuple[int, float]:
        """Largest batch to follow, and δ less the probability that any batch is larger."""
        if self._factor(self.num_retained) == self._factor(0):
            return self.num_retained, delta
        rate = _SIZE_SHARE * delta / (self.training_steps + _COUNTED)
        size = largest_size(trials=self.num_retained, rate=self.sample_rate, tail=rate)
        # A union bound over all steps, as many as are ever counted: the same δ for every K.
        return size, delta * (1.0 - _SIZE_SHARE) * (1.0 - 1e-15)

    @property
    def _shifts(self) -> FloatArray:
        """How far each forgotten instance moves a step that draws it, rounded up."""
        scale = self.step_size / self.expected_batch_size * (1.0 + 1e-15)
        return np.asarray(self.gradient_bounds) * scale

    @property
    def _present(self) -> float:
        """Shift of a batch that holds every forgotten instance; 0 if none ever does."""
        return math.fsum(self._shifts.tolist()) if self.sample_rate > 0.0 else 0.0

    def _factor(self, sizes: npt.ArrayLike) -> FloatArray:
        """Lipschitz constant of a step with at most so many retained instances, rounded up."""
        return step_factor(
            sizes,
            step_size=self.step_size,
            weight_decay=self.weight_decay,
            smoothness=self.smoothness,
            expected_batch_size=self.expected_batch_size,
        )

    def _factors(self, largest: int) -> Law:
        """Law of the factor over batches of at most `largest` retained instances."""
        values = self._factor(np.arange(largest + 1))
        return factor_law(values, trials=self.num_retained, rate=self.sample_rate)


def _require(name: str, value: object, needed: object, cure: str) -> None:
    """Refuse a run for which contraction is not proved."""
    if value != needed:
        raise CertificateError(
            f"Expected {name} = {needed!r} for contraction, got {name}={value!r}. {cure}"
        )
