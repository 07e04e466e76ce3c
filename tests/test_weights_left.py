"""What a training left is known to the bit, at no cost that could be measured."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.training.weights import WeightsLeft, block_sum, sums_of

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.complex64]


def network(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def trained(*, policy="worst_case", module=None, steps=3, attach=False):
    torch.manual_seed(0)
    module = network() if module is None else module
    dataset = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    caps = {"caps": np.full(24, 0.5)} if policy == "capped" else {}
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy=policy, **caps)
    criterion = nn.CrossEntropyLoss()
    maker = PrivacyEngine(accountant="rdp") if attach else engine
    wrapped, optimizer, loader = maker.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0,
        criterion=criterion,
    )  # fmt: skip
    if attach:
        engine.attach(module=wrapped, optimizer=optimizer, data_loader=loader, criterion=criterion)
    batches = iter(loader)
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()
    return engine, module, wrapped, optimizer


class TestSum:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1500,), (0,)])
    def test_it_is_the_same_for_the_same_bits(self, dtype, shape):
        values = torch.randn(shape).mul(10).to(dtype)
        assert block_sum(values) == block_sum(values.clone())
        assert block_sum(values.t() if values.ndim == 2 else values) == block_sum(
            (values.t() if values.ndim == 2 else values).contiguous()
        )

    @given(st.integers(1, 3000), st.data())
    def test_one_changed_bit_changes_it(self, size, data):
        values = torch.arange(size, dtype=torch.float32)
        bits = values.clone().view(torch.int32)
        bits[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 30))
        assert block_sum(bits.view(torch.float32)) != block_sum(values)

    @pytest.mark.parametrize("width", [2, 64, 509, 512, 1000, 1024])
    def test_swapped_rows_change_it(self, width):
        values = torch.randn(8, width)
        order = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
        assert block_sum(values[order]) != block_sum(values)

    def test_a_part_of_a_flat_buffer_is_read_like_any_tensor(self):
        buffer = torch.randn(101)
        assert block_sum(buffer[1:]) == block_sum(buffer[1:].clone())


class TestTraining:
    @pytest.mark.parametrize("policy", ["worst_case", "capped"])
    @pytest.mark.parametrize("attach", [False, True])
    @pytest.mark.parametrize("width", [16, 20_000])  # copied tensors; summed ones
    def test_the_last_steps_weights_are_known_and_no_others(self, policy, attach, width):
        engine, module, *_ = trained(policy=policy, attach=attach, module=network(width))
        (training,) = engine.trainings
        assert training.weights.are(module) is True
        assert training.weights.are(copy.deepcopy(module)) is True
        for number, parameter in enumerate(module.parameters()):
            edited = copy.deepcopy(module)
            other = list(edited.parameters())[number]
            with torch.no_grad():
                other.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(9.0))
            assert training.weights.are(edited) is False, number

    def test_frozen_parameters_count_too(self):
        module = network()
        module[0].requires_grad_(False)
        engine, module, *_ = trained(module=module)
        (training,) = engine.trainings
        assert training.weights.are(module) is True
        with torch.no_grad():
            module[0].weight[0, 0] += 1.0
        assert training.weights.are(module) is False

    def test_what_an_optimizer_gets_later_is_followed(self):
        engine, module, _, optimizer = trained()
        (training,) = engine.trainings
        plain = optimizer.original_optimizer
        plain.add_param_group({"params": [nn.Parameter(torch.ones(2))]})  # not of the module
        with pytest.warns(UserWarning, match="without noise"):
            plain.step()
        assert training.weights.are(module) is True

    def test_policies_without_a_certificate_keep_nothing(self):
        engine, module, *_ = trained(policy="last_seen")
        assert engine.trainings[0].weights.are(module) is None

    def test_nothing_is_known_before_the_first_step(self):
        engine, module, *_ = trained(steps=0)
        assert engine.trainings[0].weights.are(module) is None

    def test_a_replaced_layer_is_another_weight(self):
        engine, module, *_ = trained()
        module[2] = copy.deepcopy(module[2])
        assert engine.trainings[0].weights.are(module) is False

    def test_a_copied_optimizer_reports_to_nobody(self):
        engine, module, _, optimizer = trained()
        for twin in (
            copy.deepcopy(optimizer.original_optimizer),
            pickle.loads(pickle.dumps(optimizer.original_optimizer)),
        ):
            for group in twin.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            twin.step()
        assert engine.trainings[0].weights.are(module) is True

    @pytest.mark.parametrize("with_optimizer", [True, False])
    def test_a_checkpoint_keeps_it(self, tmp_path, with_optimizer):
        engine, module, wrapped, optimizer = trained()
        given_ = {"optimizer": optimizer} if with_optimizer else {}
        engine.save_checkpoint(path=tmp_path / "c.pt", module=wrapped, **given_)
        again, blank, other, its_optimizer = trained(steps=0)
        given_ = {"optimizer": its_optimizer} if with_optimizer else {}
        again.load_checkpoint(path=tmp_path / "c.pt", module=other, **given_)
        (training,) = again.trainings
        assert training.weights.are(blank) is True
        assert training.weights.state() == sums_of(module)
        assert training.evaluated == frozenset()
        with torch.no_grad():
            blank[0].bias[0] += 1.0
        assert training.weights.are(blank) is False

    def test_of_a_checkpoint_without_it_nothing_is_known(self):
        left = WeightsLeft(network())
        left.load(None)
        assert left.are(network()) is None
        assert left.state() is None
