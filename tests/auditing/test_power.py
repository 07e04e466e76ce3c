"""What a design could have seen: expected counts against the curve, and more canaries see more."""

import numpy as np
import pytest
from scipy.stats import norm

from opacus_pil.auditing import Claim, LowerBound
from opacus_pil.auditing.power import could_have_seen, expected_right

CLAIM = Claim(((10.0, 1.0, 100),), delta=1e-5)  # one Gaussian of mean 1


def design(guesses, canaries):
    return LowerBound(0.0, 1e-5, 0.95, "", "none", guesses=guesses, canaries=canaries)


def test_everybody_guessed_is_right_as_often_as_total_variation_allows():
    losses = CLAIM.losses()
    right = expected_right(losses, guesses=1000, canaries=1000)
    assert right == pytest.approx(1000 * norm.cdf(0.5), abs=8)  # the grid of ε is .025 wide


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_most_certain_guesses_are_right_as_a_gaussian_says(share):
    # Scores are N(±1/2, 1): guessed are those with |score| above t, right if the sign is.
    t = next(x for x in np.linspace(4.0, 0.0, 4001)
             if norm.sf(x - 0.5) + norm.cdf(-x - 0.5) >= share)  # fmt: skip
    wanted = norm.sf(t - 0.5) / share
    found = expected_right(CLAIM.losses(), guesses=int(10_000 * share), canaries=10_000)
    assert found / (10_000 * share) == pytest.approx(wanted, abs=0.01)


def test_more_canaries_see_twice_the_claim_and_few_do_not():
    assert not could_have_seen(design(20, 100), claim=CLAIM, times=2.0, level=5e-3)
    assert could_have_seen(design(400, 4000), claim=CLAIM, times=2.0, level=5e-3)
    assert not could_have_seen(design(400, 4000), claim=CLAIM, times=1.0, level=5e-3)
