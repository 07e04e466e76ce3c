import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil.certificates.gaussian import gaussian_delta, gaussian_epsilon
from tests.certificates import oracles


@pytest.mark.parametrize("mu", [1e-8, 1e-3, 0.3, 0.999, 1.001, 4.0, 30.0])
@pytest.mark.parametrize("quantile", [-0.4, 0.0, 0.1, 1.0, 5.0, 20.0, 35.0])
def test_delta_is_the_exact_curve_rounded_up(mu, quantile):
    epsilon = max(mu * quantile + mu * mu / 2.0, 0.0)
    exact = oracles.gaussian_delta(mu, epsilon)
    ours = gaussian_delta(mu, epsilon=epsilon)
    assert ours >= exact
    # the documented slack, 1e-14·(1 + x²), twice; and x is known to an ulp of max(ε/μ, μ)
    x = epsilon / mu - mu / 2.0
    assert ours <= exact * (1.0 + 1e-13 * (1.0 + x * x))


@given(st.floats(1e-6, 60.0), st.floats(1e-12, 0.999))
def test_delta_at_the_returned_epsilon_is_at_most_the_target(mu, delta):
    epsilon = gaussian_epsilon(mu, delta=delta)
    assert oracles.gaussian_delta(mu, epsilon) <= delta
    # and not much more than needed: below it by 1e-9 (relative, of size μ) the target is missed
    smaller = epsilon - 1e-9 * (epsilon + mu)
    assert smaller <= 0.0 or oracles.gaussian_delta(mu, smaller) > delta


def test_delta_stays_an_upper_bound_far_out():
    # x = 1500, where 1 − t·m(t) has lost its digits and its bound is used; δ underflows
    assert gaussian_delta(1.0, epsilon=1500.5) >= oracles.gaussian_delta(1.0, 1500.5) > 0


def test_edge_cases():
    assert gaussian_delta(0.0, epsilon=0.0) == 0.0
    assert gaussian_delta(math.inf, epsilon=3.0) == 1.0
    assert 0.0 < gaussian_delta(1e-200, epsilon=1e200) < 1e-300
    assert gaussian_epsilon(0.0, delta=1e-5) == 0.0
    assert gaussian_epsilon(math.inf, delta=1e-5) == math.inf
    assert gaussian_epsilon(1e200, delta=1e-5) == math.inf
    assert gaussian_epsilon(1e-6, delta=1e-5) == 0.0  # δ(0) = 4e-7 already


def test_a_large_distance_keeps_its_leading_terms():
    # for μ → ∞ the second term of δ vanishes: ε = μ²/2 + μ·Φ^{-1}(1 − δ), here at δ = 1/2
    assert gaussian_epsilon(1e6, delta=0.5) == pytest.approx(5e11, rel=1e-11)
