import copy

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil.errors import UnsupportedError
from opacus_pil.evaluation import LossBarrier, evaluate, loss_barrier


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def network():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(30, 4, generator=generator), torch.randint(3, (30,), generator=generator)


def test_identical_models_have_no_barrier_at_all(split):
    module = network()
    found = loss_barrier(
        module, copy.deepcopy(module), splits={"test": split}, criterion=nn.CrossEntropyLoss()
    )["test"]
    assert found.barrier == 0.0  # lerp and the chord are exact here: no tolerance
    assert len(set(found.losses)) == 1


def test_convex_loss_stays_below_its_chord(split):
    x, y = split
    first, second = (nn.Linear(4, 1).double() for _ in range(2))
    nn.init.constant_(first.weight, -3.0)
    nn.init.constant_(second.weight, 5.0)
    found = loss_barrier(
        first,
        second,
        splits={"s": (x.double(), (y > 0).double())},
        criterion=nn.BCEWithLogitsLoss(),
        points=21,
    )["s"]
    rise = np.subtract(found.losses, found.chord)
    assert (rise <= 1e-12).all()  # convexity, up to rounding of sums of 30 losses near 10
    assert found.barrier == pytest.approx(0.0, abs=1e-12)
    assert rise.min() < -0.1  # and the loss is truly curved


def test_linear_loss_is_its_chord():
    first, second = (nn.Linear(2, 1, bias=False).double() for _ in range(2))
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    found = loss_barrier(
        first,
        second,
        splits={"s": (x, torch.zeros(2))},
        criterion=lambda output, target: output.mean(),
    )["s"]
    mean = x.mean(dim=0)
    start, stop = first.weight[0].detach(), second.weight[0].detach()
    expected = [float(mean @ ((1 - a) * start + a * stop)) for a in found.alphas]
    assert found.losses == pytest.approx(expected, abs=1e-14)  # double rounding
    assert abs(found.barrier) <= 1e-14


def test_product_model_has_its_closed_form_barrier():
    """u·v from (1, 1) to (−1, −1): squared loss to 1 is ((1−2a)² − 1)², at most 1 (a = ½)."""

    class Product(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.u = nn.Parameter(torch.tensor(value, dtype=torch.float64))
            self.v = nn.Parameter(torch.tensor(value, dtype=torch.float64))

        def forward(self, x):
            return self.u * self.v * x

    split = torch.ones(1, dtype=torch.float64), torch.ones(1)
    found = loss_barrier(Product(1.0), Product(-1.0), splits={"s": split}, criterion=nn.MSELoss())[
        "s"
    ]
    expected = [((1 - 2 * a) ** 2 - 1) ** 2 for a in found.alphas]
    assert found.losses == pytest.approx(expected, abs=1e-14)  # double rounding
    assert found.barrier == pytest.approx(1.0, abs=1e-14)


def test_permuted_network_has_equal_ends_and_a_barrier(split):
    first = network()
    second = copy.deepcopy(first)
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    with torch.no_grad():
        second[0].weight.copy_(first[0].weight[order])
        second[0].bias.copy_(first[0].bias[order])
        second[2].weight.copy_(first[2].weight[:, order])
    # Labels that the network itself gives: it is far better than the averaged network between.
    x = split[0]
    with torch.no_grad():
        for module in (first, second):
            module[2].weight.mul_(20)
        labels = first(x).argmax(dim=1)
    found = loss_barrier(
        first, second, splits={"s": (x, labels)}, criterion=nn.CrossEntropyLoss(), points=21
    )["s"]
    # The same function summed in another order: float32 rounding of logits of size 20.
    assert found.losses[0] == pytest.approx(found.losses[-1], abs=1e-4)
    assert found.barrier > 0.1


def test_ends_are_the_models_and_a_finer_grid_is_not_lower(split):
    first, second = network(), network()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.neg_().mul_(5)
    criterion = nn.CrossEntropyLoss()
    splits = {"a": split, "b": (split[0][:7], split[1][:7])}
    coarse = loss_barrier(first, second, splits=splits, criterion=criterion, points=11)
    fine = loss_barrier(first, second, splits=splits, criterion=criterion, points=21)
    for name, (x, y) in splits.items():
        assert coarse[name].losses[0] == evaluate(first, x, y, criterion=criterion).loss
        assert coarse[name].losses[-1] == evaluate(second, x, y, criterion=criterion).loss
        assert fine[name].barrier >= coarse[name].barrier - 1e-6  # 21 contains 11; float32 lerp
        back = loss_barrier(second, first, splits=splits, criterion=criterion)[name]
        # The same line walked backwards; float32 losses of size 10.
        assert back.barrier == pytest.approx(coarse[name].barrier, abs=1e-5)


@pytest.mark.parametrize(
    ("losses", "expected"), [((1.0, np.inf, 1.0), np.inf), ((np.inf, 1.0, 1.0), np.nan)]
)
def test_losses_that_are_not_finite_never_look_like_a_flat_line(losses, expected):
    first = nn.Linear(1, 1)
    iterator = iter([losses[0]] + [losses[1]] * 9 + [losses[2]])
    found = loss_barrier(
        first,
        copy.deepcopy(first),
        splits={"s": (torch.zeros(1, 1), torch.zeros(1))},
        criterion=lambda output, target: torch.tensor(next(iterator)),
    )["s"]
    assert found.barrier == pytest.approx(expected, nan_ok=True)


def test_modules_and_randomness_are_untouched(split):
    first = nn.Sequential(network(), nn.Dropout(0.5))
    second = copy.deepcopy(first)
    first.train()
    second.eval()
    before = [copy.deepcopy(module.state_dict()) for module in (first, second)]
    state = torch.get_rng_state()
    loss_barrier(first, second, splits={"s": split}, criterion=nn.CrossEntropyLoss())
    assert torch.equal(torch.get_rng_state(), state)
    assert first[1].training
    assert not second[1].training
    for module, old in zip((first, second), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
)
def test_running_statistics_are_refused_with_the_reason(split, layer):
    module = nn.Sequential(layer, nn.Linear(4, 3))
    with pytest.raises(UnsupportedError, match=r"Norm1d at '0'.*wrong between"):
        loss_barrier(module, module, splits={"s": split}, criterion=nn.CrossEntropyLoss())


def test_constant_buffers_pass_and_different_ones_do_not(split):
    first = network()
    first.register_buffer("scale", torch.ones(1))
    second = copy.deepcopy(first)
    arguments = {"splits": {"s": split}, "criterion": nn.CrossEntropyLoss()}
    assert loss_barrier(first, second, **arguments)["s"].barrier == 0.0
    second.scale += 1
    with pytest.raises(UnsupportedError, match="'scale'"):
        loss_barrier(first, second, **arguments)


def test_other_architectures_and_coarse_grids_are_refused(split):
    arguments = {"splits": {"s": split}, "criterion": nn.CrossEntropyLoss()}
    with pytest.raises(ValueError, match="'bias' in one only"):
        loss_barrier(nn.Linear(4, 3), nn.Linear(4, 3, bias=False), **arguments)
    with pytest.raises(ValueError, match=r"'weight' of \(3, 4\) and \(2, 4\)"):
        loss_barrier(nn.Linear(4, 3), nn.Linear(4, 2), **arguments)
    with pytest.raises(ValueError, match="points"):
        loss_barrier(nn.Linear(4, 3), nn.Linear(4, 3), points=10, **arguments)


def line(*losses):
    return LossBarrier(0.0, tuple(np.linspace(0.0, 1.0, len(losses)).tolist()), losses)


def test_above_the_larger_end_is_what_descent_has_to_climb():
    assert line(0.0, 2.0, 1.0).above_ends == 1.0
    assert line(1.0, 2.0, 0.0).above_ends == 1.0
    assert line(0.0, 0.9, 1.0).above_ends == 0.0  # above the chord, and no ridge
    assert line(0.0, np.inf, 1.0).above_ends == np.inf
    assert np.isnan(line(0.0, 1.0, np.nan).above_ends)


def test_above_the_ends_is_never_more_than_above_the_chord(split):
    for seed in range(5):
        torch.manual_seed(seed)
        first, second = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in "ab")
        found = loss_barrier(first, second, splits={"s": split}, criterion=nn.CrossEntropyLoss())
        assert 0.0 <= found["s"].above_ends <= found["s"].barrier
