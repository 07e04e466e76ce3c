import csv
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.optimize import brentq

from opacus_pil.accounting import DEFAULT_ORDERS, rdp_to_epsilon, sampled_gaussian_rdp
from tests import oracles

GOLDEN = Path(__file__).parents[1] / "golden"
DIRECTIONS = {"forward": "with_without", "reverse": "without_with"}
ABOVE = 1e-9  # the documented largest relative excess of the rounded-up value


def one(shift, order, rate, direction="with_without"):
    """A single value at noise 1, where the shift is the sensitivity itself, unrounded."""
    return sampled_gaussian_rdp(
        shift, noise_multiplier=1.0, sample_rate=rate, orders=[order], direction=direction
    )[0]


def golden_rows():
    for name in ("rdp.csv", "rdp_extreme.csv"):
        with (GOLDEN / name).open() as file:
            for number, row in enumerate(csv.DictReader(file)):
                values = {key: float(value) for key, value in row.items()}
                for column in DIRECTIONS:
                    yield pytest.param(values, column, id=f"{name}-{number}-{column}")


# This reverse value was integrated up to t = 16 only, short of the mass near t = shift = 14.1; the
# oracle cut at 16 gives it digit for digit, the whole line gives 3.3 % more.
CUT_SHORT = (0.07071061299000235, 1.1, "reverse")


@pytest.mark.parametrize(("row", "column"), list(golden_rows()))
def test_golden_value_is_met_from_above(row, column):
    value = sampled_gaussian_rdp(
        row["sensitivity"],
        noise_multiplier=row["noise_multiplier"],
        sample_rate=row["sample_rate"],
        orders=[row["order"]],
        direction=DIRECTIONS[column],
    )[0]
    truth = row[column]
    if (row["noise_multiplier"], row["order"], column) == CUT_SHORT:
        shift = row["sensitivity"] / row["noise_multiplier"]
        truth = float(
            oracles.sampled_gaussian_divergence(
                shift, row["order"], row["sample_rate"], forward=False
            )
        )
        assert truth > 1.03 * row[column]
    assert truth <= value * (1 + 2.3e-16)  # the table is itself rounded to double
    assert value <= truth * (1 + ABOVE)


def random_cases(count):
    rng = np.random.default_rng(2024)
    for index in range(count):
        shift = 10 ** (rng.uniform(-8, 2) if index % 3 == 0 else rng.uniform(-2, 1))
        order = 1 + 10 ** (rng.uniform(-2, 3.6) if index % 2 else rng.uniform(-2, 1))
        rate = (10 ** rng.uniform(-8, -0.1), 1 - 10 ** rng.uniform(-9, -0.3))[index % 4 == 0]
        if order * shift < 60 / max(1.0, shift):  # what the oracle does in a quarter of a second
            yield float(shift), float(order), float(rate)


@pytest.mark.parametrize("column", DIRECTIONS)
@pytest.mark.parametrize(("shift", "order", "rate"), list(random_cases(40)))
def test_real_order_is_met_from_above_by_quadrature(shift, order, rate, column):
    truth = oracles.sampled_gaussian_divergence(shift, order, rate, forward=column == "forward")
    value = one(shift, order, rate, DIRECTIONS[column])
    assert truth <= value <= truth * (1 + ABOVE)


EXTREMES = [
    # shift, order, rate, column: what each is there for
    (40.0, 1.01, 1e-3, "forward"),  # the mode near 40 holds the value, exponents of 10^3
    (20.0, 1.01, 1e-2, "forward"),  # two distant modes of comparable weight
    (20.0, 1.1, 1e-8, "forward"),  # D of order 1 from a mode that φ alone would hide
    (0.3, 300.5, 1e-4, "forward"),  # modes near 0 and 90
    (4.0, 1.01, 1e-20, "forward"),  # u² has its mode at 8, far beyond order · shift
    (1e-8, 1.01, 1e-4, "forward"),  # D ~ 1e-25: u² is 1e-24 beside 1
    (1e-8, 4096.0, 1e-8, "reverse"),
    (0.5, 2.5, 1 - 1e-12, "forward"),  # almost the plain Gaussian
    (3.0, 64.5, 1 - 1e-12, "reverse"),  # 1 + u falls to 1e-12
    (0.1, 4000.0, 0.5, "reverse"),  # peak at −20 and narrow
    (5.0, 1000.0, 0.5, "reverse"),  # the bound −log(1−q) is nearly reached
    (14.0, 1.1, 1.5e-3, "reverse"),  # mass near 0 and near 14
    (25.0, 1.01, 0.1, "reverse"),  # closed form
]


@pytest.mark.parametrize(("shift", "order", "rate", "column"), EXTREMES)
def test_extreme_value_is_met_from_above_by_quadrature(shift, order, rate, column):
    truth = oracles.sampled_gaussian_divergence(
        shift, order, rate, forward=column == "forward", digits=60
    )
    value = one(shift, order, rate, DIRECTIONS[column])
    assert truth <= value <= truth * (1 + ABOVE)


@pytest.mark.parametrize("column", DIRECTIONS)
def test_rare_draws_of_a_far_shift_give_half_the_order_times_chi_square(column):
    # E[u²] = q²·expm1(r²); E|u|³ is smaller by q·e^(2r²) = 1e-25, and u < 1 up to 10 beyond 2r.
    rate, shift = 1e-150, 12.0
    for order in (1.01, 1.5, 2.0, 3.0):
        expected = order / 2 * rate * math.expm1(shift * shift) * rate
        value = one(shift, order, rate, DIRECTIONS[column])
        assert expected * (1 - 1e-13) <= value <= expected * (1 + ABOVE)  # e^144 to 144 ulps


@given(
    st.floats(-8, 2).map(lambda x: 10**x),
    st.one_of(st.integers(2, 40), st.sampled_from([64, 256, 1024, 4096])),
    st.one_of(st.floats(-10, -0.01).map(lambda x: 10**x), st.floats(0.5, 1 - 1e-9)),
)
def test_integer_order_is_met_from_above_by_binomial_sum(shift, order, rate):
    truth = oracles.integer_order_divergence(shift, order, rate)
    value = one(shift, order, rate)
    assert truth <= value <= truth * (1 + ABOVE)


@pytest.mark.parametrize(
    ("shift", "order", "rate"), list(product([1e-3, 0.3, 1.0, 4.0], [2, 5, 23], [1e-4, 0.1, 0.9]))
)
def test_both_oracles_agree(shift, order, rate):
    quadrature = oracles.sampled_gaussian_divergence(shift, order, rate, forward=True)
    # 36 Legendre nodes on panels of width <= 1 leave far less than 1e-18
    assert abs(quadrature / oracles.integer_order_divergence(shift, order, rate) - 1) < 1e-18


def test_opacus_agrees_where_its_sums_do_not_cancel():
    orders = [1.5, 2.0, 3.3, 8.0, 20.0, 64.0]
    ours = sampled_gaussian_rdp(1.0, noise_multiplier=1.3, sample_rate=0.02, orders=orders)
    theirs = compute_rdp(q=0.02, noise_multiplier=1.3, steps=1, orders=orders)
    # Opacus sums terms near 1 to a result near 1e-4: it keeps about 11 digits
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_dp_accounting_agrees_at_integer_orders():
    orders = [2, 3, 8, 32]
    event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(0.9))
    accountant = RdpAccountant(orders)
    accountant.compose(event)
    ours = sampled_gaussian_rdp(1.0, noise_multiplier=0.9, sample_rate=0.05, orders=orders)
    np.testing.assert_allclose(ours, accountant._rdp, rtol=1e-9)  # same cancellation as Opacus


def test_edge_cases():
    orders = [1.5, 4.0]
    sensitivity = np.array([[0.0, 1.0, 2.0]])

    def table(noise, rate):
        return sampled_gaussian_rdp(
            sensitivity, noise_multiplier=noise, sample_rate=rate, orders=orders
        )

    assert (table(0.0, 0.0) == 0).all()
    assert (table(1.0, 0.3)[:, 0] == 0).all()
    assert (table(0.0, 0.3) == [[[0, 0], [np.inf, np.inf], [np.inf, np.inf]]]).all()
    closed = np.multiply.outer(sensitivity**2 / 2, orders)
    assert (closed <= table(1.0, 1.0)).all()
    assert (table(1.0, 1.0) <= closed * (1 + 1e-15)).all()  # four ulps
    assert table(1.0, 0.3).shape == (1, 3, 2)
    assert sampled_gaussian_rdp([], noise_multiplier=1, sample_rate=0.1, orders=[2]).shape == (0, 1)


@pytest.mark.parametrize("direction", DIRECTIONS.values())
@pytest.mark.parametrize("rate", [1e-300, 1e-20, 0.01, 1 - 1e-16, 1.0])
def test_any_finite_input_gives_a_positive_number_or_infinity(rate, direction):
    sensitivity = [5e-324, 1e-200, 1e-100, 1e-8, 1.0, 30.0, 300.0, 1e4, 1e100, 1.7e308]
    orders = [1 + 1e-12, 1.0001, 1.01, 2.0, 4096.0, 1e6]
    for noise in (1e-300, 1e-3, 1.0, 1e300):
        value = sampled_gaussian_rdp(
            sensitivity, noise_multiplier=noise, sample_rate=rate, orders=orders,
            direction=direction,
        )  # fmt: skip
        assert (value > 0).all()  # a positive divergence below the double range is not reported 0
        if direction == "without_with" and rate < 1:
            assert (value <= -math.log1p(-rate) * (1 + 1e-15) + 1e-290).all()


@pytest.mark.parametrize("direction", DIRECTIONS.values())
def test_rdp_is_monotone(direction):
    shifts = np.concatenate([np.geomspace(1e-8, 100, 120), np.linspace(0.5, 1.5, 60)])
    shifts.sort()
    orders = np.sort([*DEFAULT_ORDERS, *np.linspace(1.9, 2.1, 9), *np.linspace(30, 33, 11)])
    rates = [1e-12, 1e-6, 1e-3, 1e-2, 0.011, 0.3, 0.5, 0.50001, 0.9, 1 - 1e-9, 1.0]
    table = np.stack([
        sampled_gaussian_rdp(
            shifts, noise_multiplier=1.0, sample_rate=rate, orders=orders, direction=direction
        )
        for rate in rates
    ])  # fmt: skip
    table = np.where(np.isinf(table), 1e300, table)
    for axis in range(3):  # neighbours may differ by the documented excess, not by more
        below, above = np.delete(table, -1, axis), np.delete(table, 0, axis)
        assert (below <= above * (1 + ABOVE)).all()


def test_rdp_is_nonincreasing_in_noise():
    values = [
        sampled_gaussian_rdp(
            [0.2, 1.0], noise_multiplier=noise, sample_rate=0.02, orders=DEFAULT_ORDERS
        )
        for noise in np.geomspace(0.02, 1e6, 60)
    ]
    for quieter, louder in zip(values[1:], values[:-1], strict=True):
        assert (quieter <= louder * (1 + ABOVE)).all()


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5, 0.99, 1.0])
def test_reverse_is_not_above_forward(rate):
    settings = {"noise_multiplier": 1.0, "sample_rate": rate, "orders": DEFAULT_ORDERS}
    shifts = np.geomspace(1e-6, 50, 60)
    forward = sampled_gaussian_rdp(shifts, **settings)
    reverse = sampled_gaussian_rdp(shifts, **settings, direction="without_with")
    assert (reverse <= forward * (1 + ABOVE)).all()  # Mironov et al., Thm. 5; both rounded up


@pytest.mark.parametrize("direction", DIRECTIONS.values())
def test_gap_times_rdp_is_convex_in_the_order(direction):
    orders = 1 + np.geomspace(0.01, 4095, 200)
    table = sampled_gaussian_rdp(
        np.geomspace(1e-4, 20, 40), noise_multiplier=1.0, sample_rate=0.01, orders=orders,
        direction=direction,
    )  # fmt: skip
    moment = table * (orders - 1)
    share = (orders[1:-1] - orders[:-2]) / (orders[2:] - orders[:-2])
    chord = (1 - share) * moment[:, :-2] + share * moment[:, 2:]
    assert (moment[:, 1:-1] <= chord * (1 + ABOVE)).all()


def test_a_value_does_not_depend_on_its_neighbours():
    settings = {"noise_multiplier": 0.8, "sample_rate": 0.03}
    shifts = np.geomspace(1e-3, 3, 50)
    for direction in DIRECTIONS.values():
        table = sampled_gaussian_rdp(shifts, orders=DEFAULT_ORDERS, direction=direction, **settings)
        for row, column in [(0, 0), (7, 60), (31, 33), (49, 67)]:
            alone = sampled_gaussian_rdp(
                shifts[row], orders=[DEFAULT_ORDERS[column]], direction=direction, **settings
            )
            # the same nodes and sums; a SIMD tail may round an exponential differently
            np.testing.assert_allclose(alone[0], table[row, column], rtol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1.0}, r"Expected noise_multiplier .*>= 0, got .*=-1\.0\. Pass"),
        ({"noise_multiplier": math.inf}, "Expected noise_multiplier to be a finite number"),
        ({"sample_rate": 1.2}, r"Expected sample_rate in \[0, 1\], got sample_rate=1\.2\. Pass"),
        ({"orders": [2.0, 1.0]}, r"Expected orders finite and > 1, .*\(first: row 1, value .*1\.0"),
        ({"orders": []}, "Expected orders to be a non-empty sequence"),
        ({"direction": "both"}, "Expected direction to be one of with_without, without_with"),
    ],
)
def test_wrong_argument_is_named(change, message):
    arguments = {"noise_multiplier": 1.0, "sample_rate": 0.1, "orders": [2.0], **change}
    with pytest.raises(ValueError, match=message):
        sampled_gaussian_rdp([0.5], **arguments)


def test_bad_sensitivity_names_the_first_row():
    with pytest.raises(ValueError, match=r"sensitivity .* 2 of 4 outside \(first: row 1, .*nan"):
        sampled_gaussian_rdp(
            [0.5, math.nan, 1.0, -1.0], noise_multiplier=1.0, sample_rate=0.1, orders=[2.0]
        )


def test_default_orders_ascend_over_the_promised_span():
    assert list(DEFAULT_ORDERS) == sorted(set(DEFAULT_ORDERS))
    assert DEFAULT_ORDERS[0] == 1.01
    assert DEFAULT_ORDERS[-1] == 4096
    assert {2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0} <= set(
        DEFAULT_ORDERS
    )


DENSE = np.union1d(1 + np.geomspace(0.01, 4095, 1500), DEFAULT_ORDERS)
DENSE = np.append(1.01, DENSE[DENSE > 1.01])


def epsilon_loss(shift, rate, steps, delta):
    """ε over DEFAULT_ORDERS relative to ε over dense orders, and the dense optimum."""
    settings = {"noise_multiplier": 1.0, "sample_rate": rate}
    ours, dense = (
        rdp_to_epsilon(
            steps * sampled_gaussian_rdp(shift, orders=orders, **settings),
            orders=orders,
            delta=delta,
        )
        for orders in (DEFAULT_ORDERS, DENSE)
    )
    return ours[0] / dense[0] - 1, dense[1]


@pytest.mark.parametrize("delta", [1e-5, 1e-7, 1e-10])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3, 1.0])
def test_default_orders_cost_at_most_one_percent_on_smooth_curves(rate, delta):
    # Many steps at moderate shifts: the optimum lies below the jump of the curve.
    for shift, steps in product([0.01, 0.03, 0.1, 0.2], [1e4, 1e5]):
        loss, order = epsilon_loss(shift, rate, steps, delta)
        if 1.01 < order < 4096:
            assert 0 <= loss <= 0.01


def test_default_orders_cost_at_most_their_ratio_at_a_jump():
    # ε(α') − ε(α) <= tail(α') − tail(α) for α' just below α, and tails go like 1/(α−1).
    gaps = np.array(DEFAULT_ORDERS) - 1
    assert (gaps[1:] / gaps[:-1]).max() <= 1.31
    jumps = [(1.0, 1e-5, 1e3), (0.5, 1e-5, 1e3), (1.0, 1e-4, 1e3), (1.5, 1e-4, 1e5)]
    for shift, rate, steps in jumps:
        loss, order = epsilon_loss(shift, rate, steps, 1e-5)
        assert 4 < order < 256
        assert 0 <= loss <= 0.2  # the largest ratio between 4 and 256


@given(
    st.lists(st.floats(0, 1e3), min_size=5, max_size=5),
    st.floats(-30, -0.01).map(lambda x: 10**x),
)
def test_epsilon_is_met_from_above_by_scalar_formula(curve, delta):
    orders = [1.01, 1.7, 3.0, 64.0, 4096.0]
    epsilon, order = rdp_to_epsilon(curve, orders=orders, delta=delta)
    truth = oracles.epsilon_of_curve(curve, orders, delta)
    if not any(curve):
        assert epsilon == 0
        return
    # The largest term is log(1/δ)/0.01 < 7000, a few ulps of which are 1e-11, and only at an
    # order whose ε is as large: relative to ε + 1 far less remains.
    assert truth <= epsilon <= truth + 1e-13 * (1 + float(truth) + max(curve))
    assert order in orders


def test_epsilon_is_vectorised_over_leading_axes_and_chunks():
    rng = np.random.default_rng(0)
    orders = [1.25, 2.0, 17.0]
    curves = rng.exponential(size=(5, 9001, 3))  # more rows than one chunk
    epsilon, order = rdp_to_epsilon(curves, orders=orders, delta=1e-4)
    assert epsilon.shape == order.shape == (5, 9001)
    for row, column in [(0, 0), (1, 7383), (1, 7384), (4, 9000)]:
        single = rdp_to_epsilon(curves[row, column], orders=orders, delta=1e-4)
        assert (epsilon[row, column], order[row, column]) == single
        assert isinstance(single[0], float)
    single_precision, _ = rdp_to_epsilon(curves.astype(np.float32), orders=orders, delta=1e-4)
    np.testing.assert_allclose(single_precision, epsilon, rtol=1e-6)  # float32 curves


def test_epsilon_of_special_curves():
    curves = [[0.0, 0.0], [np.inf, np.inf], [1.0, np.inf], [0.0, 1e-9]]
    epsilon, order = rdp_to_epsilon(curves, orders=[2.0, 5.0], delta=1e-5)
    assert epsilon[0] == 0
    assert epsilon[1] == np.inf
    assert np.isnan(order[1])
    assert order[2] == 2
    assert epsilon[3] > 0  # not the zero curve: the formula stands
    assert rdp_to_epsilon([[1e-3]], orders=[4096.0], delta=0.9)[0][0] == 0  # clipped


@pytest.mark.parametrize(
    ("rdp", "delta", "message"),
    [
        ([[0.1, 0.2]], 0.0, r"Expected delta in \(0, 1\), got delta=0\.0\. Pass"),
        ([[0.1, 0.2]], 1.0, r"Expected delta in \(0, 1\), got delta=1\.0\. Pass"),
        ([[0.1, 0.2], [math.nan, 1.0]], 1e-5, "Expected rdp not NaN and >= 0.*row 2, .*nan"),
        ([[0.1, -0.2]], 1e-5, "Expected rdp not NaN and >= 0.*row 1"),
        ([0.1, 0.2, 0.3], 1e-5, r"one value per order .* \(2\), got rdp of shape \(3,\)"),
    ],
)
def test_wrong_curve_or_delta_is_named(rdp, delta, message):
    with pytest.raises(ValueError, match=message):
        rdp_to_epsilon(rdp, orders=[2.0, 4.0], delta=delta)


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_epsilon_of_gaussian_is_above_the_exact_tradeoff(mu, delta):
    rdp = sampled_gaussian_rdp(mu, noise_multiplier=1.0, sample_rate=1.0, orders=DEFAULT_ORDERS)
    epsilon, _ = rdp_to_epsilon(rdp, orders=DEFAULT_ORDERS, delta=delta)
    if oracles.gaussian_delta(0.0, mu) <= delta:
        return  # exact ε is 0: nothing can be below
    exact = brentq(lambda e: oracles.gaussian_delta(e, mu) - delta, 0.0, 100.0)
    assert exact <= epsilon <= 1.5 * exact + 0.01  # RDP's own looseness stays moderate


def test_accounting_does_not_load_torch():
    code = "import sys, opacus_pil.accounting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
