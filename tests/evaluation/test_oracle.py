"""Oracles are retrained with the training's kernel, on the retain set, at no charge."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from opacus_pil.evaluation import retrained_oracles

from ..unlearning.runs import network_run
from ..unlearning.test_engine import Watched


def make(seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return module, torch.optim.SGD(module.parameters(), lr=0.5)


def retrain(run, **changes):
    arguments = {
        "privacy_engine": run.engine,
        "dataset": run.dataset,
        "criterion": run.criterion,
        "forget_set": [2, 9],
        "steps": 6,
        "seeds": [1, 2],
        "progress": False,
    }
    return retrained_oracles(make, **{**arguments, **changes})


def test_oracles_never_see_the_forget_set_and_charge_nobody():
    run = network_run()
    dataset = Watched(run.dataset)
    before = run.engine.per_instance.rdp()
    history = list(run.engine.accountant.history)
    oracles = retrain(run, dataset=dataset)
    assert len(oracles) == 2
    assert dataset.read
    assert not {2, 9} & set(dataset.read)
    np.testing.assert_array_equal(run.engine.per_instance.rdp(), before)
    assert run.engine.accountant.history == history


def test_a_seed_decides_an_oracle_and_the_global_generator_is_left_alone():
    run = network_run()
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, second = retrain(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, _ = retrain(run)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, second[0].weight)


@pytest.mark.parametrize(
    "changes", [{"forget_set": range(48)}, {"seeds": []}, {"steps": 0}, {"forget_set": [48]}]
)
def test_what_cannot_be_retrained_is_refused(changes):
    with pytest.raises(ValueError, match="Expected"):
        retrain(network_run(), **changes)
