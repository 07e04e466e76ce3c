"""A run that is passed again is no further run: not for the label, not for the confidence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opacus_pil.accounting import compose_per_instance
from opacus_pil.accounting.repeated_runs import repeated_runs

INSTANCES, STEPS = 6, 12


def runs(count, *, seed=0, instances=INSTANCES, steps=STEPS):
    """Sensitivities of independent runs, each (instances, steps)."""
    return list(np.random.default_rng(seed).uniform(0.05, 0.3, size=(count, instances, steps)))


def composed(shifts, *, order=3.0, worst=0.09, **how):
    stacked = np.stack(shifts, axis=-2)
    if worst is not None:
        how["worst_case_rdp"] = lambda a: a * worst / 2
    return compose_per_instance(lambda a: a * stacked**2 / 2, order=order, **how)


def kinds(*shifts, worst=None):
    """Rows of the runs that count."""
    return repeated_runs(np.stack(shifts, axis=-2), worst=worst).distinct.tolist()


# --- the label -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [2, 3, 7])
@pytest.mark.parametrize("worst", [0.09, None])
@pytest.mark.parametrize("fixed_start", [False, True])
def test_one_run_passed_again_and_again_is_one_run(times, worst, fixed_start):
    (a,) = runs(1)
    how = {"worst": worst, "fixed_start": fixed_start}
    once, again = composed([a], **how), composed([a] * times, **how)
    assert (once.guarantee, again.guarantee) == ("estimate", "estimate")
    assert again.distinct_runs == once.distinct_runs == 1
    # the mean of equal numbers, but for the rounding of a sum
    assert again.rdp == pytest.approx(once.rdp, rel=1e-12)
    assert any("Runs 0 and 1 give the same" in reason for reason in again.reasons)
    assert len(once.reasons) == 1
    if worst is not None:
        held = [result.upper_confidence(0.9) for result in (once, again)]
        assert held[1] == pytest.approx(held[0], rel=1e-9)  # rounding, and Newton's last step
        assert (held[1] >= held[0]).all()


def test_distinct_runs_keep_the_strongest_label_and_give_no_reasons():
    a, b = runs(2)
    for passed in ([a, b], [a, b, a], [a, a, b, b, b]):
        result = composed(passed)
        assert (result.guarantee, result.reasons) == ("expectation_bound", ())
        assert result.distinct_runs == 2


def test_deterministic_sensitivities_keep_their_number_and_lose_the_label():
    shifts = np.full((INSTANCES, STEPS), 0.2)
    result = composed([shifts, shifts], worst=None, holder_exponent=36.0)
    alone = composed([shifts], worst=None, holder_exponent=36.0)
    assert result.rdp == pytest.approx(alone.rdp, rel=1e-12)  # rounding
    assert result.guarantee == "estimate"


def test_runs_that_agree_at_every_instance_but_one_are_two():
    a, _ = runs(2)
    b = a.copy()
    b[3, 7] *= 0.9
    # One value tells them apart, but seven steps from a common start do not happen twice.
    assert kinds(a, b) == [0]
    b = a.copy()
    b[3, 1:] *= 0.9
    assert kinds(a, b) == [0, 1]


# --- the confidence ------------------------------------------------------------------------------


@pytest.mark.parametrize("order_of_runs", [(0, 1, 0), (0, 0, 1), (1, 0, 1, 1), (0, 1, 0, 1, 0)])
def test_confidence_is_never_below_that_of_the_distinct_runs_nor_of_all(order_of_runs):
    both = runs(2)
    passed = composed([both[k] for k in order_of_runs])
    rounding = 1 - 1e-9  # Newton's last step
    alone = composed(both)
    assert (passed.upper_confidence(0.9) >= alone.upper_confidence(0.9) * rounding).all()
    assert (passed.upper_confidence(0.9) >= passed.rdp).all()
    noise = 1e-3 * np.random.default_rng(1).uniform(size=(len(order_of_runs), INSTANCES, STEPS))
    as_if_independent = composed(
        [both[k] * (1 - n) for k, n in zip(order_of_runs, noise, strict=True)]
    )
    assert as_if_independent.distinct_runs == len(order_of_runs)
    # lowered by up to 0.1 %, squared
    assert (passed.upper_confidence(0.9) >= as_if_independent.upper_confidence(0.9) * 0.997).all()


def test_confidence_covers_where_counting_repetitions_would_not():
    # Half of the runs meet the worst case at every step; two draws miss it a quarter of the time.
    order, h, steps, low, high = 2.0, 60.0, 20, 0.01, 0.2
    rng = np.random.default_rng(5)
    drawn = np.where(rng.random((400, 2, 1)) < 0.5, high, low) * np.ones(steps)
    passed = np.tile(drawn, (1, 12, 1))  # each "instance" is one trial

    def compose(shifts):
        return compose_per_instance(
            lambda a: a * shifts**2 / 2,
            order=order,
            holder_exponent=h,
            worst_case_rdp=lambda a: a * high**2 / 2,
        )

    truth = compose(np.array([[low], [high]]) * np.ones(steps)).rdp
    level, spread = 0.9, math.sqrt(0.09 / 400)
    result = compose(passed)
    assert result.distinct_runs == 2
    assert (result.upper_confidence(level) >= truth).mean() >= level - 4 * spread
    counted = result._evidence[0].upper(1 - level) / (order - 1)
    assert (counted >= truth).mean() < level - 4 * spread  # the test can tell


def test_confidence_of_runs_that_agree_by_chance_is_what_it_was():
    """Of 40 independent runs nearly all are at a high point: to look at two would flatter it."""
    high, low = np.full((1, 2), 0.25), np.full((1, 2), 0.01)
    result = composed([low, *[high] * 40], holder_exponent=36.0)
    counted, once = (e.upper(0.5) / 2.0 for e in result._evidence)
    assert (once < counted).all()
    assert (result.upper_confidence(0.5) >= counted).all()


def test_number_is_the_theorem_with_the_mean_over_the_runs_as_they_are_given():
    """By hand for one instance and two steps: a run that is given twice weighs twice."""
    a, b = (run[:1, :2] for run in runs(2))
    order, h = 3.0, 6.0
    rho = h / (h - 1)
    orders = 1 + (order - 1) * np.array([rho, 1.0])
    shifts = np.stack([a, b, b], axis=-2)[0]
    # exponents: h of the last step, none of the first
    exponents = (np.array([1.0, h]) * (orders - 1)) * orders * shifts**2 / 2
    log_means = np.log(np.exp(exponents).mean(axis=0))
    expected = (log_means[0] / rho + log_means[1] / h) / (order - 1)
    found = composed([a, b, b], worst=None, holder_exponent=h).rdp
    assert found == pytest.approx([expected], rel=1e-11)  # rounded up by 1e-12


# --- runs passed by mistake ----------------------------------------------------------------------


def test_one_model_measured_again_is_the_same_run():
    a, b = runs(2, instances=50)
    again = (a.astype(np.float32) * (1 + 3e-7)).astype(np.float64)
    assert not np.array_equal(a, again)
    result = composed([a, again])
    assert (result.guarantee, result.distinct_runs) == ("estimate", 1)
    assert composed([a, b, again]).distinct_runs == 2


def test_runs_from_one_checkpoint_are_one():
    a, b = runs(2)
    forked = np.concatenate([a[:, :4], b[:, 4:]], axis=1)
    assert kinds(a, forked) == [0]
    assert kinds(a, np.concatenate([a[:, :1], b[:, 1:]], axis=1)) == [
        0,
        1,
    ]  # a common start is fine
    (reason, _) = composed([a, forked]).reasons
    assert reason == "Runs 0 and 1 begin with the same steps, as after one checkpoint."


def test_a_run_that_ended_early_is_the_run_that_went_on():
    (a,) = runs(1)
    short = a.copy()
    short[:, 5:] = 0.0
    assert kinds(a, short) == kinds(short, a) == [0]


@pytest.mark.parametrize("shift", [1, 4, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_a_run_that_begins_in_the_middle_of_another_is_the_same_run(shift, padded):
    long, other = runs(2, steps=STEPS + shift)
    first, second = long[:, :STEPS], long[:, shift:].copy()
    if padded:
        second[:, STEPS - shift :] = 0.0
    assert kinds(first, second) == kinds(second, first) == [0]
    assert kinds(other[:, :STEPS], first, second) == [0, 1]
    (reason, _) = composed([first, second]).reasons
    assert reason == "Runs 0 and 1 overlap: one begins in the middle of the other."


def test_a_run_that_ended_early_is_found_in_one_that_begins_in_its_middle():
    (long,) = runs(1, steps=STEPS + 3)
    first, second = long[:, :STEPS].copy(), long[:, 3:]
    first[:, STEPS - 2 :] = 0.0
    assert kinds(first, second) == kinds(second, first) == [0]


def test_windows_of_one_run_are_one_though_the_first_and_the_last_do_not_meet():
    (long,) = runs(1, steps=30)
    assert kinds(long[:, :12], long[:, 9:21], long[:, 18:30]) == [0]
    assert kinds(long[:, :12], long[:, 18:30], long[:, 9:21]) == [0]


def test_halves_of_a_run_are_caught_only_by_a_common_start():
    (long,) = runs(1, steps=2 * STEPS)
    halves = [long[:, :STEPS], long[:, STEPS:]]
    with pytest.raises(ValueError, match="Expected equal first steps"):
        composed(halves, fixed_start=True)
    assert composed(halves).guarantee == "expectation_bound"  # the documented limit


# --- runs that are independent all the same ------------------------------------------------------


@pytest.mark.parametrize("given_worst", [False, True])
def test_independent_runs_at_the_bound_together_are_two(given_worst):
    """All are at the clipping bound for a while, under noise that changes from step to step."""
    bound = 1.0 / np.linspace(1, 2, STEPS) ** 2
    a, b = (shift / 0.3 * bound for shift in runs(2))
    for run in (a, b):
        run[:, :5] = bound[:5]
    worst = np.broadcast_to(bound, a.shape) if given_worst else None
    assert kinds(a, b, worst=worst) == [0, 1]


def test_one_instance_on_a_coarse_grid_meets_itself_by_chance_and_stays_two_runs():
    rng = np.random.default_rng(3)
    for _ in range(20):
        grid = rng.integers(1, 4, size=(5, 1, 40)) / 4.0
        assert kinds(*grid) == [0, 1, 2, 3, 4]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_what_repeats_does_not_depend_on_the_order_of_the_runs(count, instances, steps, seed):
    rng = np.random.default_rng(seed)
    drawn = runs(count, seed=seed, instances=instances, steps=steps)
    picked = rng.integers(0, count, size=8)
    found = repeated_runs(np.stack([drawn[k] for k in picked], axis=-2))
    assert len(found.distinct) == len(set(picked.tolist()))
    # the first of each kind
    assert found.distinct.tolist() == sorted(np.unique(picked, return_index=True)[1].tolist())


def by_every_pair(values, ceiling):
    """What is promised, pair by pair and shift by shift, for values without rounding."""
    count, _, steps = values.shape
    telling = (values > 0) & (values < ceiling)
    lengths = [steps - int((v[:, ::-1].sum(axis=0) > 0).argmax()) for v in values]
    group = list(range(count))

    def related(i, j):
        together = (values[i] == values[j]).all(axis=0)
        stretch = steps if together.all() else int(together.argmin())
        if stretch == steps or telling[i, :, 1:stretch].sum() >= 8:
            return True
        for shift in range(1, steps):
            for a, b in ((i, j), (j, i)):  # b begins where a stood after `shift` steps
                size = min(lengths[a] - shift, lengths[b])
                if (
                    size > 0
                    and telling[b, :, :size].sum() >= 8
                    and np.array_equal(values[a, :, shift : shift + size], values[b, :, :size])
                ):
                    return True
        return False

    for i in range(count):
        for j in range(i + 1, count):
            if related(i, j):
                group = [group[i] if g == group[j] else g for g in group]
    return len(set(group))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 5), st.integers(1, 10), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_shortcuts_find_what_looking_at_every_pair_finds(count, instances, steps, seed):
    """Runs are windows of a few histories, cut, filled up and at the bound now and then."""
    rng = np.random.default_rng(seed)
    histories = rng.integers(1, 9, size=(2, instances, 2 * steps)) / 8.0
    histories[:, :, rng.integers(0, 2 * steps)] = 1.0
    values = np.empty((count, instances, steps))
    for k in range(count):
        start = rng.integers(0, steps + 1)
        values[k] = histories[rng.integers(2)][:, start : start + steps]
        values[k, :, steps - rng.integers(0, 3) :] *= rng.integers(0, 2)
    worst = np.ones((instances, steps))
    found = repeated_runs(np.moveaxis(values, 0, 1), worst=worst)
    assert len(found.distinct) == by_every_pair(values, worst)


def test_many_runs_are_compared_in_little_time_and_none_is_lost():
    values = np.random.default_rng(8).uniform(0.1, 0.9, size=(3, 2000, 4))
    assert len(repeated_runs(values).distinct) == 2000
