import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from opacus_pil import CertificateError
from opacus_pil.certificates import (
    Certificate,
    ContractionCertificate,
    NoisyFineTuningCertificate,
)
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


SCHEDULES = st.lists(st.one_of(st.just(0.0), st.floats(0.05, 3.0)), min_size=1, max_size=9).filter(
    any
)


@given(SETTINGS, st.integers(1, 60))
def test_a_constant_schedule_is_the_scalar(ours, steps):
    listed = dataclasses.replace(ours, noise_std=(ours.noise_std,) * 60)
    # the scalar's closed form and the running sums differ by rounding
    assert listed.rdp([2.0], steps=steps) == pytest.approx(ours.rdp([2.0], steps=steps), rel=1e-9)


@given(SETTINGS, SCHEDULES, st.integers(1, 12))
def test_schedule_is_the_least_quadratic_programme_up_to_the_number_of_steps(ours, noise, steps):
    # Chains of every length k <= K; at the least of them the one chord is feasible.
    ours = dataclasses.replace(ours, noise_std=noise)
    shrink, push = 1.0 - ours.step_size * ours.weight_decay, 2.0 * ours.step_size
    least = min(
        oracles.programme_mu(
            [shrink] * k, noise[:k], [push * ours.gradient_clip] * k, 2.0 * ours.model_clip
        )
        for k in range(1, min(steps, len(noise)) + 1)
    )
    # the oracle solves by active sets in doubles: 1e-7 of the largest number met
    assert ours.mu(steps) == pytest.approx(least, rel=1e-6, abs=1e-6)


@given(SETTINGS, SCHEDULES)
def test_schedule_does_not_grow_and_stops_counting_at_its_end(ours, noise):
    ours = dataclasses.replace(ours, noise_std=noise)
    values = [ours.mu(k) for k in range(len(noise) + 1)]
    assert all(later <= sooner for sooner, later in itertools.pairwise(values))
    assert ours.mu(len(noise)) == ours.mu(len(noise) + 1) == ours.mu(10**9)
    assert (ours.mu(1) == math.inf) == (noise[0] == 0.0)


@given(st.floats(0.1, 1.0), st.lists(st.floats(0.05, 2.0), min_size=1, max_size=30))
def test_without_gradient_any_schedule_is_exact(shrink, noise):
    ours = NoisyFineTuningCertificate(0.7, 0.0, 0.5, (1.0 - shrink) / 0.5, noise)
    steps = len(noise)
    gap, std = oracles.linear_chain([shrink] * steps, noise, [0.0] * steps, 1.4)
    exact = gap / std
    assert ours.mu(steps) == pytest.approx(exact, rel=1e-9)
    assert ours.mu(steps) >= exact * (1.0 - 1e-13)  # the oracle's rounding
    assert ours.epsilon(delta=1e-3, steps=steps) >= 0.0
    # the mechanism's own δ at the reported ε: two Gaussians of this gap
    assert oracles.gaussian_delta(exact, ours.epsilon(delta=1e-3, steps=steps)) <= 1e-3


def test_decreasing_noise_bounds_one_shared_nonlinear_kernel():
    # As above, with noise that falls from step to step: the exact δ at the reported ε.
    noise = (1.2, 0.9, 0.6, 0.4)
    ours = NoisyFineTuningCertificate(1.0, 0.4, 0.4, 0.3, noise)
    grid = np.linspace(-12.0, 12.0, 3001)
    cell = grid[1] - grid[0]
    drift = (1.0 - 0.12) * grid + 0.16 * np.sign(grid)
    p, q = (norm.pdf(grid, 0.88 * start + 0.16 * start, noise[0]) for start in (1.0, -1.0))
    for steps in range(1, 5):
        if steps > 1:
            kernel = norm.pdf(grid[:, None], drift[None, :], noise[steps - 1])
            p, q = kernel @ p * cell, kernel @ q * cell
        for order in (1.5, 3.0):
            exact = oracles.renyi_on_grid(p, q, order, cell)
            assert exact <= ours.rdp([order], steps=steps)[0] * (1.0 + 1e-6)  # the kink's cell
        epsilon = ours.epsilon(delta=0.01, steps=steps)
        delta = np.maximum(p - math.exp(epsilon) * q, 0.0).sum() * cell
        assert delta <= 0.01 * (1.0 + 1e-3)  # the kink's cell
        if steps == 1:
            assert delta == pytest.approx(0.01, rel=2e-3)  # attained at the first step


@given(SETTINGS, st.integers(1, 60))
def test_epsilon_is_the_exact_gaussian_one_and_below_the_conversion(ours, steps):
    exact = ours.epsilon(delta=1e-4, steps=steps)
    assert ours.mu(steps) ** 2 == pytest.approx(ours.rdp([2.0], steps=steps)[0], rel=1e-12)
    assert exact <= Certificate.epsilon(ours, delta=1e-4, steps=steps) * (1.0 + 1e-12)  # rounding
    assert oracles.gaussian_delta(ours.mu(steps), exact) <= 1e-4


def test_smallest_numbers_do_not_vanish():
    tiny = NoisyFineTuningCertificate(1.0, 0.0, 0.5, 1.0, 1.0)
    assert tiny.rdp([2.0], steps=10**6)[0] == 2e-300
    listed = dataclasses.replace(tiny, noise_std=(1.0,) * 3_000)
    assert listed.rdp([2.0], steps=3_000)[0] == 2e-300


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
        ("noise_std", (0.0, 0.0)),
        ("noise_std", ()),
        ("noise_std", ((0.5,),)),
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


def test_schedule_is_checked_and_named():
    with pytest.raises(ValueError, match=r"noise_std finite and >= 0, .* row 1, value -0\.5"):
        NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.1, (0.5, -0.5))
    with pytest.raises(ValueError, match="has no certificate"):
        NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.1, (0.0,))
    ours = NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.1, np.array([0.5, 0.25]))
    assert ours == NoisyFineTuningCertificate(1.0, 1.0, 0.1, 0.1, (0.5, 0.25))
    sentence = next(line for line in ours.assumptions if "noise of standard" in line)
    for words in ("0.25 to 0.5", "2 steps", "fixed before", "not counted"):
        assert words in sentence
