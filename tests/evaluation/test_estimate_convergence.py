import math

import numpy as np
import pytest

from opacus_pil.accounting import (
    PerInstanceAccountant,
    compose_per_instance,
    sampled_gaussian_rdp,
)
from opacus_pil.evaluation import (
    estimate_convergence,
    estimated_privacy_losses,
    rank_correlation,
)

# 257 nodes from the least to the largest norm, a factor of some 400, are 2.4 % apart. The slope of
# log D over log s goes from 2 to less than 10 and back within a factor e of s, a curvature below
# 10: a chord errs by at most 10/8 · 0.024² < 1e-3.
NODES = 1e-3


def norms(seed=0, trajectories=3, checkpoints=4, instances=30):
    generator = np.random.default_rng(seed)
    size = generator.lognormal(size=instances)
    noise = generator.lognormal(sigma=0.3, size=(trajectories, checkpoints, instances))
    return size * noise


def test_one_block_without_sampling_is_the_closed_form():
    """α s² n / (2σ²), and over two runs (1/(α−1)) log mean exp((α−1)·that)."""
    measured = norms(trajectories=2, checkpoints=1)
    how = {"noise_std": 3.0, "sample_rate": 1.0, "steps_per_checkpoint": 5, "order": 4.0}
    single = 4.0 * measured**2 * 5 / (2 * 3.0**2)
    found = estimated_privacy_losses(measured[:1], **how)
    np.testing.assert_allclose(found, single[0, 0], rtol=1e-9)  # log–log chords are exact here
    both = np.log(np.exp(3 * single[:, 0]).mean(axis=0)) / 3
    np.testing.assert_allclose(estimated_privacy_losses(measured, **how), both, rtol=1e-9)


def test_sampled_steps_are_those_of_the_accountant():
    """One run, one block: the accountant charged step by step, whose levels round up."""
    measured = np.minimum(norms(1, trajectories=1, checkpoints=1), 1.0)
    accountant = PerInstanceAccountant(30, orders=[2.0], levels=2048)
    accountant.observe_all(measured[0, 0])
    for _ in range(7):
        accountant.step(indices=[], sensitivities=[], noise_multiplier=0.8, sample_rate=0.1)
    expected = accountant.rdp()[:, 0]
    found = estimated_privacy_losses(
        measured, noise_std=0.8, sample_rate=0.1, steps_per_checkpoint=7
    )
    assert (found.values <= expected * (1 + NODES)).all()
    np.testing.assert_allclose(found, expected, rtol=0.02)  # a level of 2,048 is 1 % of the norm


def test_several_runs_and_checkpoints_are_composed_by_the_theorem():
    measured, steps = norms(2), np.array([1, 2, 3, 4])
    instances = measured.transpose(2, 0, 1)

    def exact(order):
        values = sampled_gaussian_rdp(
            instances, noise_multiplier=5.0, sample_rate=0.2, orders=[order]
        )
        return values[..., 0] * steps

    expected = compose_per_instance(exact, order=3.0, holder_exponent=12.0).rdp
    found = estimated_privacy_losses(
        measured, noise_std=5.0, sample_rate=0.2, steps_per_checkpoint=steps, order=3.0
    )
    np.testing.assert_allclose(found, expected, rtol=NODES)


def test_norms_of_zero_lose_nothing_and_larger_norms_lose_more():
    measured = np.array([[[0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0]]])

    def losses(part, rate=0.1):
        return estimated_privacy_losses(part, noise_std=1.0, sample_rate=rate).values

    found = losses(measured)
    assert found[0] == 0.0
    assert 0 < found[1] < found[2]
    assert losses(0 * measured).tolist() == losses(measured, rate=0.0).tolist() == [0] * 3
    some = measured.copy()
    some[1] = 0.0  # one trajectory without gradients
    assert (losses(some)[1:] < found[1:]).all()


def test_a_clipping_bound_is_that_of_the_norms_and_the_result_says_where_it_came_from():
    measured = norms(5)
    how = {"noise_std": 2.0, "sample_rate": 0.2}
    free = estimated_privacy_losses(measured, **how)
    known = estimated_privacy_losses(measured, **how, max_grad_norm=0.9)
    by_hand = estimated_privacy_losses(np.minimum(measured, 0.9), **how)
    np.testing.assert_array_equal(known.values, by_hand.values)
    assert (known.values <= free.values * (1 + NODES)).all()  # chords of two grids
    assert free.max_grad_norm is None
    assert known.max_grad_norm == 0.9
    assert any("not clipped" in reason for reason in free.reasons)
    ruled = estimated_privacy_losses(measured, **how, max_grad_norm="median")
    assert ruled.max_grad_norm == np.median(measured)
    assert any("private" in reason for reason in ruled.reasons)
    assert not any("private" in reason for reason in known.reasons)
    assert {one.guarantee for one in (free, known, ruled)} == {"estimate"}
    with pytest.raises(ValueError, match="median"):
        estimated_privacy_losses(measured, **how, max_grad_norm="mean")


def rows(result, varied):
    return {row.value: row for row in result if row.varied == varied}


def test_rankings_that_cannot_differ_agree():
    """Norms that change neither with time nor between runs: everything ranks by the norm."""
    measured = np.broadcast_to(norms(3)[0, 0], (4, 5, 30))
    result = estimate_convergence(
        measured, noise_std=[1.0, 0.1, 10.0], sample_rate=0.1, resamples=200
    )
    assert len(result) == 2 + 3 + 2  # noises; 1, 2, 4 checkpoints; 1, 2 trajectories
    for row in result:
        assert row.correlation.value == pytest.approx(1.0, abs=1e-12), row
        assert row.guarantee == "estimate"


def test_every_comparison_is_the_rank_correlation_of_the_losses_it_names():
    measured = norms(4, trajectories=5)
    how = {"sample_rate": 0.3, "order": 2.0}
    result = estimate_convergence(
        measured, noise_std=[2.0, 20.0], steps_per_checkpoint=3, resamples=200, **how
    )

    def losses(part, noise=2.0, steps=3):
        return estimated_privacy_losses(part, noise_std=noise, steps_per_checkpoint=steps, **how)

    whole = losses(measured)
    by_noise = rows(result, "noise_std")[20.0]
    assert by_noise.correlation == rank_correlation(
        losses(measured, noise=20.0), target=whole, resamples=200
    )
    assert by_noise.overlap
    few = rows(result, "checkpoints")
    assert sorted(few) == [1, 2]
    assert few[2].correlation == rank_correlation(
        losses(measured[:, [0, 2]], steps=[6, 6]), target=whole, resamples=200
    )
    assert few[1].correlation == rank_correlation(
        losses(measured[:, :1], steps=12), target=whole, resamples=200
    )
    runs = rows(result, "trajectories")
    assert sorted(runs) == [1, 2]
    assert not runs[1].overlap
    single = [losses(measured[[run]]) for run in range(4)]
    pairs = [rank_correlation(single[i], target=single[i + 1]).value for i in (0, 2)]
    assert runs[1].correlation.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert "2 disjoint pairs" in runs[1].compared_with
    two = rank_correlation(losses(measured[:2]), target=losses(measured[2:4]), resamples=200)
    assert runs[2].correlation == two


def test_more_trajectories_repeat_themselves_better():
    """Noise between runs averages out: the correlation of two halves rises with their size."""
    generator = np.random.default_rng(5)
    size = generator.lognormal(sigma=0.3, size=400)
    measured = size * generator.lognormal(sigma=0.6, size=(16, 1, 400))
    result = estimate_convergence(measured, noise_std=[50.0], sample_rate=0.1, resamples=200)
    values = [row.correlation.value for row in rows(result, "trajectories").values()]
    assert values == sorted(values)
    # One run against another, log-normal: ρ = .3²/(.3² + .6²) = 0.2 between logs, so Spearman's is
    # (6/π) asin(ρ/2); eight pairs of 400 have a deviation below 1/√3,200: four of them.
    expected = 6 / math.pi * math.asin(0.2 / 2)
    assert values[0] == pytest.approx(expected, abs=4 / math.sqrt(3200))


def test_the_order_of_the_instances_does_not_matter():
    measured = norms(6)
    order = np.random.default_rng(0).permutation(30)
    first, second = (
        estimate_convergence(part, noise_std=[1.0, 3.0], sample_rate=0.1, resamples=100)
        for part in (measured, measured[:, :, order])
    )
    for one, other in zip(first, second, strict=True):
        assert other.correlation.value == pytest.approx(one.correlation.value, abs=1e-12)


def test_single_runs_and_checkpoints_have_nothing_to_compare():
    result = estimate_convergence(
        norms(7, trajectories=1, checkpoints=1), noise_std=[1.0], sample_rate=0.1
    )
    assert result == ()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"norms": [[1.0, 2.0]]}, "trajectories, checkpoints, instances"),
        ({"norms": [[[-1.0, 2.0]]]}, "norms"),
        ({"norms": [[[math.nan, 2.0]]]}, "norms"),
        ({"norms": [[[1.0]]]}, "number of instances"),
        ({"noise_std": []}, "number of noises"),
        ({"noise_std": [0.0]}, "noise_std"),
        ({"steps_per_checkpoint": 0}, "steps_per_checkpoint"),
        ({"steps_per_checkpoint": [1, 2]}, "same length"),
        ({"steps_per_checkpoint": 1.5}, "steps_per_checkpoint"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"order": 1.0}, "order"),
    ],
)
def test_unusable_arguments_are_refused(change, match):
    arguments = {"norms": [[[1.0, 2.0]]], "noise_std": [1.0], "sample_rate": 0.1, **change}
    with pytest.raises(ValueError, match=match):
        estimate_convergence(arguments.pop("norms"), **arguments)
