import math

import numpy as np
import pytest
from scipy import stats

from opacus_pil.evaluation import (
    attack_summary,
    membership_scores,
    memorisation_scores,
    u_lira_scores,
)

GENERATOR = np.random.default_rng


def shadows(seed=0, models=12, instances=7):
    generator = GENERATOR(seed)
    margins = generator.normal(size=(models, instances)) + 3 * generator.normal(size=instances)
    members = generator.random((models, instances)) < 0.5
    members[:3], members[3:6] = True, False
    return margins + 1.5 * members, members


def split(margins, members):
    return {
        "in_margins": np.where(members, margins, np.nan),
        "out_margins": np.where(members, np.nan, margins),
    }


def test_online_scores_are_log_likelihood_ratios():
    margins, members = shadows()
    target = GENERATOR(1).normal(size=7)
    found = membership_scores(target, **split(margins, members))
    for i in range(7):
        inside, outside = margins[members[:, i], i], margins[~members[:, i], i]
        expected = stats.norm.logpdf(target[i], inside.mean(), inside.std(ddof=1))
        expected -= stats.norm.logpdf(target[i], outside.mean(), outside.std(ddof=1))
        assert found.scores[i] == pytest.approx(expected, rel=1e-9, abs=1e-12)  # rounding
    assert found.attack == "LiRA (online, variance per example)"


def test_offline_scores_are_log_tail_probabilities():
    margins, members = shadows(2)
    target = GENERATOR(3).normal(size=(2, 7))
    out = split(margins, members)["out_margins"]
    found = membership_scores(target, out_margins=out)
    for i in range(7):
        outside = margins[~members[:, i], i]
        z = (target[:, i] - outside.mean()) / outside.std(ddof=1)
        np.testing.assert_allclose(found.scores[:, i], -np.log(stats.norm.sf(z)), rtol=1e-9)
    assert found.attack == "LiRA (offline, variance per example)"


def test_offline_scores_do_not_saturate():
    """Forty deviations up the probability rounds to 0 and its complement to 1."""
    near, far = membership_scores([40.0, 41.0], out_margins=[[-1.0, -1.0], [1.0, 1.0]]).scores
    assert near < far < math.inf


def test_shared_variance_is_pooled_within_examples():
    margins, members = shadows(4)
    out = split(margins, members)["out_margins"]
    found = membership_scores(margins[0], out_margins=out, shared_variance=True)
    groups = [margins[~members[:, i], i] for i in range(7)]
    squares = sum(((g - g.mean()) ** 2).sum() for g in groups)
    std = math.sqrt(squares / sum(len(g) - 1 for g in groups))
    expected = [-stats.norm.logsf(margins[0, i], groups[i].mean(), std) for i in range(7)]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-9)
    assert "shared" in found.attack


def test_scores_do_not_depend_on_the_scale_of_margins():
    margins, members = shadows(5)
    target = GENERATOR(6).normal(size=7)
    plain = membership_scores(target, **split(margins, members)).scores
    moved = membership_scores(4 * target + 2, **split(4 * margins + 2, members)).scores
    np.testing.assert_allclose(moved, plain, rtol=1e-9)


def test_examples_without_enough_models_have_no_score():
    out = np.array([[1.0, 1.0, np.nan, 2.0], [2.0, np.nan, np.nan, 2.0]])
    found = membership_scores(np.zeros(4), out_margins=out).scores
    assert np.isnan(found).tolist() == [False, True, True, True]  # one, none, no spread
    shared = membership_scores(np.zeros(4), out_margins=out, shared_variance=True).scores
    assert np.isnan(shared).tolist() == [False, False, True, False]


def test_online_attack_on_gaussians_reaches_the_best_possible_auc():
    """In and out are N(1, 1) and N(0, 1): no attack has an AUC above Φ(1/√2)."""
    generator = GENERATOR(7)
    size, models = 2000, 100
    margins = {
        "in_margins": 1 + generator.normal(size=(models, size)),
        "out_margins": generator.normal(size=(models, size)),
    }
    members = np.arange(size) % 2 == 0
    target = generator.normal(size=size) + members
    summary = attack_summary(membership_scores(target, **margins), members=members)
    best = stats.norm.cdf(1 / math.sqrt(2))
    # Sampling: the AUC's deviation is below 0.5/√1000 = 0.016: three of them; fits of 100 models
    # lose far less.
    assert summary.auc.value == pytest.approx(best, abs=0.047)


def test_u_lira_scores_each_model_by_the_others():
    generator = GENERATOR(8)
    unlearned, retrained = generator.normal(size=(5, 3)), generator.normal(size=(4, 3)) - 1
    found = u_lira_scores(unlearned, retrained=retrained)
    for j in range(5):
        rest = np.delete(unlearned, j, axis=0)
        expected = stats.norm.logpdf(unlearned[j], rest.mean(0), rest.std(0, ddof=1))
        expected -= stats.norm.logpdf(unlearned[j], retrained.mean(0), retrained.std(0, ddof=1))
        np.testing.assert_allclose(found.unlearned[j], expected, rtol=1e-9)
    for j in range(4):
        rest = np.delete(retrained, j, axis=0)
        expected = stats.norm.logpdf(retrained[j], unlearned.mean(0), unlearned.std(0, ddof=1))
        expected -= stats.norm.logpdf(retrained[j], rest.mean(0), rest.std(0, ddof=1))
        np.testing.assert_allclose(found.retrained[j], expected, rtol=1e-9)
    assert "U-LiRA" in found.attack


def test_u_lira_finds_bad_unlearning_and_nothing_in_perfect_unlearning():
    generator = GENERATOR(9)
    size = 400

    def auc(shift):
        found = u_lira_scores(
            shift + generator.normal(size=(20, size)), retrained=generator.normal(size=(20, size))
        )
        # One held-out model of each kind per example: independent trials.
        scores = np.concatenate([found.unlearned[0], found.retrained[0]])
        labels = np.arange(2 * size) < size
        return attack_summary(scores, members=labels, attack=found.attack).auc

    perfect, bad = auc(0.0), auc(2.0)
    # Both scores have one law: ½, up to four deviations of 0.5/√400 · 0.82 = 0.02.
    assert perfect.value == pytest.approx(0.5, abs=0.082)
    assert bad.low > 0.8
    assert bad.value < stats.norm.cdf(2 / math.sqrt(2)) + 0.03


def test_memorisation_is_the_difference_of_two_shares():
    generator = GENERATOR(10)
    correct, members = generator.random((30, 6)) < 0.6, generator.random((30, 6)) < 0.5
    members[:, 5] = True  # nobody was trained without it
    found = memorisation_scores(correct, members=members)
    for i in range(5):
        inside = [c for c, m in zip(correct[:, i], members[:, i], strict=True) if m]
        outside = [c for c, m in zip(correct[:, i], members[:, i], strict=True) if not m]
        assert found[i] == pytest.approx(np.mean(inside) - np.mean(outside), abs=1e-12)
    assert math.isnan(found[5])
    known = members[:, :5]
    np.testing.assert_allclose(memorisation_scores(known, members=known), 1.0)  # all memorised
    np.testing.assert_allclose(memorisation_scores(~known, members=known), -1.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: membership_scores([1.0, 2.0], out_margins=[[1.0]] * 3), r"\(models, 2\)"),
        (lambda: membership_scores([math.nan], out_margins=[[1.0]] * 3), "finite"),
        (lambda: membership_scores([1.0], out_margins=[[math.inf]] * 3), "infinite"),
        (lambda: membership_scores([[[1.0]]], out_margins=[[1.0]] * 3), "margins"),
        (lambda: u_lira_scores([[1.0]] * 2, retrained=[[1.0]] * 3), "at least 3 models"),
        (lambda: u_lira_scores([[1.0]] * 3, retrained=[[1.0, 2.0]] * 3), "same instances"),
        (lambda: memorisation_scores([[True]], members=[[True, False]]), "one shape"),
        (lambda: memorisation_scores([[0.5]], members=[[True]]), "true or false"),
    ],
)
def test_unusable_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
