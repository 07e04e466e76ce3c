"""Rates planted in censored times are found, and intervals cover new sets as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opacus_pil.study.prediction import CensoredTimes, fit_rate, prediction_claim

END, GRAIN = 600.0, 7.0
CONTRACTION, LOG_THRESHOLD, SPREAD = 0.99, -1.0, 40.0
SLOPE = -1.0 / math.log(CONTRACTION)  # 99.5 steps per unit of ln μ


def observed(rng, size):
    """Sets whose K is the line plus a normal spread, as runs of END steps show it."""
    x = rng.uniform(-3.0, 7.0, size=size)  # a fifth at once, a tenth or so never
    k = SLOPE * (x - LOG_THRESHOLD) + SPREAD * rng.normal(size=size)
    times = np.where(k <= 0, 0.0, GRAIN * np.ceil(k / GRAIN))
    return CensoredTimes(
        x, np.where(times > END, np.inf, times), np.full(size, END), GRAIN
    ), k  # fmt: skip


def test_the_rate_and_the_threshold_are_found_in_censored_times():
    seen, _ = observed(np.random.default_rng(0), 400)
    assert (seen.times == 0).sum() > 50
    assert np.isinf(seen.times).sum() > 20
    rate = fit_rate(seen)
    # Rounding up to looks adds half of one to K; else four standard errors of 400 sets.
    error = 4 * np.sqrt(np.diag(rate.covariance))
    assert rate.slope == pytest.approx(SLOPE, abs=error[1])
    assert rate.intercept == pytest.approx(-SLOPE * LOG_THRESHOLD + GRAIN / 2, abs=error[0])
    assert rate.contraction == pytest.approx(CONTRACTION, abs=1e-3)
    assert rate.log_threshold == pytest.approx(LOG_THRESHOLD, abs=0.2)
    assert rate.spread == pytest.approx(SPREAD, rel=0.2)  # 4/√(2·280)
    naive = np.polyfit(seen.x, np.minimum(seen.times, END), 1)[0]
    assert naive < rate.slope - error[1]  # taking censored times at their word is too flat


@pytest.mark.parametrize("pilots", [14, 26])
def test_intervals_cover_the_share_of_new_sets_that_they_name(pilots):
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(40):
        rate = fit_rate(observed(rng, pilots)[0])
        new, k = observed(rng, 20)
        low, high = rate.interval(new.x, level=0.9)
        inside.append(((low <= k) & (k <= high)).mean())
    # Standard error of 40 fits with 20 sets each, which share a fit: 0.02.
    assert 0.83 < np.mean(inside) < 0.97


def test_errors_of_the_line_are_those_of_repeated_fits():
    rng = np.random.default_rng(2)
    fits = [fit_rate(observed(rng, 60)[0]) for _ in range(40)]
    spread = np.std([fit.slope for fit in fits])
    claimed = np.mean([np.sqrt(fit.covariance[1, 1]) for fit in fits])
    assert claimed == pytest.approx(spread, rel=0.4)  # 3.5 times 1/√(2·39)


@pytest.mark.parametrize(
    "times",
    [
        [0.0] * 6,
        [np.inf] * 6,
        [0.0, 0.0, 0.0, np.inf, np.inf, np.inf],
        [0.0, 7.0, 14.0] + [np.inf] * 3,
    ],
)
def test_pilots_that_show_no_rate_give_none(times):
    seen = CensoredTimes(np.arange(6.0), np.array(times), np.full(6, END), GRAIN)
    assert fit_rate(seen) is None
    same = CensoredTimes(np.ones(6), np.arange(6.0) * 7, np.full(6, END), GRAIN)
    assert fit_rate(same) is None


def test_times_that_fall_have_no_contraction():
    x = np.linspace(0.0, 5.0, 12)
    seen = CensoredTimes(x, 500.0 - 70.0 * x, np.full(12, END), GRAIN)
    rate = fit_rate(seen)
    assert rate.slope == pytest.approx(-70.0, rel=1e-3)  # an exact line, found by a search
    assert rate.contraction is None
    assert rate.log_threshold is None


def entry(x, time, kind="quantile"):
    return {
        "kind": kind, "log_distance": float(x), "log_privacy_loss": float(-x),
        "last_start": END, "record_every": GRAIN,
        "time_to_unlearn": {"d": {"mean_curve": None if np.isinf(time) else float(time)}},
    }  # fmt: skip


def trainings(count, size=14):
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        seen, _ = observed(rng, size)
        sets = [entry(x, t) for x, t in zip(seen.x, seen.times, strict=True)]
        found.append([*sets, entry(2.0, 300.0, kind="top"), entry(2.0, np.inf, kind="top")])
    return found


def test_every_set_is_predicted_from_the_other_trainings():
    sets = trainings(3)
    found = prediction_claim(sets, level=0.9)["contracted loss"]["d"]
    assert found["pilots"] == [28, 28, 28]
    assert found["sets"] == 42
    assert 34 <= found["covered"] <= 42  # 0.9 of 42 less two standard errors
    assert found["top_sets"] == 6
    assert found["top_covered"] == 3  # 300 = SLOPE · 3; not within 600 is beyond any interval
    assert 0.1 < found["width"] < 0.5  # ± 1.7 · 40 of 600, less where cut at the ends
    assert found["reproduced"] == "yes"
    changed = [[*sets[0][:-1], entry(2.0, 0.0, kind="top")], *sets[1:]]
    again = prediction_claim(changed, level=0.9)["contracted loss"]["d"]
    assert again["contraction_per_step"] == found["contraction_per_step"]  # tops are no pilots
    falling = prediction_claim(sets, level=0.9)["clipped privacy loss"]["d"]
    assert falling["contraction_per_step"] == [None] * 3
    assert falling["reproduced"] == "undecided"  # covered, but times do not grow


def test_intervals_that_miss_too_many_or_exclude_too_little_reproduce_nothing():
    sets = trainings(3, size=40)
    moved = [[{**e, "log_distance": e["log_distance"] + 3.0} for e in sets[0]], *sets[1:]]
    missed = prediction_claim(moved, level=0.9)["contracted loss"]["d"]
    assert missed["covered"] < 0.8 * missed["sets"]  # one training's threshold is another
    assert missed["reproduced"] == "no"
    rng = np.random.default_rng(5)
    noise = [[{**e, "log_distance": float(rng.normal())} for e in one] for one in sets]
    wide = prediction_claim(noise, level=0.9)["contracted loss"]["d"]
    assert wide["width"] > 0.5
    assert wide["reproduced"] != "yes"


def test_one_training_predicts_nothing():
    assert prediction_claim(trainings(1), level=0.9)["contracted loss"]["d"] is None
