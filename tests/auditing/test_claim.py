"""What an accountant claims, and the family at other amounts of noise."""

import itertools
import math

import numpy as np
import pytest

from opacus_pil.accounting.pld import tight_epsilon
from opacus_pil.auditing import Claim, GaussianTradeOff
from opacus_pil.auditing.claim import few

RUN = (1.0, 0.05, 60)


def test_epsilon_is_the_packages_own_tight_one():
    assert Claim((RUN,), delta=1e-5).epsilon == tight_epsilon([(1.0, *RUN)], delta=1e-5)


def test_bounds_from_both_sides_enclose_the_tight_epsilon():
    claim = Claim((RUN, (2.0, 0.1, 30)), delta=1e-5)
    assert claim.epsilon_from_below(1.0) <= claim.epsilon
    assert claim.losses().epsilon >= claim.epsilon_from_below(1.0)
    # Losses from below lose half a spacing a step: 0.02 / 2, and δ a hundred-thousandth of itself.
    assert claim.epsilon - claim.epsilon_from_below(1.0) < 0.02


def test_replacement_gives_away_more_than_adding():
    pair = [Claim((RUN,), delta=1e-5, neighbours=n) for n in ("add_remove", "replace")]
    assert pair[1].epsilon > pair[0].epsilon
    # Alike where both are nothing but the reserve for round-off.
    assert (pair[1].losses().deltas >= pair[0].losses().deltas - 1e-14).all()


def test_more_noise_allows_less_everywhere():
    claim = Claim((RUN,), delta=1e-5)
    curves = [claim.losses(scale).deltas for scale in (0.5, 1.0, 2.0, 8.0)]
    for larger, smaller in itertools.pairwise(curves):
        assert (larger >= smaller - 1e-14).all()  # round-off of the reserve
    assert claim.epsilon_from_below(0.5) > claim.epsilon > claim.epsilon_from_below(2.0)


def test_trade_is_the_gaussians_from_below():
    claim = Claim(((1.0, 1.0, 1),), delta=1e-5)
    x = np.linspace(0.001, 0.999, 50)
    exact = GaussianTradeOff(1.0).trade(x)
    found = claim.losses().trade(x)
    assert (found <= exact + 1e-9).all()
    np.testing.assert_allclose(found, exact, atol=2e-4)  # a tangent every 0.025 in ε


@pytest.mark.slow
def test_a_schedule_of_a_thousand_values_is_joined_towards_the_side_asked_for():
    runs = [(1.0 + i / 1000, 0.01 + i / 1e6, 1) for i in range(1000)]
    private, exposed = few(runs, private=True), few(runs, private=False)
    assert len(private) <= 32
    assert sum(r[2] for r in private) == sum(r[2] for r in exposed) == 1000
    for more, less in zip(private, exposed, strict=True):
        assert more[0] >= less[0]
        assert more[1] <= less[1]
    claim = Claim(tuple(runs), delta=1e-5)
    assert claim.epsilon_from_below(1.0) < claim.epsilon
    assert claim.steps == 1000


def test_nothing_counted_claims_nothing_given_away():
    for runs in ((), ((1.0, 0.0, 10),), ((1.0, 0.1, 0),)):
        claim = Claim(runs, delta=1e-5)
        assert claim.epsilon == claim.losses().total_variation == 0.0


def test_a_step_without_noise_claims_nothing():
    claim = Claim((RUN, (0.0, 0.1, 1)), delta=1e-5)
    assert claim.epsilon == math.inf
    with pytest.raises(ValueError, match="Expected every step to have noise"):
        claim.losses()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(1.0, 0.1)], "Expected run 0 to be"),
        ([(1.0, 1.1, 5)], "Expected sample_rate of run 0 in"),
        ([RUN, (-1.0, 0.1, 5)], "Expected noise_multiplier of run 1"),
    ],
)
def test_a_bad_run_is_named(runs, message):
    with pytest.raises(ValueError, match=message):
        Claim(tuple(runs), delta=1e-5)
