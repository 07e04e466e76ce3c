"""Means over runs without an instance; the KL divergence is that of the transcript."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opacus_pil.accounting import sampled_gaussian_kl
from opacus_pil.evaluation import held_out_losses, mean_held_out

RUNS, STEPS, SIZE = 4, 3, 5
ULPS = 1e-13  # sums of a dozen terms


def folds(seed=0):
    generator = np.random.default_rng(seed)
    norms = generator.lognormal(size=(RUNS, STEPS, SIZE))
    apart = generator.random((RUNS, SIZE)) < 0.5
    apart[0, 0] = True
    apart[:, 4] = False  # in every run
    return norms, apart


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_it_is_the_mean_of_sums_over_the_runs_without_each_instance(rate):
    norms, apart = folds()
    found = held_out_losses(
        norms, held_out=apart, noise_multiplier=1.3, sample_rate=rate, max_grad_norm=0.8,
        steps_per_checkpoint=[1, 2, 3],
    )  # fmt: skip
    for row in range(SIZE):
        runs = [
            sum(
                times * float(sampled_gaussian_kl(
                    min(norms[run, step, row] / 0.8, 1.0), noise_multiplier=1.3, sample_rate=rate
                ))
                for step, times in enumerate([1, 2, 3])
            )
            for run in np.flatnonzero(apart[:, row])
        ]  # fmt: skip
        if runs:
            assert found.values[row] == pytest.approx(np.mean(runs), rel=ULPS)
        else:
            assert np.isnan(found.values[row])
    assert np.isnan(found.values[4])


def test_without_sampling_it_is_the_formula():
    """Σ_t E‖clip(g)‖² / (2z²C²)."""
    norms, apart = folds(1)
    apart[:] = True
    found = held_out_losses(
        norms, held_out=apart, noise_multiplier=2.0, sample_rate=1.0, max_grad_norm=1.5
    )
    expected = (np.minimum(norms, 1.5) ** 2).sum(axis=1).mean(axis=0) / (2 * (2.0 * 1.5) ** 2)
    np.testing.assert_allclose(found.values, expected, rtol=ULPS)


def test_it_is_the_divergence_of_a_transcript_by_simulation():
    """Two steps of a chain whose gradient depends on where the first step went.

    Without the instance θ stays noise; with it the sum moves by g(θ). The log density ratio of the
    transcript, averaged over runs without it, is the KL divergence.
    """
    generator = np.random.default_rng(0)
    runs, z = 40_000, 1.5
    first = z * generator.normal(size=runs)
    second = z * generator.normal(size=runs)
    gradients = np.stack([np.full(runs, 0.6), 1.0 / (1.0 + first**2)])  # clipped at 1
    moved = np.stack([first, second])
    ratio = (-(moved**2) + (moved - gradients) ** 2).sum(axis=0) / (2 * z**2)
    found = held_out_losses(
        gradients.T[:, :, None], held_out=np.ones((runs, 1), dtype=bool), noise_multiplier=z,
        sample_rate=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    error = 4 * ratio.std() / math.sqrt(runs)  # four standard errors of the simulation
    assert found.values[0] == pytest.approx(ratio.mean(), abs=error)


def test_what_a_run_with_the_instance_measured_is_not_read():
    norms, apart = folds()
    how = {"held_out": apart, "noise_multiplier": 1.0, "sample_rate": 0.1}
    poisoned = np.where(apart[:, None, :], norms, np.nan)
    for bound in (1.0, "median"):
        whole = held_out_losses(norms, max_grad_norm=bound, **how)
        part = held_out_losses(poisoned, max_grad_norm=bound, **how)
        np.testing.assert_array_equal(whole.values, part.values)
        assert whole.max_grad_norm == part.max_grad_norm


def test_the_result_says_what_it_rests_on():
    norms, apart = folds()
    how = {"held_out": apart, "noise_multiplier": 1.0, "sample_rate": 0.1}
    plain = held_out_losses(norms, max_grad_norm=1.0, **how)
    ruled = held_out_losses(norms, max_grad_norm="median", steps_per_checkpoint=2, **how)
    assert plain.guarantee == ruled.guarantee == "estimate"
    assert "no confidence value" in plain.reasons[0]
    assert not any("median" in reason for reason in plain.reasons)
    assert any("median" in reason for reason in ruled.reasons)
    assert any("held" in reason for reason in ruled.reasons)
    read = norms.transpose(0, 2, 1)[apart]
    assert ruled.max_grad_norm == np.median(read)
    assert np.array_equal(np.asarray(plain), plain.values, equal_nan=True)
    assert len(plain) == SIZE


def test_held_out_loss_is_the_mean_over_the_runs_without():
    values = np.arange(6.0).reshape(2, 3)
    mask = [[True, False, False], [True, True, False]]
    found = mean_held_out(values, held_out=mask)
    assert found[:2].tolist() == [1.5, 4.0]
    assert np.isnan(found[2])


def test_wrong_shapes_and_values_are_refused():
    norms, apart = folds()
    how = {"noise_multiplier": 1.0, "sample_rate": 0.1, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="true and false"):
        held_out_losses(norms, held_out=apart.astype(int), **how)
    with pytest.raises(ValueError, match="of shape"):
        held_out_losses(norms, held_out=apart[:, :2], **how)
    with pytest.raises(ValueError, match="norms"):
        held_out_losses(-norms, held_out=apart, **how)
    with pytest.raises(ValueError, match="median"):
        held_out_losses(norms, held_out=apart, **(how | {"max_grad_norm": "mean"}))
    with pytest.raises(ValueError, match="max_grad_norm"):
        held_out_losses(norms, held_out=apart, **(how | {"max_grad_norm": 0.0}))
    with pytest.raises(ValueError, match="median > 0"):
        held_out_losses(0 * norms, held_out=apart, **(how | {"max_grad_norm": "median"}))
    with pytest.raises(ValueError, match="one shape"):
        mean_held_out(np.ones((2, 2)), held_out=np.ones((2, 3), dtype=bool))
