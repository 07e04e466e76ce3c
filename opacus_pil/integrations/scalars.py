"""What a framework's logger may be told of both ledgers, as plain numbers.

Knows an engine; no logger.
"""

from __future__ import annotations

from ..accounting.shown import quantiles_above
from ..privacy_engine import PerInstancePrivacyEngine

_QUANTILES = {"median": 0.5, "q90": 0.9, "most": 1.0}


def privacy_scalars(
    engine: PerInstancePrivacyEngine, *, delta: float, quantiles: bool = False
) -> dict[str, float]:
    """Return what was spent so far.

    Args:
        engine: That trains.
        delta: In (0, 1).
        quantiles: Also quantiles over the instances.

    Returns:
        "epsilon", Opacus's worst case, a function of public constants; with quantiles
        "per_instance_epsilon_median", "…_q90" and "…_most".

    Privacy: quantiles depend on private data, whatever their label: no ε covers a log of them. They
        are off unless asked for.
    """
    found = {"epsilon": float(engine.get_epsilon(delta))}
    if quantiles:
        spent = engine.get_per_instance_epsilon(delta).epsilon
        shown = quantiles_above(spent, list(_QUANTILES.values()))
        for name, value in zip(_QUANTILES, shown, strict=True):
            found[f"per_instance_epsilon_{name}"] = value
    return found
