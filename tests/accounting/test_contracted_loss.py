"""S_T in closed form between visits is the recursion over all steps and instances."""

from __future__ import annotations

import numpy as np
import pytest

from opacus_pil.accounting import ContractedLoss

ROUNDING = 1e-12  # some hundred sums and an exponential of up to 300 terms, each an ulp or two


def slow(size, draws, *, decay, initial=1.0):
    """O(N·T): everybody at every step."""
    total, held = np.zeros(size), np.full(size, initial)
    for rows, seen in draws:
        held[rows] = seen
        total = decay * total + held
    return total


def drawn(size, steps, *, seed=0, rate=0.1):
    generator = np.random.default_rng(seed)
    masks = generator.random((steps, size)) < rate
    return [(np.flatnonzero(m), generator.random(int(m.sum()))) for m in masks]


@pytest.mark.parametrize("decay", [1.0, 1.0 - 1e-9, 0.99, 0.5, 1e-3])
@pytest.mark.parametrize("initial", [0.0, 1.0])
def test_it_is_the_recursion_over_everybody(decay, initial):
    draws = drawn(40, 300)
    loss = ContractedLoss(40, decay=decay, initial=initial)
    for rows, seen in draws:
        loss.update(rows, seen)
    expected = slow(40, draws, decay=decay, initial=initial)
    # Near decay 1 the geometric sum is a quotient of two small numbers, the lower one exact.
    np.testing.assert_allclose(loss.values(), expected, rtol=ROUNDING)
    assert loss.steps == 300


def test_values_can_be_read_at_any_time_and_change_nothing():
    draws = drawn(10, 50)
    watched, left = ContractedLoss(10, decay=0.9), ContractedLoss(10, decay=0.9)
    for step, (rows, seen) in enumerate(draws, start=1):
        watched.update(rows, seen)
        np.testing.assert_allclose(
            watched.values(), slow(10, draws[:step], decay=0.9), rtol=ROUNDING
        )
        left.update(rows, seen)
    assert np.array_equal(watched.values(), left.values())


def test_a_constant_sensitivity_tends_to_the_fixed_point():
    loss = ContractedLoss(1, decay=0.9)
    loss.update([0], [0.3])
    for _ in range(400):
        loss.update([], [])
    # s / (1 − c), 0.9^400 = 5e-19 short of it
    assert loss.values()[0] == pytest.approx(0.3 / 0.1, rel=ROUNDING)


def test_later_shifts_count_more_and_unseen_instances_are_the_worst_case():
    loss = ContractedLoss(3, decay=0.5)
    loss.update([0, 1], [1.0, 0.0])
    loss.update([0, 1], [0.0, 1.0])
    early, late, unseen = loss.values()
    assert early == 0.5
    assert late == 1.0
    assert unseen == 1.5  # 1 at both steps
    assert ContractedLoss(2, decay=0.5).values().tolist() == [0.0, 0.0]


def test_it_claims_nothing():
    loss = ContractedLoss(1, decay=0.5)
    assert loss.guarantee == "estimate"
    assert any("last seen" in reason for reason in loss.reasons)


@pytest.mark.parametrize(
    ("rows", "seen", "match"),
    [
        ([3], [0.5], "index 3"),
        ([1, 1], [0.5, 0.5], "without repetition"),
        ([0, 1], [0.5], "same length"),
        ([0, 1], [0.5, 1.5], "row 1"),
        ([0], [np.nan], "row 0"),
        ([0], [-0.1], "row 0"),
    ],
)
def test_a_refused_step_leaves_everything_as_it_was(rows, seen, match):
    loss = ContractedLoss(3, decay=0.9)
    loss.update([0], [0.5])
    before = loss.values()
    with pytest.raises(ValueError, match=match):
        loss.update(rows, seen)
    assert np.array_equal(loss.values(), before)
    assert loss.steps == 1


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.1, np.nan])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        ContractedLoss(1, decay=decay)
