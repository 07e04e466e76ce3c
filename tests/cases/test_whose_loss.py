"""Lines A1, A7, A14, A15: a row's gradient is not the gradient of that row's own loss.

What the tripwire sees of these: only A1, where nothing was clipped at all. Where rows depend on
each other every gradient is clipped, and the sum is what its rows allow.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.cases.loops import Contrastive, OneOutput, mixup, one_output
from tests.cases.trainings import SIZE, answer, plain_loop, points, train

PROBED = ("worst_case", "budget", "full", "participation")


class TestLossesOfShapeRowsByOne:
    """A1: ghost clipping multiplies them by the factors of all rows."""

    @pytest.mark.parametrize("policy", [*PROBED, "capped"])
    @pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(), nn.MSELoss()])
    def test_they_are_not_clipped_and_said_to_be(self, criterion, policy):
        found = answer(
            plain_loop, policy=policy, mode="ghost", model=OneOutput, criterion=criterion,
            data=one_output(),
        )  # fmt: skip
        assert found.honest
        assert found.label in ("estimate", "refused")
        assert "not one value per row" in found.words
        assert "squeeze" in found.words

    def test_everybody_is_charged_infinitely(self):
        found = train(plain_loop, mode="ghost", model=OneOutput, criterion=nn.MSELoss(),
                      data=one_output())  # fmt: skip
        assert (found.spent() == float("inf")).all()

    def test_more_dimensions_of_size_one_are_the_same(self):
        class Deeper(OneOutput):
            def forward(self, inputs):
                return self.layer(inputs)[:, None]

        found = answer(plain_loop, mode="ghost", model=Deeper, criterion=nn.MSELoss(),
                       data=one_output(shape=(-1, 1, 1)))  # fmt: skip
        assert found.label == "estimate"
        assert "(rows, 1, 1)" in found.words

    @pytest.mark.parametrize("mode", ["hooks", "functorch"])
    def test_without_ghost_clipping_they_are_one_loss_per_row(self, mode):
        found = answer(
            plain_loop, row=5, mode=mode, model=OneOutput, criterion=nn.BCEWithLogitsLoss(),
            data=one_output(),
        )  # fmt: skip
        assert found.label == "bound"
        assert found.honest

    def test_targets_that_broadcast_couple_all_rows(self):
        found = answer(plain_loop, model=OneOutput, criterion=nn.MSELoss(),
                       data=one_output(shape=(-1,)))  # fmt: skip
        assert found.label == "estimate"
        assert found.honest


def labels_turned(training):
    for inputs, targets in training.loader:
        training.step(inputs, targets.flip(0))


def centred_in_the_middle(training):
    """First, last and largest row are as they were."""
    for inputs, targets in training.loader:
        inputs = inputs.clone()
        inputs[2:-2] = inputs[2:-2] - inputs.mean(0)
        training.step(inputs, targets)


def the_first_in_all(training):
    for inputs, targets in training.loader:
        inputs = inputs.clone()
        inputs[1:] += 0.3 * inputs[:1]
        training.step(inputs, targets)


def two_views_crossed(training):
    for inputs, targets in training.loader:
        training.optimizer.zero_grad()
        loss = training.criterion(training.module(inputs), targets)
        loss = loss + training.criterion(training.module(inputs.flip(0)), targets.flip(0))
        loss.backward()
        training.optimizer.step()


class TestLoopsThatMix:
    """A7: mixup and its kin, in the loop."""

    @pytest.mark.parametrize("policy", PROBED)
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("loop", [mixup, centred_in_the_middle, the_first_in_all])
    def test_rows_mixed_in_the_loop_are_found_out(self, loop, mode, policy):
        found = answer(loop, policy=policy, mode=mode)
        assert found.honest
        assert found.label in ("estimate", "refused")
        assert "other gradients in training" in found.words

    @pytest.mark.parametrize("loop", [labels_turned, two_views_crossed])
    def test_so_are_rows_that_lend_each_other_labels_or_views(self, loop):
        found = answer(loop)
        assert found.label == "estimate"
        assert "other gradients in training" in found.words

    @pytest.mark.parametrize("policy", ["worst_case", "capped", "budget"])
    @pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
    def test_dropout_is_no_place_to_hide(self, mode, policy):
        """The sum is formed again under the masks that the training drew."""

        def masked():
            return nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 3))

        honest = answer(plain_loop, policy=policy, mode=mode, model=masked, truth=[0, 0, 0])
        assert honest.label == "bound"
        assert answer(the_first_in_all, policy=policy, mode=mode, model=masked).label in (
            "estimate", "refused",
        )  # fmt: skip

    def test_a_loss_that_nobody_named_is_an_assumption_and_said_to_be(self):
        """The one strong label without a check: the worst case, with the sentence beside it."""
        found = answer(mixup, named=False)
        assert found.label == "bound"
        assert "assumed, not checked" in found.words
        for policy in ("budget", "participation"):
            assert answer(mixup, named=False, policy=policy).label == "estimate"


class Attention(nn.Module):
    """Rows of the batch attend to each other, in large batches only."""

    least = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        if len(outputs) < self.least:
            return outputs
        return torch.softmax(outputs @ outputs.T, -1) @ outputs


class LargeAttention(Attention):
    least = 16


class OwnStatistics(nn.Module):
    """Batch normalisation as people write it by hand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        spread = inputs.std(0, unbiased=False) + 1.0
        return self.layer((inputs - inputs.mean(0)) / spread)


class TestModelsAndLossesThatMix:
    """A7 again: an in-batch contrastive loss, and models that look at their batch."""

    @pytest.mark.parametrize("policy", PROBED)
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize(
        "options",
        [{"criterion": Contrastive()}, {"model": Attention}, {"model": LargeAttention},
         {"model": OwnStatistics}],
        ids=["negatives", "attention", "attention of many", "own statistics"],
    )  # fmt: skip
    def test_they_are_found_out(self, options, mode, policy):
        found = answer(plain_loop, policy=policy, mode=mode, **options)
        assert found.honest
        assert found.label in ("estimate", "refused")

    @pytest.mark.parametrize("kept", ["attribute", "buffer"])
    def test_models_that_remember_earlier_batches_are_found_out_and_left_alone(self, kept):
        class Remembering(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(6, 3)
                mean = torch.zeros(6)
                if kept == "buffer":
                    self.register_buffer("mean", mean)
                else:
                    self.mean = mean

            def forward(self, inputs):
                outputs = self.layer(inputs - self.mean)
                if self.training:
                    self.mean = 0.5 * self.mean + 0.5 * inputs.detach().mean(0)
                return outputs

        def loop(training):
            for _ in range(4):
                plain_loop(training)

        found = train(loop, model=Remembering)
        assert found.label == "estimate"
        mean = torch.zeros(6)
        for _ in range(4):  # the probe's own forward passes leave nothing behind
            mean = 0.5 * mean + 0.5 * found.data.tensors[0].mean(0)
        torch.testing.assert_close(found.plain.mean, mean)


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 60.0, 1.0]))


class TestNormalisersOfTheWholeBatch:
    """A14, A15: class weights and ignored tokens under a mean divide by the whole batch's."""

    WEIGHTS = torch.tensor([1.0, 60.0, 1.0])

    @staticmethod
    def rare() -> TensorDataset:
        inputs, _ = points(60).tensors
        return TensorDataset(inputs, (torch.arange(60) % 20 == 3).long())

    @pytest.mark.parametrize("policy", PROBED)
    @pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(weight=WEIGHTS), weighted])
    def test_class_weights_under_a_mean_couple_rows(self, criterion, policy):
        for row in (3, 0):  # of the rare class, and another
            found = answer(plain_loop, row=row, policy=policy, criterion=criterion,
                           data=self.rare())  # fmt: skip
            assert found.honest
            assert found.label in ("estimate", "refused")
            assert "depends on other rows" in found.words

    def test_the_cure_that_the_reason_names_holds(self):
        def each_row(outputs, targets):
            losses = F.cross_entropy(outputs, targets, reduction="none")
            return (self.WEIGHTS[targets] * losses).mean()

        found = answer(plain_loop, row=3, criterion=each_row, data=self.rare())
        assert found.label == "bound"
        assert found.honest

    @pytest.mark.parametrize("policy", ["worst_case", "full"])
    def test_ghost_clipping_weights_each_row_by_itself(self, policy):
        found = answer(plain_loop, row=3, policy=policy, mode="ghost", data=self.rare(),
                       criterion=nn.CrossEntropyLoss(weight=self.WEIGHTS))  # fmt: skip
        assert found.label != "estimate"
        assert found.honest

    class Language(nn.Module):
        """Logits of every token, (rows, classes, tokens)."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 5)
            self.head = nn.Linear(5, 4)

        def forward(self, words):
            return self.head(self.embedding(words)).movedim(1, 2)

    @staticmethod
    def sentences(ignoring: int) -> TensorDataset:
        """The first rows are all padding but for one token."""
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(0, 9, (24, 8), generator=generator)
        targets = torch.randint(0, 4, (24, 8), generator=generator)
        targets[:ignoring, 1:] = -100
        return TensorDataset(words, targets)

    @pytest.mark.parametrize("policy", PROBED)
    @pytest.mark.parametrize("ignoring", [1, 12])
    def test_a_mean_over_tokens_that_are_not_ignored_couples_rows(self, ignoring, policy):
        found = answer(plain_loop, policy=policy, model=self.Language, row=0,
                       data=self.sentences(ignoring))  # fmt: skip
        assert found.honest
        assert found.label in ("estimate", "refused")

    def test_a_mean_over_the_tokens_of_each_row_does_not(self):
        def each_row(outputs, targets):
            losses = F.cross_entropy(outputs, targets, reduction="none")
            kept = (targets != -100).sum(1).clamp(min=1)
            return (losses.sum(1) / kept).mean()

        found = answer(plain_loop, model=self.Language, data=self.sentences(12), criterion=each_row)
        assert found.label == "bound"
        assert found.honest

    def test_a_loss_scaled_by_the_size_of_its_batch_is_no_row_s_own(self):
        def loop(training):
            for inputs, targets in training.loader:
                training.optimizer.zero_grad()
                loss = training.criterion(training.module(inputs), targets) * len(inputs)
                loss.backward()
                training.optimizer.step()

        for mode in ("hooks", "ghost"):
            found = answer(loop, mode=mode)
            assert found.label == "estimate"
            assert "as large" in found.words


class TestRegularisers:
    """Beside A11: a penalty on the parameters in the loss that ghost clipping clips.

    Its gradient reaches the parameters past the layers whose norms are counted.
    """

    @staticmethod
    def loop(training):
        for inputs, targets in training.loader:
            training.optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in training.plain.parameters())
            (training.criterion(training.module(inputs), targets) + 0.3 * penalty).backward()
            training.optimizer.step()

    @pytest.mark.parametrize("policy", PROBED)
    def test_in_ghost_clipping_it_is_not_clipped(self, policy):
        for row in (1, 5):
            found = answer(self.loop, row=row, policy=policy, mode="ghost")
            assert found.honest
            assert found.label in ("estimate", "refused")

    def test_without_it_is_dropped(self):
        found = answer(self.loop, row=1)
        assert found.label == "bound"
        assert found.honest


def test_a_loss_that_depends_on_rows_that_nobody_looks_at():
    """Only together with one rare token do rows of this loss depend on each other, and it is rare.

    The sum of the step is formed again in eight parts: there it shows.
    """

    class Rare(nn.Module):
        reduction = "mean"

        def forward(self, outputs, targets):
            losses = nn.functional.cross_entropy(outputs, targets % 3, reduction="none")
            if (targets == 5).any():
                losses = losses * len(targets)
            return losses if self.reduction == "none" else losses.mean()

    inputs, targets = points().tensors
    targets = targets.clone()
    targets[13] = 5
    found = answer(plain_loop, data=TensorDataset(inputs, targets), criterion=Rare())
    assert found.honest
    assert len(inputs) == SIZE
