"""Our BatchMemoryManager trains as Opacus's does, and no step sums parts of two draws."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import opacus_pil
from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.accounting import group_rdp, sampled_gaussian_rdp
from opacus_pil.capture.memory import BatchMemoryManager as Home
from tests.batches import BATCH, BOUND, PHYSICAL, SIZE, WORKERS, Training
from tests.capture.models import convolutional, images


def epoch(training: Training, **options) -> None:
    with training.loading(**options) as batches:
        for batch in batches:
            training.step(*batch)


def test_name_and_signature_are_those_of_opacus():
    assert opacus_pil.BatchMemoryManager is Home
    assert issubclass(Home, OpacusManager)
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (Home, OpacusManager))
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_training_is_that_of_opacus_manager_bit_for_bit(mode, workers):
    def run(engine, manager):
        torch.manual_seed(11)
        module, loss = convolutional(dropout=0.3), nn.CrossEntropyLoss()
        made = engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(images(SIZE), batch_size=BATCH, num_workers=workers),
            noise_multiplier=1.0, max_grad_norm=BOUND, criterion=loss, grad_sample_mode=mode,
        )  # fmt: skip
        wrapped, optimizer, loader = made[0], made[1], made[-1]
        criterion = made[2] if mode == "ghost" else loss
        sizes = []
        with manager(
            data_loader=loader, max_physical_batch_size=PHYSICAL, optimizer=optimizer
        ) as batches:
            length = len(batches)
            for _ in range(2):
                for inputs, targets in batches:
                    sizes.append(len(inputs))
                    optimizer.zero_grad()
                    criterion(wrapped(inputs), targets).backward()
                    optimizer.step()
                    assert optimizer.accumulated_iterations == 1
        moved = torch.cat([p.detach().flatten() for p in module.parameters()])
        return moved, torch.get_rng_state(), sizes, length, engine.accountant.history

    expected = run(PrivacyEngine(accountant="rdp"), OpacusManager)
    for manager in (OpacusManager, BatchMemoryManager):
        engine = PerInstancePrivacyEngine(accountant="rdp")
        found = run(engine, manager)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2:] == expected[2:]
        assert found[-1] == [(1.0, BATCH / SIZE, 10)]  # the sample rate of a draw, once per draw
        assert engine.per_instance.steps == 10
        assert engine.per_instance.unattributed_steps == 0


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loop_left_early_leaves_nothing_behind(workers):
    training = Training(manager=BatchMemoryManager, loader=WORKERS[workers])
    optimizer = training.optimizer
    with training.loading(physical=3) as batches:
        for batch in batches:
            training.step(*batch)
            if optimizer._is_last_step_skipped:
                break
        assert any(p.summed_grad is not None for p in optimizer.params)
        again = iter(batches)
        assert optimizer._step_skip_queue == []
        assert all(p.summed_grad is None for p in optimizer.params)
        for batch in again:
            training.step(*batch)
    assert training.unattributed == 0
    assert len(training.records) in (5, 6)  # the first draw may have been a single part
    training.check_ledger()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_whose_last_part_was_skipped_makes_no_step(workers):
    training = Training(manager=BatchMemoryManager, loader={"num_workers": workers})
    skipped = ends = 0
    with training.loading(physical=4) as batches:
        for batch in batches:
            last = training.optimizer._step_skip_queue == [False]
            if last and ends == 1:
                assert training.optimizer._is_last_step_skipped  # a sum is waiting for this part
                skipped += 1
            else:
                training.step(*batch)  # would find the wrong sum if the waiting one stayed
            ends += last
    assert (skipped, ends, len(training.records)) == (1, 5, 4)
    assert training.unattributed == 0
    training.check_ledger()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_each_part_is_clipped_to_the_caps_of_its_rows(mode):
    caps = np.random.default_rng(0).uniform(0.1, 1.0, SIZE)
    training = Training(
        manager=BatchMemoryManager, mode=mode, engine={"norm_policy": "capped", "caps": caps}
    )
    epoch(training)  # every step compares the sum with that of the capped gradients
    assert len(training.records) == 5
    assert training.unattributed == 0
    result = training.engine.get_per_instance_epsilon(1e-2)
    assert result.guarantee == "bound"


def test_rows_left_out_stay_out_in_every_part():
    caps = np.where(np.arange(SIZE) % 2, 1.0, 0.0)
    pixels, labels = images(SIZE).tensors
    broken = TensorDataset(torch.where(torch.tensor(caps).view(-1, 1, 1, 1) > 0, pixels, torch.nan),
                           labels)  # fmt: skip
    training = Training(manager=BatchMemoryManager, engine={"norm_policy": "capped", "caps": caps})
    training.optimizer.recorder.take = training._take  # sums of NaN are compared by nobody
    with training.loading() as batches:
        for inputs, targets in batches:
            rows = [int((pixels == x).flatten(1).all(1).nonzero()[0, 0]) for x in inputs]
            training.step(broken.tensors[0][rows], targets)
    assert all(torch.isfinite(p).all() for p in training.module.parameters())
    assert training.engine.per_instance.steps == 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_caps_refuse_opacus_manager_before_anything_moves(mode, workers):
    training = Training(
        manager=OpacusManager, mode=mode, loader={"num_workers": workers},
        engine={"norm_policy": "capped", "caps": np.full(SIZE, 0.5)},
    )  # fmt: skip
    before = [p.detach().clone() for p in training.module.parameters()]
    with training.loading() as batches:
        with pytest.raises(UnsupportedError, match=r"Use opacus_pil\.BatchMemoryManager"):
            next(iter(batches))
        assert training.optimizer._step_skip_queue == []
    assert training.engine.per_instance.steps == 0
    assert all(map(torch.equal, before, training.module.parameters()))
    training.manager = BatchMemoryManager  # the cure
    epoch(training)
    assert len(training.records) == 5


@pytest.mark.parametrize("draws", [2, 3, 5])
def test_several_draws_in_one_step_are_charged_for_more_than_they_can_give(draws):
    """k bounds at rate k·q dominate k independent draws, collinear gradients being the worst."""
    orders = [1.5, 2.0, 5.0, 16.0]
    for rate in (0.01, 0.2):
        for noise in (0.7, 2.0):
            truth = group_rdp(
                np.ones(draws), noise_multiplier=noise, sample_rate=rate, orders=orders
            )
            charged = sampled_gaussian_rdp(
                1.0, noise_multiplier=noise / draws, sample_rate=min(rate * draws, 1.0),
                orders=orders,
            )  # fmt: skip
            assert (truth <= charged * (1 + 1e-9)).all()  # the set's quadrature is good to 1e-9


def test_a_step_of_two_draws_is_charged_for_both():
    training = Training(manager=OpacusManager)
    with training.loading(physical=3) as batches:
        for batch in batches:
            training.step(*batch)
            if training.optimizer._is_last_step_skipped:
                break  # Opacus keeps the sum and adds the next draw to it

        def until_it_is_summed() -> None:
            again = iter(batches)
            while training.unattributed == 0:
                training.step(*next(again))

        with pytest.warns(UserWarning, match="worst case"):
            until_it_is_summed()
    draws = [record.draws for record in training.records]
    assert draws[-1] == 2
    ledger, rate = training.engine.per_instance, BATCH / SIZE
    expected = sum(
        sampled_gaussian_rdp(
            1.0, noise_multiplier=1.0 / k, sample_rate=rate * k, orders=ledger.orders
        )
        for k in draws
    )
    # The accountant's tables are rounded up by a few units in the last place.
    np.testing.assert_allclose(ledger.worst_case_rdp(), expected, rtol=1e-9)


def test_a_failed_batch_ends_the_pass():
    class Failing(TensorDataset):
        broken = False

        def __getitem__(self, row):
            if self.broken:
                raise OSError("unreadable")
            return super().__getitem__(row)

    data = Failing(*images(SIZE).tensors)
    training = Training(data=data, manager=BatchMemoryManager)
    with training.loading() as batches:
        running = iter(batches)
        training.step(*next(running))
        data.broken = True
        with pytest.raises(OSError, match="unreadable"):
            next(running)
        data.broken = False
        with pytest.raises(UnsupportedError, match="Start a new pass"):
            next(running)
        for batch in batches:
            training.step(*batch)
    assert training.unattributed == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_is_waiting_until_its_last_part_is_handed_out(workers):
    training = Training(manager=BatchMemoryManager, loader={"num_workers": workers})
    sampler = training.loader.batch_sampler
    with training.loading(physical=3) as batches:
        steps = 0
        for batch in batches:
            training.step(*batch)
            left = sampler.remainder()
            unfinished = training.optimizer._is_last_step_skipped
            steps = len(training.records)
            waiting = [sorted(rows) for rows in left.waiting]
            assert len(waiting) + left.draws == 5 - steps
            if unfinished:  # whole, so that another process can begin it again
                part = {tuple(x.flatten().tolist()) for x in batch[0]}
                whole = training.data.tensors[0][waiting[0]]
                assert part <= {tuple(x.flatten().tolist()) for x in whole}
    assert steps == 5
    assert sampler.remainder() is None


@pytest.mark.parametrize("manager", [OpacusManager, BatchMemoryManager])
def test_adaptive_clipping_is_refused(manager):
    engine, module = PerInstancePrivacyEngine(), convolutional()
    _, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(images(SIZE), batch_size=BATCH), noise_multiplier=1.0,
        max_grad_norm=1.0, clipping="adaptive", target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2, max_clipbound=5.0, min_clipbound=0.1, unclipped_num_std=6.0,
    )  # fmt: skip

    def first():
        with manager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
            return next(iter(batches))

    with pytest.raises(UnsupportedError, match="adaptive clipping"):
        first()
    assert engine.per_instance.steps == 0


def test_other_loaders_and_optimizers_are_refused():
    one, other = Training(), Training()
    good = {
        "data_loader": one.loader, "max_physical_batch_size": 3, "optimizer": one.optimizer,
    }  # fmt: skip
    with BatchMemoryManager(**good) as split:
        for options, message in (
            ({"data_loader": DataLoader(images())}, "got DataLoader"),
            ({"data_loader": split}, "got SplittingLoader"),
            ({"optimizer": other.optimizer}, "another training"),
            ({"optimizer": torch.optim.SGD(one.module.parameters(), lr=0.1)}, "SGD of another"),
        ):
            with pytest.raises(UnsupportedError, match=message):
                BatchMemoryManager(**(good | options))
    with pytest.raises(ValueError, match="max_physical_batch_size"):
        BatchMemoryManager(**(good | {"max_physical_batch_size": 0}))
