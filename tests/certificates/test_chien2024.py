import dataclasses
import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pil import CertificateError
from opacus_pil.accounting import rdp_to_epsilon
from opacus_pil.certificates import LangevinCertificate
from opacus_pil.certificates.chien2024 import Chien2024Certificate, sharp_constants

# Graph-COM/Langevin_unlearning at 5f8e712, MNIST 3 against 8: published K, α* and, for the last
# five σ, ε at K = 0.
SIZE = 11_982
DELTA = 1.0 / SIZE
PUBLISHED = [
    (0.01, 2551, 11.323861, 0.997929, 1.001508, 2546, 325.986255),
    (0.05, 1741, 11.728841, 0.998174, 1.002990, 1738, 27.993046),
    (0.1, 1381, 12.052645, 0.998150, 1.003820, 1378, 11.671260),
    (0.2, 1011, 12.622156, 0.996224, 1.003096, 1006, 5.254314),
    (0.5, 481, 14.516435, 0.991442, 1.000892, 472, 1.962210),
    (1.0, 1, 21.096671, 0.956790, None, 1, 0.957852),
]


def mnist(sigma, deleted=100):
    convexity = 1e-6 * SIZE
    return {
        "num_instances": SIZE,
        "num_deleted": deleted,
        "strong_convexity": convexity,
        "smoothness": 0.25 + convexity,
        "step_size": 1.0 / (0.25 + convexity),
        "langevin_sigma": sigma,
        "gradient_bound": 1.0,
    }


@pytest.mark.parametrize(("sigma", "k", "order", "now", "before", "least", "start"), PUBLISHED)
def test_published_numbers_of_steps(sigma, k, order, now, before, least, start):
    ours = LangevinCertificate.chien2024(**mnist(sigma), step_grid=10)
    assert ours.steps_for(epsilon=1.0, delta=DELTA) == k
    # the table is printed with six decimals
    assert ours.order(delta=DELTA, steps=k) == pytest.approx(order, abs=6e-7)
    assert ours.epsilon(delta=DELTA, steps=k) == pytest.approx(now, abs=6e-7)
    assert ours.epsilon(delta=DELTA, steps=0) == pytest.approx(start, abs=6e-7)
    if before is not None:
        assert ours.epsilon(delta=DELTA, steps=k - 10) == pytest.approx(before, abs=6e-7)
    assert (
        LangevinCertificate.chien2024(**mnist(sigma)).steps_for(epsilon=1.0, delta=DELTA) == least
    )


@pytest.mark.parametrize(
    ("deleted", "epsilon", "k"),
    [(100, 0.1, 28_631), (100, 5.0, 331), (50, 1.0, 1651), (1, 0.1, 7061), (1, 0.5, 1)],
)
def test_the_formula_at_other_targets(deleted, epsilon, k):
    # the same formula by the authors' loop, σ = 0.03; not published
    ours = LangevinCertificate.chien2024(**mnist(0.03, deleted), step_grid=10)
    assert ours.steps_for(epsilon=epsilon, delta=DELTA) == k


@given(
    st.integers(1, 5000),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.01, 2.0),
    st.floats(0.0, 3.0),
    st.floats(1.01, 500.0),
    st.integers(0, 3000),
)
def test_rdp_is_the_formula_rounded_up(size, convexity, share, sigma, bound, order, steps):
    setting = {
        "num_instances": size,
        "num_deleted": int(share * size),
        "strong_convexity": convexity,
        "smoothness": 2.0,
        "step_size": 0.6,
        "langevin_sigma": sigma,
        "gradient_bound": bound,
    }
    ours = LangevinCertificate.chien2024(**setting)
    with mp.workdps(40):
        per_record = mp.mpf(setting["num_deleted"]) * mp.mpf(bound) / size
        truth = 4 * mp.mpf(order) * per_record**2 / (mp.mpf(convexity) * mp.mpf(sigma) ** 2)
        truth *= mp.exp(-steps * mp.mpf(0.6) * mp.mpf(convexity) / mp.mpf(order))
        value = ours.rdp([order], steps=steps)[0]
        # the documented slack: 1e-14 and 1e-15 per unit of the exponent; 1e-290 is the floor
        assert truth <= value <= max(truth * (1 + mp.mpf("1e-11")), mp.mpf("1.01e-290"))


@given(st.floats(0.01, 1.0), st.floats(0.05, 3.0))
def test_steps_for_is_the_smallest_number_on_its_grid(sigma, target):
    ours = LangevinCertificate.chien2024(**mnist(sigma), step_grid=7)
    k = ours.steps_for(epsilon=target, delta=DELTA)
    assert k % 7 == 1
    assert ours.epsilon(delta=DELTA, steps=k) <= target
    assert k == 1 or ours.epsilon(delta=DELTA, steps=k - 7) > target


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
def test_sharp_rate_and_conversion_are_never_worse(sigma):
    theirs = LangevinCertificate.chien2024(**mnist(sigma))
    rate = LangevinCertificate.strongly_convex(**mnist(sigma), moving_order=False)
    sharp = LangevinCertificate.strongly_convex(**mnist(sigma))
    orders = np.array([1.1, 2.0, 11.0, 300.0])
    eta_m = theirs.step_size * theirs.strong_convexity
    for steps in (0, 1, 30, 400):
        # 2 − ηm for 4 at the start, (1 − ηm)² for exp(−ηm) per step
        quotient = (2.0 - eta_m) / 4.0 * ((1.0 - eta_m) ** 2 * math.exp(eta_m)) ** (steps / orders)
        theirs_now = theirs.rdp(orders, steps=steps)
        # orders between the default ones cost at most 1.5 %
        assert rate.rdp(orders, steps=steps) == pytest.approx(quotient * theirs_now, rel=0.015)
        assert (sharp.rdp(orders, steps=steps) <= rate.rdp(orders, steps=steps)).all()
        assert sharp.epsilon(delta=DELTA, steps=steps) < theirs.epsilon(delta=DELTA, steps=steps)
    counts = [ours.steps_for(epsilon=1.0, delta=DELTA) for ours in (theirs, rate, sharp)]
    assert counts[0] > 3 * counts[1] > 9 * counts[2] / 2


@given(st.floats(0.001, 1.0), st.floats(0.01, 2.0), st.integers(1, 50))
def test_sharp_constants_are_rounded_to_the_safe_side(convexity, sigma, deleted):
    setting = Chien2024Certificate(
        **(mnist(sigma, deleted) | {"strong_convexity": convexity, "smoothness": 2.0})
        | {"step_size": 0.5}
    )
    sharp = sharp_constants(setting)
    with mp.workdps(40):
        eta, m, s = mp.mpf(0.5), mp.mpf(convexity), mp.mpf(sigma)
        ell, variance = 1 - eta * m, 2 * eta * s**2
        constant = variance / (1 - ell**2)
        distance = 2 * eta * deleted / (SIZE * (1 - ell))
        slope = distance**2 / (2 * constant)
        assert 1 - mp.mpf("1e-14") < ell / mp.mpf(sharp.lipschitz) <= 1
        assert 1 - mp.mpf("1e-14") < mp.mpf(sharp.noise_std) / mp.sqrt(variance) <= 1
        assert 1 - mp.mpf("1e-13") < constant / mp.mpf(sharp.lsi_constant) <= 1
        assert 1 - mp.mpf("1e-13") < slope / mp.mpf(sharp.rdp_per_order) <= 1


def test_conversion_is_the_authors():
    ours = LangevinCertificate.chien2024(**mnist(0.1))
    epsilon, order = ours.epsilon(delta=DELTA, steps=500), ours.order(delta=DELTA, steps=500)
    by_hand = ours.rdp([order], steps=500)[0] + math.log(SIZE) / (order - 1.0)
    assert epsilon == pytest.approx(by_hand, rel=1e-13)
    near = [
        ours.rdp([a], steps=500)[0] + math.log(SIZE) / (a - 1.0) for a in (order - 1, order + 1)
    ]
    assert epsilon < min(near)
    tighter, _ = rdp_to_epsilon(ours.rdp([order], steps=500), orders=[order], delta=DELTA)
    assert tighter < epsilon


def test_edge_cases():
    nothing = LangevinCertificate.chien2024(**mnist(0.1, deleted=0))
    assert (nothing.rdp([2.0, 9.0], steps=0) == 0.0).all()
    flat = LangevinCertificate.chien2024(**(mnist(0.1) | {"gradient_bound": 0.0}))
    assert (flat.rdp([2.0, 9.0], steps=3) == 0.0).all()
    tiny = LangevinCertificate.chien2024(**(mnist(0.1) | {"gradient_bound": 1e-200}))
    assert tiny.rdp([2.0], steps=0)[0] > 0.0  # its square underflows, the bound does not
    assert sharp_constants(tiny).rdp_per_order > 0.0
    assert 0.0 < LangevinCertificate.chien2024(**mnist(0.1)).rdp([1.01], steps=10**6)[0] < 1e-200
    # one step is the least their search knows, and strongest noise needs it too
    assert LangevinCertificate.chien2024(**mnist(9.0)).steps_for(epsilon=1.0, delta=DELTA) == 1


def test_step_that_is_not_known_to_contract_is_refused():
    setting = mnist(0.1)
    limit = 2.0 / (setting["strong_convexity"] + setting["smoothness"])
    LangevinCertificate.chien2024(**(setting | {"step_size": limit * (1.0 - 1e-12)}))
    for build in (LangevinCertificate.chien2024, LangevinCertificate.strongly_convex):
        with pytest.raises(CertificateError, match=r"step_size <= 2 / \(strong_convexity.*Lower"):
            build(**(setting | {"step_size": limit * 1.001}))


def test_target_out_of_reach_is_refused():
    ours = LangevinCertificate.chien2024(**mnist(0.1), step_grid=10)
    with pytest.raises(CertificateError, match=r"max_steps=1380.*retrain instead"):
        ours.steps_for(epsilon=1.0, delta=DELTA, max_steps=1380)
    assert ours.steps_for(epsilon=1.0, delta=DELTA, max_steps=1381) == 1381


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_instances", 0),
        ("num_deleted", SIZE + 1),
        ("num_deleted", -1),
        ("strong_convexity", 0.0),
        ("strong_convexity", 5.0),
        ("smoothness", math.nan),
        ("step_size", -1.0),
        ("langevin_sigma", 0.0),
        ("gradient_bound", -1.0),
        ("step_grid", 0),
    ],
)
def test_wrong_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"Expected {name}"):
        LangevinCertificate.chien2024(**(mnist(0.1) | {name: value}))


def test_record_is_frozen_labelled_and_says_what_it_assumes():
    ours = LangevinCertificate.chien2024(**mnist(0.1), step_grid=10)
    assert (ours.reference, ours.two_sided) == ("stationary", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.step_grid = 1
    text = " ".join(ours.assumptions)
    for words in ("11982 records", "100 records are replaced", "0.011982-strongly", "3.81706"):
        assert words in text
    for words in ("stationary law", "every number 10 apart", "burn-in"):
        assert words in text
