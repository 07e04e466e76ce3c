"""Whatever a user does: no number with a strong label is below the exact divergence of what ran.

Two hundred sequences of a hypothesis machine that plays the user; benchmarks/user_machine.py plays
thousands, and benchmarks/user_machine_mutations.py shows that it sees broken checks.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracles import sampled_gaussian_divergence
from tests.user_machine.account import Account, Draw, MachineError, Part, Term
from tests.user_machine.exact import (
    divergence,
    joint_divergence,
    skipped_if_empty,
    told_by_size,
)
from tests.user_machine.runs import play, summary
from tests.user_machine.troubles import twin

SEQUENCES = 200


@pytest.mark.slow  # half a minute of playing
def test_no_number_is_below_the_truth_whatever_the_user_does():
    machine = twin()
    play(machine, sequences=SEQUENCES)  # raises with the shortest sequence that it finds
    found = summary(machine)
    # What makes the property say something: strong labels survive, the account explains the sums
    # that it holds numbers against, and the numbers are not far above.
    assert found["ended with a strong label"] > 0.2 * found["sequences"]
    assert found["claims checked"] > 3 * found["sequences"]
    assert found["steps whose sum the account explains"] > 0.8 * found["noisy or raw steps"]
    unseen = sum(found["excused: nothing to be seen yet"].values())
    assert found["excused by a named assumption"] + unseen < 0.05 * found["claims checked"]
    assert found["number / exact divergence, smallest of a check"]["0.5"] < 1.001
    assert {"bound", "output_specific"} <= set(found["labels at checks"])
    assert len(found["rules"]) > 30


# --- the truth that numbers are held against ------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "shift", "order"), [(0.25, 0.5, 4.0), (1 / 3, 2.0, 16.0), (0.5, 25.0, 16.0)]
)
def test_one_coin_is_the_sampled_gaussian_mechanism(rate, shift, order):
    found = divergence(((rate, shift),), order)
    for value, forward in zip(found, (True, False), strict=True):
        exact = float(sampled_gaussian_divergence(shift, order, rate, forward=forward))
        assert value == pytest.approx(exact, rel=1e-9)  # a trapezoid rule that is far finer


def test_two_steps_on_one_draw_are_one_mixture_and_two_draws_two():
    one, two = np.array([0.6, 0.8]), np.array([1.0])
    assert joint_divergence([(0.3, one)], 4.0) == joint_divergence([(0.3, two)], 4.0)
    twice = 2 * divergence(((0.3, math.sqrt(0.5)),), 4.0)[0]
    # A coin thrown once tells more than two coins of half the evidence each.
    assert joint_divergence([(0.3, two)], 4.0)[0] > 1.5 * twice


def test_certain_coins_are_a_gaussian_and_a_projection_is_below():
    three, four = np.array([3.0, 0.0]), np.array([0.0, 4.0])
    found, _ = joint_divergence([(1.0, three), (1.0, four)], 2.0)
    assert found == pytest.approx(25.0, rel=1e-12)  # order · ‖(3, 4)‖² / 2
    apart, _ = joint_divergence([(0.5, three), (0.5, four)], 2.0)
    assert apart < 2.0 * divergence(((0.5, 4.0),), 2.0)[0]


def test_a_skipped_empty_draw_tells_like_its_coin():
    forward, reverse = skipped_if_empty(0.25, 0, 4.0)  # alone: empty without the row for certain
    assert forward == np.inf  # with it the draw may hold somebody
    # Without it: empty for certain, (1 − q)^(1 − α) in the integral.
    assert reverse == pytest.approx(-math.log(0.75), rel=1e-12)


@pytest.mark.parametrize(("size", "order"), [(1, 4.0), (2, 1.5), (3, 16.0)])
def test_a_divisor_that_counts_rows_tells_by_the_scale_of_the_noise(size, order):
    found, _ = told_by_size(1.0, 1, size, order)  # divided by 2 with the row, by 1 without it
    narrow, wide = 0.25, 1.0  # variances; Gil et al. (2013), Table 2
    mixed = order * wide + (1.0 - order) * narrow
    exact = math.log(wide / narrow) / 2 + math.log(wide / mixed) / (2 * (order - 1))
    assert found == pytest.approx(size * exact, rel=1e-4)  # midpoints of a smooth function


def plain(rows, *, rate=0.5, bound=1.0, gradients=((3.0, 4.0), (0.3, 0.0))):
    """A draw of some of two rows, clipped as Opacus does."""
    draw = Draw(rate, frozenset(rows))
    part = Part(draw, np.isin([0, 1], list(rows)), np.ones(2, dtype=np.int64))
    return Term([part], np.array(gradients), np.array([bound]))


def test_the_account_charges_who_was_not_drawn_for_what_would_have_been():
    account, term = Account(2), plain([0])
    sums = np.vstack([term.total(), [0.0, 0.0]])
    account.release([[term]], sums=sums, stds=np.array([2.0, 2.0]))
    found = account.divergence([4.0])
    for row, size in ((0, 5.0 * (1.0 / (5.0 + 1e-6))), (1, 0.3)):  # (3, 4) clipped to 1; 0.3 whole
        assert found[row, 0] == pytest.approx(divergence(((0.5, size / 2.0),), 4.0)[0], rel=1e-9)


def test_the_account_refuses_sums_that_it_cannot_explain():
    account, term = Account(2), plain([0])
    sums = 1.5 * np.vstack([term.total(), [0.0, 0.0]])
    with pytest.raises(MachineError, match="not explained"):
        account.release([[term]], sums=sums, stds=np.array([2.0, 2.0]))


def test_sums_without_noise_cost_everything_for_who_could_have_been_in_them():
    account, term = Account(2), plain([0], gradients=((3.0, 0.0), (0.0, 1.0)))
    account.release_raw([term], np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert account.divergence([4.0]).ravel().tolist() == [np.inf, 0.0]  # row 1 moves another one


def test_the_same_noise_twice_hides_nothing_of_a_difference():
    account, stds = Account(2), np.array([2.0, 2.0])
    for term, once in ((plain([0]), True), (plain([0]), False), (plain([1]), False)):
        sums = np.vstack([term.total(), [0.0, 0.0]])
        account.release([[term]], sums=sums, stds=stds, coins=[1 if once else 2, None])
    # Only the last two steps had the same noise, and each row's coin was thrown anew.
    assert np.isinf(account.divergence([4.0])).all()


def test_a_step_made_once_more_with_the_same_coins_and_noise_tells_nothing_new():
    account, term = Account(2), plain([0])
    sums, stds = np.vstack([term.total(), [0.0, 0.0]]), np.array([2.0, 2.0])
    account.release([[term]], sums=sums, stds=stds, coins=[1, 2])
    before = account.divergence([4.0])
    account.release([[term]], sums=sums, stds=stds, coins=[1, 2])
    assert (account.divergence([4.0]) == before).all()
