"""Which lines of part A the tripwire catches, and which it does not.

Just before the noise the norm of the clipped sum is held against what its rows allow, the sum of
min(norm, clip bound). A sum above that shows that clipping did not hold. One below shows nothing.

caught      A1 (nothing is clipped), A11 and A20 where the leak is larger than what the other rows
            leave free, a loss that hides large gradients from ghost's norms
not caught  A2, A8, A9, A10 (bounds and noise are noted elsewhere), A3, A4, A5, A6, A12, A16, A17
            (each gradient is clipped, whosever and however often), A7, A14, A15 (rows that depend
            on each other), A13 (a random gradient is clipped like any other), A18, A21 (no step is
            made), and gradients that cancel: A11 with a small factor, or a small sum of large ones
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.cases.loops import (
    Contrastive,
    OneOutput,
    Partly,
    another_backward,
    hooked,
    hooked_a_little,
    mixup,
    one_output,
    scaled,
    scaled_unseen,
    several_steps,
    views,
)  # fmt: skip
from tests.cases.trainings import plain_loop, points, shifts, train

TRIPPED = "larger than its rows allow"


def unfrozen(training):
    training.plain.body.requires_grad_(True)
    for parameter in training.plain.head.parameters():
        parameter.data.mul_(30.0)  # of the body's gradients: these are in no norm
    plain_loop(training)


def penalised(training):
    for inputs, targets in training.loader:
        training.optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in training.plain.parameters())
        (training.criterion(training.module(inputs), targets) + 20.0 * penalty).backward()
        training.optimizer.step()


CAUGHT = {
    "A1": (plain_loop, {"model": OneOutput, "criterion": nn.MSELoss(), "data": one_output()}),
    "A11, ten times": (scaled, {}),
    "A11, behind autograd": (scaled_unseen, {}),
    "A11, five times, by a hook": (hooked, {}),
    "A20": (unfrozen, {"model": Partly}),
    "a penalty in the loss": (penalised, {}),
}


@pytest.mark.parametrize("line", list(CAUGHT))
def test_it_trips_where_the_sum_is_larger_than_its_rows_allow(line):
    loop, options = CAUGHT[line]
    found = train(loop, mode="ghost", **options)
    assert TRIPPED in found.reasons
    assert (found.spent() == float("inf")).all()


def own_loader(training):
    for inputs, targets in DataLoader(training.data, batch_size=6):
        training.step(inputs, targets)


def noise_lowered(training):
    for inputs, targets in training.loader:
        training.backward(inputs, targets)
        training.optimizer.noise_multiplier = 0.1
        training.optimizer.step()


def balanced() -> TensorDataset:
    """Each row twice, with both labels: most gradients cancel in the sum."""
    inputs = points(12, classes=2).tensors[0]
    return TensorDataset(torch.cat([inputs, inputs]), torch.arange(24) // 12)


def zero_linear():
    module = nn.Linear(6, 2)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


MISSED = {
    "A3: a batch used again": (several_steps, {}),
    "A4: a batch from elsewhere": (own_loader, {}),
    "A5: two views": (plain_loop, {"loader": {"collate_fn": views}}),
    "A7: mixup": (mixup, {}),
    "A7: negatives": (plain_loop, {"criterion": Contrastive()}),
    "A8: less noise": (noise_lowered, {}),
    "A11: a little": (hooked_a_little, {"mode": "ghost"}),
    "A11: where gradients cancel": (
        hooked,
        {"mode": "ghost", "model": zero_linear, "data": balanced()},
    ),
    "A14": (plain_loop, {"criterion": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 60.0, 1.0]))}),
}


@pytest.mark.parametrize("line", list(MISSED))
def test_it_does_not_trip_where_each_gradient_is_clipped_or_the_sum_is_small(line):
    """What answers these lines instead is tested in their own files: the label has fallen."""
    loop, options = MISSED[line]
    found = train(loop, batch_size=24, **options)
    assert TRIPPED not in found.reasons
    assert found.label == "estimate" or line.startswith("A8")  # there the number is the answer


def test_what_cancels_moves_as_far_as_if_it_did_not():
    """The leak behind a sum that shows nothing: each row moves it five times as far."""
    options = {"mode": "ghost", "model": zero_linear, "data": balanced()}
    leaking, whole = shifts(hooked, row=5, **options), shifts(plain_loop, row=5, **options)
    assert leaking == pytest.approx(5.0 * whole, rel=1e-3)


def test_a_second_backward_pass_is_seen_by_the_gradient_s_version_not_by_the_sum():
    assert TRIPPED not in train(another_backward, mode="ghost").reasons
    assert "changed before the step" in train(another_backward, mode="ghost").reasons


def test_rounding_does_not_trip_it():
    """All gradients in one direction and all clipped: the sum is what the rows allow, exactly."""
    inputs = torch.full((1000, 6), 3.0)
    data = TensorDataset(inputs, torch.zeros(1000, dtype=torch.int64))
    for mode in ("hooks", "ghost"):
        found = train(plain_loop, mode=mode, data=data)
        assert found.label == "bound"
        assert float(found.moves[0].norm()) > 900.0
