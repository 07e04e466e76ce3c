"""What a logger is told: rounded up, and nothing private unless asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from opacus_pil.integrations.scalars import privacy_scalars


def engine(*epsilon: float) -> Any:
    return SimpleNamespace(
        get_epsilon=lambda delta: 3.0,
        get_per_instance_epsilon=lambda delta: SimpleNamespace(epsilon=np.array(epsilon)),
    )


def test_only_the_worst_case_is_told_unless_asked_for():
    assert privacy_scalars(engine(1.0, 2.0), delta=1e-2) == {"epsilon": 3.0}


def test_quantiles_are_values_of_instances_rounded_up():
    found = privacy_scalars(engine(1.0, 2.0, 2.5, 3.0), delta=1e-2, quantiles=True)
    # Half of four are at most 2.0, but 1.5 of 3 steps lie between 2.0 and 2.5: the upper one.
    assert found["per_instance_epsilon_median"] == 2.5
    assert found["per_instance_epsilon_q90"] == found["per_instance_epsilon_most"] == 3.0
    endless = privacy_scalars(engine(1.0, np.inf), delta=1e-2, quantiles=True)
    assert endless["per_instance_epsilon_median"] == np.inf  # and no NaN
