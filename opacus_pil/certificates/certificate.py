"""What all certificates share: checking steps, RDP to ε, and the search for the smallest K.

Knows no mechanism: a certificate fills in `rdp` and the codes of what it stands on.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..accounting.rdp import DEFAULT_ORDERS, rdp_to_epsilon
from ..errors import CertificateError, OutOfReachError
from .assumptions import Assumption, Context, as_assumption

OnProbe = Callable[[int, float], None]  # told of each look of a search: steps, and ε there


class Certificate(abc.ABC):
    """A claim that K unlearning steps leave the model close to one retrained without some data.

    Guarantee: with the stated assumptions, `rdp` bounds the Rényi divergence of the unlearned
        model's law from the retrained one's, and `epsilon` the ε of (ε, δ)-indistinguishability;
        both directions if `two_sided`. Neither grows with the number of steps.
    """

    two_sided: bool
    context: Context = ()

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """One code per assumption, with its numbers: the class's own, then those of `context`."""
        raise CertificateError(
            f"Expected one of the package's own certificates, got {type(self).__name__}, which "
            "names no codes. Nobody else could say what it assumes."
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """One plain sentence per assumption, with its numbers; generated from the codes."""
        return tuple(one.sentence for one in self.assumption_codes)

    def with_context(self, *codes: str | Assumption) -> Self:
        """Return the same certificate, which names these `codes` of `context` too."""
        changed: Any = dataclasses.replace(self, context=(*self.context, *codes))  # type: ignore[type-var]
        return changed

    def _of_context(self) -> tuple[Assumption, ...]:
        return tuple(map(as_assumption, self.context))

    @abc.abstractmethod
    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Rényi divergence bound in nats after `steps` unlearning steps, shape (orders,)."""

    def epsilon(self, *, delta: float, steps: int) -> float:
        """ε of the (ε, δ) statement after `steps` unlearning steps.

        Guarantee: unlearned and retrained model are (ε, δ)-indistinguishable under `assumptions`.

        Args:
            delta: In (0, 1).
            steps: Unlearning steps K, an integer >= 0.

        Returns:
            ε in nats, >= 0; inf where nothing can be said.

        Source: Canonne, Kamath, Steinke (2020), arXiv:2004.00010v4, Prop. 12, over DEFAULT_ORDERS.
        """
        delta = _validate.delta(delta)
        return float(
            rdp_to_epsilon(
                self.rdp(DEFAULT_ORDERS, steps=steps), orders=DEFAULT_ORDERS, delta=delta
            )[0]
        )

    def epsilon_of_earlier_releases(self, *, delta: float, steps: int) -> float:
        """ε as releases before this one computed it, which their files rest on; as true, if more.

        Where the formula was the same it is `epsilon`. Args: as `epsilon`.
        """
        return self.epsilon(delta=delta, steps=steps)

    def steps_for(
        self,
        *,
        epsilon: float,
        delta: float,
        max_steps: int = 1_000_000,
        on_probe: OnProbe | None = None,
    ) -> int:
        """Smallest number of unlearning steps whose reported ε is at most `epsilon`.

        Guarantee: `self.epsilon(delta=delta, steps=K) <= epsilon` for the returned K, and not for
            K − 1.

        Args:
            epsilon: Target in nats, finite, >= 0.
            delta: In (0, 1).
            max_steps: The most steps worth considering, an integer >= 0.
            on_probe: Called with (steps, ε) after each evaluation.

        Returns:
            K in [0, max_steps].

        Raises:
            CertificateError: No K up to max_steps reaches the target.
            ValueError: An argument outside its range.
        """
        epsilon, delta = _validate.epsilon(epsilon), _validate.delta(delta)
        max_steps = _validate.integer("max_steps", max_steps, low=0)
        best = self._probed(delta, max_steps, on_probe)
        if best > epsilon:
            at = self._first(best, delta, max_steps, on_probe)
            raise OutOfReachError(
                f"Expected a target that unlearning reaches within max_steps={max_steps}, got "
                f"epsilon={epsilon!r} at delta={delta!r}; the best is epsilon={best:.6g} at "
                f"K={at} steps. Relax the target or retrain instead.",
                best, max_steps,
            )  # fmt: skip
        return self._first(epsilon, delta, max_steps, on_probe)

    def _probed(self, delta: float, steps: int, on_probe: OnProbe | None) -> float:
        """ε, and whoever waits for the search is told."""
        found = self.epsilon(delta=delta, steps=steps)
        if on_probe is not None:
            on_probe(steps, found)
        return found

    def _first(self, target: float, delta: float, high: int, on_probe: OnProbe | None) -> int:
        """Smallest K <= high with ε(K) <= target, given that `high` reaches it."""
        # ε does not grow with K (each certificate proves it), so doubling and bisection find the
        # smallest K; should rounding ripple, ε(high) <= target < ε(low) still holds throughout.
        if self._probed(delta, 0, on_probe) <= target:
            return 0
        low, probe = 0, 1
        while probe < high and self._probed(delta, probe, on_probe) > target:
            low, probe = probe, 2 * probe
        high = min(high, probe)
        while high - low > 1:
            middle = (low + high) // 2
            if self._probed(delta, middle, on_probe) <= target:
                high = middle
            else:
                low = middle
        return high
