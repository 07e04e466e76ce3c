"""Planted answers are found: lines, ranks, verdicts; and what is not there is not claimed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opacus_pil.study import claims
from opacus_pil.study.forget_sets import quantile_sets, random_sets, top_sets
from opacus_pil.study.measures import gaps_of_random_sets, measure_set
from opacus_pil.study.settings import study_settings

HOW = {"resamples": 400, "seed": 0}


# --- lines ----------------------------------------------------------------------------------------


def test_the_line_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = 2.0 * x - 1.0 + rng.normal(size=30)
    line = claims.line_through(x, y, **HOW)
    slope, intercept = np.polyfit(x, y, 1)
    assert line["slope"] == pytest.approx(slope, rel=1e-9)  # two ways to solve 2 equations
    assert line["intercept"] == pytest.approx(intercept, rel=1e-9)
    assert line["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-9)
    assert line["interval"][0] < slope < line["interval"][1]


@pytest.mark.parametrize("x", [[], [1.0, 2.0], [3.0, 3.0, 3.0]])
def test_no_line_through_too_little(x):
    line = claims.line_through(np.array(x), np.arange(len(x), dtype=float), **HOW)
    assert line["slope"] is None
    assert line["interval"] is None


def test_a_constant_has_no_r2():
    line = claims.line_through(np.arange(5.0), np.ones(5), **HOW)
    assert line["slope"] == 0.0
    assert line["r2"] is None


# --- claims ---------------------------------------------------------------------------------------


def entries(times, gaps=None, barriers=None, steps=100):
    x = np.arange(len(times), dtype=float)
    return [
        {
            "kind": "quantile",
            "steps": steps,
            "log_privacy_loss": x[i],
            "time_to_unlearn": {"d": {"mean_curve": times[i]}},
            "gap": {"5 epochs": float(gaps[i] if gaps is not None else 0.0)},
            "barriers": {
                pair: dict.fromkeys(("forget", "test"), 0.0 if barriers is None else barriers[i])
                for pair in ("original", "unlearned")
            },
        }
        for i in range(len(times))
    ]  # fmt: skip


GROWING = [0, 7, 11, 22, 29, 40, 52, 60, 71, 79]


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
def test_time_claim(times, verdict):
    found = claims.time_claim(entries(times), **HOW)["d"]
    assert found["reproduced"] == verdict
    assert found["reached"] == sum(t is not None for t in times)
    assert found["at_once"] == times.count(0)


def test_unreached_sets_are_put_at_the_end_and_never_raise_the_slope():
    half = [*GROWING[:5], None, None, None, None, None]
    found = claims.time_claim(entries(half, steps=30), **HOW)["d"]
    assert found["line"]["count"] == 5
    assert found["line_with_unreached_at_the_end"]["count"] == 10
    assert found["line_with_unreached_at_the_end"]["slope"] < found["line"]["slope"]


def test_top_deciles_take_no_part_in_the_fits():
    sets = entries(GROWING)
    sets.append({**sets[0], "kind": "top", "log_privacy_loss": 1e6})
    assert claims.time_claim(sets, **HOW)["d"]["sets"] == 10


def test_gap_and_barrier_claims_follow_the_ranks():
    rising = np.linspace(0.0, 1.0, 10) ** 3
    up = entries(GROWING, gaps=rising, barriers=rising)
    down = entries(GROWING, gaps=rising[::-1], barriers=rising[::-1])
    assert claims.gap_claim(up, **HOW)["5 epochs"]["reproduced"] == "yes"
    assert claims.gap_claim(down, **HOW)["5 epochs"]["reproduced"] == "no"
    for found, verdict in ((up, "yes"), (down, "no")):
        for one in claims.barrier_claim(found, **HOW).values():
            assert one["reproduced"] == verdict


def test_ranks_of_barriers_that_are_none_decide_nothing():
    tiny = entries(GROWING, barriers=np.linspace(0.0, 0.009, 10))
    assert {one["reproduced"] for one in claims.barrier_claim(tiny, **HOW).values()} == {
        "undecided"
    }


def test_score_claim_says_no_where_a_proxy_is_better():
    rng = np.random.default_rng(1)
    hard = rng.normal(size=200)
    good, poor = (hard + width * rng.normal(size=200) for width in (0.3, 3.0))
    noise = rng.normal(size=200)

    def verdict(own, proxy):
        scores = {claims.REFERENCE: own, "proxy": proxy}
        return claims.score_claim(scores, hardness=hard, **HOW)

    better = verdict(good, poor)
    assert better["reproduced"] == "yes"
    assert better["better_than"] == ["proxy"]
    assert better["harder_top_than"] == ["proxy"]
    worse = verdict(poor, good)
    assert worse["reproduced"] == "no"
    assert worse["worse_than"] == ["proxy"]
    assert worse["easier_top_than"] == ["proxy"]
    assert verdict(good, good)["reproduced"] == "yes"  # at least as well
    assert verdict(noise, noise)["reproduced"] == "undecided"  # not worse, but it foresees nothing


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


def test_scores_that_agree_have_the_same_top_decile():
    score = np.random.default_rng(0).normal(size=50)
    one, two, three = top_sets({"a": score, "b": np.exp(score), "c": -score})
    assert np.array_equal(one.rows, two.rows)
    assert not set(one.rows) & set(three.rows)
    assert np.array_equal(one.rows, np.sort(np.argsort(score)[-5:]))
    infinite = top_sets({"never learned": np.where(np.arange(50) < 5, np.inf, score)})[0]
    assert infinite.rows.tolist() == [0, 1, 2, 3, 4]


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
        "barriers": {p: {"forget": 1.0, "test": 2.0} for p in ("original", "unlearned")},
    }  # fmt: skip
    oracle = {**run, "loss": np.full(6, math.log(2.0)), "correct": np.arange(6) < 5}
    measured = measure_set(
        forget, settings=settings, original=run, oracles=[oracle, oracle], runs=[run],
        log_privacy_loss=np.arange(6.0), scores={"s": np.array([0, 0, 0, 0, 1, np.inf])},
    )  # fmt: skip
    entry = measured.entry
    assert forget.rows.tolist() == [4, 5]
    assert entry["log_privacy_loss"] == 4.5
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
    sets = [forget, *random_sets(6, sets=1, size=2, seed=0)]
    rows, gaps = gaps_of_random_sets([measured, measured], sets, step=5)
    assert np.array_equal(rows, sets[1].rows)
    # The record at step 4, where the confidence is 0.56, not the one at 6.
    assert gaps["confidence"] == pytest.approx([0.06, 0.06])
    assert gaps["loss"] == pytest.approx([math.log(0.56 / 0.5)] * 2)
