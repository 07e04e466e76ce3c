"""Tops of scores: the measures of the whole sample are those of the sets; shared members cancel."""

from __future__ import annotations

import numpy as np
import pytest

from opacus_pil.evaluation import time_to_unlearn
from opacus_pil.study.forget_sets import ForgetSet
from opacus_pil.study.measures import SetMeasure
from opacus_pil.study.top import top_claim

STEPS = 7 * np.arange(30)
HOW = {"step": 70, "tolerances": (0.05, 0.1), "stay": 4, "resamples": 300, "seed": 0}


def measure(name, rows, *, rate, seed=0):
    """Members whose confidence goes from 1 to 1/2 as exp(−rate · record), with some noise."""
    rng = np.random.default_rng([seed, *rows])
    start = rng.uniform(0.4, 0.6, size=len(rows))
    curves = 0.5 + start * np.exp(-rate * np.arange(30))[:, None]
    targets = np.full(len(rows), 0.5)
    gaps = {"confidence": np.abs(curves - targets)}
    forget = ForgetSet(name, "top", np.sort(np.asarray(rows)))
    return SetMeasure(forget, {}, STEPS, curves, targets, gaps)


def claim(*trainings, variants=()):
    return top_claim(trainings, reference="own", variants=variants, **HOW)


def test_values_are_those_of_the_sets_averaged_over_trainings():
    trainings = [
        [measure("own", range(20), rate=0.1, seed=k), measure("proxy", range(10, 30), rate=0.3)]
        for k in range(3)
    ]
    found = claim(*trainings)
    for place, name in enumerate(("own", "proxy")):
        sets = [training[place] for training in trainings]
        one = found["scores"][name]
        gaps = [m.gaps["confidence"][10].mean() for m in sets]
        assert one["gap"]["value"]["value"] == pytest.approx(np.mean(gaps))
        for tolerance in HOW["tolerances"]:
            times = [
                time_to_unlearn(
                    m.curves.mean(axis=1), oracle_values=[m.targets.mean()], tolerance=tolerance,
                    steps=STEPS.tolist(), stay=4,
                )
                for m in sets
            ]  # fmt: skip
            value = one[f"time within {tolerance:g}"]["value"]["value"]
            assert value == pytest.approx(np.mean(times))


def test_the_slower_top_is_the_harder_one_by_every_measure():
    slow = [[measure("own", range(20), rate=0.1), measure("proxy", range(20, 40), rate=0.3)]] * 2
    found = claim(*slow)
    assert found["reproduced"] == "yes"
    assert all(names == ["proxy"] for names in found["harder_than"].values())
    fast = [[measure("own", range(20), rate=0.3), measure("proxy", range(20, 40), rate=0.1)]] * 2
    found = claim(*fast)
    assert found["reproduced"] == "no"
    assert all(names == ["proxy"] for names in found["easier_than"].values())
    assert claim(*fast, variants=["proxy", "own"])["proxies"] == []


def test_equal_tops_have_no_difference_at_all():
    sets = [measure("own", range(20), rate=0.2), measure("proxy", range(20), rate=0.2)]
    lead = claim(sets)["scores"]["proxy"]["gap"]["reference_minus_this"]
    assert lead == {"value": 0.0, "low": 0.0, "high": 0.0}  # the same members in every resample


def test_a_top_that_never_gets_there_counts_with_the_last_step():
    sets = [measure("own", range(20), rate=0.0), measure("proxy", range(20, 40), rate=5.0)]
    one = claim(sets)["scores"]
    assert one["own"]["time within 0.05"]["value"]["value"] == STEPS[-1]
    assert one["proxy"]["time within 0.05"]["value"]["value"] == 7.0
