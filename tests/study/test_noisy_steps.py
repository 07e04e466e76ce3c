"""The sweeps' plain loop is Opacus's noisy step with a clipping bound that never binds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn as nn
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil.accounting import sampled_gaussian_rdp
from opacus_pil.study.noisy_steps import make_model, noise_multiplier, run_steps
from opacus_pil.study.privacy import contracted_losses, privacy_losses, ties_broken
from opacus_pil.study.settings import Condition, study_settings

SIZE, BATCH, STEPS, SEED = 60, 12, 20, 3


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(SIZE, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (SIZE,), generator=generator)


def plain(condition, rows=None):
    images, labels = data()
    module = make_model(condition.model, side=8, seed=1)
    run_steps(
        module, images=images, labels=labels,
        rows=torch.arange(SIZE) if rows is None else rows,
        condition=condition, sample_rate=BATCH / SIZE, batch_size=BATCH, steps=STEPS, seed=SEED,
    )  # fmt: skip
    return module


def with_opacus(condition):
    module = make_model(condition.model, side=8, seed=1)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=condition.step_size, weight_decay=condition.weight_decay
    )
    bound = 1e4  # no gradient is longer: nothing is clipped
    private, private_optimizer, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(
            TensorDataset(*data()),
            batch_size=BATCH,
            generator=torch.Generator().manual_seed(2 * SEED),
        ),
        noise_multiplier=noise_multiplier(condition, batch_size=BATCH) / bound,
        max_grad_norm=bound,
        noise_generator=torch.Generator().manual_seed(2 * SEED + 1),
    )
    # Iterating a DataLoader draws a base seed from the same generator before the first coins.
    sampler = iter(loader.batch_sampler)
    images, labels = data()
    done = 0
    while done < STEPS:
        for drawn in sampler:
            private_optimizer.zero_grad()
            nn.functional.cross_entropy(private(images[drawn]), labels[drawn]).backward()
            private_optimizer.step()
            done += 1
        sampler = iter(loader.batch_sampler)
    return module


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_noisy_steps_are_those_of_opacus_without_clipping(model):
    condition = Condition("", model, 0.01, 0.01, weight_decay=0.01)
    ours, theirs = plain(condition), with_opacus(condition)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # float32: summed in another order, 20 steps long; noise of another seed would differ by
        # 0.01 · sqrt(20) per parameter.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)


def test_without_noise_it_is_sgd():
    condition = Condition("", "mlp", 0.0, 0.01)
    noisy = plain(Condition("", "mlp", 0.01, 0.01))
    quiet = plain(condition)
    far = max(
        (a - b).abs().max().item()
        for a, b in zip(noisy.parameters(), quiet.parameters(), strict=True)
    )
    assert far > 0.01  # the noise is there where it is asked for
    assert all(
        torch.equal(a, b)
        for a, b in zip(quiet.parameters(), plain(condition).parameters(), strict=True)
    )


def test_rows_that_are_left_out_have_no_influence():
    condition = Condition("", "mlp", 0.01, 0.01)
    images, labels = data()
    rows = torch.arange(10, SIZE)
    first = plain(condition, rows)
    changed = images.clone()
    changed[:10] = 0.0
    module = make_model("mlp", side=8, seed=1)
    run_steps(
        module, images=changed, labels=labels.flip(0).where(torch.arange(SIZE) < 10, labels),
        rows=rows, condition=condition, sample_rate=BATCH / SIZE, batch_size=BATCH, steps=STEPS,
        seed=SEED,
    )  # fmt: skip
    for a, b in zip(first.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_models_have_the_promised_size_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    sizes = {
        kind: sum(p.numel() for p in make_model(kind, side=28, seed=0).parameters())
        for kind in ("cnn", "mlp")
    }
    assert sizes == {"cnn": 5386, "mlp": 25450}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert make_model("cnn", side=8, seed=0)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_condition_accounts_for_the_noise_it_has():
    with pytest.raises(ValueError, match="nominal_noise_std"):
        Condition("", "mlp", 0.02, 0.01)


def test_privacy_losses_are_the_sum_over_steps_rounded_up():
    norms = np.array([[0.01, 0.5, 3.0, 40.0], [0.01, 0.1, 9.0, 1e-5]])
    how = {"steps_per_epoch": 7, "noise_multiplier": 2.0, "sample_rate": 0.1, "order": 2.0}
    found = privacy_losses(norms, **how).values
    exact = 7 * sum(
        sampled_gaussian_rdp(
            np.maximum(row, 1e-3), noise_multiplier=2.0, sample_rate=0.1, orders=[2.0]
        )[:, 0]
        for row in norms
    )
    assert (found >= exact * (1 - 1e-12)).all()  # rounding of a sum of 14 terms
    # A level is at most 1.5 % above a norm (1,023 of them from 1e-3 to 40), and at order 2 the
    # divergence log(1 + q² (exp(s²/z²) − 1)) grows with an elasticity of at most 2 s²/z² · 1.02.
    assert (found[:3] <= exact[:3] * 1.03 ** np.maximum(1.0, norms[:, :3].max(0) ** 2 / 4)).all()
    assert (np.diff(found[:4]) > 0).all()
    clipped = privacy_losses(norms, **how, max_grad_norm=1.0)
    same = privacy_losses(np.minimum(norms, 1.0), **how)
    np.testing.assert_array_equal(clipped.values, same.values)
    assert clipped.guarantee == "estimate"
    ruled = privacy_losses(norms, **how, max_grad_norm="median")
    assert ruled.max_grad_norm == np.median(norms)
    assert any("median" in reason for reason in ruled.reasons)


def test_contracted_losses_are_the_recursion_over_all_steps():
    norms = np.array([[0.01, 0.5, 3.0], [0.2, 0.1, 9.0]])
    found = contracted_losses(norms, steps_per_epoch=5, decay_per_epoch=0.9, max_grad_norm=2.0)
    total = np.zeros(3)
    for row in np.repeat(norms, 5, axis=0):
        total = 0.9 ** (1 / 5) * total + np.minimum(row / 2.0, 1.0)
    np.testing.assert_allclose(found.values, total, rtol=1e-12)  # ten steps, an ulp or two each
    assert found.guarantee == "estimate"


def test_ties_are_broken_by_the_second_loss_alone():
    first, second = np.array([2.0, 1.0, 2.0, 2.0]), np.array([5.0, 9.0, 4.0, 6.0])
    assert ties_broken(first, second).tolist() == [2.0, 0.0, 1.0, 3.0]


def test_the_three_forms_shrink_and_unknown_ones_are_refused():
    full, quick, smallest = (
        study_settings("digits", form=form) for form in ("full", "quick", "smallest")
    )
    assert len(full.conditions) == len(quick.conditions) == len(smallest.conditions) == 4
    assert full.sizes.trainings > quick.sizes.trainings
    assert full.sizes.train > quick.sizes.train > smallest.sizes.train
    with pytest.raises(ValueError, match="form"):
        study_settings("digits", form="huge")
    with pytest.raises(ValueError, match="model"):
        study_settings("digits", model="transformer")
