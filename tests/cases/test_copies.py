"""Copies of private objects: averages of the model, files, federated clients.

Found by use beside part A: a copied ghost module crashed, and left the optimizer's class broken for
every later training of the process.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from opacus_pil import UnsupportedError
from tests.cases.trainings import MODES, plain_loop, train


def averaged(training):
    """An exponential moving average of the private module, as people keep it."""
    average = copy.deepcopy(training.module)
    for inputs, targets in training.loader:
        training.step(inputs, targets)
        with torch.no_grad():
            for old, new in zip(average.parameters(), training.module.parameters(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)
    again = copy.deepcopy(training.module).eval()  # Opacus's hooks take no gradients of a copy
    with torch.no_grad():
        again(training.data.tensors[0])


@pytest.mark.parametrize("policy", ["worst_case", "capped", "participation", "last_seen"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_of_the_module_works_and_reports_to_nobody(mode, policy):
    found, plain = (train(loop, mode=mode, policy=policy) for loop in (averaged, plain_loop))
    assert found.engine.per_instance.steps == 1
    assert (found.spent() == plain.spent()).all()
    assert torch.equal(found.moves[0], plain.moves[0])


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_saved_module_loads_with_opacus_own_methods(mode):
    found = train(plain_loop, mode=mode)
    file = io.BytesIO()
    torch.save(found.module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded._module.weight, found.plain.weight)
    if mode == "ghost":
        assert loaded.get_clipping_coef.__func__ is type(loaded).get_clipping_coef
        assert loaded.get_clipping_coef.__self__ is loaded


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_copy_of_the_optimizer_is_refused_and_breaks_nothing(mode):
    """torch patches the class of what it copies; steps of a copy would be charged to nobody."""

    def loop(training):
        for copied in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(UnsupportedError, match="nobody would charge"):
                copied(training.optimizer)
        with pytest.raises(UnsupportedError, match="nobody would charge"):
            copy.deepcopy((training.module, training.optimizer))
        plain_loop(training)

    assert train(loop, mode=mode).label == "bound"
    assert train(plain_loop, mode=mode).label == "bound"


def test_a_plain_copy_trained_elsewhere_and_averaged_back_needs_no_copy_of_ours():
    """Federated rounds: weights go out and come back; each client has an engine of its own."""

    def loop(training):
        plain_loop(training)
        client = copy.deepcopy(training.plain)
        training.plain.load_state_dict(client.state_dict())
        plain_loop(training)

    found = train(loop)
    assert found.label == "bound"
    assert found.engine.per_instance.steps == 2


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: nn.DataParallel(nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.DataParallel(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)),
    ],
    ids=["DataParallel", "DataParallel inside"],
)
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_wrappers_are_looked_through(mode, wrapped):
    for policy in ("worst_case", "full"):
        found = train(plain_loop, mode=mode, policy=policy, model=wrapped)
        assert found.label != "estimate"
