"""An instance that one score does not know is left out of all, or named: never ranked by chance."""

import math
from functools import partial

import numpy as np
import pytest

from opacus_pil.evaluation import (
    DifficultyTracker,
    Metrics,
    compare_groups,
    compare_scores,
    correlation_difference,
    difficulty_scores,
    group_hardness,
    oracle_gap,
    rank_correlation,
    top_group_difference,
)
from opacus_pil.evaluation.complete_cases import complete_cases

SIZE = 40
HOW = {"resamples": 100}


def with_gaps():
    """Three vectors with gaps of their own and an infinite value; and who is known to all."""
    a, b, target = np.random.default_rng(0).normal(size=(3, SIZE))
    a[[3, 17]], b[[5, 17]], target[8] = math.nan, math.nan, math.nan
    a[30] = math.inf
    known = np.setdiff1d(np.arange(SIZE), [3, 5, 8, 17])
    return a, b, target, known


FUNCTIONS = {
    "rank_correlation": lambda a, b, t, **how: rank_correlation(a, target=t, **how),
    "correlation_difference": lambda a, b, t, **how: correlation_difference(
        a, other=b, target=t, **how
    ),
    "compare_scores": lambda a, b, t, **how: compare_scores(
        {"a": a, "b": b}, target=t, reference="a", **how
    ),
    "group_hardness": lambda a, b, t, **how: group_hardness(a, hardness=t, groups=4, **how),
    "top_group_difference": lambda a, b, t, **how: top_group_difference(
        a, other=b, hardness=t, groups=4, **how
    ),
    "compare_groups": lambda a, b, t, **how: compare_groups(
        {"a": a, "b": b}, hardness=t, reference="a", groups=4, **how
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_omitting_is_leaving_the_rows_out_of_every_array_by_hand(name):
    a, b, target, known = with_gaps()
    if name in ("rank_correlation", "group_hardness"):
        known = np.union1d(known, [5])  # the other score is not asked
    call = partial(FUNCTIONS[name], **HOW)
    assert call(a, b, target, nan_policy="omit") == call(a[known], b[known], target[known])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("which", [0, 2])
def test_raising_names_array_and_row_and_the_cure(name, which):
    arrays = [np.arange(SIZE, dtype=float) for _ in range(3)]
    arrays[which][[9, 11]] = math.nan
    with pytest.raises(ValueError, match=r"2 of 40 outside \(first: row 9") as caught:
        FUNCTIONS[name](*arrays, nan_policy="raise", **HOW)
    assert 'nan_policy="omit"' in str(caught.value)
    named = {0: r"Expected (a|score) not NaN", 2: r"Expected (target|hardness) not NaN"}[which]
    assert caught.match(named)


@pytest.mark.parametrize("name", ["compare_scores", "compare_groups"])
def test_several_scores_are_compared_on_the_same_instances_unless_told_otherwise(name):
    a, b, target, known = with_gaps()
    found = FUNCTIONS[name](a, b, target, **HOW)
    assert found == FUNCTIONS[name](a, b, target, nan_policy="omit", **HOW)
    counts = {c.difference.count for c in found.values()}
    counts |= {c.correlation.count if name == "compare_scores" else c.top.count
               for c in found.values()}  # fmt: skip
    assert counts == {len(known)}


@pytest.mark.parametrize(
    "name", ["rank_correlation", "correlation_difference", "group_hardness", "top_group_difference"]
)
def test_one_pair_is_refused_unless_told_otherwise(name):
    a, b, target, _ = with_gaps()
    with pytest.raises(ValueError, match="not NaN"):
        FUNCTIONS[name](a, b, target, **HOW)


def test_scores_of_instances_that_were_never_drawn_can_be_compared():
    tracker = DifficultyTracker(SIZE, early_steps=30)
    drawn = np.random.default_rng(4)
    for _ in range(30):
        rows = drawn.choice(SIZE - 5, size=6, replace=False)  # nobody ever draws the last five
        tracker.update(drawn.normal(size=(6, 3)), drawn.integers(0, 3, size=6), indices=rows)
    scores = {name: difficulty_scores(tracker)[name] for name in ("margin", "loss", "el2n")}
    assert np.isnan(scores["loss"][-5:]).all()
    target = drawn.normal(size=SIZE)
    found = compare_scores(scores, target=target, reference="loss", **HOW)
    assert found["margin"].correlation.count == SIZE - 5


@pytest.mark.parametrize("name", ["compare_scores", "compare_groups"])
def test_a_score_that_knows_nobody_is_named(name):
    a, _, target, _ = with_gaps()
    with pytest.raises(ValueError, match=r"got none: b has none for 40 of 40\. Leave that array"):
        FUNCTIONS[name](a, np.full(SIZE, math.nan), target, **HOW)


def test_a_score_may_be_called_target_or_hardness():
    a, b, target, known = with_gaps()
    for name, other in (("target", "b"), ("hardness", "target")):
        found = compare_scores({name: a, other: b}, target=target, reference=other, **HOW)
        alone = rank_correlation(a[known], target=target[known], **HOW)
        assert found[name].correlation == alone
        groups = compare_groups(
            {name: a, other: b}, hardness=target, reference=other, groups=4, **HOW
        )
        assert groups[name].groups == group_hardness(
            a[known], hardness=target[known], groups=4, **HOW
        )


def test_an_infinite_hardness_is_refused_only_where_it_counts():
    a, b, target, _ = with_gaps()
    target[3] = math.inf  # a does not know this instance
    FUNCTIONS["compare_groups"](a, b, target, **HOW)
    target[0] = math.inf
    with pytest.raises(ValueError, match="A mean needs finite values"):
        FUNCTIONS["compare_groups"](a, b, target, **HOW)


def test_groups_are_counted_among_those_that_are_left():
    score, hardness = np.full(6, math.nan), np.arange(6.0)
    score[:3] = [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="Form fewer groups"):
        group_hardness(score, hardness=hardness, groups=4, nan_policy="omit", **HOW)


@pytest.mark.parametrize(
    ("named", "policy", "match"),
    [
        ([("a", [1.0])], "propagate", "nan_policy to be one of raise, omit"),
        ([("a", [1.0, 2.0]), ("b", [1.0])], "omit", "same length"),
        ([("a", [[1.0, 2.0]])], "omit", "same length"),
        ([("a", [])], "omit", "number of instances"),
    ],
)
def test_unusable_arguments_are_refused(named, policy, match):
    with pytest.raises(ValueError, match=match):
        complete_cases(named, nan_policy=policy)


def test_words_are_no_numbers():
    with pytest.raises(TypeError, match="Expected a to be numbers"):
        complete_cases([("a", ["high", "low"])], nan_policy="omit")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_oracle_that_diverged_is_named_with_split_and_statistic(value):
    fine = {"forget": Metrics(0.5, 1.0), "test": Metrics(0.5, 1.0)}
    diverged = {"forget": Metrics(0.5, 1.0), "test": Metrics(0.1, value)}
    with pytest.raises(ValueError, match=r"loss of the oracles on 'test' finite.*1 of 3.*row 1"):
        oracle_gap(fine, oracles=[fine, diverged, fine])


def test_a_model_that_diverged_has_a_gap_without_a_number():
    fine = {"test": Metrics(0.5, 1.0)}
    gap = oracle_gap({"test": Metrics(0.1, math.nan)}, oracles=[fine, fine])["test"]
    assert math.isnan(gap.loss.difference)
    assert not gap.loss.inside
    assert gap.accuracy.difference == pytest.approx(-0.4)
