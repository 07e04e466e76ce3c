"""What code written for Opacus's engine finds when the import is exchanged."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from opacus_pil import PerInstancePrivacyEngine
from tests.capture.models import convolutional, images

SIZE, BATCH = 60, 12


class Halves:
    """A batch sampler of the user's own, which is none of torch's."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([list(range(SIZE // 2)), list(range(SIZE // 2, SIZE))])


LOADERS = {
    "shuffled": {"batch_size": BATCH, "shuffle": True, "drop_last": True},
    "torch's batch sampler": {
        "batch_sampler": BatchSampler(SequentialSampler(range(SIZE)), BATCH, drop_last=False)
    },
    "another batch sampler": {"batch_sampler": Halves()},
}


def fixed_batches(engine, **options):
    torch.manual_seed(5)
    module = convolutional()
    return engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(images(SIZE), **options), noise_multiplier=1.0, max_grad_norm=2.0,
        poisson_sampling=False, criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_of_fixed_batches_says_what_the_caller_s_own_does(kind):
    theirs = fixed_batches(PrivacyEngine(), **LOADERS[kind])[-1]
    ours = fixed_batches(PerInstancePrivacyEngine(norm_policy="participation"), **LOADERS[kind])[-1]
    assert len(ours) == len(theirs)
    assert ours.batch_size == theirs.batch_size
    assert ours.drop_last == theirs.drop_last
    assert type(ours.sampler) is type(theirs.sampler)


@pytest.mark.parametrize("kind", LOADERS)
def test_fixed_batches_are_split_as_opacus_splits_them(kind):
    lengths, weights = [], []
    for engine in (PrivacyEngine(), PerInstancePrivacyEngine(norm_policy="participation")):
        module, optimizer, loader = fixed_batches(engine, **LOADERS[kind])
        torch.manual_seed(6)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=5, optimizer=optimizer
        ) as parts:
            lengths.append((len(loader), len(parts)))
            for inputs, targets in parts:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(inputs), targets).backward()
                optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert lengths[0] == lengths[1]
    assert torch.equal(weights[0], weights[1])
    assert engine.per_instance.unattributed_steps == 0


def test_a_batch_norm_is_refused_as_by_opacus_and_the_cure_is_noted():
    said = []
    for engine in (PrivacyEngine(), PerInstancePrivacyEngine()):
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
        with pytest.raises(UnsupportedModuleError) as refused:
            engine.make_private(
                module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                data_loader=DataLoader(images(SIZE), batch_size=BATCH), noise_multiplier=1.0,
                max_grad_norm=1.0,
            )  # fmt: skip
        said.append(refused.value)
    theirs, ours = said
    assert str(ours) == str(theirs)
    assert "engine.get_compatible_module(model)" in " ".join(ours.__notes__)
