"""The best guess that (ε, δ) allows, beside pairs of distributions that are exactly so close."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp

from opacus_pil.accounting.best_guess import best_guess
from opacus_pil.certificates.gaussian import gaussian_epsilon

EPSILONS = st.floats(0.0, 40.0)
DELTAS = st.floats(0.0, 0.5)


def close(p: np.ndarray, q: np.ndarray, *, epsilon: float, delta: float) -> bool:
    """Whether P(A) <= e^ε Q(A) + δ for all sets A: for the worst of them."""
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum()) <= delta * (1 + 1e-12) + 1e-12


def right(p: np.ndarray, q: np.ndarray) -> float:
    """How often the best rule is right after a fair coin."""
    return float(np.maximum(p, q).sum() / 2.0)


@given(EPSILONS, DELTAS)
def test_in_both_directions_randomised_response_reaches_it(epsilon, delta):
    """P = (δ, 0, and the rest by shares e^ε : 1), Q mirrored: (ε, δ)-close, and no closer."""
    large = (1 - delta) / (1 + math.exp(-epsilon))
    p = np.array([delta, large, large * math.exp(-epsilon), 0.0])
    q = p[::-1].copy()
    assert close(p, q, epsilon=epsilon, delta=delta)
    assert close(q, p, epsilon=epsilon, delta=delta)
    # Both sides are sums of four doubles below 1.
    assert best_guess(epsilon, delta=delta) == pytest.approx(right(p, q), abs=1e-14)


@given(EPSILONS, DELTAS)
def test_in_one_direction_only_more_can_be_told(epsilon, delta):
    """P is one point, which has (1 − δ)e^−ε under Q."""
    share = (1 - delta) * math.exp(-epsilon)
    p, q = np.array([1.0, 0.0]), np.array([share, 1 - share])
    assert close(p, q, epsilon=epsilon, delta=delta)
    found = best_guess(epsilon, delta=delta, two_sided=False)
    assert found == pytest.approx(right(p, q), abs=1e-14)
    assert found >= best_guess(epsilon, delta=delta)


@given(st.lists(st.integers(0, 50), min_size=6, max_size=6), st.floats(0.0, 5.0))
def test_no_pair_of_laws_is_told_apart_more_often(weights, epsilon):
    p, q = (np.array(part, dtype=float) + 1e-3 for part in (weights[:3], weights[3:]))
    p, q = p / p.sum(), q / q.sum()
    forward = float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())
    back = float(np.maximum(q - math.exp(epsilon) * p, 0.0).sum())
    assert right(p, q) <= best_guess(epsilon, delta=max(forward, back)) + 1e-12
    assert right(p, q) <= best_guess(epsilon, delta=forward, two_sided=False) + 1e-12


@given(EPSILONS, DELTAS, st.booleans())
def test_it_is_rounded_up(epsilon, delta, two_sided):
    with mp.workdps(50):
        e, d = mp.mpf(epsilon), mp.mpf(delta)
        wrong = (1 - d) / (1 + mp.exp(e)) if two_sided else (1 - d) * mp.exp(-e) / 2
        assert mp.mpf(best_guess(epsilon, delta=delta, two_sided=two_sided)) >= min(1 - wrong, 1)


def test_two_gaussians_are_told_as_often_as_their_distance_says():
    """Φ(μ/2) is exact; ε at any δ allows at least that."""
    for delta in (1e-2, 1e-5):
        epsilon = gaussian_epsilon(1.0, delta=delta)
        exact = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
        assert best_guess(epsilon, delta=delta) >= exact


def test_the_ends():
    assert best_guess(0.0, delta=0.0) == pytest.approx(0.5, abs=1e-15)
    assert best_guess(math.inf, delta=0.0) == 1.0
    assert best_guess(1.0, delta=1.0) == 1.0
    assert best_guess(800.0, delta=0.0) == 1.0
    for wrong in ({"epsilon": -1.0, "delta": 0.0}, {"epsilon": math.nan, "delta": 0.0},
                  {"epsilon": 1.0, "delta": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match="Expected"):
            best_guess(wrong["epsilon"], delta=wrong["delta"])
