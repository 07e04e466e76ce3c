"""What benchmarks/certified_steps.py compares: D2D's noise by its own proof; steps row by row."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from opacus_pil.certificates import ContractionCertificate, LangevinCertificate
from opacus_pil.certificates.gaussian import gaussian_delta

_PATH = Path(__file__).parents[2] / "benchmarks" / "descent_to_delete.py"
_SPEC = importlib.util.spec_from_file_location("descent_to_delete", _PATH)
d2d = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(d2d)

SIZE, DECAY = 60, 0.05


def problem(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SIZE, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = (rng.uniform(size=(SIZE, 1)) < 0.5).astype(float)
    return x, y


def constants(deleted):
    return d2d.DescentToDelete(
        num_instances=SIZE, num_deleted=deleted, strong_convexity=DECAY,
        smoothness=0.25 + DECAY, gradient_bound=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_published_noise_is_the_concentrated_dp_bound_of_the_distance(steps, epsilon) -> None:
    # Two models at most 8Mγ^I/(mn(1 − γ^I)) apart; ρ-zCDP with ρ = Δ²/2σ² is
    # (ρ + 2√(ρ log 1/δ), δ)-DP (Bun, Steinke 2016, arXiv:1605.02065, Prop. 1.3).
    delta, gamma = 1e-3, 0.25 / (0.25 + 2.0 * DECAY)
    apart = 8.0 * gamma**steps / (DECAY * SIZE * (1.0 - gamma**steps))
    sigma = constants(1).published_sigma(steps, epsilon=epsilon, delta=delta)
    rho = apart**2 / (2.0 * sigma**2)
    found = rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))
    assert found == pytest.approx(epsilon, rel=1e-12)  # roundings


def test_sharp_noise_meets_the_exact_curve_and_is_less() -> None:
    delta = 1e-3
    for epsilon in (0.05, 1.0, 5.0):
        for steps in (1, 7, 40):
            ours = constants(3).sharp_sigma(steps, epsilon=epsilon, delta=delta, converged=0.0)
            apart = constants(3).rate ** steps * 2.0 * 3.0 / (DECAY * SIZE)
            # rel: the root is found to 1e-12 in μ, and δ changes at most some 100 times as fast
            assert gaussian_delta(apart / ours, epsilon=epsilon) == pytest.approx(delta, rel=1e-8)
            assert ours < constants(3).published_sigma(steps, epsilon=epsilon, delta=delta)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("deleted", [1, 10])
def test_models_are_no_further_apart_than_the_noise_assumes(deleted, seed) -> None:
    x, y = problem(seed)
    one = constants(deleted)
    common = {"step_size": one.step_size, "weight_decay": DECAY}
    zero = np.zeros((4, 1))
    start = math.sqrt(2.0 * math.log(2.0) / DECAY)
    for steps in (1, 5, 20):
        training = one.training_steps(steps, start=start)
        trained = d2d.descend(zero, x, y, steps=training, **common)
        unlearned = d2d.descend(trained, x[deleted:], y[deleted:], steps=steps, **common)
        retrained = d2d.descend(zero, x[deleted:], y[deleted:], steps=training + steps, **common)
        distance = np.linalg.norm(unlearned - retrained)
        left = one.rate**steps
        assert 0.0 < distance <= 4.0 * one.moved * left / (1.0 - left)
        converged = one.rate**training * start
        assert distance <= left * (one.moved + 2.0 * converged)


def test_the_optimum_moves_by_no_more_than_is_said() -> None:
    x, y = problem(0)
    one = constants(10)
    common = {"step_size": one.step_size, "weight_decay": DECAY}
    optima = [
        d2d.descend(np.zeros((4, 1)), x[k:], y[k:], steps=2000, **common) for k in (0, 10)
    ]  # γ^2000 < 1e-290
    assert np.linalg.norm(optima[0] - optima[1]) <= one.moved


@pytest.mark.parametrize("noise_std", [0.003, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("deleted", [1, 10])
def test_contraction_never_takes_more_steps_than_the_published_certificate(
    deleted, noise_std
) -> None:
    size, step_size, decay = 700, 7.0, 1e-3
    ours = ContractionCertificate.one_output_glm(
        caps=np.ones(deleted), max_grad_norm=1.0, step_size=step_size, weight_decay=decay,
        feature_norm=1.0, noise_multiplier=noise_std * size / step_size, expected_batch_size=size,
        num_instances=size, training_steps=1000,
    )  # fmt: skip
    theirs = LangevinCertificate.chien2024(
        num_instances=size, num_deleted=deleted, strong_convexity=decay, smoothness=0.25 + decay,
        step_size=step_size, langevin_sigma=noise_std / math.sqrt(2.0 * step_size),
        gradient_bound=0.5,  # a removal moves a step half as far as a replacement
    )  # fmt: skip
    for epsilon in (0.05, 0.1, 0.5, 1.0, 2.0):
        mine = ours.steps_for(epsilon=epsilon, delta=1.0 / size)
        published = theirs.steps_for(epsilon=epsilon, delta=1.0 / size)
        assert mine < published or (mine, published) == (1, 1)
