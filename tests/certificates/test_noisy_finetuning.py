import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from opacus_pil import CertificateError
from opacus_pil.certificates import ContractionCertificate, NoisyFineTuningCertificate
from tests.certificates import oracles

SETTINGS = st.builds(
    NoisyFineTuningCertificate,
    st.floats(0.01, 3.0),
    st.floats(0.0, 3.0),
    st.floats(0.01, 1.0),
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    st.floats(0.1, 3.0),
)


def raw_rho(ours, steps, distance=None):
    """THEORY 5.5, plain."""
    start = 2.0 * ours.model_clip if distance is None else distance
    eta, decay = ours.step_size, ours.weight_decay
    if decay == 0.0:
        shift, variance = start + 2.0 * eta * ours.gradient_clip * steps, float(steps)
    else:
        rest = (1.0 - eta * decay) ** steps
        shift = start * rest + 2.0 * ours.gradient_clip / decay * (1.0 - rest)
        variance = (1.0 - rest**2) / (eta * decay * (2.0 - eta * decay))
    return shift**2 / (2.0 * ours.noise_std**2 * variance)


@given(SETTINGS, st.integers(1, 80))
def test_rdp_is_the_least_raw_value_up_to_the_number_of_steps(ours, steps):
    least = min(raw_rho(ours, k) for k in range(1, steps + 1))
    # the plain formula loses digits for ηλ ~ 1e-8: 1e-7
    assert ours.rdp([3.0], steps=steps)[0] == pytest.approx(3.0 * least, rel=1e-7)


@given(SETTINGS, st.integers(1, 60))
def test_raw_value_is_the_contraction_certificate_of_constant_shifts(ours, steps):
    chain = ContractionCertificate(
        1.0 - ours.step_size * ours.weight_decay,
        ours.noise_std,
        (2.0 * ours.step_size * ours.gradient_clip,) * steps,
        2.0 * ours.model_clip,
    )
    exact = chain.rdp([2.0], steps=0)[0]
    # equal while ρ falls; the certificate may stop at an earlier k, never above it
    assert ours.rdp([2.0], steps=steps)[0] <= exact * (1.0 + 1e-9)
    if ours.rdp([2.0], steps=steps)[0] < ours.rdp([2.0], steps=steps - 1)[0] * (1.0 - 1e-6):
        assert ours.rdp([2.0], steps=steps)[0] == pytest.approx(exact, rel=1e-9)


@given(SETTINGS)
def test_rdp_does_not_grow_with_steps(ours):
    values = np.array([ours.rdp([2.0], steps=k)[0] for k in (0, *range(1, 40), 100, 10_000, 10**6)])
    assert values[0] == math.inf
    assert (values[2:] <= values[1:-1] * (1.0 + 1e-13)).all()  # equal minima, rounded alike


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("push", [math.inf, 4.0])
def test_bound_holds_and_is_attained_on_one_shared_nonlinear_kernel(decay, push):
    # Both runs: θ ← (1 − ηλ)θ + ηC1·tanh(push·θ) + noise, from ±C0: the gradient is clipped and
    # drives them apart. The densities are carried along on a grid, exactly at the first step.
    ours = NoisyFineTuningCertificate(1.0, 0.8, 0.4, decay, 0.9)
    grid = np.linspace(-16.0, 16.0, 2001)  # the order-3 integrand sits near 7
    cell = grid[1] - grid[0]

    def drift(theta):
        pull = np.sign(theta) if push == math.inf else np.tanh(push * theta)
        return (1.0 - 0.4 * decay) * theta + 0.4 * 0.8 * pull

    kernel = norm.pdf(grid[:, None], drift(grid)[None, :], 0.9)
    p, q = (norm.pdf(grid, drift(np.array(start)), 0.9) for start in (1.0, -1.0))
    for steps in range(1, 13):
        for order in (1.5, 3.0):
            bound = ours.rdp([order], steps=steps)[0]
            exact = oracles.renyi_on_grid(p, q, order, cell)
            assert exact <= bound * (1.0 + 1e-9)  # rounding; equality at the first step
            if steps == 1 and push == math.inf:
                assert exact == pytest.approx(bound, rel=1e-9)  # a sum over a smooth bump
        p, q = kernel @ p * cell, kernel @ q * cell


@given(st.floats(0.1, 1.0), st.floats(0.1, 2.0), st.integers(1, 30))
def test_without_gradient_the_linear_chain_is_exact(shrink, clip, steps):
    ours = NoisyFineTuningCertificate(clip, 0.0, 0.5, (1.0 - shrink) / 0.5, 0.7)
    gap, std = oracles.linear_chain([shrink] * steps, [0.7] * steps, [0.0] * steps, 2.0 * clip)
    assert ours.rdp([2.0], steps=steps)[0] == pytest.approx((gap / std) ** 2, rel=1e-9)
    assert ours.rdp([2.0], steps=steps)[0] >= (gap / std) ** 2 * (1.0 - 1e-13)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_vanishing_decay_is_the_branch_without_decay(steps):
    values = [
        NoisyFineTuningCertificate(1.0, 0.01, 0.1, decay, 1.0).rdp([2.0], steps=steps)[0]
        for decay in (0.0, 1e-300, 1e-15, 1e-11)
    ]
    # ρ changes by about Kηλ relatively: 1e-9 at the largest
    assert values == pytest.approx([values[0]] * 4, rel=2e-9)


def test_steps_for_does_not_follow_the_raw_value_upwards():
    # λ = 0: raw ρ has its minimum at K = 2C0/(2ηC1) = 10 and grows afterwards
    ours = NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.0, 5.0)
    best = ours.epsilon(delta=1e-5, steps=10)
    assert raw_rho(ours, 1000) > raw_rho(ours, 10)
    assert ours.epsilon(delta=1e-5, steps=1000) == best
    assert ours.steps_for(epsilon=best, delta=1e-5) == 10
    with pytest.raises(CertificateError, match=r"at K=10 steps.*retrain instead"):
        ours.steps_for(epsilon=best * 0.99, delta=1e-5)


@given(SETTINGS, st.floats(0.1, 30.0))
def test_steps_for_is_the_smallest_number(ours, target):
    curve = [ours.epsilon(delta=1e-4, steps=k) for k in range(61)]
    first = next((k for k, value in enumerate(curve) if value <= target), None)
    if first is None:
        with pytest.raises(CertificateError, match="retrain instead"):
            ours.steps_for(epsilon=target, delta=1e-4, max_steps=60)
    else:
        assert ours.steps_for(epsilon=target, delta=1e-4, max_steps=60) == first


def test_known_distance_sharpens_the_start():
    plain = NoisyFineTuningCertificate(1.0, 0.1, 0.1, 0.01, 1.0)
    near = dataclasses.replace(plain, initial_distance=0.2)
    assert near.rdp([2.0], steps=5)[0] == pytest.approx(
        2.0 * min(raw_rho(plain, k, distance=0.2) for k in range(1, 6)), rel=1e-9
    )
    # both bounds on the start hold: a larger declared distance changes nothing
    assert dataclasses.replace(plain, initial_distance=9.0).rdp([2.0], steps=5) == plain.rdp(
        [2.0], steps=5
    )
    same = dataclasses.replace(plain, initial_distance=0.0)
    assert same.epsilon(delta=1e-5, steps=0) == 0.0
    assert same.steps_for(epsilon=0.0, delta=1e-5) == 0


def test_no_steps_certify_nothing():
    ours = NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.1, 1.0)
    assert ours.epsilon(delta=1e-5, steps=0) == math.inf


def test_decay_beyond_a_sign_change_is_refused():
    with pytest.raises(CertificateError, match=r"step_size \* weight_decay <= 1.*Lower one"):
        NoisyFineTuningCertificate(1.0, 1.0, 0.5, 2.1, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_clip", -1.0),
        ("gradient_clip", math.nan),
        ("step_size", 0.0),
        ("weight_decay", -0.1),
        ("noise_std", 0.0),
        ("initial_distance", -1.0),
    ],
)
def test_wrong_values_are_named(name, value):
    setting = dict.fromkeys(
        ("model_clip", "gradient_clip", "step_size", "weight_decay", "noise_std"), 0.5
    )
    with pytest.raises(ValueError, match=f"Expected {name} .* got {name}="):
        NoisyFineTuningCertificate(**(setting | {name: value}))


def test_assumptions_carry_their_numbers():
    ours = NoisyFineTuningCertificate(1.25, 0.75, 0.5, 0.2, 3.5, initial_distance=0.125)
    text = " ".join(ours.assumptions)
    for words in ("1.25", "0.75", "0.5", "0.9 per step", "3.5", "0.125", "averaged", "No momentum"):
        assert words in text
    assert ours.two_sided is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.noise_std = 9.0
