"""Clipping layer by layer: Opacus's sum bit for bit, or each output of each row at its own cap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPPerLayerOptimizer
from torch import nn

from opacus_pil import UnsupportedError
from opacus_pil.capture.clipping import LayerNorms, checked_caps, joint_caps, require_bounds
from opacus_pil.capture.norms import record_norms
from opacus_pil.capture.recorder import Recorder
from opacus_pil.capture.tracker import BatchTracker
from opacus_pil.heads import OneVsRestLoss
from tests.heads.models import CLASSES, SIZE, bounded, head

BOUNDS = [0.2, 0.05, 0.4]  # of gradients of length up to 1, on both sides
BATCHES = ([1, 2, 3, 20], [], [8], list(range(SIZE)))


class Stepper:
    """Steps of Opacus's per-layer optimizer on a head, with or without our capture."""

    def __init__(self, *, recorded=True, caps=None, bounds=BOUNDS, data=None):
        torch.manual_seed(2)
        self.module, self.data = head(), bounded() if data is None else data
        for p in self.module.parameters():
            nn.init.normal_(p, std=2.0)
        self.wrapped = GradSampleModule(self.module)
        self.optimizer = DPPerLayerOptimizer(
            torch.optim.SGD(self.module.parameters(), lr=0.5), noise_multiplier=0.0,
            max_grad_norm=list(bounds), expected_batch_size=8,
        )  # fmt: skip
        self.tracker = BatchTracker()
        self.recorder = None
        if recorded:
            self.recorder = Recorder(
                self.tracker, caps=None if caps is None else caps.__getitem__,
                cap_bounds=() if caps is None else tuple(bounds),
            )  # fmt: skip
            record_norms(self.optimizer, self.recorder, module=self.wrapped)

    def step(self, rows):
        self.optimizer.zero_grad()
        self.tracker.publish(rows, owner=self)
        inputs, targets = self.data[rows]
        # Opacus multiplies by the batch again: rows are summed as they are.
        OneVsRestLoss()(self.wrapped(inputs), targets).backward()
        self.optimizer.step()
        return None if self.recorder is None else self.recorder.take(max_grad_norm=1.0)

    def gradients(self, row):
        """Gradient of each output for one row, by plain autograd, shape (outputs, features)."""
        inputs, target = self.data[[row]]
        found = torch.autograd.grad(
            OneVsRestLoss()(self.module(inputs), target), list(self.module.parameters())
        )
        return torch.cat(found).double()

    @property
    def sums(self):
        return torch.cat([p.summed_grad for p in self.module.parameters()]).double()

    @property
    def weights(self):
        return torch.cat(list(self.module.parameters())).detach().clone()


@pytest.mark.parametrize("caps", [None, np.ones((SIZE, CLASSES))], ids=["no caps", "caps of one"])
def test_the_sum_is_opacus_own_bit_for_bit(caps):
    ours, theirs = Stepper(caps=caps), Stepper(recorded=False)
    for rows in BATCHES:
        ours.step(rows)
        theirs.step(rows)
        assert torch.equal(ours.sums, theirs.sums)
        assert torch.equal(ours.weights, theirs.weights)


def test_each_output_of_each_row_is_clipped_to_its_own_cap():
    caps = np.random.default_rng(0).uniform(0.0, 1.0, (SIZE, CLASSES))
    caps[3] = 0.0
    caps[5, 1] = 0.0
    stepper = Stepper(caps=caps)
    for rows in BATCHES:
        by_hand = torch.zeros(CLASSES, stepper.data[0][0].numel(), dtype=torch.float64)
        for row in rows:
            for k, gradient in enumerate(stepper.gradients(row)):
                bound = caps[row, k] * BOUNDS[k]
                by_hand[k] += gradient * min(1.0, bound / (float(gradient.norm()) + 1e-6))
        stepper.step(rows)
        torch.testing.assert_close(stepper.sums, by_hand, rtol=1e-5, atol=1e-6)  # float32


def test_no_output_of_any_row_moves_by_more_than_its_cap():
    caps = np.random.default_rng(1).uniform(0.0, 1.0, (SIZE, CLASSES))
    for row in range(0, SIZE, 3):
        stepper = Stepper(caps=caps)
        stepper.step([row])
        moved = stepper.sums.norm(dim=1).numpy()
        assert (moved <= caps[row] * BOUNDS * (1 + 1e-6)).all()  # float32 factors
        assert moved.max() > 0.0


def test_the_record_holds_what_opacus_clip_leaves_and_the_factors_that_were_used():
    caps = np.full((SIZE, CLASSES), 0.5)
    stepper, rows = Stepper(caps=caps), [0, 4, 9]
    gradients = torch.stack([stepper.gradients(row) for row in rows])
    found = stepper.step(rows)
    left = gradients.norm(dim=2).clamp(max=torch.tensor(BOUNDS, dtype=torch.float64))
    np.testing.assert_allclose(found.norms, left.norm(dim=1), rtol=1e-5)  # float32
    assert found.max_grad_norm == math.hypot(*BOUNDS)
    assert found.layer_bounds == tuple(BOUNDS)
    assert found.largest == pytest.approx(float(gradients.norm(dim=2).max()), rel=1e-5)
    summed = torch.einsum("ik,ikd->kd", found.layer_factors.double(), gradients)
    torch.testing.assert_close(stepper.sums, summed, rtol=1e-5, atol=1e-6)
    assert not found.facts


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_output_that_is_not_finite_makes_its_row_unfinite(value):
    """Opacus's clamp would leave the bound of a norm that is inf, and the sum is NaN."""
    norms = torch.ones(4, 3)
    norms[2, 1] = value
    left = LayerNorms(norms, (0.5, 0.5, 0.5)).left.norm(2, dim=1)
    assert torch.isfinite(left).tolist() == [True, True, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_told_and_stops_caps_before_anything_moves(value):
    data = bounded()
    data.tensors[0][4] = value
    found = Stepper(data=data).step([1, 4, 2])
    assert found.unfinite.tolist() == [False, True, False]
    stepper = Stepper(data=data, caps=np.ones((SIZE, CLASSES)))
    before = stepper.weights
    with pytest.raises(UnsupportedError, match=r"1 of 3 not finite \(first: instance 4\)"):
        stepper.step([1, 4, 2])
    assert torch.equal(stepper.weights, before)
    assert all(p.summed_grad is None for p in stepper.module.parameters())


def test_a_row_whose_caps_are_all_zero_cannot_harm_even_with_nan():
    data, caps = bounded(), np.ones((SIZE, CLASSES))
    data.tensors[0][4] = torch.nan
    caps[4] = 0.0
    whole, part = Stepper(data=data, caps=caps), Stepper(data=data, caps=caps)
    found = whole.step([1, 4, 2])
    part.step([1, 2])
    assert found.norms[1] == 0.0
    assert not found.unfinite.any()
    torch.testing.assert_close(whole.sums, part.sums, rtol=1e-6, atol=1e-8)


def test_a_cap_of_zero_in_one_output_does_not_excuse_nan_in_it():
    """Which output is not finite is not looked at: the row is refused as a whole."""
    data, caps = bounded(), np.ones((SIZE, CLASSES))
    data.tensors[0][4] = torch.nan
    caps[4, :2] = 0.0
    with pytest.raises(UnsupportedError, match="instance 4"):
        Stepper(data=data, caps=caps).step([1, 4, 2])


# --- bounds ---------------------------------------------------------------------------------------


def test_caps_are_held_against_the_bounds_that_they_are_charged_for_only():
    stepper = Stepper(caps=np.ones((SIZE, CLASSES)))
    stepper.step([1, 2])
    stepper.optimizer.max_grad_norms = BOUNDS[::-1]  # as long together as before
    before = stepper.weights
    with pytest.raises(UnsupportedError, match="which caps were charged for"):
        stepper.step([1, 2])
    assert torch.equal(stepper.weights, before)


@pytest.mark.parametrize("found", [None, (1.0, 2.0), (2.0, 1.0, 3.0)])
def test_other_bounds_are_named(found):
    layers = None if found is None else LayerNorms(torch.ones(2, len(found)), found)
    with pytest.raises(UnsupportedError, match=r"\[1\.0, 2\.0, 3\.0\], one per output"):
        require_bounds(layers, caps_for=(1.0, 2.0, 3.0))
    require_bounds(None, caps_for=())


# --- caps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        ([0.2, 0.4], [[0.2] * 3, [0.4] * 3]),
        ([[0.2], [0.4]], [[0.2] * 3, [0.4] * 3]),
        ([[0.1, 0.2, 0.3], [1, 1, 0]], [[0.1, 0.2, 0.3], [1, 1, 0]]),
    ],
)
def test_one_cap_per_instance_is_one_for_each_output(caps, expected):
    assert checked_caps(caps, num_instances=2, outputs=3).tolist() == expected


@pytest.mark.parametrize(
    "caps", [[0.5], [[0.5] * 2] * 2, [[0.5] * 3], [[[0.5] * 3] * 2], [[1.1] * 3] * 2, [np.nan] * 2]
)
def test_caps_of_another_shape_or_range_are_refused(caps):
    with pytest.raises(ValueError, match="caps"):
        checked_caps(caps, num_instances=2, outputs=3)


def test_caps_per_output_are_refused_where_there_is_one_clip():
    with pytest.raises(ValueError, match="OneVsRest with clipping='per_layer'"):
        checked_caps(np.ones((4, 2)), num_instances=4)


def test_joint_caps_are_the_length_of_what_all_outputs_move_by():
    generator = np.random.default_rng(0)
    for outputs in (1, 2, 9):
        caps = generator.uniform(0.0, 1.0, (50, outputs))
        bounds = generator.uniform(0.1, 5.0, outputs)
        expected = np.linalg.norm(caps * bounds, axis=1) / np.linalg.norm(bounds)
        found = joint_caps(caps, bounds)
        np.testing.assert_allclose(found, expected, rtol=1e-14)
        assert found.max() <= 1.0
        assert joint_caps(np.ones((1, outputs)), bounds) == pytest.approx(1.0, rel=1e-15)
