"""Influence of the last layer against retraining, finite differences and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import spearmanr

from opacus_pil.evaluation import influence_scores


def problem(*, count: int, width: int, classes: int, seed: int = 0):
    """Features, and noisy classes that depend on them; one logit where classes is 1."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, width))
    truth = generator.normal(size=(width, max(classes, 2)))
    noisy = features @ truth + 2.0 * generator.normal(size=(count, max(classes, 2)))
    return features, noisy.argmax(axis=1)


def onehot(targets: np.ndarray, classes: int) -> np.ndarray:
    return targets[:, None].astype(float) if classes == 1 else np.eye(classes)[targets]


def probabilities(outputs: np.ndarray) -> np.ndarray:
    return expit(outputs) if outputs.shape[1] == 1 else softmax(outputs, axis=1)


def bend(p: np.ndarray) -> np.ndarray:
    """Second derivative of one instance's loss by its outputs."""
    return (p * (1 - p))[:, None] if len(p) == 1 else np.diag(p) - np.outer(p, p)


def dense_hessian(features, p, decay: float) -> np.ndarray:
    parts = [np.kron(bend(a), np.outer(x, x)) for a, x in zip(p, features, strict=True)]
    return np.mean(parts, axis=0) + decay * np.eye(len(parts[0]))


def train(features, targets, *, classes: int, decay: float, shares=None) -> np.ndarray:
    """Newton's method on sum(shares · loss) + decay / 2 · ‖W‖², to rounding; shape (width, K)."""
    count, width = features.shape
    shares = np.full(count, 1 / count) if shares is None else shares
    weights = np.zeros((classes, width))
    for _ in range(50):
        p = probabilities(features @ weights.T)
        gradient = ((p - onehot(targets, classes)) * shares[:, None]).T @ features + decay * weights
        parts = [
            s * np.kron(bend(a), np.outer(x, x))
            for s, a, x in zip(shares, p, features, strict=True)
        ]
        hessian = np.sum(parts, axis=0) + decay * np.eye(classes * width)
        weights -= np.linalg.solve(hessian, gradient.reshape(-1)).reshape(classes, width)
        if np.abs(gradient).max() < 1e-13:
            return weights.T
    raise AssertionError("Newton's method did not converge")


def own_losses(features, targets, weights) -> np.ndarray:
    p = probabilities(features @ weights)
    y = onehot(targets, weights.shape[1])
    return -np.log((p * y).sum(axis=1) + (0 if p.shape[1] > 1 else ((1 - p) * (1 - y)).sum(axis=1)))


def test_it_predicts_what_retraining_without_each_instance_does() -> None:
    features, targets = problem(count=150, width=3, classes=1)
    decay = 0.05
    weights = train(features, targets, classes=1, decay=decay)
    before = own_losses(features, targets, weights)
    truth = np.empty(150)
    for i in range(150):
        shares = np.full(150, 1 / 150)
        shares[i] = 0.0
        without = train(features, targets, classes=1, decay=decay, shares=shares)
        truth[i] = own_losses(features[[i]], targets[[i]], without)[0] - before[i]
    found = influence_scores(
        features, features @ weights, targets, weight_decay=decay, bias=False
    ).loss_change
    assert spearmanr(found, truth).statistic > 0.999
    # To second order the change of the logit is divided by 1 − h, h the leverage, and the loss
    # bends by h/2 more: first order misses about 3h/2. The curvature itself changes by a factor of
    # at most exp(change of the logit): |d log σ'| <= 1.
    p = probabilities(features @ weights)
    inverse = np.linalg.inv(150 * dense_hessian(features, p, decay))
    spread = np.einsum("nd,de,ne->n", features, inverse, features)
    leverage, change = (p * (1 - p))[:, 0] * spread, np.abs(p[:, 0] - targets) * spread
    assert (np.abs(found / truth - 1) < 2 * leverage + change).all()
    assert np.median(np.abs(found / truth - 1)) < 0.03  # three weights of 150 rows: h below 2 %


@pytest.mark.parametrize("classes", [1, 3])
def test_it_is_the_derivative_of_the_own_loss_by_the_own_weight(classes: int) -> None:
    features, targets = problem(count=20, width=3, classes=classes, seed=1)
    weights = train(features, targets, classes=classes, decay=0.02)
    found = influence_scores(features, features @ weights, targets, weight_decay=0.02, bias=False)
    for i in (0, 7, 19):
        ends = []
        for step in (-1e-4, 1e-4):
            shares = np.full(20, 1 / 20)
            shares[i] *= 1 + step
            moved = train(features, targets, classes=classes, decay=0.02, shares=shares)
            ends.append(own_losses(features[[i]], targets[[i]], moved)[0])
        # central differences: error of order step² = 1e-8, rounding 1e-16 / step = 1e-12 over 1e-3
        assert -(ends[1] - ends[0]) / 2e-4 == pytest.approx(found.loss_change[i], rel=1e-6)


def test_at_even_odds_it_is_the_leverage_of_ridge_regression() -> None:
    features, targets = problem(count=40, width=5, classes=1, seed=2)
    # p = 1/2: residual ±1/2 and curvature 1/4 for all, so that 4 · ridge is the ridge of least
    # squares, with leverages x (XᵀX/n + 4λ)⁻¹ xᵀ.
    gram = features.T @ features / 40 + 4 * 0.1 * np.eye(5)
    leverage = np.einsum("nd,de,ne->n", features, np.linalg.inv(gram), features)
    found = influence_scores(features, np.zeros(40), targets, weight_decay=0.1, bias=False)
    np.testing.assert_allclose(found.self_influence, leverage, rtol=1e-12)  # condition below 100


def test_two_softmax_outputs_are_one_logit_at_half_the_decay() -> None:
    # At the minimum w₁ = −w₂, so λ/2 (‖w₁‖² + ‖w₂‖²) = λ/4 ‖w₂ − w₁‖².
    features, targets = problem(count=60, width=4, classes=1, seed=3)
    logit = features @ train(features, targets, classes=1, decay=0.01)
    two = influence_scores(features, np.hstack([-logit, logit]) / 2, targets, weight_decay=0.02)
    one = influence_scores(features, logit, targets, weight_decay=0.01)
    np.testing.assert_allclose(two.self_influence, one.self_influence, rtol=1e-9)
    assert (one.hessian, two.hessian) == ("exact", "exact")


@pytest.mark.parametrize("classes", [1, 4])
def test_exact_and_blocks_are_the_dense_formula(classes: int) -> None:
    features, targets = problem(count=50, width=3, classes=classes, seed=4)
    outputs = np.random.default_rng(5).normal(size=(50, classes))  # anything, not a minimum
    p = probabilities(outputs)
    gradients = np.einsum("nk,nd->nkd", p - onehot(targets, classes), features).reshape(50, -1)
    dense = dense_hessian(features, p, 0.003)
    blocks = dense * np.kron(np.eye(classes), np.ones((3, 3)))
    for limit, matrix in ((3 * classes, dense), (3 * classes - 1, blocks)):
        found = influence_scores(
            features, outputs, targets, weight_decay=0.001, damping=0.002, bias=False,
            largest_hessian=limit,
        )  # fmt: skip
        expected = np.einsum("na,ab,nb->n", gradients, np.linalg.inv(matrix), gradients)
        np.testing.assert_allclose(found.self_influence, expected, rtol=1e-10)
        np.testing.assert_allclose(found.loss_change, expected / 50, rtol=1e-10)
        assert found.hessian == ("exact" if limit == 3 * classes or classes == 1 else "blocks")


def test_a_bias_is_the_weight_of_a_constant_feature_and_a_rotation_changes_nothing() -> None:
    features, targets = problem(count=50, width=3, classes=4, seed=6)
    outputs = features @ np.random.default_rng(7).normal(size=(3, 4))
    base = influence_scores(features, outputs, targets, weight_decay=0.01)
    with_one = np.hstack([features, np.ones((50, 1))])
    rotation = np.linalg.qr(np.random.default_rng(8).normal(size=(4, 4)))[0]
    for other in (with_one, with_one @ rotation):
        found = influence_scores(other, outputs, targets, weight_decay=0.01, bias=False)
        np.testing.assert_allclose(found.self_influence, base.self_influence, rtol=1e-9)


def test_tensors_of_a_network_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 3)
    features, targets = torch.randn(30, 6, requires_grad=True), torch.arange(30) % 3
    outputs = layer(features)
    found = influence_scores(features, outputs, targets, weight_decay=0.0, damping=0.1)
    again = influence_scores(
        features.detach().double().numpy(), outputs.detach().double().numpy(), targets.numpy(),
        weight_decay=0.1,
    )  # fmt: skip
    assert np.array_equal(found.self_influence, again.self_influence)
    assert (found.self_influence > 0).all()


def test_many_instances_are_handled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = problem(count=50, width=3, classes=4, seed=9)
    outputs = features @ np.random.default_rng(10).normal(size=(3, 4))
    whole = influence_scores(features, outputs, targets, weight_decay=0.01)
    monkeypatch.setattr("opacus_pil.evaluation.influence._CELLS", 50)
    parts = influence_scores(features, outputs, targets, weight_decay=0.01)
    np.testing.assert_allclose(parts.self_influence, whole.self_influence, rtol=1e-12)


def test_a_gradient_that_is_nearly_zero_is_not_rounded_to_zero() -> None:
    # p − 1 of a logit of 40 is 4e-18, which 1 − p would lose.
    found = influence_scores([[1.0], [1.0]], [40.0, 0.0], [1, 1], weight_decay=1.0, bias=False)
    three = influence_scores(
        [[1.0], [1.0]], [[0.0, 40.0], [0.0, 0.0]], [1, 1], weight_decay=1.0, bias=False
    )
    hessian = 1 + 1 / 8  # the second instance alone bends: 1/4 of two
    assert found.self_influence[0] == pytest.approx(np.exp(-80) / hessian, rel=1e-12)
    assert three.self_influence[0] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_decay": 0.0}, r"weight_decay \+ damping > 0, got 0"),
        ({"weight_decay": 1e-30}, r"singular in float64, got 1e-30. Pass a damping above"),
        ({"weight_decay": -1.0}, "weight_decay to be a finite number >= 0"),
        ({"features": np.zeros((4, 2, 1))}, r"shape \(instances, width\), got \(4, 2, 1\)"),
        ({"features": np.array([[1, 1], [1, 1], [np.nan, 1], [1, 1]])}, "first: row 2"),
        ({"features": np.ones((3, 2))}, r"outputs to have one entry per entry of features \(3\)"),
        ({"targets": [0, 1, 2, 3]}, "targets to be classes 0 to 2"),
        ({"largest_hessian": -1}, "largest_hessian to be an integer >= 0"),
    ],
)
def test_what_has_no_influence_function_is_refused(changed: dict, message: str) -> None:
    arguments = {
        "features": np.ones((4, 2)), "outputs": np.zeros((4, 3)), "targets": [0, 1, 2, 0],
        "weight_decay": 0.1, **changed,
    }  # fmt: skip
    first = [arguments.pop(name) for name in ("features", "outputs", "targets")]
    with pytest.raises(ValueError, match=message):
        influence_scores(*first, **arguments)
