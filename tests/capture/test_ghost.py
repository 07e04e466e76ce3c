"""Ghost clipping, seen from inside: norms that float32 keeps, factors, gradients as they were."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.grad_sample.linear import compute_linear_norm_sample
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from opacus_pil.capture.ghost import SEQUENCE_ROUNDING, ClipFactors, GhostSeam, linear_norms
from opacus_pil.capture.norms import record_norms
from opacus_pil.capture.recorder import Recorder
from opacus_pil.capture.tracker import BatchTracker

ROWS, LENGTH, IN, OUT = 4, 6, 5, 3


def exact(activations, backprops):
    """Norms of the gradients of weight and bias, formed in float64."""
    weight = torch.einsum("nto,nti->noi", backprops.double(), activations.double())
    return weight.flatten(1).norm(dim=1), backprops.double().sum(dim=1).norm(dim=1)


def sequence(size: float, *, cancelling: float):
    """Terms of one size whose sum is smaller by a factor: pairs of opposite ones, and a rest."""
    generator = torch.Generator().manual_seed(3)
    halves = torch.randn(ROWS, LENGTH // 2, IN, generator=generator) * size
    rest = torch.randn(ROWS, LENGTH // 2, IN, generator=generator) * size * cancelling
    activations = torch.cat([halves, rest - halves], dim=1)
    backprops = torch.randn(ROWS, 1, OUT, generator=generator).expand(ROWS, LENGTH, OUT)
    return activations, backprops.contiguous()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cancelling", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5, 3e6])
def test_norms_of_sequences_are_those_of_the_gradients(size, cancelling, bias):
    """Below the truth by less than what charges are raised for; Opacus's alone are not."""
    layer = nn.Linear(IN, OUT, bias=bias)
    activations, backprops = sequence(size, cancelling=cancelling)
    found = linear_norms(layer, [activations], backprops)
    weight, sums = exact(activations, backprops)
    for parameter, truth in ((layer.weight, weight), (layer.bias, sums)):
        if parameter is not None:
            # Sixteen roundings of what is left of sequences; and float32 of the terms themselves.
            terms = activations.double().norm(dim=2).amax(1) * backprops.double().norm(dim=2).amax(
                1
            )
            slack = 16 * SEQUENCE_ROUNDING * truth + 2.0**-23 * terms * LENGTH
            assert (found[parameter].double() >= truth - slack).all()
            assert (found[parameter].double() <= truth + slack).all()


def test_opacus_own_norms_lose_what_cancels():
    """The reason for all this: sixteen roundings are nothing beside it."""
    layer = nn.Linear(IN, OUT)
    activations, backprops = sequence(1e5, cancelling=1e-4)
    weight, _ = exact(activations, backprops)
    lost = compute_linear_norm_sample(layer, [activations], backprops)[layer.weight].double()
    kept = linear_norms(layer, [activations], backprops)[layer.weight].double()
    assert (lost / weight - 1).abs().max() > 0.1 or lost.isnan().any()
    torch.testing.assert_close(kept, weight, rtol=1e-3, atol=0.0)  # float32 sums of 1e5 terms


def test_rows_without_a_sequence_and_empty_batches_are_opacus_own():
    layer = nn.Linear(IN, OUT)
    activations, backprops = torch.randn(ROWS, IN), torch.randn(ROWS, OUT)
    for count in (ROWS, 0):
        found = linear_norms(layer, [activations[:count]], backprops[:count])
        own = compute_linear_norm_sample(layer, [activations[:count]], backprops[:count])
        for parameter, norms in own.items():
            assert torch.equal(found[parameter], norms)


class TestFactors:
    """What the factors are multiplied with."""

    @staticmethod
    def factors(size=3):
        recorder = Recorder(BatchTracker())
        made = torch.full((size,), 0.5).as_subclass(ClipFactors)
        made.recorder = recorder
        return made, recorder

    def test_losses_of_their_shape_are_scaled_and_plain_again(self):
        factors, recorder = self.factors()
        for product in (factors * torch.ones(3), torch.ones(3) * factors, factors.mul(2.0)):
            assert type(product) is torch.Tensor
            assert torch.equal(product, torch.full((3,), 0.5 if product[0] < 0.9 else 1.0))
        assert recorder.take(max_grad_norm=1.0).facts == ()

    @pytest.mark.parametrize("shape", [(3, 1), (3, 3), (1, 3, 1), (1,), ()])
    def test_other_shapes_are_noted(self, shape):
        factors, recorder = self.factors()
        assert (factors * torch.ones(shape)).shape == torch.broadcast_shapes((3,), shape)
        (fact,) = recorder.take(max_grad_norm=1.0).facts
        assert fact.code == "loss_not_per_row"

    def test_moving_them_keeps_them(self):
        factors, recorder = self.factors()
        moved = factors.to(torch.float64).detach()
        moved * torch.ones(3, 1, dtype=torch.float64)
        assert [f.code for f in recorder.take(max_grad_norm=1.0).facts] == ["loss_not_per_row"]


def ghost(model=None):
    """One ghost training under a recorder, without an engine."""
    torch.manual_seed(0)
    module = nn.Linear(IN, OUT) if model is None else model
    wrapped = GradSampleModuleFastGradientClipping(module, max_grad_norm=1.0)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=ROWS,
    )  # fmt: skip
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    recorder = Recorder(BatchTracker())
    record_norms(optimizer, recorder, module=wrapped)
    inputs, targets = torch.randn(ROWS, IN), torch.arange(ROWS) % OUT

    def backward():
        recorder.tracker.publish(np.arange(ROWS), owner=wrapped)
        criterion(wrapped(inputs), targets).backward()

    return wrapped, optimizer, recorder, backward


class TestGradientsAsTheyWere:
    """Between the clipped backward pass and the step."""

    @staticmethod
    def codes(recorder):
        return [fact.code for fact in recorder.take(max_grad_norm=1.0).facts]

    def test_untouched_they_are_what_was_clipped(self):
        _, optimizer, recorder, backward = ghost()
        backward()
        optimizer.pre_step()
        assert self.codes(recorder) == []

    @pytest.mark.parametrize("change", ["in place", "replaced", "dropped"])
    def test_any_change_is_noted(self, change):
        wrapped, optimizer, recorder, backward = ghost()
        backward()
        weight = wrapped._module.weight
        if change == "in place":
            weight.grad.mul_(2.0)
        elif change == "replaced":
            weight.grad = weight.grad.clone()
        else:
            optimizer.zero_grad()
            backward_again = wrapped._module(torch.ones(1, IN)).sum()
            backward_again.backward()
        optimizer.pre_step()
        assert self.codes(recorder) in (
            ["gradient_changed"],
            ["gradient_changed", "sum_above_clip"],
        )

    def test_a_step_without_a_backward_pass_is_noted(self):
        wrapped, optimizer, recorder, _ = ghost()
        for parameter in wrapped._module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.pre_step()
        assert "gradient_not_clipped" in self.codes(recorder)

    def test_sequences_are_charged_their_own_rounding(self):
        class Sequences(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(IN, OUT)

            def forward(self, inputs):
                return self.layer(inputs[:, None].expand(-1, 3, -1)).mean(dim=1)

        for model, rounding in ((Sequences(), SEQUENCE_ROUNDING), (None, 2.0**-23)):
            _, optimizer, recorder, backward = ghost(model)
            backward()
            optimizer.pre_step()
            assert recorder.take(max_grad_norm=1.0).rounding == rounding


def test_a_copy_of_the_module_has_opacus_own_methods_and_reports_to_nobody():
    wrapped, optimizer, recorder, backward = ghost()
    twin = copy.deepcopy(wrapped)
    assert twin.get_clipping_coef.__self__ is twin
    assert twin.enable_hooks.__self__ is twin
    assert twin.NORM_SAMPLERS[nn.Linear] is linear_norms
    twin.enable_hooks()
    backward()
    optimizer.pre_step()
    assert len(recorder.take(max_grad_norm=1.0).norms) == ROWS
    assert isinstance(optimizer.seam, GhostSeam)
