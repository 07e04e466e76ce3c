"""C1, C3, C4, C6: any optimizer, any mode and any type that was trained with unlearns."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pil import UnlearningEngine
from opacus_pil.errors import UnsupportedError

from .test_unlearning_tasks import METHODS
from .unlearning_models import classes, features, network, network_module, train, weights

# --- C1: any optimizer ----------------------------------------------------------------------------


class Renamed(torch.optim.SGD):
    """Takes other arguments than the groups keep."""

    def __init__(self, parameters, *, speed):
        super().__init__(parameters, lr=speed)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: Renamed(p, speed=0.3),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
)
@pytest.mark.parametrize("goal", [METHODS[1], METHODS[2]])
def test_any_optimizer_unlearns(make, goal):
    unlearning = network(make_optimizer=make).unlearning()
    unlearning.unlearn(unlearning.plan([1], **goal), seed=0)
    assert unlearning.forgotten == {1}
    assert unlearning.plan([2], steps=1).steps == 1


# --- C3, C4: modes --------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [METHODS[1], METHODS[2], METHODS[5]])
@pytest.mark.parametrize("part", [None, 0, 2])
def test_a_model_in_evaluation_mode_unlearns_and_stays_in_it(goal, part):
    found = []
    for asleep in (False, True):
        torch.manual_seed(7)
        trained = network(module=network_module(nn.Dropout(0.5)))
        if asleep:
            (trained.module if part is None else trained.module._module[part]).eval()
        unlearning = trained.unlearning()
        modes = [p.training for p in unlearning.module.modules()]
        torch.manual_seed(1)
        result = unlearning.unlearn(unlearning.plan([0], **goal), seed=1)
        assert [p.training for p in result.module.modules()] == modes
        found.append(weights(result.module))
    assert torch.equal(*found)


def test_parts_that_were_evaluated_in_training_are_so_in_unlearning():
    def run(p, asleep):
        torch.manual_seed(7)
        module = network_module(nn.Dropout(p))
        module[1].train(not asleep)
        unlearning = network(module=module).unlearning()
        unlearning.module.train()
        return weights(unlearning.unlearn(unlearning.plan([0], steps=3), seed=1).module)

    assert torch.equal(run(0.5, True), run(0.0, False))
    assert not torch.equal(run(0.5, False), run(0.0, False))


def frozen_norm(kind=nn.BatchNorm1d):
    norm = kind(8)
    norm.running_mean.normal_()
    return norm.requires_grad_(False).eval()


@pytest.mark.parametrize("goal", [METHODS[1], METHODS[2], METHODS[4]])
@pytest.mark.parametrize("woken", [False, True])
def test_a_frozen_batchnorm_is_left_as_it_is(goal, woken):
    trained = network(module=network_module(frozen_norm()))
    if woken:
        trained.module.train()  # and its statistics did not move in training
    unlearning = trained.unlearning()
    before = unlearning.module[1].running_mean.clone()
    result = unlearning.unlearn(unlearning.plan([0], **goal), seed=1)
    assert torch.equal(result.module[1].running_mean, before)
    if "delta" in goal:
        assert result.certificate.context == ("frozen_part_is_public",)


def test_full_passes_leave_a_frozen_batchnorm_alone_and_are_exact():
    trained = network(module=network_module(frozen_norm()), policy="full")
    assert trained.engine.per_instance.guarantee == "output_specific"


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (nn.BatchNorm1d(8), r"BatchNorm1d at '1' that parameter 'weight' trains"),
        (nn.BatchNorm1d(8).eval(), "parameter 'weight' trains"),
        (nn.BatchNorm1d(8, affine=False), "is in training mode"),
        (nn.BatchNorm1d(8, affine=False, track_running_stats=False).eval(), "by the batch itself"),
    ],
)
def test_a_batchnorm_that_learns_is_refused_with_the_cure(norm, words):
    module = network_module(norm)
    with pytest.raises(UnsupportedError, match=words) as raised:
        UnlearningEngine(
            module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), dataset=classes(),
            criterion=nn.CrossEntropyLoss(), training_steps=1, batch_size=1,
        )  # fmt: skip
    assert "GroupNorm" in str(raised.value)
    assert "requires_grad_(False)" in str(raised.value)


# --- C6: types ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The full pass finds other")  # bf16 norms agree to 1 %
@pytest.mark.filterwarnings("ignore:Per-instance losses of this training are 'estimate'")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", ["worst_case", "full"])
@pytest.mark.parametrize("goal", [METHODS[0], METHODS[4]])
def test_a_cast_in_the_loop_is_made_in_unlearning(dtype, policy, goal):
    criterion = nn.CrossEntropyLoss()

    def backward(step, wrapped, batch):
        criterion(wrapped(batch[0].to(dtype)), batch[1]).backward()

    torch.manual_seed(0)
    trained = train(
        network_module().to(dtype), classes(), criterion=criterion, backward=backward,
        policy=policy,
    )  # fmt: skip
    unlearning = trained.unlearning()
    result = unlearning.unlearn(unlearning.plan([0], **goal), seed=1)
    assert next(result.module.parameters()).dtype is dtype


def test_targets_of_another_type_than_the_loss_takes_are_refused_by_name():
    torch.manual_seed(0)
    x = features()
    criterion = nn.BCEWithLogitsLoss()
    module = nn.Linear(5, 1)
    unlearning = UnlearningEngine(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        dataset=TensorDataset(x, (x[:, :1] > 0).long()), criterion=criterion, training_steps=3,
        batch_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="two retained rows, at the forward pass or the"):
        unlearning.plan([0], steps=2, method="finetuning")
