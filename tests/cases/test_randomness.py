"""Line A13: a gradient that is random given the model; norms are those of one draw of it.

What the tripwire sees of it: nothing, each gradient is clipped as it is. With worst case or caps
nothing is lost by it, and they keep their labels.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.cases.trainings import SIZE, answer, plain_loop, points, train

MEASURED = ("full", "participation")


class Functional(nn.Module):
    """Dropout without a module of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.layer(F.dropout(inputs, 0.3, training=self.training))


class Noisy(nn.Module):
    """Noise from the global generator, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.layer(inputs + 0.3 * torch.randn_like(inputs))


def masked():
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 3))


class Augmented(Dataset):
    """Other items each time, by torch's generator or one of its own."""

    def __init__(self, generator=None):
        self.data, self.generator = points(), generator

    def __len__(self):
        return SIZE

    def __getitem__(self, row):
        inputs, target = self.data[row]
        return inputs + 0.1 * torch.randn(6, generator=self.generator), target


@pytest.mark.parametrize("policy", MEASURED)
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("model", [Functional, Noisy, masked])
def test_a_random_forward_pass_makes_measured_norms_an_estimate(model, mode, policy):
    found = train(plain_loop, policy=policy, mode=mode, model=model)
    assert found.label == "estimate"
    assert "random" in found.reasons or "other gradients" in found.reasons


@pytest.mark.parametrize("policy", MEASURED)
@pytest.mark.parametrize("own", [False, True])
def test_so_does_a_data_set_that_augments_at_random(own, policy):
    generator = torch.Generator().manual_seed(1) if own else None
    found = train(plain_loop, policy=policy, data=Augmented(generator))
    assert found.label == "estimate"
    assert "other items" in found.reasons


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("policy", ["worst_case", "capped"])
@pytest.mark.parametrize("model", [Functional, masked])
def test_clipping_to_a_constant_does_not_mind_dropout(model, policy, mode):
    found = answer(plain_loop, policy=policy, mode=mode, model=model, truth=[0, 0, 0])
    assert found.label == "bound"
    assert "assumed" not in found.words  # the masks are known, and the sum was formed with them


@pytest.mark.parametrize("own", [False, True])
def test_random_items_do_not_look_like_rows_that_depend_on_each_other(own):
    """They are asked for once, alone and together; only the step cannot be compared with them."""
    generator = torch.Generator().manual_seed(1) if own else None
    found = train(plain_loop, data=Augmented(generator))
    assert found.label == "bound"
    assert "assumed, not compared" in found.reasons
    # Whose cap it was cannot be seen without a comparison.
    found = train(plain_loop, policy="capped", data=Augmented(generator))
    assert found.label == "estimate"


def test_watching_draws_nothing():
    """The moves of a training with a probe and a watch are those of one with neither."""
    for policy in ("worst_case", "capped"):
        watched = train(plain_loop, policy=policy, model=masked)
        plain = train(plain_loop, policy="last_seen", model=masked)
        for one, other in zip(watched.moves, plain.moves, strict=True):
            assert torch.equal(one, other)
