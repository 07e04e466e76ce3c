import itertools
import math

import numpy as np
import pytest
from scipy import stats

from opacus_pil.evaluation import compare_scores, correlation_difference, rank_correlation
from opacus_pil.evaluation.rank_correlation import MidRanks, _kendall, spearman_statistic

METHODS = ["spearman", "kendall"]


def sample(seed=0, size=25, ties=True):
    generator = np.random.default_rng(seed)
    a = generator.normal(size=size)
    b = 0.6 * a + generator.normal(size=size)
    return (a.round(0), b.round(1)) if ties else (a, b)


@pytest.mark.parametrize("make", [spearman_statistic, _kendall])
def test_statistic_of_a_resample_is_that_of_the_resampled_rows(make):
    """Independent oracle: scipy on the rows written out, ties and repetitions included."""
    a, b = sample()
    known = {spearman_statistic: stats.spearmanr, _kendall: stats.kendalltau}[make]
    taken = np.random.default_rng(1).multinomial(25, np.full(25, 1 / 25), size=40)
    taken[0], taken[1], taken[1, 3] = 1, 1, 0  # the sample itself, and one instance left out
    found = make(a, b)(taken)
    for row, value in zip(taken, found, strict=True):
        rows = np.repeat(np.arange(25), row)
        assert value == pytest.approx(known(a[rows], b[rows]).statistic, abs=1e-12)  # rounding


def test_kendall_by_counting_pairs():
    a, b = sample(2)
    agree = ties_a = ties_b = 0
    for i, j in itertools.combinations(range(25), 2):
        agree += np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
        ties_a, ties_b = ties_a + (a[i] == a[j]), ties_b + (b[i] == b[j])
    expected = agree / math.sqrt((300 - ties_a) * (300 - ties_b))
    found = rank_correlation(a, target=b, method="kendall", resamples=100)
    assert found.value == pytest.approx(expected, abs=1e-12)  # rounding
    assert ties_a * ties_b > 0


def test_spearman_without_ties_by_its_textbook_formula():
    a, b = sample(3, ties=False)
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    expected = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (25 * (25**2 - 1))
    assert rank_correlation(a, target=b).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_increasing_transformations_change_nothing_and_decreasing_ones_the_sign(method):
    a, b = sample(4)
    how = {"method": method, "resamples": 200}
    plain = rank_correlation(a, target=b, **how)
    assert rank_correlation(np.exp(a), target=b**3, **how) == plain
    turned = rank_correlation(-a, target=b, **how, interval="percentile")
    straight = rank_correlation(a, target=b, **how, interval="percentile")
    assert turned.value == -straight.value
    assert turned.low == pytest.approx(-straight.high, abs=1e-12)  # quantiles interpolate


def test_infinite_scores_rank_highest():
    a, b = sample(5, ties=False)
    largest = a.argmax()
    infinite = a.copy()
    infinite[largest] = math.inf
    assert rank_correlation(infinite, target=b) == rank_correlation(a, target=b)


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_another_order_give_the_same_value(method):
    a, b = sample(6)
    order = np.random.default_rng(7).permutation(25)
    how = {"method": method, "resamples": 100}
    first = rank_correlation(a, target=b, **how).value
    assert rank_correlation(a[order], target=b[order], **how).value == pytest.approx(
        first, abs=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_edges_perfect_constant_and_short(method):
    how = {"method": method, "resamples": 200}
    perfect = rank_correlation(np.arange(9.0), target=np.arange(9.0) ** 2, **how)
    # scipy's square roots of pair counts round.
    assert [perfect.value, perfect.low, perfect.high] == pytest.approx([1.0] * 3, abs=1e-12)
    constant = rank_correlation(np.ones(9), target=np.arange(9.0), **how)
    assert math.isnan(constant.value)
    assert math.isnan(constant.low)
    pair = rank_correlation([1.0, 2.0], target=[1.0, 2.0], **how)
    assert pair.value == pytest.approx(1.0, abs=1e-12)
    assert math.isnan(pair.low)  # two instances say nothing about others


def test_difference_is_that_of_the_two_correlations():
    a, b = sample(8)
    other = np.random.default_rng(9).normal(size=25)
    found = correlation_difference(a, other=other, target=b)
    expected = rank_correlation(a, target=b).value - rank_correlation(other, target=b).value
    assert found.value == pytest.approx(expected, abs=1e-12)
    back = correlation_difference(other, other=a, target=b, interval="percentile")
    there = correlation_difference(a, other=other, target=b, interval="percentile")
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)


def test_pairing_cancels_what_two_scores_share():
    """Two scores that are nearly one: each correlation is uncertain, their difference hardly."""
    generator = np.random.default_rng(10)
    target = generator.normal(size=60)
    common = target + 2.0 * generator.normal(size=60)
    scores = {"one": common, "two": common + 0.1 * generator.normal(size=60)}
    result = compare_scores(scores, target=target, reference="one")
    alone, paired = result["two"].correlation, result["two"].difference
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    assert result["two"].verdict == "undecided"
    itself = result["one"].difference
    assert (itself.value, itself.low, itself.high) == (0.0, 0.0, 0.0)


def test_comparing_many_scores_is_comparing_each_by_itself():
    generator = np.random.default_rng(15)
    target, *values = generator.normal(size=(3, 12))
    scores = dict(zip("ab", values, strict=True))
    how = {"target": target, "resamples": 100, "method": "kendall"}
    for name, found in compare_scores(scores, reference="b", **how).items():
        assert found.correlation == rank_correlation(scores[name], **how)
        assert found.difference == correlation_difference(scores["b"], other=scores[name], **how)


def test_verdict_names_the_better_score():
    generator = np.random.default_rng(11)
    target = generator.normal(size=80)
    scores = {"noise": generator.normal(size=80), "good": target + 0.3 * generator.normal(size=80)}
    assert compare_scores(scores, target=target, reference="good")["noise"].verdict == "better"
    assert compare_scores(scores, target=target, reference="noise")["good"].verdict == "worse"


@pytest.mark.parametrize("size", [40, 100])
def test_intervals_cover_the_correlation_of_the_population(size):
    """Bivariate normal: Spearman's correlation is (6/π) asin(ρ/2)."""
    rho, trials = 0.6, 300
    truth = 6 / math.pi * math.asin(rho / 2)
    generator = np.random.default_rng(12)
    hits = 0
    for trial in range(trials):
        a = generator.normal(size=size)
        b = rho * a + math.sqrt(1 - rho**2) * generator.normal(size=size)
        found = rank_correlation(a, target=b, resamples=400, seed=trial)
        hits += found.low <= truth <= found.high
    # Nominal 0.95; bootstraps of some ten instances are short by up to 0.03 (their second order
    # is 1/n and quantiles of 400 draws), then four binomial deviations of 300 trials (0.05). An
    # interval of half the width would cover 0.67.
    assert hits / trials >= 0.95 - 0.03 - 0.05


def test_paired_difference_covers_zero_where_two_scores_are_equally_good():
    generator = np.random.default_rng(13)
    trials, hits = 300, 0
    for trial in range(trials):
        target = generator.normal(size=50)
        first, second = target + generator.normal(size=(2, 50))  # exchangeable: truth is 0
        found = correlation_difference(
            first, other=second, target=target, resamples=400, seed=trial
        )
        hits += found.low <= 0.0 <= found.high
    assert hits / trials >= 0.95 - 0.03 - 0.05  # as above


def test_mid_ranks_are_scipys():
    a, _ = sample(14)
    assert np.array_equal(MidRanks(a)(np.ones((1, 25), dtype=int))[0] + 0.5, stats.rankdata(a))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"score": [1.0, math.nan], "target": [1.0, 2.0]}, "row 1.*Leave such"),
        ({"score": [1.0], "target": [1.0, 2.0]}, "same length"),
        ({"score": [], "target": []}, "number of instances"),
        ({"score": [1.0, 2.0], "target": [1.0, 2.0], "method": "pearson"}, "method"),
    ],
)
def test_unusable_arguments_are_refused(arguments, match):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=match):
        rank_correlation(arguments.pop("score"), **arguments)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="reference"):
        compare_scores({"a": [1.0, 2.0]}, target=[1.0, 2.0], reference="b")
