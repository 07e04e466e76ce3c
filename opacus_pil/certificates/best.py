"""The least of several certificates of one unlearning run, and which of them it was.

Knows no mechanism: it compares what its members report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .. import _validate
from .._validate import FloatArray
from ..accounting.shown import rounded_up
from ..errors import CertificateError, OutOfReachError
from .assumptions import Assumption, assumption
from .certificate import Certificate, OnProbe


@dataclass(frozen=True)
class Winner:
    """Which certificate gave an ε, and what the others gave.

    Attributes:
        name: Its class name, numbered where several members share a class.
        epsilon: Its ε in nats.
        certificate: The member itself; only its assumptions are needed for this ε, and the ε holds
            in both directions if it is `two_sided`.
        others: The other members' ε, by name.
    """

    name: str
    epsilon: float
    certificate: Certificate
    others: dict[str, float]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What this ε rests on."""
        return self.certificate.assumptions


@dataclass(frozen=True)
class BestCertificate(Certificate):
    """The least of its members at every call; made by `best_of`.

    Guarantee: at every number of steps, order and δ the least of the members' bounds. Each bounds
        the same divergence from the same reference, so the least does; in both directions only if
        every member is `two_sided`.

    Args:
        members: Certificates of one forget set and one run, with one `reference`. At least one;
            a BestCertificate is replaced by its members.

    Raises:
        CertificateError: The members speak of different references.
        TypeError: Something that is not a certificate.
        ValueError: No member.
    """

    members: tuple[Certificate, ...]
    two_sided: bool = field(init=False)
    reference: str = field(init=False)

    def __post_init__(self) -> None:
        """Check the members, take nested ones apart."""
        flat: list[Certificate] = []
        for member in self.members:
            if not isinstance(member, Certificate):
                raise TypeError(
                    _validate.expected("certificates", "to hold certificates only", member)
                )
            flat.extend(member.members if isinstance(member, BestCertificate) else (member,))
        if not flat:
            raise ValueError(
                _validate.expected("certificates", "to hold at least one", self.members)
            )
        # A certificate that names no reference speaks of retraining for as many steps.
        references = [getattr(member, "reference", "same_horizon") for member in flat]
        object.__setattr__(self, "members", tuple(flat))
        if len(set(references)) > 1:
            found = ", ".join(
                f"{name}: {reference}"
                for (name, _), reference in zip(self._named(), references, strict=True)
            )
            raise CertificateError(
                f"Expected certificates with one reference, got {found}. Their divergences are "
                "from different models, so the smaller number says nothing about the other one. "
                "Compare certificates of one reference."
            )
        object.__setattr__(self, "reference", references[0])
        object.__setattr__(self, "two_sided", all(member.two_sided for member in flat))

    @property
    def assumption_codes(self) -> tuple[Assumption, ...]:
        """Every member's codes under its name; one number needs its winner's only."""
        names = tuple(name for name, _ in self._named())
        return (
            assumption("least_of", members=len(self.members), names=names),
            *(
                replace(one, of=name)
                for name, member in self._named()
                for one in member.assumption_codes
            ),
        )

    def with_context(self, *codes: str | Assumption) -> BestCertificate:
        """Return the least of the same members, each of which names these `codes` too."""
        return BestCertificate(tuple(member.with_context(*codes) for member in self.members))

    def rdp(self, orders: npt.ArrayLike, *, steps: int) -> FloatArray:
        """Least Rényi divergence bound per order in nats after `steps` steps, shape (orders,)."""
        return np.min([member.rdp(orders, steps=steps) for member in self.members], axis=0)

    def epsilon(self, *, delta: float, steps: int) -> float:
        """Least ε of the members, each by its own conversion (exact where it has one).

        Least per order and then converted would give no less where each member's ε is at most the
        conversion of its own divergences: both are minima over orders and members.
        """
        return min(member.epsilon(delta=delta, steps=steps) for member in self.members)

    def winner(self, *, delta: float, steps: int) -> Winner:
        """Which member gives `epsilon`, and what the others give.

        Args:
            delta: In (0, 1).
            steps: Unlearning steps K, an integer >= 0.

        Returns:
            The winner; the first of the list among equals.
        """
        epsilons = {
            name: member.epsilon(delta=delta, steps=steps) for name, member in self._named()
        }
        name = min(epsilons, key=epsilons.__getitem__)
        return Winner(name, epsilons.pop(name), dict(self._named())[name], epsilons)

    def epsilon_of_earlier_releases(self, *, delta: float, steps: int) -> float:
        """Least of the members'. Args: as `Certificate.epsilon`."""
        return min(
            member.epsilon_of_earlier_releases(delta=delta, steps=steps) for member in self.members
        )

    def steps_for(
        self,
        *,
        epsilon: float,
        delta: float,
        max_steps: int = 1_000_000,
        on_probe: OnProbe | None = None,
    ) -> int:
        """Smallest number of unlearning steps at which some member's ε is at most `epsilon`.

        Guarantee: as `Certificate.steps_for`; no member's ε grows with the number of steps.
            `on_probe` is told of every member's evaluations, one member after the other.

        Raises:
            CertificateError: No member reaches the target; the message gives each one's best.
            ValueError: An argument outside its range.
        """
        max_steps = _validate.integer("max_steps", max_steps, low=0)
        least: int | None = None
        for member in self.members:
            if least == 0:
                break
            limit = max_steps if least is None else least - 1  # only fewer steps are news
            try:
                least = member.steps_for(
                    epsilon=epsilon, delta=delta, max_steps=limit, on_probe=on_probe
                )
            except CertificateError:
                continue  # this member does not reach the target, or not sooner
        if least is None:
            best = [
                (name, member.epsilon(delta=delta, steps=max_steps))
                for name, member in self._named()
            ]
            reached = "; ".join(f"{name}: epsilon={rounded_up(e, digits=6)}" for name, e in best)
            raise OutOfReachError(
                f"Expected a target that one of the certificates reaches within "
                f"max_steps={max_steps}, got epsilon={epsilon!r} at delta={delta!r}; the best are "
                f"{reached}. Relax the target or retrain instead.",
                min(e for _, e in best),
                max_steps,
            )
        return least

    def _named(self) -> list[tuple[str, Certificate]]:
        """Members with their class names, numbered where a name comes twice."""
        names = [type(member).__name__ for member in self.members]
        count, seen = Counter(names), Counter[str]()
        named = []
        for name, member in zip(names, self.members, strict=True):
            seen[name] += 1
            named.append((f"{name} {seen[name]}" if count[name] > 1 else name, member))
        return named


def best_of(certificates: Sequence[Certificate]) -> BestCertificate:
    """One certificate that takes the least of several at every call, and tells which it was.

    Guarantee: as `BestCertificate`.

    Args:
        certificates: At least one, all of the same forget set, training run, unlearning steps and
            reference (`same_horizon`, `retrained` or `stationary`).

    Returns:
        The certificate; `.winner(delta=, steps=)` names the member that won.

    Raises:
        CertificateError: The certificates speak of different references.
        TypeError: Something that is not a certificate.
        ValueError: No certificate.

    Edge cases (first match wins):
        one certificate            itself, wrapped
        a member that is a best    replaced by its members
        a member that says inf     passed over while another says less

    Source: every member bounds the same divergence, so the least of them does, at each order and
        for each (ε, δ) by itself.

    >>> from opacus_pil.certificates import ContractionCertificate, DataProcessingCertificate
    >>> contraction = ContractionCertificate(0.9, 1.0, shifts=(1.0,) * 10)
    >>> training = DataProcessingCertificate((1.0, 5.0), (2.0, 10.0))
    >>> best = best_of([contraction, training])
    >>> best.winner(delta=1e-5, steps=0).name
    'DataProcessingCertificate'
    >>> best.winner(delta=1e-5, steps=20).name
    'ContractionCertificate'
    """
    return BestCertificate(tuple(certificates))
