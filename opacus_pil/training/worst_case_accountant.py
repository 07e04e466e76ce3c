"""WorstCaseRDPAccountant: Opacus's accountant interface over this package's one-step RDP.

Registered with Opacus as "per_instance_rdp". It meets Opacus's hook only, so it knows neither
instances nor batches: its ε is the one that holds for everybody. `RecordingEngine.attach` or
`PerInstancePrivacyEngine` add the instances.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from opacus.accountants import RDPAccountant, register_accountant

from .. import _validate as check
from ..accounting import DEFAULT_ORDERS, rdp_to_epsilon, sampled_gaussian_rdp

MECHANISM = "per_instance_rdp"


class WorstCaseRDPAccountant(RDPAccountant):
    """RDP of the sampled Gaussian mechanism on orders up to 4096, never rounded down.

    Guarantee: ε for adding or removing any one instance, both directions. Equal to Opacus's "rdp"
        on the same orders where that is exact; smaller where a larger order is better.

    Source: Mironov, Talwar, Zhang (2019), arXiv:1908.10530; Canonne, Kamath, Steinke (2020),
        arXiv:2004.00010, Prop. 12.
    """

    def get_privacy_spent(self, *, delta: float, alphas: Any = None) -> tuple[float, float]:
        """Return (epsilon, order); `alphas` are the orders to look at, default DEFAULT_ORDERS."""
        orders = check.orders(DEFAULT_ORDERS if alphas is None else alphas)
        target = check.delta(delta)
        total = np.zeros(len(orders))
        for noise_multiplier, sample_rate, steps in self.history:
            total += steps * sampled_gaussian_rdp(
                1.0, noise_multiplier=noise_multiplier, sample_rate=sample_rate, orders=orders
            )
        total *= 1.0 + 4.0 * np.finfo(np.float64).eps * (len(self.history) + 1)
        epsilon, order = rdp_to_epsilon(total, orders=orders, delta=target)
        return float(epsilon), float(order)

    @classmethod
    def mechanism(cls) -> str:
        """Return the name this accountant is registered under."""
        return MECHANISM


# Opacus refuses a second registration, which a reloaded module would be.
register_accountant(MECHANISM, WorstCaseRDPAccountant, force=True)
