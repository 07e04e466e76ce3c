import builtins
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from opacus_pil.evaluation import MembershipScores, Proportion, attack_summary


def summary(inside, outside, **options):
    scores = np.concatenate([inside, outside])
    members = np.arange(len(scores)) < len(inside)
    return attack_summary(scores, members=members, **{"attack": "test", **options})


def gaussians(seed, size=200, distance=1.0):
    generator = np.random.default_rng(seed)
    return distance + generator.normal(size=size), generator.normal(size=size)


def test_auc_counts_pairs_and_ties_half():
    inside, outside = (values.round(0) for values in gaussians(0, 30))
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(inside, outside)]
    assert summary(inside, outside).auc.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert summary(outside, inside).auc.value == pytest.approx(1 - np.mean(pairs), abs=1e-12)


def test_auc_interval_is_delongs():
    """The variance from placement values, written out pair by pair."""
    inside, outside = (values.round(1) for values in gaussians(1, 25))
    psi = (inside[:, None] > outside) + (inside[:, None] == outside) / 2
    auc = psi.mean()
    std = math.sqrt(psi.mean(1).var(ddof=1) / 25 + psi.mean(0).var(ddof=1) / 25)
    logit = math.log(auc / (1 - auc))
    reach = stats.norm.isf(0.05) * std / (auc * (1 - auc))
    found = summary(inside, outside, level=0.9).auc
    assert found.low == pytest.approx(1 / (1 + math.exp(-logit + reach)), rel=1e-9)
    assert found.high == pytest.approx(1 / (1 + math.exp(-logit - reach)), rel=1e-9)


def test_two_gaussians_have_the_auc_of_the_closed_form():
    found = summary(*gaussians(2, 20_000)).auc.value
    # Φ(d/√2); the deviation is below 0.5/√20,000 = 0.0036: four of them.
    assert found == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.0145)


def test_auc_intervals_cover_as_often_as_they_say():
    truth, trials = stats.norm.cdf(1 / math.sqrt(2)), 200
    found = [summary(*gaussians(100 + trial, 40), level=0.9).auc for trial in range(trials)]
    hits = sum(each.low <= truth <= each.high for each in found)
    # Nominal 0.9, three binomial deviations (0.064) and 0.02 for samples of 40. Without the spread
    # of one of the two kinds the interval would cover 0.76.
    assert 0.9 - 0.084 <= hits / trials <= 0.9 + 0.084


def test_increasing_transformations_change_nothing_but_the_threshold():
    inside, outside = gaussians(3)
    plain, moved = summary(inside, outside), summary(np.exp(inside), np.exp(outside))
    assert moved.auc == plain.auc
    assert [p.tpr for p in moved.true_positives] == [p.tpr for p in plain.true_positives]
    infinite = np.where(inside == inside.max(), math.inf, inside)
    assert summary(infinite, outside).auc == plain.auc


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.35])
def test_true_positives_by_trying_every_threshold(rate):
    inside, outside = (values.round(1) for values in gaussians(4, 150))
    (found,) = summary(inside, outside, false_positive_rates=[rate]).true_positives
    best = max(
        ((inside >= t).mean(), t)
        for t in [*np.unique(np.concatenate([inside, outside])), math.inf]
        if (outside >= t).mean() <= rate
    )
    assert found.tpr.value == best[0]
    assert found.fpr.value <= rate
    assert (inside >= found.threshold).mean() == found.tpr.value
    assert (outside >= found.threshold).mean() == found.fpr.value


def test_rates_that_the_sample_cannot_show_have_no_number():
    """999 non-members show 1/999 at best, which is more than 0.1 %."""
    inside, outside = gaussians(5, 1000)
    fine, coarse = summary(inside, outside).true_positives
    assert fine.tpr is not None
    assert fine.fpr.trials == 1000
    fine, coarse = summary(inside, outside[:999]).true_positives
    assert fine.tpr is None
    assert fine.fpr is None
    assert fine.threshold is None
    assert "999 non-members" in fine.note
    assert "1000 are needed" in fine.note
    assert coarse.tpr is not None
    assert coarse.note == ""


def test_no_member_above_every_other_has_true_positives_of_zero():
    (found,) = summary([-1.0] * 5, np.arange(100.0), false_positive_rates=[0.01]).true_positives
    assert found.tpr.value == 0.0
    assert found.tpr.high == pytest.approx(1 - 0.025 ** (1 / 5), rel=1e-12)
    (tied,) = summary([9.0] * 5, [9.0] * 100, false_positive_rates=[0.5]).true_positives
    assert (tied.tpr.value, tied.threshold) == (0.0, math.inf)  # nobody can be told apart


def test_clopper_pearson_covers_at_least_as_often_as_it_says():
    """Exactly, by summing the binomial law over the outcomes whose interval holds the truth."""
    for trials in (5, 20):
        intervals = [Proportion.of(k, trials, level=0.9) for k in range(trials + 1)]
        for truth in np.linspace(0.01, 0.99, 25):
            covered = sum(
                stats.binom.pmf(k, trials, truth)
                for k, each in enumerate(intervals)
                if each.low <= truth <= each.high
            )
            assert covered >= 0.9 - 1e-12


def test_separated_scores_have_a_bound_and_not_certainty():
    """3 against 5: three disjoint pairs agree, which a fair coin does once in eight."""
    found = summary([5.0, 6.0, 7.0], [0.0, 1.0, 2.0, 3.0, 4.0]).auc
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 3), rel=1e-12)
    turned = summary([0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0]).auc
    assert (turned.low, turned.value) == (0.0, 0.0)
    assert turned.high == pytest.approx(1 - found.low, rel=1e-12)


def test_nothing_is_said_without_spread():
    found = summary([1.0, 1.0, 1.0], [1.0, 1.0]).auc
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    found = summary([1.0], [0.0, 2.0]).auc
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_entries_without_a_score_are_left_out_and_counted():
    scores = MembershipScores(np.array([1.0, np.nan, 0.0, 2.0]), "LiRA (offline)")
    found = attack_summary(scores, members=[1, 1, 0, 0])
    assert (found.members, found.nonmembers, found.unscored) == (1, 2, 1)
    assert found.attack == "LiRA (offline)"


def test_curve_runs_from_nobody_to_everybody():
    found = summary(*gaussians(6, 30))
    for rates in (found.false_positive_rates, found.true_positive_rates):
        assert (rates[0], rates[-1]) == (0.0, 1.0)
        assert (np.diff(rates) >= 0).all()
    area = np.trapezoid(found.true_positive_rates, found.false_positive_rates)
    assert area == pytest.approx(found.auc.value, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "options", "match"),
    [
        ([1.0, 2.0], {"members": [True, False]}, "name the attack"),
        ([1.0, 2.0], {"members": [True], "attack": "a"}, "same length"),
        ([1.0, 2.0], {"members": [True, True], "attack": "a"}, "got 2 and 0"),
        ([math.nan, 2.0], {"members": [True, False], "attack": "a"}, "got 0 and 1"),
        ([1.0, 2.0], {"members": [0.5, 1.0], "attack": "a"}, "true or false"),
        (
            [1.0, 2.0],
            {"members": [True, False], "attack": "a", "false_positive_rates": [0.0]},
            "false_positive_rates",
        ),
        ([1.0, 2.0], {"members": [True, False], "attack": "a", "level": 1.0}, "level"),
    ],
)
def test_unusable_arguments_are_refused(scores, options, match):
    with pytest.raises(ValueError, match=match):
        attack_summary(scores, **options)


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"opacus-pil\[evaluation\]"):
        attack_summary([1.0, 0.0], members=[True, False], attack="a")
