"""Pairs of a member and a held-out row: a coin each, if the split was drawn at random."""

import itertools
import math

import numpy as np
import pytest

from opacus_pil.auditing import Claim, paired_bounds
from opacus_pil.auditing.pairs import _matched

RUNS = ((1.0, 1 / 28, 280),)


def drawn(n=400, shift=0.0, seed=0):
    random = np.random.default_rng(seed)
    rows = random.permutation(2 * n)
    inside, outside = rows[:n].tolist(), rows[n:].tolist()
    members = {i: float(random.normal() + shift) for i in inside}
    return members, {i: float(random.normal()) for i in outside}


def test_given_the_pairs_either_row_is_the_member_with_probability_one_half():
    # All random splits of four rows, all matchings: by enumeration over splits and many seeds.
    first_in, seen = {}, {}
    for inside in itertools.combinations(range(4), 2):
        members = {i: 10.0**i for i in inside}
        held_out = {i: 10.0**i for i in range(4) if i not in inside}
        for seed in range(300):
            gaps, coins = _matched(members, held_out, strata=None, seed=seed)
            # The scores tell which rows were compared, in which order.
            for gap, coin in zip(gaps.tolist(), coins.tolist(), strict=True):
                first_in[round(gap)] = first_in.get(round(gap), 0) + coin
                seen[round(gap)] = seen.get(round(gap), 0) + 1
    for pair, times in seen.items():
        assert abs(first_in[pair] / times - 0.5) < 5 * 0.5 / math.sqrt(times), pair
    assert len(seen) == 12


def test_the_claim_is_the_replacement_curve_of_the_steps():
    members, held_out = drawn()
    found = paired_bounds(
        members, held_out=held_out, delta=1e-5, split="random", seed=0,
        claim=Claim(RUNS, delta=1e-5),
    )  # fmt: skip
    assert found.claimed == pytest.approx(5.87, abs=0.01)  # against 3.92 for adding one
    assert found.pairs == 400
    assert [b.assumption for b in found.lower] == ["none", "none"]
    assert all("drawn at random" in b.condition for b in found.lower)
    assert found.lower[1].p_value > 0.05
    assert found.lower[0].epsilon < 0.5


def test_members_that_stand_out_refute_a_small_claim():
    members, held_out = drawn(shift=4.0)
    found = paired_bounds(
        members, held_out=held_out, delta=1e-5, split="random", seed=0,
        claim=Claim(((10.0, 1 / 28, 28),), delta=1e-5),
    )  # fmt: skip
    assert found.lower[0].epsilon > found.claimed
    assert found.lower[1].p_value < 1e-6


@pytest.mark.slow
def test_a_sign_slip_finds_nothing_and_the_null_does_so_too():
    members, held_out = drawn(shift=-3.0)
    slip = paired_bounds(members, held_out=held_out, delta=1e-6, split="random", seed=0)
    assert slip.lower[0].epsilon == 0.0
    above = [
        paired_bounds(m, held_out=h, delta=1e-6, split="random", seed=s).lower[0].epsilon > 0
        for s in range(200)
        for m, h in [drawn(n=60, seed=s)]
    ]  # fmt: skip
    assert np.mean(above) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_pairs_stay_within_strata():
    members, held_out = {0: 1.0, 1: 100.0}, {2: 2.0, 3: 200.0}
    strata = {0: "a", 2: "a", 1: "b", 3: "b"}
    for seed in range(20):
        gaps, _ = _matched(members, held_out, strata=strata, seed=seed)
        assert sorted(np.abs(gaps)) == [1.0, 100.0]
    with pytest.raises(ValueError, match="stratum of every id, got none of 3"):
        _matched(members, held_out, strata={0: "a", 1: "a", 2: "a"}, seed=0)


@pytest.mark.parametrize("split", ["time", "source", "sorted"])
def test_a_split_by_time_or_source_is_refused_with_the_cure(split):
    members, held_out = drawn()
    with pytest.raises(ValueError, match=r"proves nothing.*Split at random before training"):
        paired_bounds(members, held_out=held_out, delta=1e-5, split=split, seed=0)


def test_rows_in_order_are_refused_although_the_split_is_called_random():
    first, last = (dict.fromkeys(part, 0.0) for part in (range(50), range(50, 100)))
    for pair in ((first, last), (last, first)):
        with pytest.raises(ValueError, match="split by order"):
            paired_bounds(pair[0], held_out=pair[1], delta=1e-5, split="random", seed=0)


def test_ids_on_both_sides_too_few_pairs_and_a_large_delta_are_refused():
    members, held_out = drawn(n=20)
    with pytest.raises(ValueError, match="1 that are both"):
        paired_bounds(
            members, held_out={**held_out, next(iter(members)): 0.0}, delta=1e-5, split="random",
            seed=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="at least two pairs"):
        paired_bounds({1: 0.0}, held_out={2: 0.0}, delta=1e-5, split="random", seed=0)
    with pytest.raises(ValueError, match="well below 1 / canaries"):
        paired_bounds(members, held_out=held_out, delta=0.1, split="random", seed=0)
