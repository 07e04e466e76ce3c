"""Task: one description of the training, which everybody asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from opacus_pil.errors import UnsupportedError
from opacus_pil.training.task import Task, evaluated_parts, training_mode

INPUTS, LABELS = torch.linspace(-1, 1, 24).reshape(4, 6), torch.tensor([0, 1, 2, 1])
BATCH = INPUTS, LABELS


@pytest.fixture
def module():
    torch.manual_seed(1)
    return nn.Linear(6, 3)


def own(module, batch):
    return F.cross_entropy(module(batch["x"]), batch["y"], reduction="none")


class TestLosses:
    """One per row, and the scalar that training calls backward() on."""

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_the_batch_s_is_made_of_the_rows(self, module, reduction):
        task = Task(criterion=nn.CrossEntropyLoss(reduction=reduction), reduction=reduction)
        rows, joint = task.loss_of(module, BATCH), task.batch_loss(module, BATCH)
        torch.testing.assert_close(joint, getattr(rows, reduction)())

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_a_loss_of_one_s_own_takes_any_batch(self, module, reduction):
        task = Task(own_loss=own, reduction=reduction)
        batch = {"x": INPUTS, "y": LABELS}
        assert not task.pairs
        rows = task.loss_of(module, batch)
        torch.testing.assert_close(task.batch_loss(module, batch), getattr(rows, reduction)())

    def test_precision_follows_the_model_in_both(self, module):
        doubled = module.double()
        task = Task(criterion=nn.CrossEntropyLoss())
        assert task.loss_of(doubled, BATCH).dtype == torch.float64
        assert task.batch_loss(doubled, BATCH).dtype == torch.float64

    def test_nothing_named_is_nothing_to_ask(self, module):
        assert not Task().named
        with pytest.raises(ValueError, match="Pass criterion= or loss_of="):
            Task().loss_of(module, BATCH)

    def test_losses_of_another_shape_are_refused(self, module):
        task = Task(own_loss=lambda module, batch: module(batch[0]))
        with pytest.raises(UnsupportedError, match=r"shape \(rows,\), got shape \(4, 3\)"):
            task.loss_of(module, BATCH)


class TestCoupling:
    """What a criterion's own settings say about rows that depend on each other."""

    WEIGHTS = torch.tensor([1.0, 2.0, 3.0])

    @pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
    def test_class_weights_under_a_mean(self, kind):
        assert "class weights" in Task(criterion=kind(weight=self.WEIGHTS)).coupling()
        for fine in (
            Task(criterion=kind(weight=self.WEIGHTS, reduction="sum")),
            Task(criterion=kind()),
            Task(criterion=kind(weight=self.WEIGHTS), per_row=True),
            Task(criterion=kind(weight=self.WEIGHTS), own_loss=own),
        ):
            assert fine.coupling() == ""

    def test_weights_of_other_losses_divide_by_nothing(self):
        for criterion in (nn.BCEWithLogitsLoss(weight=torch.ones(3)), nn.MultiMarginLoss()):
            assert Task(criterion=criterion).coupling() == ""

    def test_ignored_targets_under_a_mean(self):
        task = Task(criterion=nn.CrossEntropyLoss(ignore_index=1))
        assert "ignore_index=1" in task.ignores(BATCH)
        assert task.ignores((INPUTS, torch.tensor([0, 2, 2, 0]))) == ""
        assert task.ignores({"x": INPUTS}) == ""
        assert task.ignores((INPUTS, torch.ones(4))) == ""  # no classes
        summed = Task(criterion=nn.CrossEntropyLoss(ignore_index=1, reduction="sum"))
        assert summed.ignores(BATCH) == ""


class TestBatches:
    """How items are joined."""

    def test_by_the_loader_s_own_function_or_torch_s(self):
        items = [(INPUTS[0], 1), (INPUTS[1], 2)]
        plain = Task().collate(items)
        assert all(map(torch.equal, plain, default_collate(items)))
        turned = Task(collate_fn=lambda items: default_collate(items[::-1])).collate(items)
        assert turned[1].tolist() == [2, 1]

    def test_onto_a_device(self):
        batch = Task().collate([(INPUTS[0], 1)], device=torch.device("meta"))
        assert batch[0].device.type == "meta"


class TestModes:
    """Training mode, but for what never trains."""

    @staticmethod
    def backbone():
        module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout(0.1))
        module[0].requires_grad_(False)
        return module.eval()

    def test_a_frozen_batch_norm_stays_in_evaluation_mode(self):
        module = self.backbone()
        training_mode(module)
        assert module.training
        assert not module[0].training
        assert module[1].training
        assert module[2].training

    def test_so_do_parts_that_were_evaluated_in_training(self):
        module = self.backbone()
        module[1].train()
        assert evaluated_parts(module) == {"", "0", "2"}
        training_mode(module, evaluated=frozenset({"0", "2"}))
        assert [part.training for part in module] == [False, True, False]
