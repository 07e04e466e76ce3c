"""The probe: what it finds at the steps it looks at, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate

from opacus_pil.capture.recorder import StepRecord
from opacus_pil.training.probe import Probe, chosen_rows, due, explained
from opacus_pil.training.row_gradients import RowGradients, norm, undisturbed
from opacus_pil.training.task import Task

ROWS = 16


def data(size=ROWS):
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(size, 5, generator=generator), torch.arange(size) % 3)


def model():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def step(module, dataset, rows, *, bound=0.5, mixed=None):
    """What a recorder keeps of a step on these rows, and the clipped sums; by plain autograd."""
    parameters = list(module.parameters())
    norms, sums = [], [torch.zeros_like(p) for p in parameters]
    for row in rows:
        inputs, target = dataset[int(row)]
        inputs = inputs if mixed is None else inputs + mixed
        loss = F.cross_entropy(module(inputs[None]), torch.as_tensor(target)[None])
        gradient = torch.autograd.grad(loss, parameters)
        norms.append(norm(gradient))
        factor = min(1.0, bound / (norms[-1] + 1e-6))
        for total, part in zip(sums, gradient, strict=True):
            total += factor * part
    found = np.array(norms)
    record = StepRecord(
        np.array(rows), found, bound, 2.0**-23, drawn=np.array(rows),
        factors=np.minimum(1.0, bound / (found + 1e-6)), parts=(len(rows),),
    )  # fmt: skip
    return record, sums


def whole(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def look(probe, module, record, sums):
    probe.look(
        record, module=module, parameters=list(module.parameters()), clipped_norm=whole, sums=sums
    )
    return {fact.code for fact in probe.facts}


@pytest.fixture
def probe():
    return Probe(Task(criterion=nn.CrossEntropyLoss()), data())


class TestFindings:
    """Steps that were what was described, and steps that were not."""

    def test_a_step_as_described_leaves_no_fact(self, probe):
        module = model()
        for rows in (range(ROWS), [3], [5, 1, 9], []):
            assert look(probe, module, *step(module, data(), list(rows))) == set()

    def test_rows_in_another_order(self, probe):
        module = model()
        record, sums = step(module, data(), range(ROWS))
        order = np.roll(np.arange(ROWS), 1)
        assert look(probe, module, replace(record, indices=order), sums) & {
            "rows_reordered", "loss_differs",
        }  # fmt: skip

    def test_two_rows_in_the_middle_with_caps(self, probe):
        module = model()
        record, _ = step(module, data(), range(ROWS))
        caps = np.linspace(0.1, 1.0, ROWS)
        order = np.arange(ROWS)
        order[[7, 8]] = order[[8, 7]]
        bounds = caps * record.max_grad_norm
        factors = np.minimum(1.0, bounds / (record.norms + 1e-6))
        weighted = RowGradients(
            probe.task, data(), module, list(module.parameters()), dimension=0
        ).weighted(order, factors)
        record = replace(record, norms=record.norms[order], factors=factors[order])
        assert look(probe, module, record, weighted) & {"rows_reordered", "loss_differs"}

    def test_a_factor(self, probe):
        module = model()
        record, sums = step(module, data(), range(ROWS))
        assert look(probe, module, replace(record, norms=3.0 * record.norms), sums) == {
            "loss_scaled"
        }

    def test_a_sum_that_holds_more_than_its_rows(self, probe):
        """A regulariser in ghost clipping: every norm is right."""
        module = model()
        record, sums = step(module, data(), range(ROWS))
        more = [s + 0.1 * p.detach() for s, p in zip(sums, module.parameters(), strict=True)]
        assert look(probe, module, record, more) == {"loss_differs"}

    @pytest.mark.parametrize("turned", [False, True])
    def test_sums_of_layers_that_are_clipped_one_by_one(self, probe, turned):
        """One row pulls the other way, which no norm shows."""
        module, bound = model(), 0.1
        parameters = list(module.parameters())
        norms, factors, sums = [], [], [torch.zeros_like(p) for p in parameters]
        for row in range(ROWS):
            inputs, target = data()[row]
            loss = F.cross_entropy(module(inputs[None]), target[None])
            gradient = torch.autograd.grad(-loss if turned and row == 7 else loss, parameters)
            own = [min(1.0, bound / (norm([g]) + 1e-6)) for g in gradient]
            for total, part, factor in zip(sums, gradient, own, strict=True):
                total += factor * part
            factors.append(own)
            norms.append(norm([f * g for f, g in zip(own, gradient, strict=True)]))
        record = StepRecord(
            np.arange(ROWS), np.array(norms), 2 * bound, 2.0**-23, drawn=np.arange(ROWS),
            layer_factors=torch.tensor(factors), parts=(ROWS,),
        )  # fmt: skip
        probe.look(
            record, module=module, parameters=parameters, sums=sums,
            clipped_norm=lambda found: math.hypot(*(min(norm([g]), bound) for g in found)),
        )  # fmt: skip
        assert {fact.code for fact in probe.facts} == ({"loss_differs"} if turned else set())

    def test_rows_mixed(self, probe):
        module = model()
        record, sums = step(module, data(), range(ROWS), mixed=0.3 * data()[0][0])
        assert look(probe, module, record, sums) == {"loss_differs"}

    def test_what_was_found_stays(self, probe):
        module = model()
        record, sums = step(module, data(), range(ROWS))
        look(probe, module, replace(record, norms=3.0 * record.norms), sums)
        assert look(probe, module, record, sums) == {"loss_scaled"}

    def test_rows_that_are_not_known_are_not_compared(self, probe):
        module = model()
        record, sums = step(module, data(), range(ROWS))
        assert look(probe, module, replace(record, indices=None), sums) == {"not_compared"}

    def test_a_named_loss_that_fails_is_not_checked_and_says_so(self):
        def failing(module, batch):
            raise RuntimeError("no\nsuch thing")

        probe = Probe(Task(own_loss=failing), data())
        module = model()
        assert look(probe, module, *step(module, data(), range(ROWS))) == {"loss_not_checked"}
        assert "RuntimeError: no" in probe.facts[0].detail

    def test_no_named_loss_is_not_checked_from_the_start(self):
        (fact,) = Probe(Task(), data()).facts
        assert fact.code == "loss_not_checked"

    def test_custom_joining_is_followed(self):
        def turned(items):
            return default_collate(items[::-1])

        probe = Probe(Task(criterion=nn.CrossEntropyLoss(), collate_fn=turned), data())
        module = model()
        assert look(probe, module, *step(module, data(), range(ROWS))) == set()


class TestSchedule:
    """When it looks."""

    def test_powers_of_two_and_every_64th(self):
        looked = [step for step in range(1, 300) if due(step)]
        assert looked == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]

    def test_in_between_it_asks_nobody(self):
        asked = []

        def counting(module, batch):
            asked.append(len(batch[1]))
            return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

        probe, module = Probe(Task(own_loss=counting), data()), model()
        record, sums = step(module, data(), range(ROWS))
        counts = []
        for _ in range(8):
            before = len(asked)
            look(probe, module, record, sums)
            counts.append(len(asked) > before)
        assert counts == [True, True, False, True, False, False, False, True]

    def test_a_large_sum_is_formed_once_only_and_a_larger_one_never(self):
        large, larger = data(600), data(1100)
        module = model()
        for dataset, looks in ((large, [True, False]), (larger, [False, False])):
            probe = Probe(Task(criterion=nn.CrossEntropyLoss()), dataset)
            record, sums = step(module, dataset, range(len(dataset)))
            for seen in looks:
                more = [s + 1.0 for s in sums]
                found = look(copy_of(probe), module, record, more)
                assert (found == {"loss_differs"}) is seen
                look(probe, module, record, sums)


def copy_of(probe):
    twin = copy.copy(probe)
    twin._found = dict(probe._found)
    return twin


class Stateful(nn.Module):
    """Counts, remembers and normalises by what it saw."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))
        self.last = None

    def forward(self, inputs):
        self.calls += 1
        self.mean = 0.5 * self.mean + inputs.detach().mean(0)
        self.last = inputs
        self.new = len(inputs)
        return self.layer(F.dropout(inputs, 0.2, training=self.training))


class TestLeavingNoTrace:
    """Gradients, modes, buffers, attributes, generators and hooks are as they were."""

    def test_a_stateful_model(self):
        module, dataset = Stateful(), data()
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        module.layer.eval()
        torch.manual_seed(1)
        random.seed(1)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        states = torch.get_rng_state(), random.getstate()
        probe = Probe(Task(criterion=nn.CrossEntropyLoss()), dataset, module=module)
        record, _ = step(nn.Sequential(module.layer), dataset, range(ROWS))
        sums = [torch.zeros_like(p) for p in module.parameters()]
        look(probe, module, record, sums)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
        assert module.last is None
        assert not hasattr(module, "new")
        assert module.training
        assert not module.layer.training
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]

    def test_buffers_that_nobody_wrote_to_are_not_written_to(self):
        module = nn.BatchNorm1d(3).eval()
        versions = [b._version for b in module.buffers()]
        with undisturbed(module):
            module(torch.ones(2, 3))
        assert [b._version for b in module.buffers()] == versions
        module.train()
        with undisturbed(module):
            module(torch.ones(2, 3))
        assert float(module.running_mean.abs().sum()) == 0.0

    def test_hooks_are_off_meanwhile_and_on_again_after_an_error(self):
        class Wrapper:
            hooks_enabled = True
            _module = nn.Linear(2, 2)

        wrapper = Wrapper()

        def failing():
            with undisturbed(wrapper):
                assert not wrapper.hooks_enabled
                raise KeyError

        with pytest.raises(KeyError):
            failing()
        assert wrapper.hooks_enabled


class TestExplanations:
    """What differing norms say."""

    @pytest.mark.parametrize(
        ("ran", "alone", "code"),
        [
            ([50.0, 100.0], [1.0, 2.0], "loss_scaled"),
            ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], "rows_reordered"),
            ([1.0, 2.0], [1.0, 5.0], "loss_differs"),
            ([2.0], [1.0], "loss_differs"),  # one row alone tells no factor from anything else
            ([1.0, 1.0], [0.0, 0.0], "loss_scaled"),
        ],
    )
    def test_the_simplest_that_fits(self, ran, alone, code):
        found, _ = explained(np.array(ran), np.array(alone), tolerance=1e-3)
        assert found == code


class TestChosenRows:
    """Rows that show coupling, if any do."""

    def test_rare_classes_come_first(self):
        labels = torch.zeros(1000, dtype=torch.int64)
        labels[137], labels[501] = 1, 2
        rows = chosen_rows(TensorDataset(torch.zeros(1000, 1), labels), np.array([7, 9]))
        assert {137, 501, 7, 9} <= set(rows.tolist())
        assert len(rows) == 8 == len(set(rows.tolist()))

    def test_labels_of_subsets_lists_and_none(self):
        whole_set = TensorDataset(torch.zeros(30, 1), torch.arange(30) // 29)
        assert 1 in chosen_rows(Subset(whole_set, [3, 29, 5]), None)  # row 29 is position 1

        class Listed(Dataset):
            targets = [0] * 40 + [1]

            def __len__(self):
                return 41

        assert 40 in chosen_rows(Listed(), None)
        assert len(chosen_rows(ConcatDataset([whole_set, whole_set]), None)) == 8
        assert chosen_rows(TensorDataset(torch.zeros(1, 1)), None).tolist() == [0]

    def test_real_targets_are_no_classes(self):
        rows = chosen_rows(TensorDataset(torch.zeros(80, 1), torch.rand(80)), None)
        assert rows.tolist() == np.linspace(0, 79, 8).astype(int).tolist()
