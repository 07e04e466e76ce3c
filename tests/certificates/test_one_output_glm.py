import math

import numpy as np
import pytest

from opacus_pil import CertificateError
from opacus_pil.certificates import ContractionCertificate

SETTING = {
    "caps": (0.3, 0.8),
    "max_grad_norm": 0.7,
    "step_size": 0.9,
    "weight_decay": 0.05,
    "feature_norm": 2.0,
    "noise_multiplier": 3.0,
    "expected_batch_size": 38,
    "num_instances": 40,
    "training_steps": 30,
}
LOSSES = {  # derivative in the linear output, its Lipschitz constant
    "logistic": (lambda u, y: 1.0 / (1.0 + np.exp(-u)) - y, 0.25),
    "squared": (lambda u, y: u - y, 1.0),
    "huber": (lambda u, y: np.clip(u - y, -0.2, 0.2), 1.0),
}


class Run:
    """Full-batch DP-SGD on one linear output, with Opacus's clip factor at per-instance caps."""

    def __init__(self, loss, seed, caps_low=0.0):
        random = np.random.default_rng(seed)
        size, width = SETTING["num_instances"], 5
        features = random.normal(size=(size, width))
        features[:, -1] = 1.0  # bias
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        self.features = features * np.minimum(1.0, SETTING["feature_norm"] / norms)
        self.labels = random.integers(0, 2, size).astype(float)
        self.caps = random.uniform(caps_low, 1.0, size)
        self.caps[:4] = (0.0, 1e-7, 1e-6, 1.0)  # below, at and above Opacus's 1e-6
        self.caps[-2:] = SETTING["caps"]
        self.derivative, smoothness = LOSSES[loss]
        step = 0.9 if loss == "logistic" else 0.3
        self.setting = SETTING | {"loss_smoothness": smoothness, "step_size": step}
        self.random = random

    def step(self, theta, *, forget):
        """One noiseless step with or without the last two instances."""
        keep = slice(None) if forget else slice(None, -2)
        x, y, caps = self.features[keep], self.labels[keep], self.caps[keep]
        gradients = self.derivative(x @ theta, y)[:, None] * x
        bound = caps * self.setting["max_grad_norm"]
        factor = np.minimum(1.0, bound / (np.linalg.norm(gradients, axis=1) + 1e-6))
        total = (gradients * factor[:, None]).sum(axis=0) / self.setting["expected_batch_size"]
        eta = self.setting["step_size"]
        return (1.0 - eta * self.setting["weight_decay"]) * theta - eta * total


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_coupled_runs_never_separate_by_more_than_the_recursion(loss, seed):
    run = Run(loss, seed)
    ours = ContractionCertificate.one_output_glm(**run.setting)
    theta = other = run.random.normal(size=5)
    gap, farthest = 0.0, 0.0
    for t in range(SETTING["training_steps"] + 20):
        noise = ours.noise_std * run.random.normal(size=5)
        training = t < SETTING["training_steps"]
        theta = run.step(theta, forget=training) + noise
        other = run.step(other, forget=False) + noise
        gap = ours.contraction * gap + (ours.shifts[t] if training else 0.0)
        distance = np.linalg.norm(theta - other)
        farthest = max(farthest, distance / gap)
        assert distance <= gap  # the shifts' slack of 1e-5 covers double rounding
    assert farthest > 0.05  # the recursion is not vacuous here


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 30.0])
def test_noiseless_step_contracts_any_two_models(loss, scale):
    run = Run(loss, 7)
    c = ContractionCertificate.one_output_glm(**run.setting).contraction
    for _ in range(300):
        theta = run.random.normal(size=5) * run.random.choice([0.0, 0.1, 3.0])
        other = theta + scale * run.random.normal(size=5)
        moved = np.linalg.norm(run.step(theta, forget=False) - run.step(other, forget=False))
        # models 1e-7 apart, of size 3: their difference is known to 1e-8 relatively
        assert moved <= c * np.linalg.norm(theta - other) * (1.0 + 1e-7)


def test_opacus_clip_factor_leaves_the_derivative_monotone_and_1_lipschitz():
    for bound in (0.0, 1e-9, 1e-7, 9e-7, 1e-6, 2e-6, 1e-3, 1.0):
        points = np.r_[0.0, np.logspace(-12, 3, 4001)]
        for norm in (0.01, 1.0, 50.0):
            clipped = points * np.minimum(1.0, bound / (points * norm + 1e-6))
            rise = np.diff(clipped)
            assert (rise >= -1e-15 * clipped[1:]).all()  # rounding of two nearly equal values
            assert (rise <= np.diff(points) + 1e-15 * clipped[1:]).all()
            assert (clipped * norm <= bound * (1.0 + 1e-15)).all()


def test_constants_are_those_of_the_theory():
    ours = ContractionCertificate.one_output_glm(**SETTING)
    eta, decay, batch, clip = 0.9, 0.05, 38, 0.7
    beta = 0.25 * 2.0**2 * 40 / batch
    assert ours.contraction == pytest.approx(
        max(abs(1 - eta * decay), abs(1 - eta * (decay + beta))), rel=1e-14
    )
    assert ours.contraction >= 1 - eta * decay
    assert ours.noise_std == pytest.approx(eta * 3.0 * clip / batch, rel=1e-14)
    assert len(ours.shifts) == 30
    shift = eta / batch * clip * 1.1
    assert shift <= min(ours.shifts) <= max(ours.shifts) <= shift * (1.0 + 2e-5)


def test_smaller_caps_are_forgotten_sooner():
    def steps(caps):
        setting = SETTING | {"caps": caps}
        return ContractionCertificate.one_output_glm(**setting).steps_for(epsilon=0.5, delta=0.01)

    assert steps((0.0,)) == 0
    assert steps((0.05,)) < steps((0.3,)) < steps((1.0,)) < steps((1.0, 1.0))


def test_assumptions_carry_their_numbers():
    text = " ".join(ContractionCertificate.one_output_glm(**SETTING).assumptions)
    for words in (
        "one linear output",
        "norm at most 2,",
        "0.25 per unit",
        "no L2 term",
        "no momentum",
        "fixed before the run",
        "summing to 1.1",
        "full batch of at most 40",
        "decoupled",
        "same initialisation",
    ):
        assert words in text


def test_poisson_batches_are_refused():
    with pytest.raises(
        CertificateError, match=r"sample_rate = 1, got sample_rate=0\.1.*full batch"
    ):
        ContractionCertificate.one_output_glm(**SETTING, sample_rate=0.1)


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"weight_decay": 0.0}, "Pass weight_decay > 0 and step_size <"),
        ({"step_size": 3.0}, r"Pass step_size < 2 / \(λ \+ β\) = 1\.8"),
    ],
)
def test_a_map_that_does_not_contract_is_refused(change, cure):
    with pytest.raises(CertificateError, match=cure) as failure:
        ContractionCertificate.one_output_glm(**(SETTING | change))
    for name in ("step_size η=", "weight_decay λ=", "smoothness β="):
        assert name in str(failure.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caps": ()}, "caps"),
        ({"caps": (0.5, 1.5)}, "row 1"),
        ({"caps": (-0.5,)}, "caps"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"feature_norm": math.inf}, "feature_norm"),
        ({"num_instances": 0}, "num_instances"),
        ({"training_steps": -1}, "training_steps"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"loss_smoothness": -1.0}, "loss_smoothness"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"sample_rate": 1.5}, "sample_rate"),
    ],
)
def test_wrong_values_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        ContractionCertificate.one_output_glm(**(SETTING | change))
