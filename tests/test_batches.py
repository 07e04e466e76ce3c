"""Every supported way of feeding batches: the rows charged are the rows that moved the model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from tests.batches import MANAGERS, SIZE, WORKERS, Training, pair
from tests.capture.models import convolutional, images

LOOPS = ("two epochs", "break", "continue", "peek")


def run(training: Training, loop: str) -> None:
    with training.loading() as batches:
        for epoch in range(2):
            if loop == "peek":
                next(iter(batches))
            for number, batch in enumerate(batches):
                if loop == "break" and epoch == 0 and number == 3:
                    break
                if loop == "continue" and number % 4 == 1:
                    continue
                training.step(*batch)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_charged_rows_are_those_in_the_step(loop, manager, workers):
    training = Training(manager=MANAGERS[manager], loader=WORKERS[workers])
    if manager == "Opacus's" and loop != "two epochs":
        # Opacus's manager sums parts of several draws from the first irregular batch on.
        with pytest.warns(UserWarning, match="opacus_pil.BatchMemoryManager allows"):
            run(training, loop)
        assert training.unattributed > 0
    else:
        run(training, loop)
        assert training.unattributed == 0
    training.check_ledger()
    if loop == "two epochs":
        assert len(training.records) == 10  # one charge per draw, however it is split


@pytest.mark.parametrize("manager", MANAGERS)
def test_charged_rows_are_those_in_the_step_with_ghost_clipping(manager):
    training = Training(manager=MANAGERS[manager], mode="ghost")
    run(training, "two epochs")
    assert training.unattributed == 0
    training.check_ledger()


@pytest.mark.parametrize("manager", MANAGERS)
def test_fixed_batches_know_their_rows(manager):
    training = Training(
        manager=MANAGERS[manager], engine={"norm_policy": "participation"},
        poisson_sampling=False, loader={"shuffle": True},
    )  # fmt: skip
    run(training, "two epochs")
    assert training.unattributed == 0
    assert len(training.records) == 10
    assert np.isfinite(training.last_seen).all()


class Dictionaries(Dataset):
    def __init__(self) -> None:
        self.inner = images(SIZE)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, row):
        pixels, label = self.inner[row]
        return {"pixels": pixels, "label": label}


class Item(NamedTuple):
    pixels: torch.Tensor
    label: torch.Tensor


class NamedTuples(Dictionaries):
    def __getitem__(self, row):
        return Item(*self.inner[row])


class Batched(Dictionaries):
    """A map-style data set that also fetches whole batches."""

    fetched = 0

    def __getitem__(self, row):
        return self.inner[row]

    def __getitems__(self, rows):
        self.fetched += 1
        return [self.inner[row] for row in rows]


DATA = {
    "dict": Dictionaries,
    "namedtuple": NamedTuples,
    "Subset": lambda: Subset(images(90), range(89, 89 - SIZE, -1)),
    "__getitems__": Batched,
}


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("kind", DATA)
def test_any_map_style_data_set_and_batch_container(kind, manager):
    training = Training(manager=MANAGERS[manager], data=DATA[kind]())
    with training.loading() as batches:
        for batch in batches:
            training.step(*pair(batch))
    assert training.unattributed == 0
    assert len(training.records) == 5
    training.check_ledger()
    if kind == "__getitems__":
        assert training.data.fetched >= 5


@pytest.mark.parametrize("manager", MANAGERS)
@pytest.mark.parametrize("rand_on_empty", [False, True])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_empty_draws_are_steps_that_move_no_level(kind, rand_on_empty, manager):
    data = Dictionaries() if kind == "dict" else images(SIZE)
    # Opacus learns what an empty batch looks like from a full one: the seed draws one first.
    training = Training(
        manager=MANAGERS[manager], data=data, loader={"batch_size": 1}, seed=3,
        rand_on_empty=rand_on_empty,
    )  # fmt: skip
    with training.loading(physical=1) as batches:
        for batch in batches:
            training.step(*pair(batch))
    sizes = [len(record.indices) for record in training.records]
    # Draws of 60 rows at rate 1/60 are empty with probability 0.36: none in 60 has 0.64^60 < 1e-11.
    assert len(sizes) == 60
    assert {0, 1, 2} <= set(sizes)
    training.check_ledger()


def test_opacus_cannot_make_an_empty_namedtuple():
    """Its collation calls the class with one list; give such data a collate_fn of their own."""
    training = Training(data=NamedTuples(), loader={"batch_size": 1}, seed=3)

    def loop() -> None:
        for batch in training.loader:
            training.step(*pair(batch))

    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        loop()
    assert training.engine.per_instance.steps == len(training.records)
    training.check_ledger()


@pytest.mark.parametrize("manager", ["none", "Opacus's"])
def test_a_second_pass_beside_the_first_is_never_a_guess(manager):
    training = Training(manager=MANAGERS[manager])

    def loop(batches) -> None:
        for number, batch in enumerate(batches):
            if number == 3:
                next(iter(batches))
                kept = iter(training.loader)
                next(kept)  # a batch of the private loader itself, kept alive
            training.step(*batch)

    with training.loading() as batches, pytest.warns(UserWarning, match="worst case"):
        loop(batches)
    assert training.unattributed > 0
    training.check_ledger()


def test_batches_fetched_ahead_of_opacus_manager_are_never_a_guess():
    training = Training(manager=MANAGERS["Opacus's"])

    def loop(batches) -> None:
        for batch in list(batches):
            training.step(*batch)

    with training.loading() as batches, pytest.warns(UserWarning, match="worst case"):
        loop(batches)
    assert training.unattributed == len(training.records)


@pytest.mark.parametrize("poisson", [True, False])
def test_batches_that_may_overtake_each_other_are_refused(poisson):
    policy = "last_seen" if poisson else "participation"
    engine, module = PerInstancePrivacyEngine(norm_policy=policy), convolutional()
    loader = DataLoader(images(SIZE), batch_size=12, num_workers=1, in_order=False)
    with pytest.raises(UnsupportedError, match="in_order=True, got in_order=False"):
        engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
            poisson_sampling=poisson, criterion=nn.CrossEntropyLoss(),
        )  # fmt: skip
    assert engine.dataset is None
    assert not hasattr(module, "autograd_grad_sample_hooks")
