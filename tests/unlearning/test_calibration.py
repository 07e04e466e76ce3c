"""The line through pilot sets: its intervals, its honesty about what was not reached."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy import stats

from opacus_pil.evaluation import calibrate
from opacus_pil.unlearning import PredictedPlan, RetrainPlan
from opacus_pil.unlearning.pilots import fit_calibration, mean_log_loss

from .runs import network_run

COMMON = {"max_steps": 1000, "method": "dp_sgd", "order": 2.0}


def test_points_on_a_line_are_predicted_exactly():
    fit = fit_calibration([0.0, 1.0, 2.0, 4.0], times=[10, 15, 20, 30], **COMMON)
    found = fit.predict(3.0)
    assert fit.slope == pytest.approx(5.0)
    assert fit.r_squared == pytest.approx(1.0)
    # residuals are rounding errors of the fit
    assert found.low == pytest.approx(25.0, abs=1e-6)
    assert found.high == pytest.approx(25.0, abs=1e-6)
    assert not found.extrapolated
    assert fit.predict(5.0).extrapolated
    assert fit.predict(-100.0).low == fit.predict(-100.0).high == 0.0  # no negative steps


def test_prediction_intervals_hold_as_often_as_they_say():
    """Normal residuals: a new set falls into a 90 % interval in 90 % of the worlds."""
    rng = np.random.default_rng(0)
    worlds, hits = 1000, 0
    for _ in range(worlds):
        x = rng.uniform(-3, 5, size=8)
        times = np.rint(200 + 40 * x + 15 * rng.normal(size=8)).astype(int)
        new = rng.uniform(-3, 5)
        truth = 200 + 40 * new + 15 * rng.normal()
        found = fit_calibration(x, times=times.tolist(), **COMMON).predict(new)
        hits += found.low <= truth <= found.high
    # rounding to whole steps moves residuals of 15 by at most 0.5
    low, high = stats.binom(worlds, 0.9).ppf([1e-5, 1 - 1e-5])
    assert low <= hits <= high


def test_the_same_line_as_least_squares_by_hand():
    x, y = np.array([0.0, 1.0, 3.0, 7.0]), np.array([3, 4, 11, 18])
    fit = fit_calibration(x, times=y.tolist(), **COMMON)
    design = np.stack([np.ones(4), x], axis=1)
    solution, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    np.testing.assert_allclose([fit.intercept, fit.slope], solution)
    at = np.array([1.0, 2.5])
    variance = residual[0] / 2 * (1 + at @ np.linalg.inv(design.T @ design) @ at)
    half = stats.t.ppf(0.95, 2) * math.sqrt(variance)
    found = fit.predict(2.5)
    np.testing.assert_allclose([found.low, found.high], at @ solution + np.array([-half, half]))


def test_a_set_that_was_not_forgotten_leaves_no_upper_end():
    losses = [0.0, 1.0, 2.0, 3.0]
    assert math.isfinite(fit_calibration(losses, times=[10, 15, 20, 25], **COMMON).predict(0).high)
    fit = fit_calibration(losses, times=[10, 15, 20, None], **COMMON)
    assert fit.predict(0.0).high == fit.predict(3.0).high == math.inf


@pytest.mark.parametrize("times", [[1, 2], [1, None, 2, None]])
def test_too_few_pilots_are_refused(times):
    with pytest.raises(ValueError, match="three pilot sets"):
        fit_calibration(np.arange(len(times), dtype=float), times=times, **COMMON)


def test_losses_of_zero_or_infinity_have_no_rank():
    orders = np.array([2.0, 3.0])
    assert mean_log_loss(np.array([[1.0, 9], [math.e**2, 9]]), orders=orders, order=2.0) == 1.0
    for bad in (0.0, math.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            mean_log_loss(np.array([[bad, 1.0]]), orders=orders, order=2.0)
    with pytest.raises(ValueError, match="one of the ledger's orders"):
        mean_log_loss(np.ones((1, 2)), orders=orders, order=2.5)


@pytest.fixture(scope="module")
def calibrated():
    run = network_run()
    unlearning = run.unlearning()
    oracle = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))
    oracle.load_state_dict(unlearning.module.state_dict())
    before = run.engine.per_instance.rdp()
    order = np.argsort(before[:, 0])
    fit = calibrate(
        unlearning,
        pilot_sets=[order[:4], order[20:24], order[-4:]],
        oracles=lambda rows: [oracle],
        dataset=run.dataset,
        criterion=run.criterion,
        max_steps=6,
        tolerance=100.0,  # reached at once: times are known
        stay=1,
    )
    return run, unlearning, before, order, fit


def test_pilots_run_on_branches(calibrated):
    run, unlearning, before, _, fit = calibrated
    np.testing.assert_array_equal(run.engine.per_instance.rdp(), before)
    assert unlearning.forgotten == frozenset()
    assert fit.times == (0, 0, 0)
    assert list(fit.log_losses) == sorted(fit.log_losses)


def test_a_calibrated_plan_is_predicted(calibrated):
    _, unlearning, _, order, fit = calibrated
    plan = unlearning.plan(order[30:34], calibration=fit)
    assert isinstance(plan, PredictedPlan)
    assert plan.steps == 0
    assert plan.interval == (0.0, 0.0)
    assert "steps, predicted" in str(plan)
    assert not hasattr(plan, "epsilon")
    with pytest.raises(ValueError, match="calibration alone"):
        unlearning.plan(order[:2], calibration=fit, epsilon=1.0, delta=0.1)
    far = fit_calibration(
        [fit.log_losses[0] - 9, fit.log_losses[0] - 8, fit.log_losses[0] - 7, fit.log_losses[0]],
        times=[1, 2, 3, None],
        **COMMON,
    )
    assert isinstance(unlearning.plan(order[:4], calibration=far), RetrainPlan)


def test_a_branch_shares_nothing_that_changes(calibrated):
    _, unlearning, _, _, _ = calibrated
    weights = {k: v.clone() for k, v in unlearning.module.state_dict().items()}
    branch = unlearning.branch()
    branch.unlearn(branch.plan([1], steps=3, method="finetuning"), seed=0)
    assert branch.forgotten == {1}
    assert unlearning.forgotten == frozenset()
    for name, value in unlearning.module.state_dict().items():
        assert torch.equal(value, weights[name])
