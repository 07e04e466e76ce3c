"""One loss per row: what a row's gradient is the gradient of, from a criterion and pairs."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opacus_pil.capture.row_losses import as_pair, moved_to, pair_loss
from opacus_pil.errors import UnsupportedError

INPUTS = torch.linspace(-1, 1, 30).reshape(5, 6)
LABELS = torch.tensor([0, 2, 1, 1, 0])


@pytest.fixture
def module():
    torch.manual_seed(1)
    return nn.Linear(6, 3)


def alone(module, criterion, targets):
    """The definition: each row by itself."""
    pairs = zip(INPUTS, targets, strict=True)
    return torch.stack([criterion(module(x[None]), y[None]) for x, y in pairs])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_criterion_of_the_batch_is_asked_for_rows(module, reduction):
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    found = pair_loss(criterion, reduction="mean")(module, (INPUTS, LABELS))
    expected = alone(module, nn.CrossEntropyLoss(), LABELS)
    torch.testing.assert_close(found, expected)
    assert criterion.reduction == reduction  # the user's own is as it was


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_terms_of_a_row_are_joined_as_the_criterion_joins_them(module, how):
    targets = torch.zeros(5, 3)
    found = pair_loss(nn.MSELoss(reduction=how), reduction="mean")(module, (INPUTS, targets))
    torch.testing.assert_close(found, alone(module, nn.MSELoss(reduction=how), targets))


def test_a_divergence_under_batchmean_sums_its_terms(module):
    targets = torch.softmax(torch.arange(15.0).reshape(5, 3), 1)
    criterion = nn.KLDivLoss(reduction="batchmean")
    found = pair_loss(criterion, reduction="mean")(
        lambda x: F.log_softmax(module(x), 1), (INPUTS, targets)
    )
    torch.testing.assert_close(
        found, alone(lambda x: F.log_softmax(module(x), 1), criterion, targets)
    )


def test_a_plain_function_is_called_row_by_row(module):
    sizes = []

    def criterion(outputs, targets):
        sizes.append(len(outputs))
        return F.cross_entropy(outputs, targets)

    found = pair_loss(criterion, reduction="mean")(module, (INPUTS, LABELS))
    torch.testing.assert_close(found, alone(module, F.cross_entropy, LABELS))
    assert sizes == [1] * 5
    empty = pair_loss(criterion, reduction="mean")(module, (INPUTS[:0], LABELS[:0]))
    assert empty.shape == (0,)


def test_floating_inputs_and_targets_get_the_parameters_precision(module):
    doubled = module.double()
    found = pair_loss(nn.MSELoss(), reduction="mean")(doubled, (INPUTS, torch.zeros(5, 3)))
    assert found.dtype == torch.float64
    words = nn.Embedding(9, 3)
    assert pair_loss(nn.CrossEntropyLoss(), reduction="mean")(
        words, (torch.arange(5), LABELS)
    ).shape == (5,)  # whole numbers stay whole


def test_a_loss_that_is_not_one_per_row_is_refused(module):
    class Pairs(nn.Module):
        reduction = "mean"

        def forward(self, outputs, targets):
            return outputs.flatten()

    with pytest.raises(
        UnsupportedError, match=r"one loss per instance .* \(5\), got shape \(15,\)"
    ):
        pair_loss(Pairs(), reduction="mean")(module, (INPUTS, LABELS))


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ({"x": INPUTS, "y": LABELS}, r"dict with keys \['x', 'y'\]"),
        ((INPUTS, LABELS, LABELS), "tuple of 3"),
        (INPUTS, "Tensor"),
        ((INPUTS, "text"), "tuple of 2"),
    ],
)
def test_batches_that_are_no_pairs_are_named_with_the_cure(batch, kind):
    with pytest.raises(UnsupportedError, match=rf"got {kind}. Pass loss_of="):
        as_pair(batch)


class Point(NamedTuple):
    inputs: torch.Tensor
    label: torch.Tensor


class Frozen(UserDict):
    """A mapping that cannot be written to."""

    def __setitem__(self, key, value):
        if getattr(self, "closed", False):
            raise TypeError("frozen")
        super().__setitem__(key, value)


def test_every_leaf_of_a_nested_batch_is_moved_and_its_kind_kept():
    meta = torch.device("meta")
    batch = [Point(INPUTS, LABELS), {"a": (INPUTS, "text", 3)}, OrderedDict(b=LABELS)]
    moved = moved_to(batch, meta)
    assert isinstance(moved[0], Point)
    assert moved[0].inputs.device == moved[1]["a"][0].device == moved[2]["b"].device == meta
    assert moved[1]["a"][1:] == ("text", 3)
    assert isinstance(moved[2], OrderedDict)
    assert batch[0].inputs.device.type == "cpu"
    frozen = Frozen(a=INPUTS)
    frozen.closed = True
    assert moved_to(frozen, meta)["a"].device == meta
    assert frozen["a"].device.type == "cpu"
