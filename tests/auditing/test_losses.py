"""Loss laws on a lattice against dp-accounting, closed forms and each other."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy.stats import norm

from opacus_pil.auditing.losses import ADD_REMOVE, REPLACE, step_laws
from tests.oracles import gaussian_delta

EPSILONS = np.linspace(0.0, 8.0, 33)
RELATION = {
    ADD_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
    REPLACE: NeighboringRelation.REPLACE_ONE,
}


def delta(noise, rate, steps, *, above, neighbours=ADD_REMOVE, spacing=1e-3):
    laws = step_laws(noise, rate, spacing=spacing, above=above, neighbours=neighbours)
    return np.max([law.repeated(steps).deltas(EPSILONS) for law in laws], axis=0)


@pytest.mark.parametrize("neighbours", [ADD_REMOVE, REPLACE])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.05, 60), (0.6, 0.01, 200), (3, 1, 9)])
def test_laws_agree_with_dp_accounting_from_both_sides(noise, rate, steps, neighbours):
    exact = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=1e-3,
        neighboring_relation=RELATION[neighbours],
    ).self_compose(steps).get_delta_for_epsilon(EPSILONS)  # fmt: skip
    above = delta(noise, rate, steps, above=True, neighbours=neighbours)
    below = delta(noise, rate, steps, above=False, neighbours=neighbours)
    # Both are connect-the-dots on one lattice: alike up to the round-off of transforms.
    np.testing.assert_allclose(above, exact, atol=1e-9)
    assert (below <= above + 1e-12).all()
    assert (above - below <= steps * 1e-3).all()  # each loss is rounded by one spacing at most


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_full_batches_are_one_gaussian(mu):
    for neighbours, shift in ((ADD_REMOVE, 1.0), (REPLACE, 2.0)):  # an exchange moves by two
        exact = np.array([gaussian_delta(e, shift * mu) for e in EPSILONS])
        above = delta(2.0 / mu, 1.0, 4, above=True, neighbours=neighbours, spacing=1e-4)
        below = delta(2.0 / mu, 1.0, 4, above=False, neighbours=neighbours, spacing=1e-4)
        assert (below <= exact + 1e-10).all()
        assert (exact <= above + 1e-10).all()
        np.testing.assert_allclose(above, below, atol=4e-4)  # four spacings


def test_one_step_is_exact_at_every_epsilon():
    noise, rate = 0.8, 0.1
    forward, reverse = step_laws(noise, rate, spacing=1e-4, above=True)
    for epsilon in (0.05, 0.4, 1.5):
        place = 0.5 + noise**2 * math.log1p(math.expm1(epsilon) / rate)
        mixture = (1 - rate) * norm.sf(place / noise) + rate * norm.sf((place - 1) / noise)
        exact = mixture - math.exp(epsilon) * norm.sf(place / noise)
        found = float(forward.deltas(np.array([epsilon]))[0])
        assert exact <= found * (1 + 1e-12)
        assert found == pytest.approx(exact, abs=1e-8)  # between dots: quadratic in the spacing
    # The reverse loss never exceeds −log(1 − q).
    assert reverse.deltas(np.array([-math.log(1 - rate) + 2e-4]))[0] < 1e-15


@pytest.mark.parametrize("neighbours", [ADD_REMOVE, REPLACE])
def test_masses_sum_to_one_under_both_neighbours(neighbours):
    for noise, rate in ((0.3, 0.02), (1.0, 0.5), (5.0, 1.0)):
        for law in step_laws(noise, rate, spacing=1e-3, above=True, neighbours=neighbours):
            assert law.masses.sum() + law.infinite == pytest.approx(1.0, abs=1e-12)
            other = (law.masses * np.exp(-law.losses)).sum()
            assert other == pytest.approx(1.0, abs=1e-9)  # dots keep both masses of a cell


def test_epsilon_and_delta_invert_each_other():
    for law in step_laws(1.0, 0.1, spacing=1e-3, above=True):
        many = law.repeated(50)
        for epsilon in (0.01, 0.7, 2.0):
            at = float(many.deltas(np.array([epsilon]))[0])
            if at > 1e-12:
                assert many.epsilon(at) == pytest.approx(epsilon, abs=1e-9)


def test_order_of_runs_does_not_matter():
    first = step_laws(1.0, 0.1, spacing=1e-3, above=True)[0].repeated(10)
    second = step_laws(2.0, 0.3, spacing=1e-3, above=True)[0].repeated(5)
    np.testing.assert_allclose(
        first.plus(second).deltas(EPSILONS), second.plus(first).deltas(EPSILONS), atol=1e-13
    )


def test_enormous_losses_are_numbers_and_rounded_as_the_law_is():
    above = step_laws(0.02, 1.0, spacing=0.5, above=True)[0].epsilon(1e-5)
    below = step_laws(0.02, 1.0, spacing=0.5, above=False)[0].epsilon(1e-5)
    exact = 1250.0 + 50.0 * norm.isf(1e-5)  # L ~ N(μ²/2, μ²); e^{ε − L} is nothing out there
    assert below <= exact + 1.0
    assert exact - 1.0 <= above
    assert abs(above - below) <= 2.0
