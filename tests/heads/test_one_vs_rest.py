"""OneVsRest and its loss: outputs that share nothing, each a smooth convex logistic regression."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from opacus_pil.heads import OneVsRest, OneVsRestLoss
from opacus_pil.heads.one_vs_rest import head_of, one_vs_rest_of
from tests.heads.models import CLASSES, frozen, head, linear

RANDOM = torch.Generator().manual_seed(0)


def random_logits(rows: int = 40, *, spread: float = 8.0) -> torch.Tensor:
    return spread * torch.randn(rows, CLASSES, generator=RANDOM, dtype=torch.float64)


def classes(rows: int = 40) -> torch.Tensor:
    return torch.randint(0, CLASSES, (rows,), generator=RANDOM)


def test_each_class_has_one_tensor_in_their_order_and_no_bias():
    module = OneVsRest(5, CLASSES)
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert shapes == [(1, 5)] * CLASSES
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.fill_(k + 1.0)
    assert module(torch.ones(1, 5)).tolist() == [[5.0, 10.0, 15.0]]


def test_logits_are_those_of_one_linear_layer_of_the_stacked_weights():
    module, inputs = OneVsRest(5, CLASSES), torch.randn(7, 5, generator=RANDOM)
    for p in module.parameters():
        nn.init.normal_(p, generator=RANDOM)
    expected = inputs @ torch.cat(list(module.parameters())).T
    torch.testing.assert_close(module(inputs), expected, rtol=1e-5, atol=1e-6)  # float32


def test_it_starts_at_zero_so_that_no_class_is_favoured():
    assert not head()(torch.randn(3, 5)).any()


def test_an_output_is_moved_by_its_own_logit_alone():
    module, inputs = head(), torch.randn(6, 5, generator=RANDOM)
    for k, p in enumerate(module.parameters()):
        gradients = torch.autograd.grad(
            module(inputs)[:, k].sum(), list(module.parameters()), allow_unused=True
        )
        assert [bool(g is not None and g.any()) for g in gradients] == [
            other is p for other in module.parameters()
        ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_sum_over_classes_of_binary_cross_entropy(reduction):
    logits, targets = random_logits(), classes()
    rows = nn.BCEWithLogitsLoss(reduction="none")(logits, one_hot(targets, CLASSES).to(logits)).sum(
        dim=1
    )
    expected = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    torch.testing.assert_close(OneVsRestLoss(reduction)(logits, targets), expected)


def test_the_mean_loss_is_torchs_times_the_number_of_classes():
    logits, targets = random_logits(), classes()
    torchs = nn.BCEWithLogitsLoss()(logits, one_hot(targets, CLASSES).to(logits))
    torch.testing.assert_close(OneVsRestLoss()(logits, targets), CLASSES * torchs)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_loss_is_convex_along_any_line(scale):
    loss = OneVsRestLoss("none")
    a, b, targets = random_logits(400), random_logits(400), classes(400)
    middle = loss(a + scale * b / 2, targets)
    ends = (loss(a, targets) + loss(a + scale * b, targets)) / 2
    assert bool((middle <= ends + 1e-12 * (1.0 + ends)).all())  # rounding of float64


def slopes(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(OneVsRestLoss("sum")(logits, targets), logits)
    return found


def test_each_slope_is_below_one_and_changes_by_a_quarter_per_unit_at_most():
    near, targets = random_logits(4000, spread=2.0), classes(4000)
    assert float(slopes(20.0 * near, targets).abs().max()) <= 1.0
    steepest = 0.0
    for step in (1e-4, 0.1, 3.0):
        change = (slopes(near + step, targets) - slopes(near, targets)).abs()
        steepest = max(steepest, float(change.max()) / step)
        assert float(change.max()) <= 0.25 * step * (1.0 + 1e-9)  # rounding of a difference
    assert steepest > 0.2499  # the constant is met: a smaller one would be false


def test_no_term_joins_two_outputs():
    logits, targets = random_logits(30), classes(30)
    moved = logits.clone()
    moved[:, 0] += 5.0
    change = slopes(moved, targets) - slopes(logits, targets)
    assert bool(change[:, 0].all())
    assert not change[:, 1:].any()


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (torch.zeros(4), "torch.float32"),
        (torch.zeros(4, CLASSES, dtype=torch.long), r"shape \(4, 3\)"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
    ],
)
def test_targets_that_are_no_class_numbers_are_refused(targets, found):
    with pytest.raises(ValueError, match=found):
        OneVsRestLoss()(torch.zeros(4, CLASSES), targets)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="reduction"):
        OneVsRestLoss("median")
    with pytest.raises(ValueError, match="classes"):
        OneVsRest(3, 0)
    with pytest.raises(ValueError, match="features"):
        OneVsRest(0, 3)


# --- which part is the head -----------------------------------------------------------------------


def partly(outputs: OneVsRest) -> OneVsRest:
    next(outputs.parameters()).requires_grad_(False)
    return outputs


class Named(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.part(inputs)


@pytest.mark.parametrize(
    "module", [head(), frozen(head()), Named(head()), nn.Sequential(frozen(head()))]
)
def test_a_head_is_found_wherever_it_is_all_that_trains(module):
    found = head_of(module)
    assert isinstance(found, OneVsRest)
    assert one_vs_rest_of(module) is found
    assert list(map(id, found.parameters())) == [
        id(p) for p in module.parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("module", [linear(), frozen(linear(4)), Named(linear())])
def test_a_linear_layer_is_a_head_and_no_one_vs_rest(module):
    assert type(head_of(module)) is nn.Linear
    assert one_vs_rest_of(module) is None


@pytest.mark.parametrize(
    "module",
    [
        frozen(head()).requires_grad_(True),
        head().requires_grad_(False),
        partly(head()),
        nn.Sequential(head(), head()),
        nn.ReLU(),
        Named(type("Own", (OneVsRest,), {})(5, 3)),
    ],
    ids=["body trains", "nothing trains", "one output frozen", "two heads", "none", "a subclass"],
)
def test_what_is_no_single_head_is_none(module):
    assert head_of(module) is None
