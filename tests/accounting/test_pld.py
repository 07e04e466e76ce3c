import math
import sys

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from scipy.optimize import brentq
from scipy.stats import binom

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    group_rdp,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from opacus_pil.accounting.pld import _few_atoms, tight_epsilon, tight_group_epsilon
from tests.oracles import gaussian_delta

DELTA = 1e-5
COARSE = 1e-3  # a fast discretisation; each composed step adds at most that much to ε


def rdp_epsilon(runs):
    curve = sum(
        count * sampled_gaussian_rdp(s, noise_multiplier=z, sample_rate=q, orders=DEFAULT_ORDERS)
        for s, z, q, count in runs
    )
    return rdp_to_epsilon(curve, orders=DEFAULT_ORDERS, delta=DELTA)[0]


def gaussian_epsilon(mu):
    return brentq(lambda epsilon: gaussian_delta(epsilon, mu) - DELTA, 1e-9, 100.0)


@pytest.mark.parametrize(
    "runs",
    [
        [(1.0, 2.0, 1.0, 1)],
        [(1.0, 10.0, 1.0, 25)],
        [(0.5, 4.0, 1.0, 16), (1.0, 5.0, 1.0, 4)],
    ],
)
def test_full_batches_are_one_gaussian_from_above(runs):
    exact = gaussian_epsilon(math.sqrt(sum(n * (s / z) ** 2 for s, z, _, n in runs)))
    value = tight_epsilon(runs, delta=DELTA)
    # connect-the-dots costs a few times the spacing 1e-4, the reserves less
    assert exact <= value <= exact + 2e-3


def test_constant_runs_agree_with_dp_accounting():
    event = PoissonSampledDpEvent(0.01, GaussianDpEvent(1.5))
    accountant = PLDAccountant(value_discretization_interval=COARSE)
    accountant.compose(SelfComposedDpEvent(event, 300))
    expected = accountant.get_epsilon(DELTA)
    value = tight_epsilon(
        [(1.0, 1.5, 0.01, 300)], delta=DELTA, value_discretization_interval=COARSE
    )
    assert expected <= value <= expected * 1.001  # 1e-4 of δ is kept back


def test_never_above_rdp_nor_below_an_optimistic_distribution():
    runs = [(0.4, 1.0, 0.02, 100), (1.0, 1.2, 0.01, 50)]
    value = tight_epsilon(runs, delta=DELTA, value_discretization_interval=COARSE)
    assert value < rdp_epsilon(runs)
    composed = None
    for s, z, q, count in runs:
        step = privacy_loss_distribution.from_gaussian_mechanism(
            z / s, sampling_prob=q, pessimistic_estimate=False, use_connect_dots=False,
            value_discretization_interval=COARSE / 10,
        ).self_compose(count)  # fmt: skip
        composed = step if composed is None else composed.compose(step)
    assert composed.get_epsilon_for_delta(DELTA) <= value


def test_epsilon_moves_the_right_way():
    def value(**change):
        run = {"s": 0.5, "z": 1.0, "q": 0.05, "n": 20} | change
        return tight_epsilon(
            [tuple(run.values())], delta=DELTA, value_discretization_interval=COARSE
        )

    base = value()
    assert value(z=1.3) < base < value(s=0.7)
    assert base < value(q=0.1)
    assert base < value(n=40)
    split = tight_epsilon(
        [(0.5, 1.0, 0.05, 8), (0.5, 1.0, 0.05, 12)],
        delta=DELTA,
        value_discretization_interval=COARSE,
    )
    assert split == pytest.approx(base, rel=1e-3)  # truncated at other places


@pytest.mark.parametrize("delta", [1e-300, 1e-11])
def test_a_delta_below_the_round_off_gets_the_rdp_value(delta):
    curve = 10 * sampled_gaussian_rdp(
        1.0, noise_multiplier=1.0, sample_rate=0.01, orders=DEFAULT_ORDERS
    )
    expected = rdp_to_epsilon(curve, orders=DEFAULT_ORDERS, delta=delta)[0]
    assert tight_epsilon([(1.0, 1.0, 0.01, 10)], delta=delta) == pytest.approx(expected, rel=1e-12)


def test_enormous_losses_get_a_finite_bound():
    assert tight_epsilon([(1.0, 0.001, 0.5, 10)], delta=DELTA) >= 5e5 * 10 * 0.4


# --- forget sets ---------------------------------------------------------------------------------


def test_one_member_is_one_instance():
    group = tight_group_epsilon([([0.8, 0.0], 1.0, 0.02, 30)], delta=DELTA)
    single = tight_epsilon(
        [(0.8, 1.0, 0.02, 30)], delta=DELTA, value_discretization_interval=COARSE
    )
    assert group == pytest.approx(single, rel=1e-12)  # the same computation


def test_a_set_drawn_whole_is_one_gaussian_of_the_summed_sensitivity():
    exact = gaussian_epsilon(math.sqrt(9) * 1.2 / 4.0)
    value = tight_group_epsilon([([0.3, 0.4, 0.5], 4.0, 1.0, 9)], delta=DELTA)
    assert exact <= value <= exact + 20 * COARSE  # the spacing, a few times


def test_group_epsilon_is_between_optimistic_mixture_and_group_rdp():
    count, noise, rate, steps = 5, 3.0, 0.05, 40
    drawn = np.arange(count + 1)
    below = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, drawn.astype(float).tolist(), binom.pmf(drawn, count, rate).tolist(),
        pessimistic_estimate=False, use_connect_dots=False, value_discretization_interval=COARSE,
    ).self_compose(steps)  # fmt: skip
    curve = steps * group_rdp(
        np.ones(count), noise_multiplier=noise, sample_rate=rate, orders=DEFAULT_ORDERS
    )
    above = rdp_to_epsilon(curve, orders=DEFAULT_ORDERS, delta=DELTA)[0]
    value = tight_group_epsilon([(np.ones(count), noise, rate, steps)], delta=DELTA)
    assert below.get_epsilon_for_delta(DELTA) <= value < above


def test_group_epsilon_grows_with_the_set():
    members = [0.2, 0.5, 0.9]
    values = [
        tight_group_epsilon([(members[:size], 2.0, 0.05, 20)], delta=DELTA) for size in (1, 2, 3)
    ]
    assert values == sorted(set(values))


@pytest.mark.parametrize("count", [3, 12, 60])
def test_few_atoms_only_move_mass_to_the_right(count):
    shifts = np.random.default_rng(count).uniform(0.1, 1.0, size=count)
    draws = np.random.default_rng(0).random((20_000, count)) < 0.1
    sums = draws @ shifts
    atoms, masses = _few_atoms(shifts, 0.1, 1e-12)
    assert len(atoms) <= 128
    assert atoms[0] == 0.0
    mean, spread = count * 0.1 * shifts.mean(), sums.std() / math.sqrt(len(sums))
    assert masses @ atoms >= mean
    for point in atoms[:: max(1, len(atoms) // 8)]:
        # five standard errors of the empirical distribution function
        assert masses[atoms <= point].sum() <= (sums <= point + 1e-12).mean() + 5 * 0.5 / 141
    assert masses @ atoms <= sums.mean() * 1.1 + 5 * spread  # rounding costs under 10 %


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [tight_epsilon, tight_group_epsilon])
def test_edge_values(function):
    nothing = [(0.0, 1.0, 0.5, 10), (1.0, 0.0, 0.0, 10), (1.0, 0.0, 0.5, 0)]
    assert function(nothing, delta=DELTA) == 0.0
    assert function([], delta=DELTA) == 0.0
    assert function([*nothing, (1.0, 0.0, 0.5, 1)], delta=DELTA) == math.inf


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ((-1.0, 1.0, 0.5, 1), "Expected sensitivity of run 1"),
        ((1.0, -1.0, 0.5, 1), "Expected noise_multiplier of run 1"),
        ((1.0, 1.0, 1.5, 1), "Expected sample_rate of run 1"),
        ((1.0, 1.0, 0.5, -1), "Expected count of run 1"),
        ((1.0, 1.0, 0.5), "Expected run 1"),
    ],
)
def test_a_bad_run_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        tight_epsilon([(1.0, 1.0, 0.5, 1), run], delta=DELTA)


def test_missing_library_names_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(ImportError, match="pip install dp-accounting"):
        tight_epsilon([(1.0, 1.0, 0.5, 1)], delta=DELTA)
