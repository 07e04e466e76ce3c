"""Planted answers are found: lines, ranks, verdicts; and what is not there is not claimed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opacus_pil.study import claims
from opacus_pil.study.forget_sets import folds, quantile_sets, random_sets, top_sets
from opacus_pil.study.measures import gaps_at, measure_set
from opacus_pil.study.scores import score_claim
from opacus_pil.study.settings import study_settings

HOW = {"resamples": 400, "seed": 0}


# --- lines ----------------------------------------------------------------------------------------


def test_the_line_is_the_mean_of_the_least_squares_lines():
    rng = np.random.default_rng(0)
    points = []
    for _ in range(3):
        x = rng.normal(size=30)
        points.append((x, 2.0 * x - 1.0 + rng.normal(size=30)))
    line = claims.line_through(points, **HOW)
    slope, intercept = np.mean([np.polyfit(x, y, 1) for x, y in points], axis=0)
    assert line["slope"] == pytest.approx(slope, rel=1e-9)  # two ways to solve 2 equations
    assert line["intercept"] == pytest.approx(intercept, rel=1e-9)
    squares = [np.corrcoef(x, y)[0, 1] ** 2 for x, y in points]
    assert line["r2"] == pytest.approx(np.mean(squares), rel=1e-9)
    assert line["interval"][0] < slope < line["interval"][1]
    assert line["count"] == 90


@pytest.mark.parametrize("x", [[], [1.0, 2.0], [3.0, 3.0, 3.0]])
def test_no_line_through_too_little(x):
    points = (np.array(x), np.arange(len(x), dtype=float))
    assert claims.line_through([points], **HOW)["slope"] is None
    good = (np.arange(5.0), np.arange(5.0))
    line = claims.line_through([points, good], **HOW)
    assert (line["count"], line["slope"]) == (5, pytest.approx(1.0))


def test_a_constant_has_no_r2():
    line = claims.line_through([(np.arange(5.0), np.ones(5))], **HOW)
    assert line["slope"] == 0.0
    assert line["r2"] is None


# --- claims ---------------------------------------------------------------------------------------


def entries(times, gaps=None, barriers=None, steps=100):
    x = np.arange(len(times), dtype=float)
    heights = np.zeros(len(times)) if barriers is None else barriers
    return [
        {
            "kind": "quantile",
            "steps": steps,
            "log_privacy_loss": x[i],
            "time_to_unlearn": {"d": {"mean_curve": times[i]}},
            "gap": {"5 epochs": float(gaps[i] if gaps is not None else 0.0)},
            "barriers": {
                pair: dict.fromkeys(
                    ("forget", "test"), dict.fromkeys(("chord", "above_ends"), heights[i])
                )
                for pair in ("original", "unlearned")
            },
        }
        for i in range(len(times))
    ]  # fmt: skip


GROWING = [0, 7, 11, 22, 29, 40, 52, 60, 71, 79]


@pytest.mark.parametrize("trainings", [1, 3])
@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        (GROWING, "yes"),
        (GROWING[::-1], "no"),
        ([*GROWING[:7], None, None, None], "yes"),  # not reached is later than all others
        ([0] * 10, "undecided"),
        ([None] * 10, "undecided"),
        ([0, 0, 0, 0, 7, 9, None, None, None, None], "undecided"),  # two groups, not a line
    ],
)
def test_time_claim(times, verdict, trainings):
    found = claims.time_claim([entries(times)] * trainings, **HOW)["d"]
    assert found["reproduced"] == verdict
    assert found["reached"] == trainings * sum(t is not None for t in times)
    assert found["at_once"] == trainings * times.count(0)


def test_trainings_that_disagree_decide_nothing():
    found = claims.time_claim([entries(GROWING), entries(GROWING[::-1])], **HOW)["d"]
    assert found["reproduced"] == "undecided"
    assert found["spearman"]["value"] == pytest.approx(0.0, abs=1e-12)


def test_unreached_sets_are_put_at_the_end_and_never_raise_the_slope():
    half = [*GROWING[:5], None, None, None, None, None]
    found = claims.time_claim([entries(half, steps=30)], **HOW)["d"]
    assert found["line"]["count"] == 5
    assert found["line_with_unreached_at_the_end"]["count"] == 10
    assert found["line_with_unreached_at_the_end"]["slope"] < found["line"]["slope"]


def test_tops_take_no_part_in_the_fits():
    sets = entries(GROWING)
    sets.append({**sets[0], "kind": "top", "log_privacy_loss": 1e6})
    assert claims.time_claim([sets], **HOW)["d"]["sets"] == 10


def test_gap_and_barrier_claims_follow_the_ranks():
    rising = np.linspace(0.0, 1.0, 10) ** 3
    up = [entries(GROWING, gaps=rising, barriers=rising)] * 2
    down = [entries(GROWING, gaps=rising[::-1], barriers=rising[::-1])] * 2
    assert claims.gap_claim(up, **HOW)["5 epochs"]["reproduced"] == "yes"
    assert claims.gap_claim(down, **HOW)["5 epochs"]["reproduced"] == "no"
    for found, verdict in ((up, "yes"), (down, "no")):
        for one in claims.barrier_claim(found, **HOW).values():
            assert {height["reproduced"] for height in one.values()} == {verdict}


def test_ranks_of_barriers_that_are_none_decide_nothing():
    tiny = [entries(GROWING, barriers=np.linspace(0.0, 0.009, 10))]
    for one in claims.barrier_claim(tiny, **HOW).values():
        assert {height["reproduced"] for height in one.values()} == {"undecided"}


def test_score_claim_says_no_where_a_proxy_is_better():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=200)
    good, poor = (hard + width * rng.normal(size=200) for width in (0.3, 3.0))
    noise = rng.normal(size=200)

    def verdict(own, proxy):
        case = ({"own": own, "variant": hard, "proxy": proxy}, hard)
        return score_claim([case], reference="own", variants=["variant"], margin=0.05, **HOW)

    better = verdict(good, poor)
    assert better["reproduced"] == "yes"
    assert better["better_than"] == ["proxy"]
    assert better["within_margin"]
    assert better["scores"]["variant"]["reference_is"] == "worse"  # without a part in the verdict
    worse = verdict(poor, good)
    assert worse["reproduced"] == "no"
    assert worse["worse_than"] == ["proxy"]
    assert not worse["within_margin"]
    assert worse["shortfall"] > 0.05
    assert verdict(good, good)["reproduced"] == "yes"  # at least as well
    assert verdict(noise, noise)["reproduced"] == "undecided"  # not worse, but it foresees nothing


def test_a_lead_in_one_training_and_none_in_another_is_undecided():
    rng = np.random.default_rng(2)
    cases = []
    for own, proxy in ((0.3, 3.0), (3.0, 0.3)):
        hard = rng.normal(size=150)
        noise = rng.normal(size=(2, 150))
        cases.append(({"own": hard + own * noise[0], "proxy": hard + proxy * noise[1]}, hard))
    found = score_claim(cases, reference="own", variants=[], margin=0.05, **HOW)
    lead = found["scores"]["proxy"]["reference_minus_this"]
    assert lead["low"] < -0.3 < 0.3 < lead["high"]  # both trainings are inside
    assert found["better_than"] == found["worse_than"] == []


# --- forget sets ----------------------------------------------------------------------------------


def test_quantile_sets_are_the_ranks_they_say():
    score = np.random.default_rng(0).permutation(100).astype(float)
    low, middle, high = quantile_sets(score, ends=(0.05, 0.5, 1.0), size=10)
    assert sorted(score[low.rows]) == list(range(10))  # never fewer than the size
    assert sorted(score[middle.rows]) == list(range(40, 50))
    assert sorted(score[high.rows]) == list(range(90, 100))


def test_random_sets_are_disjoint_and_follow_the_seed():
    first = random_sets(100, sets=4, size=20, seed=1)
    rows = np.concatenate([s.rows for s in first])
    assert len(np.unique(rows)) == 80
    again = random_sets(100, sets=4, size=20, seed=1)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(first, again, strict=True))


def test_scores_that_agree_have_the_same_top():
    score = np.random.default_rng(0).normal(size=50)
    one, two, three = top_sets({"a": score, "b": np.exp(score), "c": -score}, size=5)
    assert np.array_equal(one.rows, two.rows)
    assert not set(one.rows) & set(three.rows)
    assert np.array_equal(one.rows, np.sort(np.argsort(score)[-5:]))
    never = np.where(np.arange(50) < 5, np.inf, score)
    infinite = top_sets({"never learned": never}, size=5)[0]
    assert infinite.rows.tolist() == [0, 1, 2, 3, 4]


def test_folds_are_a_partition_that_follows_the_seed():
    parts = folds(53, parts=5, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(53))
    assert {len(part) for part in parts} == {10, 11}
    again = folds(53, parts=5, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(
        np.array_equal(a, b) for a, b in zip(parts, folds(53, parts=5, seed=2), strict=True)
    )


# --- measures -------------------------------------------------------------------------------------


def test_a_set_is_measured_against_its_oracles():
    """Two members; the runs go from confidence 1 to the oracles' 1/2 in a known number of steps."""
    settings = study_settings("digits", form="smallest")
    (forget,) = quantile_sets(np.arange(6.0), ends=(1.0,), size=2)
    path = np.array([1.0, 0.8, 0.56, 0.52, 0.5, 0.5])  # within 0.1 from record 2, 0.05 from 3
    run = {
        "steps": 2 * np.arange(6), "curve_loss": -np.log(np.stack([path, path], axis=1)),
        "curve_correct": np.ones((6, 2), dtype=bool), "loss": np.zeros(6), "test_accuracy": 0.5,
        "correct": np.ones(6, dtype=bool),
        "barriers": {
            p: {"forget": {"chord": 1.0, "above_ends": 0.5},
                "test": {"chord": 2.0, "above_ends": 0.0}}
            for p in ("original", "unlearned")
        },
    }  # fmt: skip
    oracle = {**run, "loss": np.full(6, math.log(2.0)), "correct": np.arange(6) < 5}
    measured = measure_set(
        forget, settings=settings, original=run, oracles=[oracle, oracle], runs=[run],
        log_privacy_loss=np.arange(6.0), distance=np.arange(6.0),
        scores={"s": np.array([0, 0, 0, 0, 1, np.inf])},
    )  # fmt: skip
    entry = measured.entry
    assert forget.rows.tolist() == [4, 5]
    assert entry["log_privacy_loss"] == 4.5
    assert entry["log_distance"] == pytest.approx(math.log(4.5))  # of the mean, not a mean of logs
    assert (entry["record_every"], entry["last_start"]) == (2, 8)  # stay = 2 records
    assert entry["barriers"]["original"]["forget"] == {"chord": 1.0, "above_ends": 0.5}
    assert entry["scores"] == {"s": None}  # JSON has no infinity
    assert entry["time_to_unlearn"]["confidence within 0.1"] == {"mean_curve": 4, "runs": [4]}
    assert entry["time_to_unlearn"]["confidence within 0.05"] == {"mean_curve": 6, "runs": [6]}
    # The runs predict both members correctly for ever, the oracles one of them.
    assert entry["time_to_unlearn"]["accuracy within 0.1"]["mean_curve"] is None
    assert entry["oracle"]["forget_accuracy"] == 0.5
    assert entry["oracle"]["retain_accuracy"] == 1.0
    assert entry["gap"]["0 epochs"] == pytest.approx(0.5)
    assert entry["gap"]["2 epochs"] == pytest.approx(0.0, abs=1e-12)
    assert entry["oracle_confidence_std"] == 0.0
    rows, gaps = gaps_at([measured, measured], step=5)
    assert rows.tolist() == [4, 5, 4, 5]
    # The record at step 4, where the confidence is 0.56, not the one at 6.
    assert gaps["confidence"] == pytest.approx([0.06] * 4)
    assert gaps["loss"] == pytest.approx([math.log(0.56 / 0.5)] * 4)
