"""Recorded norms are the true ones, and the clip around them is Opacus's or the cap's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from opacus_pil.capture.clipping import checked_caps, clip_factors
from opacus_pil.capture.norms import record_norms
from opacus_pil.capture.recorder import Recorder
from opacus_pil.capture.tracker import BatchTracker
from opacus_pil.errors import UnsupportedError
from tests.capture.models import Words, convolutional, images, one_by_one_norms, sentences

FLOAT32, FLOAT64 = 1e-4, 1e-9  # as in test_sweep
BOUND = 0.5
CRITERION = nn.CrossEntropyLoss()


def stepper(module, *, ghost=False, recorded=True, noise=0.0, reduction="mean", **recorder):
    """One optimizer step as Opacus runs it; `recorded` adds our capture."""
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    options = {
        "noise_multiplier": noise, "max_grad_norm": BOUND, "expected_batch_size": 8,
        "loss_reduction": reduction,
    }  # fmt: skip
    tracker, owner = BatchTracker(), nn.Identity()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=BOUND, loss_reduction=reduction
        )
        optimizer = DPOptimizerFastGradientClipping(inner, **options)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion, reduction)
    else:
        wrapped = GradSampleModule(module, loss_reduction=reduction)
        optimizer = DPOptimizer(inner, **options)
    record = None
    if recorded:
        if recorder.get("caps") is not None:
            recorder["caps"] = recorder["caps"].__getitem__
        record = Recorder(tracker, **recorder)
        record_norms(optimizer, record, module=wrapped)

    def step(data, rows, *, published="same"):
        optimizer.zero_grad()
        if published is not None:
            tracker.publish(rows if published == "same" else published, owner=owner)
        inputs, targets = data[rows]
        criterion(wrapped(inputs), targets).backward()
        optimizer.step()
        return None if record is None else record.take(max_grad_norm=BOUND)

    return step, optimizer


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
@pytest.mark.parametrize(
    ("make", "data", "tolerance"),
    [
        (convolutional, images, FLOAT32),
        (Words, sentences, FLOAT32),
        (
            lambda: convolutional(dtype=torch.float64),
            lambda: images(dtype=torch.float64),
            FLOAT64,
        ),
    ],
    ids=["convolutional", "words", "float64"],
)
def test_recorded_norms_are_those_of_each_instance_alone(make, data, tolerance, ghost, reduction):
    torch.manual_seed(1)
    module, dataset, rows = make(), data(), [5, 0, 17, 9]
    plain = type(module)() if isinstance(module, Words) else make()
    plain.load_state_dict(module.state_dict())
    truth = one_by_one_norms(plain, dataset, rows, nn.CrossEntropyLoss())
    step, _ = stepper(module, ghost=ghost, reduction=reduction)
    found = step(dataset, rows)
    np.testing.assert_allclose(found.norms, truth, rtol=tolerance)
    assert found.indices.tolist() == rows
    assert found.max_grad_norm == BOUND


@pytest.mark.parametrize("caps", [None, np.ones(60)], ids=["no caps", "caps of one"])
def test_the_fused_clip_is_opacus_own_bit_for_bit(caps):
    sums = []
    for recorded in (False, True):
        torch.manual_seed(2)
        module = convolutional()
        options = {"caps": caps} if recorded else {}
        step, _ = stepper(module, recorded=recorded, **options)
        seen = []
        for rows in ([1, 2, 3, 40], [], [8], list(range(60))):
            step(images(), rows)
            seen += [p.summed_grad.clone() for p in module.parameters()]
            seen += [p.detach().clone() for p in module.parameters()]
        sums.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


def test_no_instance_contributes_more_than_its_cap():
    dataset, caps = images(), np.linspace(0.0, 1.0, 60)
    for row in (0, 1, 20, 59):
        torch.manual_seed(3)
        module = convolutional()
        step, _ = stepper(module, caps=caps)
        norm = step(dataset, [row]).norms[0]
        contribution = sum(p.summed_grad.double().square().sum() for p in module.parameters())
        size = float(contribution) ** 0.5
        assert size <= caps[row] * BOUND * (1 + 1e-6)  # float32 rounding of the factor
        # Not clipped more than asked for either; the 1e-6 inside Opacus's factor is below 1e-4.
        assert size >= (1 - FLOAT32) * min(norm, caps[row] * BOUND)


def test_a_capped_out_instance_cannot_harm_even_with_nan():
    pixels, labels = images().tensors
    pixels = pixels.clone()
    pixels[4] = torch.nan
    broken = torch.utils.data.TensorDataset(pixels, labels)
    caps = np.ones(60)
    caps[4] = 0.0
    sums = []
    for rows in ([1, 4, 2], [1, 2]):
        torch.manual_seed(4)
        module = convolutional()
        step, _ = stepper(module, caps=caps, reduction="sum")
        assert np.isfinite(step(broken, rows).norms).all()
        sums.append(torch.cat([p.summed_grad.flatten() for p in module.parameters()]))
    # The same two gradients, summed inside batches of different length.
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
def test_a_gradient_that_is_not_finite_is_told_and_stops_only_caps(ghost):
    pixels, labels = images().tensors
    pixels = pixels.clone()
    pixels[4] = torch.nan
    data = torch.utils.data.TensorDataset(pixels, labels)
    step, _ = stepper(convolutional(), ghost=ghost)
    found = step(data, [1, 4, 2])
    assert found.unfinite.tolist() == [False, True, False]
    step, _ = stepper(convolutional(), ghost=ghost, caps=np.ones(60))
    with pytest.raises(UnsupportedError, match=r"1 of 3 not finite \(first: instance 4\)"):
        step(data, [1, 4, 2])


@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
def test_an_empty_batch_is_a_step_without_norms(ghost):
    step, _ = stepper(convolutional(), ghost=ghost)
    found = step(images(), [])
    assert found.indices.tolist() == []
    assert found.norms.tolist() == []
    assert step(images(), [3]).indices.tolist() == [3]


@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
@pytest.mark.parametrize("published", [None, [1, 2, 3]], ids=["nothing", "another length"])
def test_rows_that_do_not_fit_the_norms_are_unknown(ghost, published):
    step, _ = stepper(convolutional(), ghost=ghost)
    found = step(images(), [1, 2], published=published)
    assert found.indices is None
    assert found.mismatch
    assert step(images(), [1, 2]).indices.tolist() == [1, 2]  # and the next step is known again


@pytest.mark.parametrize("published", [None, [1, 2, 3]], ids=["nothing", "another length"])
def test_caps_refuse_unknown_rows_before_anything_moves(published):
    module = convolutional()
    step, _ = stepper(module, caps=np.ones(60))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(UnsupportedError, match="its own cap"):
        step(images(), [1, 2], published=published)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(p.summed_grad is None for p in module.parameters())


def test_the_random_row_of_an_empty_draw_is_nobodys():
    step, _ = stepper(convolutional(), rand_on_empty=True, caps=np.zeros(60))
    found = step(images(), [7], published=[])
    assert found.indices.tolist() == []
    assert found.norms.tolist() == []


def two_batches(**recorder):
    """One noisy step on two drawn batches, put together by hand."""
    step, optimizer = stepper(convolutional(), **recorder)
    optimizer._step_skip_queue.append(True)
    optimizer.recorder.take = lambda **_: None  # the first step() call ends no noisy step
    step(images(), [1, 2])
    del optimizer.recorder.take
    return step(images(), [2, 3])


def test_two_batches_in_one_noisy_step_are_two_draws_and_stop_caps():
    found = two_batches()
    assert found.indices is None
    assert (found.draws, len(found.norms)) == (2, 4)
    with pytest.raises(UnsupportedError, match="one drawn batch"):
        two_batches(caps=np.ones(60))


def test_gradients_dropped_without_a_step_leave_no_norms_behind():
    step, optimizer = stepper(convolutional())
    optimizer.recorder.tracker.publish([1], owner=optimizer)
    optimizer.recorder.capture(torch.ones(1), max_grad_norm=BOUND)
    assert step(images(), [2, 3]).indices.tolist() == [2, 3]


def test_a_later_hook_runs_after_the_accounting_instead_of_replacing_it():
    step, optimizer = stepper(convolutional())
    calls = []
    optimizer.attach_step_hook(lambda _: calls.append("accounting"))
    optimizer.recorder.guarded = True
    with pytest.warns(UserWarning, match="added after"):
        optimizer.attach_step_hook(lambda _: calls.append("user"))
    step(images(), [1])
    assert calls == ["accounting", "user"]


class Foreign(DPOptimizer):
    """An optimizer that clips in a way nobody here knows."""


def test_unknown_optimizers_and_caps_without_one_norm_are_refused():
    module = convolutional()
    wrapped = GradSampleModule(module)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)
    options = {"noise_multiplier": 1.0, "expected_batch_size": 8}
    foreign = Foreign(inner, max_grad_norm=BOUND, **options)
    with pytest.raises(UnsupportedError, match="Foreign"):
        record_norms(foreign, Recorder(BatchTracker()), module=wrapped)
    layered = DPPerLayerOptimizer(inner, max_grad_norm=[1.0] * 6, **options)
    with pytest.raises(UnsupportedError, match="whole gradient"):
        record_norms(layered, Recorder(BatchTracker(), caps=np.ones(60).take), module=wrapped)
    assert type(layered) is DPPerLayerOptimizer


@pytest.mark.parametrize("dropped", [False, True])
def test_ghost_clipping_with_caps_sums_what_flat_clipping_with_caps_sums(dropped):
    caps, rows = np.linspace(0.02, 1.0, 60), [3, 17, 40, 59]
    if dropped:
        caps[17] = 0.0
    sums = []
    for ghost in (False, True):
        torch.manual_seed(3)
        step, optimizer = stepper(convolutional(), ghost=ghost, caps=caps)
        record = step(images(), rows)
        sums.append(torch.cat([p.grad.flatten() for p in optimizer.params]))
        assert (record.norms[1] == 0.0) == dropped  # it took no part
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-4, atol=1e-6)  # two ways, float32


def test_ghost_clipping_cannot_drop_a_row_that_is_not_finite():
    caps = np.ones(60)
    caps[2] = 0.0
    data = images()
    data.tensors[0][2] = float("nan")
    step, _ = stepper(convolutional(), ghost=True, caps=caps)
    with pytest.raises(UnsupportedError, match="1 of 2 not finite"):
        step(data, [1, 2])


def test_per_layer_clipping_records_what_is_left_of_each_gradient():
    torch.manual_seed(5)
    module = convolutional()
    rows, bounds = [0, 5, 9, 33], [0.3, 0.1, 2.0, 0.2, 1.0, 0.5]
    names = [name for name, _ in module.named_parameters()]
    expected = []
    for row in rows:
        inputs, target = images()[row]
        loss = CRITERION(module(inputs[None]), target[None])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        kept = [min(float(g.norm()), b) for g, b in zip(gradients, bounds, strict=True)]
        expected.append(np.linalg.norm(kept))
    wrapped = GradSampleModule(module)
    optimizer = DPPerLayerOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=bounds,
        expected_batch_size=8,
    )  # fmt: skip
    tracker, owner = BatchTracker(), nn.Identity()
    record = Recorder(tracker)
    record_norms(optimizer, record, module=wrapped)
    tracker.publish(rows, owner=owner)
    inputs, targets = images()[rows]
    CRITERION(wrapped(inputs), targets).backward()
    optimizer.step()
    found = record.take(max_grad_norm=BOUND)
    np.testing.assert_allclose(found.norms, expected, rtol=1e-5)  # float32
    assert found.max_grad_norm == pytest.approx(np.linalg.norm(bounds))
    assert len(names) == len(bounds)


def test_adaptive_clipping_records_the_bound_in_force():
    torch.manual_seed(5)
    module = convolutional()
    rows = [0, 5, 9, 33]
    truth = one_by_one_norms(module, images(), rows, CRITERION)
    wrapped = GradSampleModule(module)
    optimizer = AdaClipDPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0,
        target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, max_clipbound=20.0,
        min_clipbound=0.1, unclipped_num_std=2.0, max_grad_norm=BOUND, expected_batch_size=8,
    )  # fmt: skip
    tracker, owner = BatchTracker(), nn.Identity()
    record = Recorder(tracker)
    record_norms(optimizer, record, module=wrapped)
    seen = []
    optimizer.attach_step_hook(lambda _: seen.append(record.take(max_grad_norm=0.0)))
    for _ in range(2):
        optimizer.zero_grad()
        tracker.publish(rows, owner=owner)
        inputs, targets = images()[rows]
        CRITERION(wrapped(inputs), targets).backward()
        optimizer.step()
    np.testing.assert_allclose(seen[0].norms, truth, rtol=1e-5)  # float32
    assert seen[0].max_grad_norm == BOUND
    assert seen[1].max_grad_norm != BOUND  # moved after the first step's hook
    assert seen[1].max_grad_norm != float(optimizer.max_grad_norm)  # and again after the second's


@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
def test_the_wrapped_module_offers_the_norms_of_the_last_batch(ghost):
    torch.manual_seed(5)
    module = convolutional()
    truth = one_by_one_norms(module, images(), [4, 8], CRITERION)
    step, optimizer = stepper(module, ghost=ghost)
    step(images(), [4, 8])
    holder = optimizer.seam._module() if ghost else optimizer.recorder.publish
    np.testing.assert_allclose(holder.per_sample_gradient_norms, truth, rtol=1e-5)  # float32


def test_clip_factors_bound_the_product():
    norms = torch.tensor([0.0, 1e-8, 0.5, 1.0, 3.0, torch.nan, torch.inf])
    caps = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0])
    factors = clip_factors(norms, max_grad_norm=2.0, caps=caps)
    assert (factors[:5] * norms[:5] <= 1.0).all()
    assert factors[:4].tolist() == [1.0, 1.0, 1.0, pytest.approx(1.0, abs=2e-6)]  # the 1e-6 inside
    assert factors[5:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("caps", [[0.5], [0.5, 1.1], [0.5, -0.1], [0.5, np.nan]])
def test_caps_outside_their_domain_are_refused(caps):
    with pytest.raises(ValueError, match="caps"):
        checked_caps(caps, num_instances=2)
