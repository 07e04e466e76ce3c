"""Caps from a public model: norms that Opacus itself would clip, of each row and output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from opacus_pil import UnsupportedError
from opacus_pil.heads import (
    FrozenFeatures,
    OneVsRest,
    OneVsRestLoss,
    caps_from_public_model,
)
from tests.heads.models import CLASSES, WIDTH, binary, bounded, frozen, head, linear, raw


def trained(module: nn.Module, *, scale: float = 2.0) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return module


def opacus_norms(module: nn.Module, data: TensorDataset, criterion: nn.Module) -> np.ndarray:
    """Per-sample, per-tensor gradient norms as Opacus forms them, shape (rows, tensors)."""
    wrapped = GradSampleModule(module)
    criterion(wrapped(data.tensors[0]), data.tensors[1]).backward()
    norms = [p.grad_sample.flatten(1).norm(dim=1) for p in wrapped.parameters() if p.requires_grad]
    found = torch.stack(norms, dim=1).double().numpy()
    wrapped.to_standard_module()
    return found


KINDS = {
    "bare": (lambda: trained(head()), bounded(), OneVsRestLoss(), 1.0),
    "frozen": (lambda: trained(frozen(head())), raw(), OneVsRestLoss(), 1.0),
    "mean": (
        lambda: trained(head()),
        TensorDataset(bounded().tensors[0], one_hot(bounded().tensors[1], CLASSES).float()),
        nn.BCEWithLogitsLoss(),
        1.0 / CLASSES,
    ),
    "one": (lambda: trained(linear()), binary(bounded()), nn.BCEWithLogitsLoss(), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_is_the_gradient_norm_that_opacus_finds_at_the_public_model(kind):
    make, data, criterion, scale = KINDS[kind]
    model = make()
    norms = opacus_norms(make(), data, criterion)
    bounds = np.linspace(0.4, 1.1, norms.shape[1])
    caps = caps_from_public_model(
        model, data, max_grad_norm=bounds.tolist() if len(bounds) > 1 else 0.4, factor=0.7,
        floor=0.03, loss_scale=scale,
    )  # fmt: skip
    expected = np.minimum(0.7 * norms / bounds + 0.03, 1.0)
    assert (expected < 1.0).any()  # not all at the bound
    np.testing.assert_allclose(
        caps,
        expected if kind != "one" else expected[:, 0],
        rtol=1e-5,
        atol=1e-7,  # float32 norms
    )


def test_a_bias_counts_as_a_feature_of_length_one():
    model = trained(nn.Linear(WIDTH, 1))
    inputs, targets = binary(raw()).tensors
    wrapped = GradSampleModule(model)
    nn.BCEWithLogitsLoss()(wrapped(inputs), targets).backward()
    both = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], dim=1).norm(dim=1)
    wrapped.to_standard_module()
    caps = caps_from_public_model(
        model, TensorDataset(inputs, targets), max_grad_norm=50.0, factor=1.0, floor=0.0
    )
    np.testing.assert_allclose(caps, both.numpy() / 50.0, rtol=1e-5)


@pytest.mark.parametrize("make", [head, lambda: frozen(head())])
def test_a_cap_is_a_function_of_its_own_row(make):
    model = trained(make())
    data = raw() if isinstance(model, nn.Sequential) else bounded()
    inputs, targets = (tensor.clone() for tensor in data.tensors)
    before = caps_from_public_model(model, TensorDataset(inputs, targets), max_grad_norm=1.0)
    inputs[1:], targets[1:] = 7.0 * inputs[1:].flip(0), targets[1:].flip(0)
    after = caps_from_public_model(model, TensorDataset(inputs, targets), max_grad_norm=1.0)
    assert np.array_equal(before[0], after[0])
    assert not np.array_equal(before[1:], after[1:])


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model = trained(frozen(head())).train()
    state, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    caps_from_public_model(model, raw(), max_grad_norm=1.0)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(p._forward_pre_hooks for p in model.modules())


def test_caps_are_at_most_the_clip_and_at_least_the_floor():
    caps = caps_from_public_model(trained(head()), bounded(), max_grad_norm=0.05, floor=0.02)
    assert caps.shape == (24, CLASSES)
    assert caps.max() == 1.0
    caps = caps_from_public_model(trained(head(), scale=30.0), bounded(), max_grad_norm=9.0)
    assert caps.min() >= 0.02


@pytest.mark.parametrize(
    "module", [linear(3), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)), nn.ReLU()]
)
def test_other_models_are_refused(module):
    with pytest.raises(UnsupportedError, match="OneVsRest or a Linear with one output"):
        caps_from_public_model(module, bounded(), max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_grad_norm": [1.0, 1.0]}, "one bound or 3"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"factor": -1.0}, "factor"),
        ({"floor": -1.0}, "floor"),
        ({"loss_scale": 0.0}, "loss_scale"),
    ],
)
def test_constants_out_of_range_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        caps_from_public_model(head(), bounded(), **({"max_grad_norm": 1.0} | change))


def test_targets_that_are_no_classes_and_features_that_are_no_numbers_are_refused():
    inputs = bounded().tensors[0]
    with pytest.raises(ValueError, match="class numbers"):
        caps_from_public_model(head(), TensorDataset(inputs, inputs[:, 0]), max_grad_norm=1.0)
    broken = inputs.clone()
    broken[5] = torch.nan
    with pytest.raises(ValueError, match="row 5"):
        caps_from_public_model(
            head(), TensorDataset(broken, bounded().tensors[1]), max_grad_norm=1.0
        )


def test_features_of_erased_rows_give_no_caps() -> None:
    data = TensorDataset(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
    features = FrozenFeatures(data, nn.Identity(), progress=False)
    head = OneVsRest(3, 3)
    before = caps_from_public_model(head, features, max_grad_norm=[1.0] * 3)
    features.erase([2])
    with pytest.raises(UnsupportedError, match="1 rows are erased"):
        caps_from_public_model(head, features, max_grad_norm=[1.0] * 3)
    assert before.shape == (6, 3)
