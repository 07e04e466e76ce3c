"""Tests on wrong guesses: exact under independence, and why they are kept from natural canaries."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from opacus_pil.auditing import Claim, step_bound, total_variation_bound, wrong_guess_bound
from opacus_pil.auditing.error_test import gaussian_shift, upper_proportion, wrong_guess_p_value

CLAIM = Claim(((1.0, 0.05, 60),), delta=1e-5)


def test_the_p_value_is_exact_at_the_best_rule():
    m, tv = 50, 0.3
    law = binom.pmf(np.arange(m + 1), m, (1 - tv) / 2)
    p = np.array([wrong_guess_p_value(u, canaries=m, total_variation=tv) for u in range(m + 1)])
    for u in range(m + 1):
        assert law[p <= p[u]].sum() == pytest.approx(p[u], rel=1e-12)


def test_no_rule_does_better_however_it_mixes_certain_and_idle_guesses():
    # Canaries told with certainty in part: error (1 − TV)/2 on average, and less spread.
    m, tv = 60, 0.4
    certain = round(m * tv)
    law = np.convolve(
        binom.pmf(np.arange(certain + 1), certain, 0.0),
        binom.pmf(np.arange(m - certain + 1), m - certain, 0.5),
    )
    p = np.array([wrong_guess_p_value(u, canaries=m, total_variation=tv) for u in range(m + 1)])
    for level in (0.01, 0.05, 0.2):
        assert law[p <= level].sum() <= level


def test_the_bound_covers_the_truth_in_its_family():
    m, level, random = 300, 0.05, np.random.default_rng(0)
    error = (1 - CLAIM.losses().total_variation) / 2
    covered = [
        wrong_guess_p_value(int(u), canaries=m, total_variation=CLAIM.losses().total_variation)
        >= level
        for u in random.binomial(m, error, size=4000)
    ]  # the bound exceeds ε just where the truth itself is rejected
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_the_bound_is_what_the_least_rejected_noise_gives():
    bound = wrong_guess_bound(100, canaries=300, claim=CLAIM, level=0.05)
    low, high = 0.5, 8.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        tv = CLAIM.losses(middle).total_variation
        low, high = (low, middle) if binom.cdf(100, 300, (1 - tv) / 2) < 0.05 else (middle, high)
    # The search ends within 1.5e-3 of the noise; ε moves about 2.5 times as much.
    assert bound.epsilon == pytest.approx(CLAIM.epsilon_from_below(high), rel=5e-3)
    assert bound.epsilon <= CLAIM.epsilon_from_below(low) * (1 + 1e-9)
    assert bound.assumption == "independent by construction"
    assert "rate, steps" in bound.condition


def test_fewer_errors_never_lower_the_bound_and_half_wrong_gives_zero():
    found = [
        wrong_guess_bound(u, canaries=200, claim=CLAIM, level=0.05).epsilon
        for u in (200, 120, 100, 80, 60, 20, 0)
    ]
    assert found == sorted(found)
    assert found[:3] == [0.0, 0.0, 0.0]  # a sign slip is no evidence


def test_total_variation_alone_gives_epsilon_in_closed_form():
    bound = total_variation_bound(0, canaries=1000, delta=0.0001, level=0.05, independent=True)
    share = 1 - 0.05 ** (1 / 1000)  # Clopper–Pearson at no error
    tv = 1 - 2 * share
    assert bound.epsilon == pytest.approx(math.log((1 + tv - 2e-4) / (1 - tv)), rel=1e-9)
    assert bound.ceiling == bound.epsilon
    assert total_variation_bound(
        500, canaries=1000, delta=1e-5, level=0.05, independent=False
    ).assumption == "assumes independence"  # fmt: skip


def test_randomised_response_gets_its_own_epsilon_at_most():
    # The tightest case of log((1 + TV)/(1 − TV)): above ε in at most 5 % of audits.
    epsilon, m, random = 1.0, 400, np.random.default_rng(1)
    wrong = random.binomial(m, 1 / (1 + math.exp(epsilon)), size=400)
    above = [
        total_variation_bound(
            int(u), canaries=m, delta=1e-9, level=0.05, independent=True
        ).epsilon > epsilon
        for u in wrong
    ]  # fmt: skip
    assert np.mean(above) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_clopper_pearson_is_exact_at_its_limit():
    for k, n in ((0, 20), (3, 20), (19, 20)):
        upper = upper_proportion(k, n, level=0.05)
        assert binom.cdf(k, n, upper) == pytest.approx(0.05, rel=1e-9)
    assert upper_proportion(5, 5, level=0.05) == 1.0


def test_the_shift_covers_and_knows_its_sign():
    mu, n, random = 0.8, 2000, np.random.default_rng(2)
    above = []
    for _ in range(400):
        hits = random.binomial(n, norm.sf(0.5 * mu - mu))
        alarms = random.binomial(20 * n, norm.sf(0.5 * mu))
        above.append(gaussian_shift(hits, of=n, false_alarms=alarms, among=20 * n, level=0.05) > mu)
    assert np.mean(above) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert gaussian_shift(100, of=1000, false_alarms=900, among=1000, level=0.05) == 0.0
    assert gaussian_shift(0, of=0, false_alarms=0, among=0, level=0.05) == 0.0


def test_single_steps_come_close_to_the_claim_and_stay_below():
    n, q = 5000, 0.05
    hits, alarms = round(n * norm.sf(-0.5)), round(n / q * norm.sf(0.5))
    bound = step_bound(hits, of=n, false_alarms=alarms, among=round(n / q), claim=CLAIM, level=0.05)
    assert 0.85 * CLAIM.epsilon < bound.epsilon < CLAIM.epsilon
    assert bound.p_value > 0.3
    assert "independent from step to step" in bound.condition
    halved = step_bound(
        round(n * norm.sf(-1.0)), of=n, false_alarms=round(n / q * norm.sf(1.0)),
        among=round(n / q), claim=CLAIM, level=0.05,
    )  # fmt: skip
    assert halved.p_value < 1e-12
    assert halved.epsilon > 2 * CLAIM.epsilon
    assert halved.epsilon < CLAIM.epsilon_from_below(0.5)


def test_of_a_schedule_the_least_noise_sets_the_limit():
    mixed = Claim(((1.0, 0.05, 30), (2.0, 0.05, 30)), delta=1e-5)
    bound = step_bound(
        round(5000 * norm.sf(-0.5)), of=5000, false_alarms=round(1e5 * norm.sf(0.5)),
        among=100_000, claim=mixed, level=0.05,
    )  # fmt: skip
    assert bound.epsilon < mixed.epsilon
