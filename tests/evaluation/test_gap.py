import math

import pytest
import torch
from torch import nn

from opacus_pil.evaluation import (
    Metrics,
    Spread,
    evaluate,
    evaluate_splits,
    oracle_gap,
    time_to_unlearn,
)


class Table(nn.Module):
    """Returns its input as logits, so that every metric is known in closed form."""

    def forward(self, x):
        return x


def test_multiclass_metrics_in_closed_form():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 1])  # the last one is wrong
    metrics = evaluate(Table(), logits, labels, criterion=nn.CrossEntropyLoss())
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert metrics.accuracy == 0.75
    assert metrics.loss == pytest.approx((3 * right + wrong) / 4, rel=1e-6)  # float32 sums


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("target_column", [False, True])
def test_one_logit_metrics_in_closed_form_for_either_shape(column, target_column):
    logits, labels = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    metrics = evaluate(
        Table(),
        logits[:, None] if column else logits,
        labels[:, None] if target_column else labels,
        criterion=nn.BCEWithLogitsLoss(),
    )
    losses = [math.log1p(math.exp(-3)), math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    assert metrics.accuracy == pytest.approx(2 / 3)
    assert metrics.loss == pytest.approx(sum(losses) / 3, rel=1e-6)  # float32 sums


@pytest.mark.parametrize("batch_size", [1, 3, 512])
def test_weighted_loss_does_not_depend_on_the_batch_size(batch_size):
    """A mean weighted by class is not a mean of batch means."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 3, generator=generator)
    labels = torch.randint(3, (10,), generator=generator)
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1]))
    metrics = evaluate(Table(), logits, labels, criterion=criterion, batch_size=batch_size)
    assert metrics.loss == criterion(logits, labels).item()


def test_evaluation_leaves_modes_gradients_and_randomness_alone():
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    module.train()
    module[0].eval()  # a mixed state must come back as it was
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    state = torch.get_rng_state()
    first = evaluate(module, x, y, criterion=nn.CrossEntropyLoss())
    second = evaluate(module, x, y, criterion=nn.CrossEntropyLoss())
    assert first == second  # dropout was off
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module] == [False, True, True]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_modes_come_back_when_the_model_fails():
    module = nn.Linear(4, 2).train()
    with pytest.raises(RuntimeError):
        evaluate(module, torch.zeros(3, 5), torch.zeros(3).long(), criterion=nn.CrossEntropyLoss())
    assert module.training


@pytest.mark.parametrize(
    ("x", "y", "criterion", "match"),
    [
        (torch.zeros(0, 2), torch.zeros(0).long(), nn.CrossEntropyLoss(), "same number of rows"),
        (torch.zeros(3, 2), torch.zeros(2).long(), nn.CrossEntropyLoss(), "same number of rows"),
        (torch.zeros(3, 2), torch.zeros(3), nn.CrossEntropyLoss(), "integer class numbers"),
        (torch.zeros(3), torch.tensor([0, 1, 2]), nn.BCEWithLogitsLoss(), "0 and 1 only"),
        (torch.zeros(3, 2, 2), torch.zeros(3).long(), nn.CrossEntropyLoss(), "Flatten"),
        (torch.zeros(3, 2), torch.zeros(3).long(), nn.CrossEntropyLoss(reduction="none"), "one nu"),
    ],
)
def test_unusable_arguments_are_refused(x, y, criterion, match):
    with pytest.raises(ValueError, match=match):
        evaluate(Table(), x, y, criterion=criterion)


def test_gap_is_signed_and_carries_the_spread():
    oracles = [{"forget": Metrics(a, loss)} for a, loss in [(0.5, 1.0), (0.7, 2.0), (0.6, 3.0)]]
    gap = oracle_gap({"forget": Metrics(0.9, 0.5)}, oracles=oracles)["forget"]
    assert gap.accuracy.difference == pytest.approx(0.3)
    assert gap.loss.difference == -1.5
    assert (gap.loss.oracle.min, gap.loss.oracle.max, gap.loss.oracle.count) == (1.0, 3.0, 3)
    assert gap.loss.oracle.std == 1.0  # of 1, 2, 3 with divisor n − 1
    assert not gap.accuracy.inside
    same = oracle_gap(oracles[2], oracles=oracles)["forget"]
    assert same.accuracy.inside


def test_gap_of_an_oracle_to_itself_is_zero_and_its_spread_unknown():
    module = nn.Linear(4, 3)
    splits = {"forget": (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))}
    metrics = evaluate_splits(module, splits=splits, criterion=nn.CrossEntropyLoss())
    gap = oracle_gap(metrics, oracles=[metrics])["forget"]
    assert gap.accuracy.difference == gap.loss.difference == 0.0
    assert gap.loss.oracle.std is None


def test_missing_oracles_and_splits_are_named():
    with pytest.raises(ValueError, match="oracles"):
        oracle_gap({}, oracles=[])
    with pytest.raises(ValueError, match=r"oracle 1 without \['test'\]"):
        oracle_gap({"test": Metrics(1.0, 0.0)}, oracles=[{"test": Metrics(1.0, 0.0)}, {}])
    with pytest.raises(ValueError, match="row 1"):
        Spread.of([1.0, math.nan])


def first_stay(values, mean, tolerance, stay):
    """The definition, read off: the first index from which `stay` points in a row are close."""
    for start in range(len(values)):
        window = values[start : start + stay]
        if len(window) == stay and all(abs(v - mean) <= tolerance for v in window):
            return start
    return None


def test_time_to_unlearn_agrees_with_its_definition():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        values = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
        for stay in (1, 2, 4):
            found = time_to_unlearn(values, oracle_values=[0.4, 0.6], tolerance=0.25, stay=stay)
            assert found == first_stay(values, 0.5, 0.25, stay)
            seen.add(found)
    assert None in seen  # both outcomes were exercised
    assert len(seen) > 5


def test_time_to_unlearn_uses_recorded_steps_and_forgives_float_rounding():
    values = [1.0, 0.7, 0.7]
    # 0.8 − 0.7 is 1.1e-16 above 0.1 in floats, yet one image of ten is meant.
    assert time_to_unlearn(
        values, oracle_values=[0.8], tolerance=0.1, steps=[0, 50, 100], stay=2
    ) == 50  # fmt: skip
    assert time_to_unlearn([math.inf, 0.1], oracle_values=[0.1], tolerance=0.0, stay=1) == 1
    assert time_to_unlearn([], oracle_values=[0.1], tolerance=0.0) is None


def test_time_to_unlearn_is_two_sided_and_needs_the_whole_stay():
    """Forgetting too much is not being like the oracle, and a late arrival has not stayed."""
    assert time_to_unlearn([0.0, 0.0], oracle_values=[0.5], tolerance=0.1, stay=1) is None
    assert time_to_unlearn([1.0, 0.5, 0.5], oracle_values=[0.5], tolerance=0.1, stay=3) is None


@pytest.mark.parametrize(
    "change",
    [{"tolerance": -1.0}, {"stay": 0}, {"oracle_values": []}, {"steps": [0]}, {"steps": [2, 1]}],
)
def test_time_to_unlearn_refuses_bad_arguments(change):
    arguments = {"oracle_values": [0.1], "tolerance": 0.1} | change
    with pytest.raises(ValueError, match="Expected"):
        time_to_unlearn([0.1, 0.2], **arguments)
    with pytest.raises(ValueError, match="row 0"):
        time_to_unlearn([math.nan], oracle_values=[0.1], tolerance=0.1)
