"""What canaries saw, held against a claim: the law of their entries is known exactly."""

import math

import numpy as np
import pytest

from opacus_pil.auditing import Claim
from opacus_pil.auditing.canary_record import CanaryRecord, evidence
from opacus_pil.auditing.error_test import wrong_guess_p_value

Z, Q, T = 1.0, 0.1, 40
CLAIM = Claim(((Z, Q, T),), delta=1e-5)


def simulate(*, seed=0, m=300, noise=Z, rate=Q, hit=1.0, steps=T, noises=None):
    random = np.random.default_rng(seed)
    record = CanaryRecord(random.random(m) < 0.5, 64, Q)
    places = np.flatnonzero(record.included)
    for step in range(steps):
        z = noise if noises is None else noises[step]
        values = z * random.standard_normal(m + 64)
        drawn = places[random.random(len(places)) < rate]
        values[drawn] += hit
        record.add(values, drawn=drawn, noise=Z if noises is None else z)
    return record


def test_errors_are_those_that_the_total_variation_allows():
    error = np.mean([simulate(seed=s).wrong for s in range(20)]) / 300
    limit = (1 - CLAIM.losses().total_variation) / 2
    # The best rule attains the limit; σ is measured, so not quite. 6,000 guesses: .6 % each way.
    assert limit - 0.02 < error < limit + 0.025


def test_correct_runs_are_refuted_no_more_often_than_the_level_says():
    tv = CLAIM.losses().total_variation
    p = [
        wrong_guess_p_value(simulate(seed=s, m=200).wrong, canaries=200, total_variation=tv)
        for s in range(200)
    ]
    for level in (0.05, 0.2):
        assert np.mean(np.array(p) < level) <= level + 3 * math.sqrt(level * (1 - level) / 200)


def test_coins_that_the_training_never_saw_give_zero():
    record = simulate()
    record.included = np.random.default_rng(9).random(300) < 0.5
    proof = evidence(record, claim=CLAIM)
    for bound in proof.lower:
        if "single steps" not in bound.method:  # which knows the draws, not the coins
            assert bound.epsilon < 0.15 * CLAIM.epsilon


def test_a_sign_slip_gives_zero():
    record = simulate()
    record.scores = -record.scores
    for bound in evidence(record, claim=CLAIM).lower:
        if "single steps" not in bound.method:
            assert bound.epsilon == 0.0


@pytest.mark.parametrize(
    ("fault", "refuted"),
    [({"noise": 0.0}, True), ({"noise": 0.5}, True), ({"hit": 3.0}, True), ({"rate": 0.3}, True),
     ({}, False), ({"noise": 2.0}, False), ({"rate": 0.02}, False)],
)  # fmt: skip
def test_less_privacy_is_refuted_and_more_is_not(fault, refuted):
    proof = evidence(simulate(m=1000, **fault), claim=CLAIM)
    assert (proof.refuted_p < 1e-4) == refuted


@pytest.mark.slow
def test_a_schedule_is_scored_in_units_of_each_steps_noise():
    noises = np.repeat([0.8, 1.2, 2.0], (T + 2) // 3)[:T]
    record = simulate(m=600, noises=noises)
    assert math.sqrt(record.noise_squares / record.undrawn) == pytest.approx(1.0, abs=0.02)
    claim = Claim(tuple((float(z), Q, 1) for z in noises), delta=1e-5)
    proof = evidence(record, claim=claim)
    assert proof.refuted_p > 1e-3
    assert proof.lower[1].epsilon < claim.epsilon


def test_steps_that_are_not_finite_are_counted_and_not_scored():
    record = simulate(steps=3)
    record.add(np.full(364, np.nan), drawn=np.zeros(0, dtype=np.int64), noise=Z)
    assert (record.faults, record.steps) == (1, 3)
    assert np.isfinite(record.scores).all()


def test_every_bound_names_its_design():
    proof = evidence(simulate(), claim=CLAIM)
    for bound in proof.lower:
        assert bound.ceiling >= bound.epsilon
        assert bound.confidence == pytest.approx(0.95)
        if bound.smallest_detectable is not None:
            assert 0 < bound.smallest_detectable < bound.ceiling
        if bound.null_share is not None:
            assert bound.null_share <= 0.13  # 5 % and the noise of 200 permutations
    import json

    assert json.loads(json.dumps(proof.to_json()))["lower"][0]["assumption"]


def test_without_steps_counted_the_claim_is_that_nothing_is_given_away():
    proof = evidence(simulate(m=1000), claim=Claim((), delta=1e-5))
    assert proof.refuted_p < 1e-6
    assert proof.lower[0].epsilon == 0.0  # no member of that family gives anything away
