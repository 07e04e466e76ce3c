"""Outputs clipped one by one, and losses that are not clipped: constants and exact laws."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from opacus_pil import CertificateError
from opacus_pil.certificates import ContractionCertificate, PoissonContractionCertificate

_PATH = Path(__file__).parents[2] / "benchmarks" / "clipped_laws.py"
_SPEC = importlib.util.spec_from_file_location("clipped_laws", _PATH)
clipped_laws = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(clipped_laws)
ClippedLogistic = clipped_laws.ClippedLogistic

KINDS = (ContractionCertificate, PoissonContractionCertificate)
BOUNDS = (0.7, 0.2, 1.1)
CAPS = ((0.3, 0.8, 0.0), (1.0, 0.1, 0.5))
SHARED = {
    "step_size": 0.9, "weight_decay": 0.05, "feature_norm": 2.0, "noise_multiplier": 3.0,
    "expected_batch_size": 38, "num_instances": 40, "training_steps": 30,
}  # fmt: skip
SETTING = SHARED | {"caps": CAPS, "max_grad_norms": BOUNDS}
UNCLIPPED = SHARED | {"caps": (0.3, 0.8), "max_grad_norm": 3.0}
POISSON = {"sample_rate": 0.3}


def rate_of(kind):
    return POISSON if kind is PoissonContractionCertificate else {}


def numbers_of(certificate):
    """Every constant but the context, whose words differ."""
    found = dataclasses.asdict(dataclasses.replace(certificate, context=()))
    return {name: value for name, value in found.items() if name != "context"}


# --- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("caps", [(0.3,), (0.3, 0.8, 1e-7), (0.0,)])
def test_one_output_is_the_certificate_of_one_output_number_for_number(kind, caps):
    one = kind.one_output_glm(caps=caps, max_grad_norm=0.7, **SHARED, **rate_of(kind))
    rest = kind.one_vs_rest_glm(
        caps=np.array(caps)[:, None], max_grad_norms=[0.7], **SHARED, **rate_of(kind)
    )
    assert numbers_of(one) == numbers_of(rest)


def test_constants_are_those_of_the_theory():
    ours = ContractionCertificate.one_vs_rest_glm(**SETTING)
    eta, decay, batch, clip = 0.9, 0.05, 38, np.linalg.norm(BOUNDS)
    beta = 0.25 * 2.0**2 * 40 / batch
    factor = max(abs(1 - eta * decay), abs(1 - eta * (decay + beta)))
    assert ours.contraction == pytest.approx(factor, rel=1e-14)
    assert ours.contraction >= 1 - eta * decay
    assert ours.noise_std == pytest.approx(eta * 3.0 * clip / batch, rel=1e-14)
    # a set moves each output by the sum of its caps, and all of them by the root of their squares
    shift = eta / batch * np.linalg.norm(np.sum(CAPS, axis=0) * BOUNDS)
    assert shift <= min(ours.shifts) <= max(ours.shifts) <= shift * (1.0 + 2e-5)
    assert len(ours.shifts) == 30


def test_poisson_constants_are_those_of_the_theory():
    ours = PoissonContractionCertificate.one_vs_rest_glm(**SETTING, **POISSON)
    each = np.linalg.norm(np.array(CAPS) * BOUNDS, axis=1)
    found = np.array(ours.gradient_bounds)
    assert (each <= found).all()
    np.testing.assert_allclose(found, each, rtol=2e-5)
    assert ours.smoothness == 0.25 * 2.0**2
    assert ours.noise_std == pytest.approx(0.9 * 3.0 * np.linalg.norm(BOUNDS) / 38, rel=1e-14)
    assert (ours.num_retained, ours.sample_rate) == (38, 0.3)


def test_members_in_different_outputs_cost_less_than_in_the_same():
    def mu(caps):
        setting = SETTING | {"caps": caps}
        return ContractionCertificate.one_vs_rest_glm(**setting | {"max_grad_norms": (1.0, 1.0)})

    apart, together = mu(((1, 0), (0, 1))).shifts[0], mu(((1, 0), (1, 0))).shifts[0]
    assert together == pytest.approx(math.sqrt(2.0) * apart, rel=1e-12)


def test_smaller_caps_are_forgotten_sooner():
    def steps(caps):
        setting = SETTING | {"caps": caps}
        return ContractionCertificate.one_vs_rest_glm(**setting).steps_for(epsilon=0.5, delta=0.01)

    assert steps(((0.0, 0.0, 0.0),)) == 0
    ones = np.ones((1, 3))
    assert steps(0.1 * ones) < steps(((1.0, 0.0, 0.0),)) < steps(ones) < steps(np.ones((2, 3)))


# --- coupled runs ---------------------------------------------------------------------------------


class Run:
    """Full-batch DP-SGD on several outputs, with Opacus's clip factor per output or for all."""

    def __init__(self, seed, *, flat=False):
        random = np.random.default_rng(seed)
        size, self.flat = SHARED["num_instances"], flat
        features = random.normal(size=(size, 5))
        features[:, -1] = 1.0
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        self.x = features * np.minimum(1.0, SHARED["feature_norm"] / norms)
        self.y = np.eye(3)[random.integers(0, 3, size)]
        self.caps = random.uniform(0.0, 1.0, (size, 3))
        self.caps[:3] = ((0, 0, 0), (1e-7, 1e-6, 1), (0, 1, 1e-7))  # at Opacus's 1e-6 and below
        self.caps[-2:] = CAPS
        self.random = random

    def step(self, theta, *, forget):
        """One noiseless step of shape (3, 5), with or without the last two instances."""
        keep = slice(None) if forget else slice(None, -2)
        x, y, caps = self.x[keep], self.y[keep], self.caps[keep]
        slopes = 1.0 / (1.0 + np.exp(-x @ theta.T)) - y
        norms = np.abs(slopes) * np.linalg.norm(x, axis=1, keepdims=True)
        bounds = caps * BOUNDS
        if self.flat:
            norms, bounds = (np.linalg.norm(v, axis=1, keepdims=True) for v in (norms, bounds))
        factors = np.minimum(1.0, bounds / (norms + 1e-6))
        total = (slopes * factors).T @ x / SHARED["expected_batch_size"]
        eta = SHARED["step_size"]
        return (1.0 - eta * SHARED["weight_decay"]) * theta - eta * total


@pytest.mark.parametrize("seed", range(3))
def test_coupled_runs_never_separate_by_more_than_the_recursion(seed):
    run, ours = Run(seed), ContractionCertificate.one_vs_rest_glm(**SETTING)
    theta = other = run.random.normal(size=(3, 5))
    gap, farthest = 0.0, 0.0
    for t in range(50):
        noise = ours.noise_std * run.random.normal(size=(3, 5))
        training = t < SHARED["training_steps"]
        theta = run.step(theta, forget=training) + noise
        other = run.step(other, forget=False) + noise
        gap = ours.contraction * gap + (ours.shifts[t] if training else 0.0)
        distance = np.linalg.norm(theta - other)
        farthest = max(farthest, distance / gap)
        assert distance <= gap  # the shifts' slack of 1e-5 covers double rounding
    assert farthest > 0.05  # the recursion is not vacuous here


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 30.0])
def test_a_noiseless_step_contracts_any_two_models(scale):
    run, c = Run(7), ContractionCertificate.one_vs_rest_glm(**SETTING).contraction
    for _ in range(300):
        theta = run.random.normal(size=(3, 5)) * run.random.choice([0.0, 0.1, 3.0])
        other = theta + scale * run.random.normal(size=(3, 5))
        moved = np.linalg.norm(run.step(theta, forget=False) - run.step(other, forget=False))
        assert moved <= c * np.linalg.norm(theta - other) * (1.0 + 1e-7)  # differences of doubles


def flat_step(theta, *, clip=0.5, eta=7.5, decay=0.001):
    """One record x̃ = 1 of two outputs, y = (1, 0), clipped together."""
    slopes = 1.0 / (1.0 + np.exp(-theta)) - np.array([1.0, 0.0])
    clipped = slopes * min(1.0, clip / (np.linalg.norm(slopes) + 1e-6))
    return (1.0 - eta * decay) * theta - eta * clipped


def test_clipping_outputs_together_is_no_contraction():
    """Why it is refused: at the same constants two models move apart by 6 %."""
    one, other = np.array([-6.50, 0.269]), np.array([-7.06, 0.496])
    before, after = (np.linalg.norm(f(one) - f(other)) for f in (lambda v: v, flat_step))
    assert after / before == pytest.approx(1.059, abs=2e-3)
    apart = ContractionCertificate.one_vs_rest_glm(
        caps=[[1.0, 1.0]], max_grad_norms=[0.5, 0.5], step_size=7.5, weight_decay=0.001,
        feature_norm=1.0, noise_multiplier=1.0, expected_batch_size=1, num_instances=1,
        training_steps=1,
    )  # fmt: skip
    assert apart.contraction < 1.0  # what it would have been taken for

    def by_output(theta):
        slopes = 1.0 / (1.0 + np.exp(-theta)) - np.array([1.0, 0.0])
        return (1 - 0.0075) * theta - 7.5 * slopes * np.minimum(1, 0.5 / (np.abs(slopes) + 1e-6))

    assert np.linalg.norm(by_output(one) - by_output(other)) <= apart.contraction * before


# --- exact laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(50))
def test_no_exact_divergence_of_two_outputs_is_above_the_certificate(number):
    """Outputs share no noise: their laws are a product, and its divergence is the sum of both."""
    random = np.random.default_rng(number)
    size, members, outputs = int(random.integers(3, 9)), int(random.integers(1, 3)), 2
    x = random.uniform(0.2, 1.0, size)
    y = random.integers(0, 2, (size, outputs)).astype(float)
    caps = random.uniform(0.0, 1.0, (size, outputs)) ** 2
    bounds = random.uniform(0.2, 1.0, outputs)
    eta, z = random.uniform(0.5, 4.0), random.uniform(0.5, 3.0)
    decay = random.uniform(0.1, 0.4) / eta
    training, steps = int(random.integers(1, 12)), int(random.integers(0, 8))
    ours = ContractionCertificate.one_vs_rest_glm(
        caps=caps[:members], max_grad_norms=bounds, step_size=eta, weight_decay=decay,
        feature_norm=1.0, noise_multiplier=z, expected_batch_size=size, num_instances=size,
        training_steps=training,
    )  # fmt: skip
    orders = [1.5, 2.0, 6.0]
    exact = np.zeros((2, len(orders)))
    for k in range(outputs):
        one = ClippedLogistic(
            x, y[:, k], caps[:, k] * bounds[k], step_size=eta, weight_decay=decay, batch=size,
            noise_std=eta * z * float(np.linalg.norm(bounds)) / size,
        )  # fmt: skip
        exact += one.divergences(orders, members=members, training=training, steps=steps)
    bound = ours.rdp(orders, steps=steps)
    assert (bound >= exact * (1.0 - 1e-3)).all()  # of the grid, see the test below
    assert (exact > 0.0).all()


def test_the_grid_of_the_exact_laws_is_fine_enough():
    found = []
    for finer in (1.0, 2.0):
        one = ClippedLogistic(
            np.array([1.0, 0.5, 0.7]), np.array([1.0, 0.0, 1.0]), np.array([0.3, 0.9, 0.2]),
            step_size=3.0, weight_decay=0.05, batch=3, noise_std=0.5, finer=finer,
        )  # fmt: skip
        found.append(one.divergences([1.5, 6.0], members=1, training=9, steps=3))
    # The clip's kinks: half the cell, a quarter of the error, which is 1e-4 here.
    np.testing.assert_allclose(*found, rtol=3e-4)


# --- losses that are not clipped ------------------------------------------------------------------


def softmax_slope(logits, label):
    shifted = np.exp(logits - logits.max())
    slope = shifted / shifted.sum()
    slope[label] -= 1.0
    return slope


@pytest.mark.parametrize("outputs", [2, 3, 10])
def test_softmax_is_as_steep_and_as_smooth_as_is_said(outputs):
    random = np.random.default_rng(outputs)
    steepest = smoothest = 0.0
    for _ in range(4000):
        logits = random.normal(size=outputs) * random.choice([0.1, 1.0, 8.0])
        step = random.normal(size=outputs)
        if random.integers(2):  # the direction in which it bends most
            step = np.zeros(outputs)
            step[:2] = 1.0, -1.0
            logits[2:] -= 40.0
        step *= random.choice([1e-3, 0.1, 2.0]) / np.linalg.norm(step)
        one, other = (softmax_slope(v, 0) for v in (logits, logits + step))
        steepest = max(steepest, np.linalg.norm(one))
        smoothest = max(smoothest, np.linalg.norm(other - one) / np.linalg.norm(step))
    assert 1.4 < steepest <= math.sqrt(2.0)
    assert 0.49 < smoothest <= 0.5 * (1.0 + 1e-9)  # rounding of a difference


def test_unclipped_constants_are_those_of_the_theory():
    ours = ContractionCertificate.unclipped_glm(**UNCLIPPED)
    eta, decay, batch = 0.9, 0.05, 38
    beta = 0.5 * 2.0**2 * 40 / batch
    factor = max(abs(1 - eta * decay), abs(1 - eta * (decay + beta)))
    assert ours.contraction == pytest.approx(factor, rel=1e-14)
    shift = eta / batch * 3.0 * 1.1
    assert shift <= ours.shifts[0] <= shift * (1.0 + 2e-5)
    poisson = PoissonContractionCertificate.unclipped_glm(**UNCLIPPED, **POISSON)
    assert poisson.smoothness == 0.5 * 2.0**2
    np.testing.assert_allclose(poisson.gradient_bounds, (0.9, 2.4), rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_that_softmax_reaches_is_refused(kind):
    reached = math.sqrt(2.0) * SHARED["feature_norm"]
    for clip, fine in (
        (reached * 1.0001, True), (reached + 1.1e-6, True),
        (reached + 0.9e-6, False), (reached * 0.9999, False),
    ):  # fmt: skip
        setting = UNCLIPPED | {"max_grad_norm": clip} | rate_of(kind)
        if fine:
            kind.unclipped_glm(**setting)
            continue
        with pytest.raises(CertificateError, match=r"at least 2\.82843.*no contraction"):
            kind.unclipped_glm(**setting)


# --- refusals -------------------------------------------------------------------------------------


def test_poisson_batches_are_refused_where_a_step_is_one_map():
    for make, setting in (
        (ContractionCertificate.one_vs_rest_glm, SETTING),
        (ContractionCertificate.unclipped_glm, UNCLIPPED),
    ):
        with pytest.raises(CertificateError, match=r"sample_rate = 1, got sample_rate=0\.3"):
            make(**setting, **POISSON)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caps": (0.3, 0.8, 0.0)}, "one column per output"),
        ({"caps": ((0.3, 0.8),)}, "one column per output"),
        ({"caps": np.zeros((0, 3))}, "caps"),
        ({"caps": ((0.3, 0.8, 1.1),)}, "caps"),
        ({"max_grad_norms": 0.7}, "one column per output"),
        ({"max_grad_norms": (0.7, 0.0, 1.0)}, "max_grad_norm"),
        ({"feature_norm": math.inf}, "feature_norm"),
        ({"num_instances": 0}, "num_instances"),
        ({"training_steps": -1}, "training_steps"),
        ({"loss_smoothness": -1.0}, "loss_smoothness"),
    ],
)
def test_wrong_values_are_named(kind, change, words):
    with pytest.raises(ValueError, match=words):
        kind.one_vs_rest_glm(**(SETTING | change), **rate_of(kind))


def test_assumptions_carry_their_numbers():
    text = " ".join(ContractionCertificate.one_vs_rest_glm(**SETTING).assumptions)
    for words in ("each", "norm at most 2,", "0.25 per unit", "full batch of at most 40"):
        assert words in text
    text = " ".join(ContractionCertificate.unclipped_glm(**UNCLIPPED).assumptions)
    for words in ("norm at most 2,", "1.41421", "full batch of at most 40"):
        assert words in text
