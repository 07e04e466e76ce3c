import dataclasses
import json
import math
import pathlib

import mpmath as mp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import norm

from opacus_pil import CertificateError
from opacus_pil.accounting import rdp_to_epsilon
from opacus_pil.accounting.rdp import DEFAULT_ORDERS
from opacus_pil.certificates import (
    ContractionCertificate,
    LangevinCertificate,
    lsi_constant_after,
)
from opacus_pil.certificates.log_sobolev import (
    fixed_order_factor,
    log_growth,
    moving_order_factor,
)
from tests.certificates import oracles

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "cases.json").read_text())
# Neighbours differ by 4 % in α − 1: for D = αs interpolation between them costs (0.02)² of D.
DENSE = tuple(float(x) for x in 1.0 + np.geomspace(1e-9, 2e3, 740))
ASKED = (1.05, 1.5, 2.0, 5.0, 32.0)

ELL = st.floats(0.2, 1.3)
CONTRACTING = st.floats(0.1, 0.97)
STD = st.floats(0.2, 2.0)
MEAN = st.floats(-3.0, 3.0)
STEPS = st.integers(0, 40)


def gaussian_renyi(first, second, order):
    """D_α(N(a, s) ‖ N(b, t)) in closed form, means and variances as pairs."""
    (a, s), (b, t) = first, second
    mixed = (1.0 - order) * s + order * t
    if mixed <= 0.0:
        return math.inf
    logs = (
        0.5 / (1.0 - order) * (math.log(mixed) - (1.0 - order) * math.log(s) - order * math.log(t))
    )
    return order * (a - b) ** 2 / (2.0 * mixed) + max(logs, 0.0)


def run(law, steps, ell, noise, shift=0.0):
    """Mean and variance after steps of θ ← ℓθ + shift + N(0, ζ²)."""
    mean, variance = law
    for _ in range(steps):
        mean, variance = ell * mean + shift, ell * ell * variance + noise * noise
    return mean, variance


def renyi_curve(first, second, orders=DENSE):
    return tuple(gaussian_renyi(first, second, order) for order in orders)


def exact(first, second):
    return np.array([gaussian_renyi(first, second, order) for order in ASKED])


def holds(bound, truth):
    # both sides are a dozen double roundings; differences of logarithms lose 1e-14 absolutely
    return (bound >= truth * (1.0 - 1e-10) - 1e-12).all()


def both_forms(*args, **kwargs):
    fixed = LangevinCertificate(*args, **kwargs)
    return fixed, dataclasses.replace(fixed, moving_order=True)


def test_closed_form_is_the_integral():
    grid = np.linspace(-20.0, 20.0, 8001)
    p, q = norm.pdf(grid, 0.7, math.sqrt(0.8)), norm.pdf(grid, -0.4, math.sqrt(1.3))
    for order in (1.5, 2.0, 2.5):  # (1 − α)s + αt stays positive
        integral = oracles.renyi_on_grid(p, q, order, grid[1] - grid[0])
        # the trapezoid sum over a smooth bump is exact to rounding
        assert gaussian_renyi((0.7, 0.8), (-0.4, 1.3), order) == pytest.approx(integral, rel=1e-10)


# --- same horizon ---------------------------------------------------------------------------------


@given(ELL, STD, STD, st.integers(0, 8), STEPS, st.floats(0.1, 2.0))
def test_same_horizon_on_linear_chains_is_exact_at_a_moving_order(ell, noise, v0, t, k, shift):
    trained = run((0.3, v0), t, ell, noise, shift)
    retrained = run((0.0, v0), t, ell, noise)
    constant = lsi_constant_after(t, start=v0, lipschitz=ell, noise_std=noise)
    assert constant == pytest.approx(retrained[1], rel=1e-12)
    fixed, moving = both_forms(renyi_curve(trained, retrained), DENSE, ell, noise, constant)
    start = (trained[0] - retrained[0]) ** 2 / (2.0 * retrained[1])
    now = (ell**k * (trained[0] - retrained[0])) ** 2 / (2.0 * run(retrained, k, ell, noise)[1])
    orders = np.array(ASKED)
    # interpolation 4e-4 (see DENSE), and a closed form of order 0.1 with a rounding of 1e-16
    assert (moving.rdp(ASKED, steps=k) >= orders * now * (1.0 - 1e-10)).all()
    assert moving.rdp(ASKED, steps=k) == pytest.approx(orders * now, rel=1e-3)
    # at a fixed order the price is G^{1 − 1/α}, where G is the quotient of the exact values
    price = (start / now) ** (1.0 - 1.0 / orders)
    assert (fixed.rdp(ASKED, steps=k) >= orders * now * (1.0 - 1e-10)).all()
    assert fixed.rdp(ASKED, steps=k) == pytest.approx(orders * now * price, rel=1e-3)


@given(ELL, STD, MEAN, STD, STD, st.integers(0, 20))
def test_same_horizon_bounds_laws_of_different_variance(ell, noise, mean, u0, v0, k):
    # here D is not linear in the order and infinite from some order on
    fixed, moving = both_forms(renyi_curve((mean, u0), (0.0, v0)), DENSE, ell, noise, v0)
    truth = exact(run((mean, u0), k, ell, noise), run((0.0, v0), k, ell, noise))
    assert holds(fixed.rdp(ASKED, steps=k), truth)
    assert holds(moving.rdp(ASKED, steps=k), truth)
    assert (moving.rdp(ASKED, steps=k) <= fixed.rdp(ASKED, steps=k)).all()


@given(ELL, STD, MEAN, STD, STD, st.integers(0, 20))
def test_declared_two_sidedness_holds_when_both_laws_have_the_constant(ell, noise, mean, u0, v0, k):
    constant, law, other = max(u0, v0), (mean, u0), (0.0, v0)
    curve = np.maximum(renyi_curve(law, other), renyi_curve(other, law))
    after, after_other = run(law, k, ell, noise), run(other, k, ell, noise)
    for ours in both_forms(curve, DENSE, ell, noise, constant, two_sided=True):
        assert holds(ours.rdp(ASKED, steps=k), exact(after, after_other))
        assert holds(ours.rdp(ASKED, steps=k), exact(after_other, after))


@pytest.mark.parametrize("case", GOLDEN["ou_chain"])
def test_golden_ou_chain(case):
    ell = 1.0 - case["step_size"] * case["strong_convexity"]
    noise = math.sqrt(2.0 * case["step_size"]) * case["temperature_sigma"]
    constant = lsi_constant_after(case["training_steps"], start=0.0, lipschitz=ell, noise_std=noise)
    per_order = case["composition_P"] / case["order"]  # P = αs
    curve = [order * per_order for order in DENSE]
    fixed, moving = both_forms(curve, DENSE, ell, noise, constant)
    asked, steps = [case["order"]], case["unlearning_steps"]
    # (α − 1)D interpolated to the asked order costs 4e-4 (see DENSE); a given order costs nothing
    assert fixed.rdp(asked, steps=steps)[0] == pytest.approx(case["lsi_same_horizon"], rel=4e-4)
    there = LangevinCertificate((case["composition_P"],), tuple(asked), ell, noise, constant)
    # our slack is 1e-13 · steps at most
    assert there.rdp(asked, steps=steps)[0] == pytest.approx(case["lsi_same_horizon"], rel=1e-11)
    assert there.rdp(asked, steps=steps)[0] >= case["lsi_same_horizon"] * (1.0 - 1e-14)
    assert case["exact"] <= moving.rdp(asked, steps=steps)[0] <= fixed.rdp(asked, steps=steps)[0]
    # what remains is the looseness of P alone, the same at every K
    start = GOLDEN["ou_chain"][0]
    looseness = start["composition_P"] / start["exact"]
    assert moving.rdp(asked, steps=steps)[0] == pytest.approx(case["exact"] * looseness, rel=1e-3)


# --- stationary -----------------------------------------------------------------------------------


@given(CONTRACTING, STD, MEAN, STD, STEPS)
def test_stationary_on_linear_chains(ell, noise, mean, u0, k):
    constant = noise * noise / (1.0 - ell * ell)
    start, target = (mean, u0), (0.0, constant)
    truth = exact(run(start, k, ell, noise), target)
    for ours in both_forms(
        renyi_curve(start, target), DENSE, ell, noise, constant, reference="stationary"
    ):
        assert holds(ours.rdp(ASKED, steps=k), truth)


@given(CONTRACTING, STD, st.floats(0.1, 3.0), STEPS)
def test_stationary_factor_is_the_contraction_rate(ell, noise, mean, k):
    constant = noise * noise / (1.0 - ell * ell)
    start, target = (mean, constant), (0.0, constant)
    fixed, moving = both_forms(
        renyi_curve(start, target, ASKED), ASKED, ell, noise, constant, reference="stationary"
    )
    orders = np.array(ASKED)
    assert fixed.rdp(ASKED, steps=k) == pytest.approx(
        exact(start, target) * ell ** (2.0 * k / orders), rel=1e-10
    )
    dense = dataclasses.replace(moving, initial_rdp=renyi_curve(start, target), orders=DENSE)
    # interpolation 4e-4 (see DENSE)
    assert dense.rdp(ASKED, steps=k) == pytest.approx(
        exact(start, target) * ell ** (2.0 * k), rel=1e-3, abs=1e-30
    )


def test_a_declared_constant_of_the_stationary_law_stays():
    ours = LangevinCertificate((0.3,), (2.0,), 0.9, 0.5, 4.0, "stationary")
    plain = 0.3 * (1.0 + 0.25 / (0.81 * 4.0)) ** (-30.0 / 2.0)
    assert ours.rdp([2.0], steps=30)[0] == pytest.approx(plain, rel=1e-12)  # roundings


@pytest.mark.parametrize("radius", [math.inf, 1.5])
def test_bounds_hold_on_a_nonlinear_projected_chain(radius):
    # θ ← Π(θ − η(mθ + a·tanh(θ − c)) + noise), m-strongly convex, (m + a)-smooth; the two data sets
    # have different c, and one start is bimodal. Laws are carried along on a grid.
    m, a, eta, noise = 0.4, 1.2, 0.9, 0.5
    ell, constant = 1.0 - eta * m, noise**2 / (1.0 - (1.0 - eta * m) ** 2)
    assert eta <= 2.0 / (2.0 * m + a)
    edge = min(radius, 5.0)
    grid = np.linspace(-edge, edge, 901)
    cell = grid[1] - grid[0]

    def kernel(centre):
        target = grid - eta * (m * grid + a * np.tanh(grid - centre))
        mass = norm.pdf(grid[:, None], target[None, :], noise) * cell
        # what leaves the interval is projected to its ends (beyond ±5 there is next to nothing)
        mass[0] = norm.cdf(grid[0] + cell / 2.0, target, noise)
        mass[-1] = norm.sf(grid[-1] - cell / 2.0, target, noise)
        return mass / mass.sum(axis=0)

    def renyi(p, q, order):
        return math.log(float(np.sum(q * (p / q) ** order))) / (order - 1.0)

    old, new = kernel(1.0), kernel(-0.5)
    trained = stationary = np.full(len(grid), 1.0 / len(grid))
    for _ in range(200):
        trained, stationary = old @ trained, new @ stationary
    modes = norm.pdf(grid, -1.2, 0.15) + norm.pdf(grid, 1.3, 0.1)
    for law in (trained, modes / modes.sum()):
        orders = tuple(float(x) for x in 1.0 + np.geomspace(1e-4, 30.0, 300))
        curve = tuple(max(renyi(law, stationary, order), 0.0) for order in orders)
        fixed, moving = both_forms(curve, orders, ell, noise, constant, reference="stationary")
        for steps in range(13):
            for order in (1.2, 2.0, 6.0):
                truth = renyi(law, stationary, order)
                # a grid is itself a chain only nearly as smooth as the line: 1e-3
                assert moving.rdp([order], steps=steps)[0] >= truth * (1.0 - 1e-3) - 1e-12
                assert fixed.rdp([order], steps=steps)[0] >= truth * (1.0 - 1e-3) - 1e-12
            law = new @ law


SETTING = {
    "num_instances": 500,
    "num_deleted": 3,
    "strong_convexity": 0.05,
    "smoothness": 0.3,
    "step_size": 2.0,
    "langevin_sigma": 0.02,
    "gradient_bound": 1.0,
}


def test_strongly_convex_is_the_contraction_certificate_of_long_training():
    ell, noise = 1.0 - 2.0 * 0.05, math.sqrt(2.0 * 2.0) * 0.02
    shift = 2.0 * 2.0 * 3.0 / 500.0
    contraction = ContractionCertificate(ell, noise, shifts=(shift,) * 2000)
    ours = LangevinCertificate.strongly_convex(**SETTING)
    fixed = LangevinCertificate.strongly_convex(**SETTING, moving_order=False)
    assert ours.two_sided
    for steps in (0, 1, 10, 100):
        truth = contraction.rdp(ASKED, steps=steps)
        # both are exact here up to the hull's own slack of 1e-9; DEFAULT_ORDERS start at 1.01 and
        # are up to 28 % apart: 1.5 %
        assert (ours.rdp(ASKED, steps=steps) >= truth * (1.0 - 1e-8)).all()
        assert ours.rdp(ASKED, steps=steps) == pytest.approx(truth, rel=0.015)
        price = ell ** (2.0 * steps / np.array(ASKED) - 2.0 * steps)
        assert fixed.rdp(ASKED, steps=steps) == pytest.approx(truth * price, rel=0.015)


# --- retrained ------------------------------------------------------------------------------------


def plain_retrained(order, steps, *, p, there, back, ell, noise, constant):
    """THEORY 5.4, plain."""
    rate = math.log(1.0 + noise**2 / (ell**2 * constant))
    bracket = (2.0 * order - 0.5) / (2.0 * order - 1.0) * p(4.0 * order) + there(4.0 * order - 1.0)
    decay = math.exp(-rate * steps / (2.0 * order))
    return (order - 0.5) / (order - 1.0) * decay * bracket + back(2.0 * order - 1.0)


@st.composite
def retrained_cases(draw):
    """An OU chain: laws when unlearning starts, retrained for T steps, stationary."""
    ell, noise = draw(CONTRACTING), draw(STD)
    constant = noise**2 / (1.0 - ell**2)
    retrained = run((draw(MEAN), draw(STD)), draw(st.integers(0, 6)), ell, noise)
    return ell, noise, (draw(MEAN), draw(STD)), retrained, (0.0, constant)


def retrained_certificate(case, moving_order=False):
    ell, noise, start, retrained, stationary = case
    orders = (*DENSE, *(4.0 * order for order in ASKED))
    orders = tuple(sorted(set(orders)))
    return LangevinCertificate(
        renyi_curve(start, retrained, orders),
        orders,
        ell,
        noise,
        1.3 * stationary[1],  # a valid declaration, above the least
        "retrained",
        lambda order: gaussian_renyi(retrained, stationary, order),
        lambda order: gaussian_renyi(stationary, retrained, order),
        moving_order=moving_order,
    )


@given(retrained_cases(), STEPS)
def test_retrained_form_bounds_linear_chains(case, k):
    ell, noise, start, retrained, stationary = case
    truth = exact(run(start, k, ell, noise), retrained)
    ours, moving = retrained_certificate(case), retrained_certificate(case, moving_order=True)
    assert holds(moving.rdp(ASKED, steps=k), truth)
    assert (moving.rdp(ASKED, steps=k) <= ours.rdp(ASKED, steps=k)).all()
    plain = [
        plain_retrained(
            order,
            k,
            p=lambda a: gaussian_renyi(start, retrained, a),
            there=lambda a: gaussian_renyi(retrained, stationary, a),
            back=lambda a: gaussian_renyi(stationary, retrained, a),
            ell=ell,
            noise=noise,
            constant=1.3 * stationary[1],
        )
        for order in ASKED
    ]
    # the curve is as increasing as closed-form rounding lets it be: 1e-12 absolutely
    assert ours.rdp(ASKED, steps=k) == pytest.approx(plain, rel=1e-9, abs=1e-11)


@given(retrained_cases())
def test_irreducible_term_is_what_many_steps_leave(case):
    for moving_order in (False, True):
        ours = retrained_certificate(case, moving_order)
        rest = ours.irreducible_rdp(ASKED)
        assert (ours.rdp(ASKED, steps=10) >= rest).all()
        finite = np.isfinite(ours.rdp(ASKED, steps=0))
        assert ours.rdp(ASKED, steps=10**6)[finite] == pytest.approx(rest[finite], abs=1e-9)


def toy_retrained(moving_order=False, rest=0.01):
    return LangevinCertificate(
        tuple(0.05 * order for order in DEFAULT_ORDERS),
        DEFAULT_ORDERS,
        0.9,
        0.3,
        0.09 / (1.0 - 0.81),
        "retrained",
        lambda order: 0.02 * order,
        lambda order: rest * order,
        moving_order=moving_order,
    )


def test_a_target_below_the_irreducible_term_is_refused_by_name():
    ours = toy_retrained()
    orders = np.array(DEFAULT_ORDERS)
    least, _ = rdp_to_epsilon(0.01 * (2.0 * orders - 1.0), orders=orders, delta=1e-5)
    with pytest.raises(CertificateError, match=r"irreducible.*No number of steps") as failure:
        ours.steps_for(epsilon=0.99 * least, delta=1e-5)
    # the named ε uses a few more orders than the default ones
    named = float(str(failure.value).split("epsilon=")[1].split()[0])
    assert least * 0.99 < named <= least * (1.0 + 1e-5)  # printed with six digits
    steps = ours.steps_for(epsilon=1.01 * least, delta=1e-5)
    assert ours.epsilon(delta=1e-5, steps=steps) <= 1.01 * least
    assert ours.epsilon(delta=1e-5, steps=steps - 1) > 1.01 * least
    # reachable in principle, but not in time: another message
    with pytest.raises(CertificateError, match="max_steps=3"):
        ours.steps_for(epsilon=1.01 * least, delta=1e-5, max_steps=3)


def test_moving_the_order_shortens_the_retrained_form():
    target = 1.05 * toy_retrained().epsilon(delta=1e-5, steps=10**6)
    fixed = toy_retrained().steps_for(epsilon=target, delta=1e-5)
    moving = toy_retrained(moving_order=True).steps_for(epsilon=target, delta=1e-5)
    assert 1 <= moving < fixed / 5  # the rate loses its factor 1/(2α), and α is above 10 here


def test_retrained_form_at_a_moving_order_starts_no_lower_than_two():
    ours = toy_retrained(moving_order=True, rest=0.0)
    near = 1.5 * 0.05 * 4.0 + 0.02 * 3.0  # (2 − ½)/(2 − 1)·P(4) + D_3(ν′‖π′)
    for steps in (10, 60, 200):  # 1 + 5/G < 2 for the order 2·3
        expected = 2.5 / 2.0 * 6.0 / (0.9 ** (-2 * steps) + 5.0) * near
        # roundings of 400 factors
        assert ours.rdp([3.0], steps=steps)[0] == pytest.approx(expected, rel=1e-10)


def test_retrained_form_takes_the_smaller_of_both_forms():
    # where P is the same at every order, the first steps are worth more at a fixed order
    fixed = dataclasses.replace(
        toy_retrained(),
        initial_rdp=(0.4,) * len(DEFAULT_ORDERS),
        retrained_to_stationary=lambda order: 0.0,
    )
    moving = dataclasses.replace(fixed, moving_order=True)
    assert (moving.rdp([3.0], steps=1) == fixed.rdp([3.0], steps=1)).all()
    assert (moving.rdp([3.0], steps=60) < fixed.rdp([3.0], steps=60)).all()


def test_given_orders_take_part_in_the_conversion_of_the_retrained_form():
    # known up to order 21.2 only, which serves the order 5.3
    ours = dataclasses.replace(toy_retrained(rest=0.0), initial_rdp=(0.02,), orders=(21.2,))
    expected, _ = rdp_to_epsilon(ours.rdp([5.3], steps=500), orders=[5.3], delta=1e-3)
    assert ours.epsilon(delta=1e-3, steps=500) == expected


# --- growth, constants, numerics ------------------------------------------------------------------


@given(ELL, STD, STD, st.integers(0, 60), st.booleans())
def test_growth_is_the_product_of_the_steps_rounded_down(ell, noise, constant, steps, stationary):
    with mp.workdps(50):
        product, current = mp.mpf(1), mp.mpf(constant)
        for _ in range(steps):
            product *= 1 + mp.mpf(noise) ** 2 / (mp.mpf(ell) ** 2 * current)
            if not stationary:
                current = mp.mpf(ell) ** 2 * current + mp.mpf(noise) ** 2
        truth = mp.log(product)
        ours = log_growth(
            steps, lipschitz=ell, noise_std=noise, lsi_constant=constant, stationary=stationary
        )
        assert ours <= truth
        assert ours >= truth * (
            1 - mp.mpf("1e-11")
        )  # 8 ulps of about 100, relative to G − 1 > 0.01


@pytest.mark.parametrize("ell", [1e-150, 0.3, 1.0 - 1e-9, 1.0, 1.0 + 1e-9, 7.0])
@pytest.mark.parametrize("noise", [1e-80, 1.0, 1e60])
@pytest.mark.parametrize("steps", [1, 1000, 10**9])
def test_growth_neither_overflows_nor_exceeds_the_closed_form(ell, noise, steps):
    with mp.workdps(60):
        power = mp.mpf(ell) ** -2
        total = steps * mp.mpf(1) if ell == 1.0 else power * (power**steps - 1) / (power - 1)
        moving = mp.log1p(mp.mpf(noise) ** 2 / mp.mpf("0.7") * total)
        still = steps * mp.log1p(mp.mpf(noise) ** 2 / mp.mpf("0.7") * power)
        for truth, stationary in ((moving, False), (still, True)):
            ours = log_growth(
                steps, lipschitz=ell, noise_std=noise, lsi_constant=0.7, stationary=stationary
            )
            # 0.7 the double against 0.7 the decimal: 1e-16
            assert truth * (1 - mp.mpf("1e-9")) <= ours <= truth * (1 + mp.mpf("1e-15"))


@given(st.floats(1.0001, 4096.0), st.floats(1e-9, 600.0))
def test_both_factors_and_the_first_order_are_rounded_up(order, growth):
    fixed = fixed_order_factor(np.array([order]), growth)[0]
    first, factor = (value[0] for value in moving_order_factor(np.array([order]), growth))
    with mp.workdps(40):
        big, alpha = mp.exp(mp.mpf(growth)), mp.mpf(order)
        for ours, truth in (
            (fixed, big ** (-1 / alpha)),
            (first, 1 + (alpha - 1) / big),
            (factor, alpha / (big + alpha - 1)),
        ):
            # 64 ulps, and one per unit of an exponent below 600
            assert truth <= ours <= truth * (1 + mp.mpf("2e-13"))


@given(st.floats(0.0, 1.5), st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.integers(0, 80))
def test_constant_after_is_the_recursion_rounded_up(ell, noise, start, steps):
    with mp.workdps(50):
        truth = mp.mpf(start)
        for _ in range(steps):
            truth = mp.mpf(ell) ** 2 * truth + mp.mpf(noise) ** 2
        ours = lsi_constant_after(steps, start=start, lipschitz=ell, noise_std=noise)
        assume(truth == 0 or truth > mp.mpf("1e-290"))  # below, doubles lose digits
        # the documented slack: 64 ulps and 8 per unit of the exponent, which is at most 80·1500
        assert truth <= ours <= truth * (1 + mp.mpf("3e-10"))


def test_constant_after_edge_cases():
    assert lsi_constant_after(0, start=0.4, lipschitz=0.0, noise_std=1.0) == 0.4
    assert lsi_constant_after(9, start=0.4, lipschitz=0.0, noise_std=2.0) == pytest.approx(4.0)
    assert lsi_constant_after(10**6, start=0.4, lipschitz=2.0, noise_std=0.0) == math.inf
    assert lsi_constant_after(600, start=0.4, lipschitz=2.0, noise_std=0.0) == math.inf
    assert lsi_constant_after(10**6, start=0.0, lipschitz=2.0, noise_std=0.0) == 0.0
    with pytest.raises(ValueError, match="noise_std"):
        lsi_constant_after(1, start=0.4, lipschitz=1.0, noise_std=-1.0)


@given(
    st.lists(st.one_of(st.floats(0.0, 9.0), st.just(math.inf)), min_size=4, max_size=4),
    ELL,
    STD,
    STD,
    st.sampled_from(["same_horizon", "stationary"]),
    st.booleans(),
)
def test_rdp_never_grows_with_steps(curve, ell, noise, constant, reference, moving_order):
    ours = LangevinCertificate(
        curve,
        (1.3, 2.0, 6.0, 40.0),
        ell,
        noise,
        constant,
        reference,
        moving_order=moving_order,
    )
    asked = (1.01, 1.3, 1.7, 2.0, 6.0, 20.0, 100.0)
    values = np.array([ours.rdp(asked, steps=k) for k in (0, 1, 2, 3, 5, 9, 40, 1000, 10**7)])
    assert not np.isnan(values).any()
    assert (values[1:] <= values[:-1] * (1.0 + 1e-12)).all()  # roundings of the factor


@given(STD, MEAN, CONTRACTING, st.integers(0, 30), st.booleans())
def test_rdp_is_nondecreasing_in_the_order(noise, mean, ell, k, moving_order):
    start, target = (mean + 4.0, noise**2), (0.0, 2.0 * noise**2)
    ours = LangevinCertificate(
        renyi_curve(start, target, DENSE), DENSE, ell, noise, target[1], moving_order=moving_order
    )
    values = ours.rdp((1.02, 1.3, 2.0, 3.3, 9.0, 64.0, 900.0), steps=k)
    assert (values[1:] >= values[:-1] * (1.0 - 1e-12)).all()  # roundings


@given(STD, CONTRACTING, st.floats(0.05, 3.0), st.booleans())
def test_steps_for_is_the_smallest_number(noise, ell, target, moving_order):
    curve = tuple(0.4 * order for order in DEFAULT_ORDERS)
    ours = LangevinCertificate(curve, DEFAULT_ORDERS, ell, noise, 1.3, moving_order=moving_order)
    values = [ours.epsilon(delta=1e-5, steps=k) for k in range(61)]
    first = next((k for k, value in enumerate(values) if value <= target), None)
    if first is None:
        with pytest.raises(CertificateError, match="retrain instead"):
            ours.steps_for(epsilon=target, delta=1e-5, max_steps=60)
    else:
        assert ours.steps_for(epsilon=target, delta=1e-5, max_steps=60) == first


def test_given_orders_take_part_in_the_conversion():
    ours = LangevinCertificate((0.3,), (17.3,), 1.0, 0.0, 1.0)
    # D at 17.3 bounds D at 16 and below by its share of α − 1; 17.3 itself converts best
    expected, order = rdp_to_epsilon([0.3], orders=[17.3], delta=1e-3)
    assert (ours.epsilon(delta=1e-3, steps=0), order) == (expected, 17.3)


# --- edge cases and refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("moving_order", [False, True])
def test_edge_cases(moving_order):
    def ours(curve=(0.2, 0.8), ell=0.5, noise=1.0):
        return LangevinCertificate(
            curve, (2.0, 8.0), ell, noise, 0.6, moving_order=moving_order
        ).rdp

    asked = [2.0, 8.0]
    assert (ours()(asked, steps=0) == [0.2, 0.8]).all()
    assert (ours(noise=0.0)(asked, steps=50) == [0.2, 0.8]).all()
    assert (ours(ell=0.0)(asked, steps=1) == 0.0).all()
    assert (ours(ell=0.0, noise=0.0)(asked, steps=1) == 0.0).all()
    assert (ours(ell=0.0)(asked, steps=0) == [0.2, 0.8]).all()
    assert (ours(curve=(0.0, 0.0))(asked, steps=3) == 0.0).all()
    assert (ours(curve=(math.inf, math.inf))(asked, steps=10**9) == math.inf).all()
    assert (ours()(asked, steps=10**9) == 1e-290).all()
    for steps in (0, 5):  # the floor holds from the start, so that nothing grows
        assert (ours(curve=(1e-300, 1e-300))(asked, steps=steps) == 1e-290).all()
    # a map that expands: G stays below 1 + ζ²/(C(ℓ² − 1))
    limit = 1.0 + 1.0 / (0.6 * (4.0 - 1.0))
    far = ours(ell=2.0)([2.0], steps=500)[0]
    share = limit ** (-1.0 / 2.0) * 0.2
    if moving_order:  # P at the first order is at most P(2)
        assert 2.0 / (limit + 1.0) * 0.2 * 0.5 < far <= share
    else:
        assert far == pytest.approx(share, rel=1e-12)


def test_a_moving_order_makes_an_infinite_divergence_finite():
    # known at order 2 only; at order 9 it is finite once 1 + 8/G <= 2
    ours = LangevinCertificate((0.7,), (2.0,), 1.0, 1.0, 1.0, moving_order=True)
    values = ours.rdp([9.0], steps=6)[0], ours.rdp([9.0], steps=8)[0]
    assert values[0] == math.inf  # G = 7
    assert values[1] == pytest.approx(9.0 / (9.0 + 8.0) * 0.7, rel=1e-12)  # G = 9, α₀ = 17/9


def test_a_curve_that_falls_counts_as_its_later_value():
    falling = LangevinCertificate((5.0, 0.3), (2.0, 4.0), 0.5, 1.0, 1.0)
    assert (falling.rdp([2.0, 4.0], steps=0) == 0.3).all()


GOOD = {
    "initial_rdp": (0.1, 0.3),
    "orders": (2.0, 4.0),
    "lipschitz": 0.9,
    "noise_std": 1.0,
    "lsi_constant": 2.0,
}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("initial_rdp", (0.1,), ValueError),
        ("initial_rdp", (0.1, math.nan), ValueError),
        ("initial_rdp", (0.1, -0.3), ValueError),
        ("orders", (4.0, 2.0), ValueError),
        ("orders", (1.0, 2.0), ValueError),
        ("lipschitz", -0.1, ValueError),
        ("lipschitz", math.inf, ValueError),
        ("noise_std", -1.0, ValueError),
        ("lsi_constant", 0.0, ValueError),
        ("lsi_constant", math.inf, ValueError),
        ("reference", "retraining", ValueError),
        ("two_sided", 1, TypeError),
        ("moving_order", "yes", TypeError),
        ("retrained_to_stationary", lambda order: 0.1, ValueError),
        ("stationary_to_retrained", lambda order: 0.1, ValueError),
    ],
)
def test_wrong_values_are_named(name, value, kind):
    with pytest.raises(kind, match=f"Expected {name}"):
        LangevinCertificate(**(GOOD | {name: value}))


def test_retrained_needs_both_divergences_and_is_one_sided():
    functions = {
        "retrained_to_stationary": lambda order: 0.1,
        "stationary_to_retrained": lambda order: 0.1,
    }
    for missing in functions:
        with pytest.raises(ValueError, match=f"Expected {missing} to be given"):
            LangevinCertificate(**GOOD, reference="retrained", **(functions | {missing: None}))
        with pytest.raises(TypeError, match=f"Expected {missing} to be a function"):
            LangevinCertificate(**GOOD, reference="retrained", **(functions | {missing: 0.1}))
    with pytest.raises(CertificateError, match=r"two_sided=False.*unlearned ‖ retrained"):
        LangevinCertificate(**GOOD, reference="retrained", **functions, two_sided=True)
    assert not LangevinCertificate(**GOOD, reference="retrained", **functions).two_sided


def test_a_divergence_that_is_none_is_named():
    wrong = dataclasses.replace(toy_retrained(), stationary_to_retrained=lambda order: -0.1)
    with pytest.raises(ValueError, match="stationary_to_retrained"):
        wrong.rdp([2.0], steps=1)
    nothing = dataclasses.replace(toy_retrained(), retrained_to_stationary=lambda order: math.nan)
    with pytest.raises(ValueError, match="retrained_to_stationary"):
        nothing.epsilon(delta=1e-5, steps=1)


def test_record_is_frozen_and_comparable():
    ours = LangevinCertificate(**GOOD)
    assert ours == LangevinCertificate(np.array([0.1, 0.3]), [2, 4], 0.9, 1, 2)
    assert (ours.two_sided, ours.reference) == (False, "same_horizon")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.lipschitz = 0.1


def test_assumptions_carry_their_numbers():
    text = " ".join(LangevinCertificate(**GOOD).assumptions)
    for words in ("constant 2 ", "0.9-Lipschitz", "deviation 1 ", "0.3", "order 4", "full-batch"):
        assert words in text
    assert "as many steps as training and unlearning together" in text
    assert "reverse" not in text
    both = " ".join(LangevinCertificate(**GOOD, two_sided=True).assumptions)
    assert "the reverse one" in both
    assert "unlearned law obeys the same constant" in both
    retrained = " ".join(toy_retrained().assumptions)
    assert "as many steps as training;" in retrained
    assert "never unlearned" in retrained
    sharp = LangevinCertificate.strongly_convex(**SETTING)
    for words in (
        "500 records",
        "0.05-strongly convex",
        "3 records are replaced",
        "stationary law",
    ):
        assert words in " ".join(sharp.assumptions)


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_wrong_steps_are_named(steps):
    with pytest.raises((ValueError, TypeError), match="Expected steps"):
        LangevinCertificate(**GOOD).rdp([2.0], steps=steps)
