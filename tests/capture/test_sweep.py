"""A sweep finds what autograd finds one instance at a time, and leaves no trace."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from opacus_pil.capture.sweep import sweep
from opacus_pil.errors import UnsupportedError
from tests.capture.models import (
    CLASSES,
    Tied,
    Words,
    convolutional,
    images,
    one_by_one_norms,
    sentences,
)

# float32 has 1.2e-7; a norm sums ~1e3 squares after a backward pass through four layers.
FLOAT32, FLOAT64 = 1e-4, 1e-9


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - nn.functional.one_hot(targets, CLASSES)).square().sum(dim=1).mean()


@pytest.mark.parametrize(
    ("make", "data"), [(convolutional, images), (Words, sentences), (Tied, images)]
)
@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), squared_error]
)
def test_norms_and_losses_are_those_of_each_instance_alone(make, data, criterion):
    torch.manual_seed(0)
    module, dataset = make(), data()
    rows = [7, 3, 3, 30]
    found = sweep(module, dataset, criterion=criterion, indices=rows, chunk_size=3)
    truth = one_by_one_norms(module, dataset, rows, criterion)
    np.testing.assert_allclose(found.norms, truth, rtol=FLOAT32)
    with torch.no_grad():
        losses = [float(criterion(module(x[None]), y[None])) for x, y in (dataset[r] for r in rows)]
    np.testing.assert_allclose(found.losses, losses, rtol=FLOAT32)
    assert found.deterministic
    assert found.outputs is None


def test_float64_norms_agree_to_float64():
    torch.manual_seed(0)
    module, dataset = convolutional(dtype=torch.float64), images(dtype=torch.float64)
    found = sweep(module, dataset, criterion=nn.CrossEntropyLoss())
    truth = one_by_one_norms(module, dataset, range(60), nn.CrossEntropyLoss())
    np.testing.assert_allclose(found.norms, truth, rtol=FLOAT64)


def test_a_small_sum_of_large_terms_keeps_its_norm():
    # Two sequence positions whose gradients cancel to 1e-4 of their size: ghost clipping's Gram
    # matrix loses that in float32 (1e-8 of the square).
    layer = nn.Linear(1, 1, bias=False)
    inputs = torch.tensor([[[1.0], [-1.0001]]])
    data = TensorDataset(inputs, torch.zeros(1, 2, 1))

    def total(outputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return outputs.sum()

    found = sweep(layer, data, criterion=total)
    np.testing.assert_allclose(found.norms, [1e-4], rtol=1e-2)  # inputs are rounded to 1e-7


@pytest.mark.parametrize("wrap", [GradSampleModule, GradSampleModuleFastGradientClipping, None])
def test_the_training_module_and_every_generator_stay_as_they_were(wrap):
    torch.manual_seed(0)
    module, dataset = convolutional(dropout=0.5), images()
    untouched = copy.deepcopy(module)
    wrapped = module if wrap is None else wrap(module)
    if wrap is GradSampleModule:
        nn.functional.cross_entropy(wrapped(dataset[:5][0]), dataset[:5][1]).backward()
        held = [p.grad_sample.clone() for p in module.parameters()]
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = sweep(wrapped, dataset, criterion=nn.CrossEntropyLoss())
    second = sweep(wrapped, dataset, criterion=nn.CrossEntropyLoss())
    np.testing.assert_array_equal(first.norms, second.norms)  # dropout is off
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert hooks == [len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules()]
    if wrap is GradSampleModule:
        after = [p.grad_sample for p in module.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(held, after, strict=True))
    for parameter, before in zip(module.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, before)
    assert all(m.training for m in module.modules())
    truth = one_by_one_norms(untouched.eval(), dataset, range(60), nn.CrossEntropyLoss())
    np.testing.assert_allclose(first.norms, truth, rtol=FLOAT32)


def test_randomness_in_data_or_forward_is_noticed_and_undone():
    class Augmented(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int):
            return torch.randn(1, 6, 6), torch.tensor(row)

    class Functional(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, training=self.training))

    before = torch.get_rng_state()
    loss = nn.CrossEntropyLoss()
    assert not sweep(convolutional(), Augmented(), criterion=loss).deterministic
    net = Functional(nn.Flatten(), nn.Linear(36, CLASSES))
    assert not sweep(net, images(), criterion=loss).deterministic
    # Both models drew their weights after `before`: build them again to compare.
    torch.set_rng_state(before)
    convolutional()
    Functional(nn.Flatten(), nn.Linear(36, CLASSES))
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    sweep(convolutional(), Augmented(), criterion=loss)
    sweep(Functional(nn.Flatten(), nn.Linear(36, CLASSES)), images(), criterion=loss)
    assert torch.equal(expected, torch.get_rng_state())


def test_only_the_parameters_named_count():
    torch.manual_seed(0)
    module, dataset = convolutional(), images(8)
    head = {"5.weight", "5.bias"}
    found = sweep(module, dataset, criterion=nn.CrossEntropyLoss(), parameters=head)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in head)
    truth = one_by_one_norms(module, dataset, range(8), nn.CrossEntropyLoss())
    np.testing.assert_allclose(found.norms, truth, rtol=FLOAT32)


def test_outputs_are_kept_on_request_and_nothing_is_an_empty_answer():
    dataset = images(5)
    module = convolutional()
    found = sweep(module, dataset, criterion=nn.CrossEntropyLoss(), chunk_size=2, keep_outputs=True)
    np.testing.assert_allclose(
        found.outputs, module(dataset[:][0]).detach().numpy(), rtol=FLOAT32, atol=1e-6
    )  # another batch size may round differently
    empty = sweep(module, dataset, criterion=nn.CrossEntropyLoss(), indices=[])
    assert len(empty.norms) == len(empty.losses) == 0


def test_non_finite_norms_name_the_row():
    pixels, labels = images(6).tensors
    pixels[4] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 3 not finite \(first: row 4\)"):
        sweep(
            convolutional(), TensorDataset(pixels, labels), criterion=nn.CrossEntropyLoss(),
            indices=[1, 4, 2],
        )  # fmt: skip


def test_uses_without_a_norm_per_instance_are_refused():
    loss = nn.CrossEntropyLoss()
    mixing = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, CLASSES))
    with pytest.raises(UnsupportedError, match="BatchNorm"):
        sweep(mixing, images(), criterion=loss)
    with pytest.raises(UnsupportedError, match="pair"):
        sweep(convolutional(), TensorDataset(torch.zeros(3, 1, 6, 6)), criterion=loss)
    module = Words()
    module.idle = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="idle"):
        sweep(module, sentences(), criterion=loss)
    with pytest.raises(ValueError, match="indices"):
        sweep(convolutional(), images(5), criterion=loss, indices=[5])
