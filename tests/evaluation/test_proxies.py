"""Interquartile range of loss traces and last-layer leverage against their definitions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil.evaluation import (
    DIFFICULTY_SCORES,
    DifficultyTracker,
    difficulty_scores,
    last_layer_features,
    last_layer_leverage,
    loss_trace_iqr,
)

ROUNDING = 1e-9  # solving against refitting, condition numbers below 1e4


def visits(seed=0, size=6, steps=40):
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        rows = np.flatnonzero(generator.random(size - 1) < 0.4)  # the last one is never drawn
        yield rows, generator.normal(size=(len(rows), 3)), generator.integers(3, size=len(rows))


def tracked(traces=True, steps=40):
    tracker = DifficultyTracker(6, early_steps=0, traces=traces)
    by_hand = [[] for _ in range(6)]
    for rows, logits, classes in visits(steps=steps):
        tracker.update(logits, classes, indices=rows)
        losses = nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(classes), reduction="none"
        )
        for row, loss in zip(rows, losses.tolist(), strict=True):
            by_hand[row].append(loss)
    return tracker, by_hand


def test_the_tracker_has_the_quartiles_of_every_visit():
    tracker, by_hand = tracked()
    found = difficulty_scores(tracker)["loss_trace_iqr"]
    for row, losses in enumerate(by_hand[:5]):
        low, high = np.quantile(losses, [0.25, 0.75])
        assert found[row] == pytest.approx(high - low, rel=1e-12)  # two ways to log-softmax
    assert np.isnan(found[5])


def test_traces_are_kept_only_where_asked_for_and_change_no_other_score():
    with_them, without = tracked()[0], tracked(traces=False)[0]
    scores, others = difficulty_scores(with_them), difficulty_scores(without)
    assert set(scores) - set(others) == {"loss_trace_iqr"}
    for name, values in others.items():
        assert np.array_equal(scores[name], values, equal_nan=True), name
    assert set(difficulty_scores([with_them, without])) == set(others)
    assert set(DIFFICULTY_SCORES) - set(scores) == {"leverage", "held_out_loss"}


def test_traces_are_saved_and_a_state_without_them_is_refused():
    tracker, _ = tracked(steps=15)
    other = DifficultyTracker(6, early_steps=0, traces=True)
    other.load_state_dict(copy.deepcopy(tracker.state_dict()))
    for number, (rows, logits, classes) in enumerate(visits()):
        if number >= 15:
            other.update(logits, classes, indices=rows)
    whole = difficulty_scores(tracked()[0])["loss_trace_iqr"]
    assert np.array_equal(difficulty_scores(other)["loss_trace_iqr"], whole, equal_nan=True)
    with pytest.raises(ValueError, match="without"):
        other.load_state_dict(DifficultyTracker(6, early_steps=0).state_dict())
    assert np.array_equal(difficulty_scores(other)["loss_trace_iqr"], whole, equal_nan=True)


def test_full_passes_and_visits_have_the_same_range():
    passes = np.random.default_rng(0).random((7, 4))
    tracker = DifficultyTracker(4, early_steps=0, traces=True)
    for losses in passes:  # logits (0, z) with loss log(1 + e^−z)
        tracker.update(-np.log(np.expm1(losses)), np.ones(4), indices=np.arange(4))
    np.testing.assert_allclose(
        difficulty_scores(tracker)["loss_trace_iqr"], loss_trace_iqr(passes), rtol=1e-9
    )  # exp, log and back
    assert np.isnan(loss_trace_iqr(passes[:1])).all()
    with pytest.raises(ValueError, match="passes, instances"):
        loss_trace_iqr([1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        loss_trace_iqr([[1.0], [np.nan]])


def test_leverage_is_the_weight_of_ones_own_target_in_ones_own_fit():
    """Ridge regression of unit vectors: instance i's fitted value at i is h_i."""
    features = np.random.default_rng(0).normal(size=(12, 3))
    wide = np.hstack([features, np.ones((12, 1))])
    found = last_layer_leverage(features, ridge=0.7)
    for row in range(12):
        rows = np.vstack([wide, np.sqrt(0.7) * np.eye(4)])  # ridge as rows of data
        target = np.zeros(16)
        target[row] = 1.0
        weights, *_ = np.linalg.lstsq(rows, target, rcond=None)
        assert found[row] == pytest.approx(wide[row] @ weights, rel=ROUNDING)
    values = np.linalg.eigvalsh(wide.T @ wide)
    assert found.sum() == pytest.approx((values / (values + 0.7)).sum(), rel=ROUNDING)
    assert ((found > 0) & (found < 1)).all()


def test_an_outlier_has_the_largest_leverage_and_the_edges_hold():
    features = np.random.default_rng(0).normal(size=(50, 2))
    features[7] = 100.0
    assert last_layer_leverage(features, ridge=1e-3).argmax() == 7
    bias = last_layer_leverage(np.empty((4, 0)), ridge=1.0)
    assert bias == pytest.approx([0.2] * 4, rel=ROUNDING)
    with pytest.raises(ValueError, match="ridge"):
        last_layer_leverage(features, ridge=0.0)
    with pytest.raises(ValueError, match="features"):
        last_layer_leverage([1.0, 2.0], ridge=1.0)
    with pytest.raises(ValueError, match="features"):
        last_layer_leverage([[np.inf]], ridge=1.0)


def test_features_are_the_inputs_of_the_last_linear_layer():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)).train()
    x = torch.randn(7, 4)
    found = last_layer_features(module, x, batch_size=3)
    np.testing.assert_allclose(
        found, module[1](module[0](x)).detach().numpy(), rtol=1e-6
    )  # float32
    assert module.training
    assert not module[3]._forward_pre_hooks
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        last_layer_features(nn.ReLU(), x)
    with pytest.raises(ValueError, match="one vector"):
        last_layer_features(nn.Linear(4, 2), torch.randn(7, 3, 4))
