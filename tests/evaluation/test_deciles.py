import itertools
import math

import numpy as np
import pytest

from opacus_pil.evaluation import compare_groups, group_hardness, top_group_difference


def values(estimates):
    return [estimate.value for estimate in estimates]


def by_random_tie_breaking(score, hardness, groups):
    """The definition: expected group means over all orders of tied rows, groups of whole rows."""
    size = len(score) // groups
    orders = [
        order for order in itertools.permutations(range(len(score)))
        if all(score[a] <= score[b] for a, b in itertools.pairwise(order))
    ]  # fmt: skip
    sums = np.array([np.asarray(hardness)[list(order)].reshape(groups, size) for order in orders])
    return sums.mean(axis=(0, 2))


def test_deciles_without_ties_are_means_of_sorted_tenths():
    generator = np.random.default_rng(0)
    score, hardness = generator.normal(size=(2, 200))
    expected = hardness[np.argsort(score)].reshape(10, 20).mean(axis=1)
    found = group_hardness(score, hardness=hardness, resamples=100)
    assert values(found) == pytest.approx(expected, abs=1e-12)  # sums in another order


def test_tied_instances_share_their_places():
    score, hardness = [1, 1, 1, 2, 3, 3], [5.0, 1.0, 0.0, 4.0, 2.0, 8.0]
    found = values(group_hardness(score, hardness=hardness, groups=3, resamples=100))
    assert found == pytest.approx(by_random_tie_breaking(score, hardness, 3), abs=1e-12)


def test_an_instance_on_a_boundary_counts_by_its_parts():
    """Three instances in two groups: the middle one is half in each, as if there were two of it."""
    found = values(group_hardness([1, 2, 3], hardness=[0.0, 6.0, 3.0], groups=2))
    doubled = [0.0, 0.0, 6.0, 6.0, 3.0, 3.0]
    assert found == pytest.approx([np.mean(doubled[:3]), np.mean(doubled[3:])], abs=1e-12)


def test_groups_average_to_the_mean_of_all_and_rows_may_come_in_any_order():
    generator = np.random.default_rng(1)
    score, hardness = generator.normal(size=(2, 57)).round(1)
    found = values(group_hardness(score, hardness=hardness, groups=10, resamples=100))
    assert np.mean(found) == pytest.approx(hardness.mean(), abs=1e-12)
    order = generator.permutation(57)
    again = values(group_hardness(score[order], hardness=hardness[order], resamples=100))
    assert again == pytest.approx(found, abs=1e-12)


def test_increasing_transformations_of_the_score_change_nothing():
    generator = np.random.default_rng(2)
    score, hardness = generator.normal(size=(2, 40))
    found = group_hardness(score, hardness=hardness, groups=4, resamples=100)
    assert group_hardness(np.exp(score), hardness=hardness, groups=4, resamples=100) == found
    infinite = np.where(score == score.max(), math.inf, score)
    assert group_hardness(infinite, hardness=hardness, groups=4, resamples=100) == found


def test_a_constant_score_tells_no_group_from_another():
    hardness = np.arange(20.0)
    found = values(group_hardness(np.ones(20), hardness=hardness, groups=5, resamples=100))
    assert found == pytest.approx([hardness.mean()] * 5, abs=1e-12)


def test_intervals_cover_the_group_means_of_the_population():
    """Score uniform, hardness = score + noise: decile k has mean (k + ½)/10."""
    generator = np.random.default_rng(3)
    trials, hits = 150, 0
    for trial in range(trials):
        score = generator.uniform(size=200)
        hardness = score + 0.2 * generator.normal(size=200)
        top = group_hardness(score, hardness=hardness, groups=2, resamples=200, seed=trial)[-1]
        hits += top.low <= 0.75 <= top.high
    # Nominal 0.95; 0.02 for 200 draws and the second order, four binomial deviations (0.07). Half
    # the width would cover 0.67.
    assert hits / trials >= 0.95 - 0.02 - 0.07


def test_better_score_has_the_harder_top_decile():
    generator = np.random.default_rng(4)
    hardness = generator.exponential(size=300)
    scores = {"privacy_loss": hardness + 0.2 * generator.normal(size=300),
              "margin": hardness + 5 * generator.normal(size=300)}  # fmt: skip
    found = compare_groups(scores, hardness=hardness, reference="privacy_loss", resamples=400)
    assert found["margin"].verdict == "harder"
    assert found["privacy_loss"].verdict == "undecided"
    assert max(found, key=lambda name: found[name].top.value) == "privacy_loss"
    difference = found["privacy_loss"].top.value - found["margin"].top.value
    assert found["margin"].difference.value == pytest.approx(difference, abs=1e-12)
    turned = compare_groups(scores, hardness=hardness, reference="margin", resamples=400)
    assert turned["privacy_loss"].verdict == "easier"


def test_comparing_many_scores_is_comparing_each_by_itself():
    generator = np.random.default_rng(6)
    hardness, *values = generator.normal(size=(4, 30))
    scores = dict(zip("abc", values, strict=True))
    how = {"hardness": hardness, "groups": 3, "resamples": 200}
    for name, found in compare_groups(scores, reference="b", **how).items():
        assert found.groups == group_hardness(scores[name], **how)
        assert found.difference == top_group_difference(scores["b"], other=scores[name], **how)


def test_difference_is_antisymmetric():
    generator = np.random.default_rng(5)
    a, b, hardness = generator.normal(size=(3, 50))
    how = {"hardness": hardness, "resamples": 300, "interval": "percentile"}
    there = top_group_difference(a, other=b, **how)
    back = top_group_difference(b, other=a, **how)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)


@pytest.mark.parametrize(
    ("score", "hardness", "groups", "match"),
    [
        ([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], 2, "row 1"),
        ([1.0, 2.0, 3.0], [1.0, math.inf, 3.0], 2, "A mean needs finite values"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], 2, "same length"),
        ([1.0, 2.0], [1.0, 2.0], 3, "fewer groups"),
        ([1.0, 2.0], [1.0, 2.0], 1, "groups"),
    ],
)
def test_unusable_arguments_are_refused(score, hardness, groups, match):
    with pytest.raises(ValueError, match=match):
        group_hardness(score, hardness=hardness, groups=groups)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="reference"):
        compare_groups({"a": [1.0, 2.0]}, hardness=[1.0, 2.0], reference="b", groups=2)
