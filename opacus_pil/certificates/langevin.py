"""Unlearning by noisy full-batch steps whose reference law has a log-Sobolev constant.

Does not know the loss and does not verify the constant: that is the caller's declared assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..accounting.quadrature import SMALLEST
from ..accounting.rdp import DEFAULT_ORDERS, rdp_to_epsilon
from ..errors import CertificateError, OutOfReachError
from .assumptions import Assumption, Context, assumption, checked_context
from .certificate import Certificate, OnProbe
from .chien2024 import Chien2024Certificate, sharp_constants
from .data_processing import DataProcessingCertificate
from .log_sobolev import fixed_order_factor, log_growth, moving_order_factor

_EPS = float(np.finfo(np.float64).eps)
_ROUND_UP = 1.0 + 64.0 * _EPS
_REFERENCES = ("same_horizon", "stationary", "retrained")

Divergence = Callable[[float], float]  # an upper bound in nats as a function of the order


@dataclass(frozen=True)
class LangevinCertificate(Certificate):
    """Noisy full-batch steps draw the unlearned law towards one with a log-Sobolev constant.

    Guarantee: with G = Π_k (1 + ζ²/(ℓ²C_k)) over the K steps, C_{k+1} = ℓ²C_k + ζ² for
        "same_horizon" and C_k = C otherwise, D_α of the unlearned law from
        "same_horizon", the law retrained for T + K steps, is at most G^{−1/α}·P(α);
        "stationary", the stationary law π′ of the retained data, is at most G^{−1/α}·P(α);
        "retrained", the law ν′ retrained for T steps only, is at most
            (α−½)/(α−1)·G^{−1/(2α)}·[(2α−½)/(2α−1)·P(4α) + D_{4α−1}(ν′‖π′)] + D_{2α−1}(π′‖ν′),
            whose last term no number of steps removes (`irreducible_rdp`).
        With `moving_order` the smaller of G^{−1/α}·P(α) and α/(G + α − 1)·P(1 + (α − 1)/G), and
        likewise inside "retrained": exact for two Gaussians of one variance. One direction,
        D(unlearned ‖ reference), unless `two_sided`.

    Args:
        initial_rdp: (orders,) P, bound in nats on the divergence at the start of unlearning: of
            the trained from the retrained law (their transcripts' divergence is one), for
            "stationary" of the trained law from π′. >= 0, may be inf. Used at other orders as in
            `DataProcessingCertificate`, and nowhere above its value at a larger order.
        orders: (orders,) Rényi orders, each > 1, strictly increasing.
        lipschitz: ℓ, Lipschitz constant of the noiseless unlearning step. >= 0, above 1 allowed.
        noise_std: ζ, noise on the parameters per step. >= 0.
        lsi_constant: C, log-Sobolev constant, Ent(f²) <= 2C·E|∇f|²: of the retrained law when
            unlearning starts ("same_horizon"; see `lsi_constant_after`), else of π′. > 0.
        reference: The second law of the claim; see Guarantee.
        retrained_to_stationary: Any order > 1 -> bound on D(ν′‖π′), non-decreasing. For
            "retrained" only.
        stationary_to_retrained: The same for D(π′‖ν′).
        two_sided: Declares that the unlearned law obeys the same constants at every step and that
            initial_rdp bounds both directions. Not for "retrained".
        moving_order: Use the sharper form of the decay.
        context: Codes of further assumptions (`certificates.sentences.CONTEXT`), from whoever
            derived the constants.

    Raises:
        ValueError: A value outside its range, or a divergence missing or not used.
        TypeError: A divergence that is not a function, a flag that is not a bool.
        CertificateError: two_sided with reference "retrained"; free text or an unknown code in
            context.

    Edge cases of `.rdp` (first match wins; "retrained" adds its irreducible term):
        lipschitz = 0 and steps > 0   0
        noise_std = 0 or steps = 0    no decay
        positive but below 1e-290     1e-290

    Source: Chien, Wang, Chen, Li (2024), arXiv:2401.10371, and Vempala, Wibisono (2019),
        arXiv:1903.08568, Lemma 5; "retrained" is reconstructed from Sepahvand et al. (2025),
        arXiv:2505.18786, with the weak triangle inequality of Mironov (2017), arXiv:1702.07476,
        Prop. 11. Deviations: exact step factors, not their exponentials; the moving order.

    >>> ours = LangevinCertificate((0.4,), (2.0,), 0.5, 1.0, 4.0 / 3.0, reference="stationary")
    >>> ours.rdp([2.0], steps=1).round(9)  # G = 1/ℓ² = 4
    array([0.2])
    """

    initial_rdp: Sequence[float]
    orders: Sequence[float]
    lipschitz: float
    noise_std: float
    lsi_constant: float
    reference: str = "same_horizon"
    retrained_to_stationary: Divergence | None = None
    stationary_to_retrained: Divergence | None = None
    two_sided: bool = field(default=False, kw_only=True)
    moving_order: bool = field(default=False, kw_only=True)
    context: Context = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        """Check every field; sequences become tuples."""
        grid = _validate.orders(self.orders)
        if (np.diff(grid) <= 0.0).any():
            raise ValueError(_validate.expected("orders", "to increase strictly", self.orders))
        curve = _validate.real_array("initial_rdp", self.initial_rdp, low=0.0, allow_infinite=True)
        _validate.same_length("initial_rdp", curve, "orders", len(grid))
        checked: dict[str, object] = {
            "orders": tuple(grid.tolist()),
            "initial_rdp": tuple(curve.tolist()),
            "lipschitz": _validate.real("lipschitz", self.lipschitz, low=0.0),
            "noise_std": _validate.real("noise_std", self.noise_std, low=0.0),
            "lsi_constant": _validate.real(
                "lsi_constant", self.lsi_constant, low=0.0, open_low=True
            ),
            "reference": _validate.choice("reference", self.reference, _REFERENCES),
        }
        for name in ("two_sided", "moving_order"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(_validate.expected(name, "to be True or False", value))
        self._check_divergences()
        if self.two_sided and self.reference == "retrained":
            raise CertificateError(
                'Expected two_sided=False for reference="retrained", got two_sided=True. '
                "That bound is known for D(unlearned ‖ retrained) only."
            )
        checked["context"] = checked_context(self.context)
        for name, result in checked.items():
            object.__setattr__(self, name, result)

    def _check_divergences(self) -> None:
        """Raise unless both functions are there for "retrained", and neither otherwise."""
        needed = self.reference == "retrained"
        for name in ("retrained_to_stationary", "stationary_to_retrained"):
            value = getattr(self, name)
            if (value is not None) != needed:
                raise ValueError(
                    f"Expected {name} {'to be given' if needed else 'to be None'} for "
                    f"reference={self.reference!r}, got {name}={value!r}. "
                    'The two divergences belong to reference="retrained".'
                )
            if needed and not callable(value):
                raise TypeError(_validate.expected(name, "to be a function of the order", value))

    @staticmethod
    def chien2024(
        *,
        num_instances: int,
        num_deleted: int,
        strong_convexity: float,
        smoothness: float,
        step_size: float,
        langevin_sigma: float,
        gradient_bound: float,
        step_grid: int = 1,
    ) -> Chien2024Certificate:
        """Certificate in the authors' own constants, rate and conversion.

        Args: as `Chien2024Certificate`, which explains them and what is guaranteed.
        """
        return Chien2024Certificate(
            num_instances=num_instances,
            num_deleted=num_deleted,
            strong_convexity=strong_convexity,
            smoothness=smoothness,
            step_size=step_size,
            langevin_sigma=langevin_sigma,
            gradient_bound=gradient_bound,
            step_grid=step_grid,
        )

    @classmethod
    def strongly_convex(
        cls,
        *,
        num_instances: int,
        num_deleted: int,
        strong_convexity: float,
        smoothness: float,
        step_size: float,
        langevin_sigma: float,
        gradient_bound: float,
        moving_order: bool = True,
    ) -> LangevinCertificate:
        """What the setting of `chien2024` gives with sharp constants, rate and conversion.

        Guarantee: as the class for "stationary", both directions; for quadratic losses whose
            gradients differ by a constant it is exact up to its grid of orders.

        Args: as `chien2024` (see `Chien2024Certificate`), and moving_order; False gives the factor
            (1 − ηm)^{2/α} per step.

        Raises:
            ValueError: A value outside its range.
            CertificateError: η(m + L) > 2.

        Source: see `opacus_pil.certificates.chien2024.sharp_constants`.
        """
        setting = cls.chien2024(
            num_instances=num_instances,
            num_deleted=num_deleted,
            strong_convexity=strong_convexity,
            smoothness=smoothness,
            step_size=step_size,
            langevin_sigma=langevin_sigma,
            gradient_bound=gradient_bound,
        )
        sharp = sharp_constants(setting)
        return cls(
            tuple(order * sharp.rdp_per_order * (1.0 + _EPS) for order in DEFAULT_ORDERS),
            DEFAULT_ORDERS,
            sharp.lipschitz,
            sharp.noise_std,
            sharp.lsi_constant,
            "stationary",
            two_sided=True,
            moving_order=moving_order,
            context=setting.setting,
        )

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers."""
        both = "_both" if self.two_sided else ""
        law = "retrained" if self.reference == "same_horizon" else "stationary"
        start = "stationary" if self.reference == "stationary" else "retrained"
        return (
            assumption(f"log_sobolev_{law}{both}", lsi_constant=self.lsi_constant),
            assumption("lipschitz_full_batch", lipschitz=self.lipschitz, noise_std=self.noise_std),
            assumption(
                f"start_from_{start}{both}",
                last_rdp=self.initial_rdp[-1],
                last_order=self.orders[-1],
            ),
            assumption(f"reference_{self.reference}"),
            assumption("plain_langevin_steps"),
            assumption("not_adaptive"),
            *self._of_context(),
        )

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats after `steps` steps, shape (orders,)."""
        asked = _validate.orders(orders)
        steps = _validate.integer("steps", steps, low=0)
        if self.reference != "retrained":
            return self._decayed(asked, steps)
        near = (asked - 0.5) / (asked - 1.0) * self._decayed(2.0 * asked, steps)
        return (near + self.irreducible_rdp(asked)) * _ROUND_UP

    def irreducible_rdp(self, orders: npt.ArrayLike) -> FloatArray:
        """The part of `rdp` that no number of steps removes, shape (orders,)."""
        asked = _validate.orders(orders)
        if self.stationary_to_retrained is None:
            return np.zeros_like(asked)
        return _evaluate("stationary_to_retrained", self.stationary_to_retrained, 2.0 * asked - 1.0)

    def epsilon(self, *, delta: float, steps: int) -> float:
        """ε of the (ε, δ) statement after `steps` steps; from default and given orders."""
        orders = self._conversion_orders()
        return float(rdp_to_epsilon(self.rdp(orders, steps=steps), orders=orders, delta=delta)[0])

    def steps_for(
        self,
        *,
        epsilon: float,
        delta: float,
        max_steps: int = 1_000_000,
        on_probe: OnProbe | None = None,
    ) -> int:
        """Smallest number of unlearning steps whose reported ε is at most `epsilon`.

        As `Certificate.steps_for`; for "retrained" a target below what the irreducible term alone
        gives is refused with its name.
        """
        target, orders = _validate.epsilon(epsilon), self._conversion_orders()
        least = rdp_to_epsilon(self.irreducible_rdp(orders), orders=orders, delta=delta)[0]
        if least > target:
            raise OutOfReachError(
                "Expected epsilon above the irreducible term D(stationary ‖ retrained), which "
                f"alone gives epsilon={least:.6g} at delta={delta!r}, got epsilon={target!r}. No "
                "number of steps removes it. Relax the target or retrain instead.",
                float(least),
                max_steps,
            )
        return super().steps_for(
            epsilon=epsilon, delta=delta, max_steps=max_steps, on_probe=on_probe
        )

    def _conversion_orders(self) -> FloatArray:
        """Orders for ε: the default ones and those where the given curve enters as given."""
        own = np.asarray(self.orders) / (4.0 if self.reference == "retrained" else 1.0)
        return np.union1d(own[own > 1.0], DEFAULT_ORDERS)

    def _initial(self, orders: FloatArray) -> FloatArray:
        """Divergence before the first step from the law that the steps draw towards."""
        if self.retrained_to_stationary is None:
            return self._curve.rdp(orders, steps=0)
        second = _evaluate(
            "retrained_to_stationary", self.retrained_to_stationary, 2.0 * orders - 1.0
        )
        first = (orders - 0.5) / (orders - 1.0) * self._curve.rdp(2.0 * orders, steps=0)
        return (first + second) * _ROUND_UP

    def _decayed(self, orders: FloatArray, steps: int) -> FloatArray:
        """That divergence after `steps` steps, rounded up."""
        start = self._initial(orders)
        start = np.where(start > 0.0, np.maximum(start, SMALLEST), 0.0)
        growth = log_growth(
            steps,
            lipschitz=self.lipschitz,
            noise_std=self.noise_std,
            lsi_constant=self.lsi_constant,
            stationary=self.reference != "same_horizon",
        )
        if growth == 0.0:
            return start
        if growth == math.inf:
            return np.zeros_like(orders)
        with np.errstate(under="ignore", over="ignore", invalid="ignore"):
            result = start * fixed_order_factor(orders, growth)
            if self.moving_order:
                first, factor = moving_order_factor(orders, growth)
                if self.reference == "retrained":
                    # D grows with the order, so a larger first order is valid too. Mironov's
                    # inequality explodes at order 1; at 2 it is within 3 % of the least there is
                    # for P proportional to α. The order asked is above 2 here.
                    first = np.maximum(first, 2.0)
                result = np.fmin(result, self._initial(first) * factor)
        result[np.isnan(result)] = np.inf  # inf·0: nothing was known at the start
        return np.where(start > 0.0, np.maximum(result, SMALLEST), 0.0)

    @cached_property
    def _curve(self) -> DataProcessingCertificate:
        """The given curve at any order; the divergence does not fall with the order."""
        least = np.minimum.accumulate(np.asarray(self.initial_rdp)[::-1])[::-1]
        return DataProcessingCertificate(least.tolist(), self.orders)


def _evaluate(name: str, divergence: Divergence, orders: FloatArray) -> FloatArray:
    """A caller's divergence at each order, checked."""
    values = [divergence(float(order)) for order in orders]
    return _validate.real_array(name, values, low=0.0, allow_infinite=True)
