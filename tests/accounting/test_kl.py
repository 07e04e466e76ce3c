"""The KL divergence of one step against mpmath, its limits, and the Rényi divergences around it."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from opacus_pil.accounting import sampled_gaussian_kl, sampled_gaussian_rdp

ABOVE = 1e-6  # promised: rounded up by no more than this
ULPS = 1e-14  # two closed forms of a few operations each


def true_kl(shift, rate):
    """E over N(0,1) of u − log(1+u), which is the KL divergence because u has mean 0."""
    with mpmath.workdps(40):
        r, q = mpmath.mpf(shift), mpmath.mpf(rate)

        def integrand(t):
            u = q * mpmath.expm1(r * t - r * r / 2)
            return mpmath.npdf(t) * (u - mpmath.log1p(u))

        points = sorted({-14.0, -5.0, 0.0, 5.0, 14.0, shift / 2, shift - 7, shift, shift + 14})
        return float(mpmath.quad(integrand, points))


@pytest.mark.parametrize("shift", [1e-6, 0.1, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("rate", [1e-4, 0.03, 0.5, 0.99])
def test_it_is_the_integral_rounded_up(shift, rate):
    (found,) = sampled_gaussian_kl([shift], noise_multiplier=1.0, sample_rate=rate)
    exact = true_kl(shift, rate)
    assert exact * (1 - ULPS) <= found <= exact * (1 + ABOVE)


def test_gauss_hermite_agrees_where_the_integrand_is_a_polynomial_almost():
    """80 nodes: at a shift of 1/2 the integrand is smooth on the nodes' scale."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    u = 0.3 * np.expm1(0.5 * nodes - 0.125)
    expected = (weights * (u - np.log1p(u))).sum() / math.sqrt(2 * math.pi)
    (found,) = sampled_gaussian_kl([1.0], noise_multiplier=2.0, sample_rate=0.3)
    assert found == pytest.approx(expected, rel=ABOVE)


def test_without_sampling_it_is_half_the_square():
    found = sampled_gaussian_kl([0.0, 0.5, 2.0], noise_multiplier=2.0, sample_rate=1.0)
    np.testing.assert_allclose(found, [0.0, 1 / 32, 0.5], rtol=ULPS)


def test_it_grows_with_the_sensitivity_up_to_the_limit_of_the_rate():
    sizes = np.concatenate([[0.0], np.geomspace(1e-9, 1e3, 200)])
    found = sampled_gaussian_kl(sizes, noise_multiplier=1.0, sample_rate=0.2)
    assert found[0] == 0.0
    assert (np.diff(found) >= -ABOVE * found[1:]).all()
    assert (found <= -math.log1p(-0.2) * (1 + ULPS)).all()
    # q·KL(N(0,1) ‖ N(s,1)), convexity
    assert (found <= 0.2 * sizes**2 / 2 * (1 + ABOVE)).all()


def test_renyi_divergences_of_the_step_are_not_below():
    """sampled_gaussian_rdp is the larger of both directions at an order above 1."""
    sizes = np.linspace(0.05, 1.0, 20)
    found = sampled_gaussian_kl(sizes, noise_multiplier=0.7, sample_rate=0.1)
    above = sampled_gaussian_rdp(sizes, noise_multiplier=0.7, sample_rate=0.1, orders=[1.5])[:, 0]
    assert (found <= above).all()


def test_edges():
    sizes = np.array([[0.0, 1.0]])
    nothing = sampled_gaussian_kl(sizes, noise_multiplier=1.0, sample_rate=0.0)
    assert nothing.tolist() == [[0.0, 0.0]]
    quiet = sampled_gaussian_kl(sizes, noise_multiplier=0.0, sample_rate=0.5)
    assert quiet.tolist() == [[0.0, math.log(2.0)]]
    assert sampled_gaussian_kl(1.0, noise_multiplier=0.0, sample_rate=1.0) == math.inf
    with pytest.raises(ValueError, match="row 1"):
        sampled_gaussian_kl([0.5, -1.0], noise_multiplier=1.0, sample_rate=0.5)
    with pytest.raises(ValueError, match="sample_rate"):
        sampled_gaussian_kl([0.5], noise_multiplier=1.0, sample_rate=1.5)
