import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.utils import get_noise_multiplier
from scipy.optimize import brentq

from opacus_pil.accounting import (
    DEFAULT_ORDERS,
    noise_multiplier_for,
    rdp_to_delta,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from tests.oracles import gaussian_delta

TERMS = 1e-13  # relative to the exponent's size: what doubles may lose in it


def delta_of_curve(rdp, orders, epsilon):
    """Prop. 12 as Canonne et al. print it, δ = exp((α−1)(D−ε))/(α−1) · (1−1/α)^α."""
    with mpmath.workdps(40):
        values = [mpmath.mpf(1)]
        for value, order in zip(rdp, orders, strict=True):
            a = mpmath.mpf(float(order))
            gap = mpmath.mpf(float(value)) - mpmath.mpf(float(epsilon))
            values.append(mpmath.exp((a - 1) * gap) / (a - 1) * (1 - 1 / a) ** a)
        return min(values)


@given(
    st.lists(st.floats(0, 20), min_size=3, max_size=3),
    st.floats(0, 30),
)
def test_delta_meets_the_printed_formula_from_above(rdp, epsilon):
    orders = [1.05, 3.0, 40.0]
    if max(rdp) == 0:
        rdp[0] = 1e-9
    delta, order = rdp_to_delta(rdp, orders=orders, epsilon=epsilon)
    truth = delta_of_curve(rdp, orders, epsilon)
    assert truth <= delta
    exponent = 39 * (max(rdp) + epsilon + 4)
    assert delta <= max(truth * (1 + TERMS * exponent), 1e-300)
    assert order in orders


@given(st.floats(-12, -1).map(lambda x: 10**x), st.integers(1, 10_000))
def test_delta_and_epsilon_are_each_others_inverse(delta, steps):
    rdp = steps * np.array(DEFAULT_ORDERS) * 1e-4
    epsilon, order = rdp_to_epsilon(rdp, orders=DEFAULT_ORDERS, delta=delta)
    if epsilon == 0:  # then a smaller δ may do as well
        return
    back, same = rdp_to_delta(rdp, orders=DEFAULT_ORDERS, epsilon=epsilon)
    # ε is a few ulps up, which (α−1) magnifies: δ comes back a little smaller, or up by its own
    assert back == pytest.approx(delta, rel=4096 * 30 * TERMS)
    assert same == order


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 8.0])
def test_delta_is_above_the_gaussian_mechanisms_own(mu, epsilon):
    rdp = np.array(DEFAULT_ORDERS) * mu**2 / 2
    assert (
        gaussian_delta(epsilon, mu) <= rdp_to_delta(rdp, orders=DEFAULT_ORDERS, epsilon=epsilon)[0]
    )


def test_delta_is_vectorised_and_keeps_its_edges():
    orders = [2.0, 8.0]
    rdp = np.array([[[0.0, 0.0], [np.inf, np.inf]], [[50.0, 50.0], [np.inf, 0.1]]])
    delta, order = rdp_to_delta(rdp, orders=orders, epsilon=1.0)
    assert delta.shape == order.shape == (2, 2)
    assert delta[0].tolist() == [0.0, 1.0]
    assert math.isnan(order[0, 1])
    assert delta[1, 0] == 1.0
    assert order[1, 1] == 8.0
    alone = rdp_to_delta([np.inf, 0.1], orders=orders, epsilon=1.0)
    assert (delta[1, 1], order[1, 1]) == alone
    tiny, _ = rdp_to_delta([1e-9, 1e-9], orders=[2.0, 4096.0], epsilon=1e3)
    assert tiny == 1e-300  # exp(−4e6) is no double, and 0 would be a claim


def test_delta_falls_as_epsilon_grows():
    rdp = 0.05 * np.array(DEFAULT_ORDERS)
    deltas = [rdp_to_delta(rdp, orders=DEFAULT_ORDERS, epsilon=e)[0] for e in np.linspace(0, 9, 30)]
    assert (np.diff(deltas) < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": -1.0}, "Expected epsilon"),
        ({"epsilon": math.inf}, "Expected epsilon"),
        ({"rdp": [1.0]}, "one value per order"),
        ({"rdp": [-1.0, 2.0]}, "Expected rdp"),
        ({"orders": [1.0, 2.0]}, "Expected orders"),
    ],
)
def test_wrong_curve_is_refused(arguments, message):
    good = {"rdp": [1.0, 2.0], "orders": [2.0, 4.0], "epsilon": 1.0}
    good |= arguments
    with pytest.raises(ValueError, match=message):
        rdp_to_delta(good.pop("rdp"), **good)


# --- noise ---------------------------------------------------------------------------------------


def epsilon_at(noise, sensitivity=1.0, *, steps, sample_rate, delta, orders=DEFAULT_ORDERS):
    rdp = sampled_gaussian_rdp(
        sensitivity, noise_multiplier=noise, sample_rate=sample_rate, orders=orders
    )
    return rdp_to_epsilon(steps * rdp, orders=orders, delta=delta)[0]


@settings(deadline=None, max_examples=15)
@given(
    st.floats(-1, 1.5).map(lambda x: 10**x),
    st.floats(-3, 0).map(lambda x: 10**x),
    st.integers(1, 3000),
    st.floats(-3, 0).map(lambda x: 10**x),
)
def test_noise_reaches_the_target_and_little_less_does_not(epsilon, rate, steps, sensitivity):
    setting = {"delta": 1e-5, "steps": steps, "sample_rate": rate}
    noise = noise_multiplier_for([sensitivity, 1.0], epsilon=epsilon, **setting)
    for value, s in zip(noise, (sensitivity, 1.0), strict=True):
        assert epsilon_at(value, s, **setting) <= epsilon
        assert epsilon_at(value * (1 - 2e-3), s, **setting) > epsilon


def test_noise_is_a_scalar_root_search():
    setting = {"delta": 1e-6, "steps": 500, "sample_rate": 0.02}
    root = brentq(lambda z: epsilon_at(z, **setting) - 3.0, 0.3, 10.0, xtol=1e-10)
    for tolerance in (1e-2, 1e-3, 1e-5):
        noise = noise_multiplier_for(epsilon=3.0, relative_tolerance=tolerance, **setting)
        assert root * (1 - 1e-9) <= noise <= root * (1 + tolerance) * (1 + 1e-9)  # brentq's xtol


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(0.5, 0.01, 1000), (2.0, 0.004, 3000), (8.0, 0.05, 200)]
)
def test_noise_agrees_with_opacus(epsilon, rate, steps):
    with pytest.warns(UserWarning, match="largest alpha"):  # its search starts at a large noise
        theirs = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=1e-5,
            sample_rate=rate,
            steps=steps,
            accountant="rdp",
            epsilon_tolerance=0.01,
        )
    orders = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))  # Opacus's own
    setting = {"delta": 1e-5, "steps": steps, "sample_rate": rate, "orders": orders}
    ours = noise_multiplier_for(epsilon=epsilon, relative_tolerance=1e-6, **setting)
    assert epsilon_at(ours, **setting) <= epsilon
    assert epsilon_at(theirs, **setting) <= epsilon * (1 + 1e-6)
    # Theirs stops within 0.01 below the target; ours is the smallest on the same orders.
    assert epsilon_at(theirs, **setting) >= epsilon - 0.01
    assert ours <= theirs * (1 + 2e-6)
    # More orders can only help.
    more = noise_multiplier_for(epsilon=epsilon, **(setting | {"orders": DEFAULT_ORDERS}))
    assert more <= ours * 1.002  # the default grid is coarser: it may cost up to its spacing


def test_noise_is_proportional_to_the_sensitivity():
    s = np.array([[0.0, 1e-3], [0.5, 1.0]])
    setting = {"epsilon": 1.0, "delta": 1e-5, "steps": 100, "sample_rate": 0.1}
    noise = noise_multiplier_for(s, **setting)
    assert noise.shape == (2, 2)
    assert noise[0, 0] == 0.0
    assert noise / noise[1, 1] == pytest.approx(s, rel=1e-14)
    assert noise_multiplier_for(**setting) == noise[1, 1]


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"sample_rate": 0.0}, {"sensitivity": 0.0}])
def test_no_noise_is_needed_where_nothing_is_revealed(nothing):
    setting = {"sensitivity": 1.0, "epsilon": 0.1, "delta": 1e-5, "steps": 9, "sample_rate": 0.1}
    setting |= nothing
    assert noise_multiplier_for(setting.pop("sensitivity"), **setting) == 0.0


def test_a_target_met_exactly_is_still_met_after_rounding():
    # ε at noise 1, where the search begins and so must end: no slack of the bisection is left.
    setting = {"delta": 1e-5, "steps": 300, "sample_rate": 0.02}
    exact = epsilon_at(1.0, **setting)
    sensitivities = [0.3, 0.7, 1.0]
    noises = noise_multiplier_for(sensitivities, epsilon=exact, **setting)
    assert noises[-1] == pytest.approx(1.0, rel=2e-9)  # the margin that is kept
    for s, noise in zip(sensitivities, noises, strict=True):
        assert epsilon_at(noise, s, **setting) <= exact


def test_unreachable_target_says_what_can_be_reached():
    setting = {"delta": 1e-5, "steps": 10, "sample_rate": 0.1, "orders": [2.0, 8.0]}
    # log(1 − 1/8) − (log δ + log 8)/7, the price of the conversion at order 8
    floor = math.log(7 / 8) - (math.log(1e-5) + math.log(8)) / 7
    with pytest.raises(ValueError, match=f"epsilon > {floor:.6g}") as error:
        noise_multiplier_for(epsilon=1.0, **setting)
    assert "Pass larger orders" in str(error.value)
    just_above = floor * (1 + 1e-6)
    noise = noise_multiplier_for(epsilon=just_above, **setting)
    assert epsilon_at(noise, **setting) <= just_above


def test_zero_epsilon_is_reachable_where_the_orders_are_large_enough():
    setting = {"delta": 0.1, "steps": 5, "sample_rate": 0.1}
    noise = noise_multiplier_for(epsilon=0.0, **setting)
    assert epsilon_at(noise, **setting) == 0.0
    assert epsilon_at(noise / 1.1, **setting) > 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -1.0),
        ("delta", 0.0),
        ("steps", -1),
        ("sample_rate", 1.5),
        ("orders", [1.0]),
        ("relative_tolerance", 0.5),
    ],
)
def test_argument_outside_its_range_is_refused(name, value):
    setting = {"epsilon": 1.0, "delta": 1e-5, "steps": 10, "sample_rate": 0.1}
    with pytest.raises(ValueError, match=f"Expected {name}"):
        noise_multiplier_for(**(setting | {name: value}))


def test_bad_sensitivity_is_named_by_its_row():
    with pytest.raises(ValueError, match="first: row 1"):
        noise_multiplier_for([0.5, -0.1], epsilon=1.0, delta=1e-5, steps=1, sample_rate=0.1)
