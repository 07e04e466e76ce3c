"""Uses of Opacus beside the plain loop: several optimizers, bfloat16, time first, schedules."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from opacus.schedulers import ExponentialNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.accounting import PerInstanceAccountant
from tests.capture.models import CLASSES, convolutional, images, one_by_one_norms, sentences

SIZE, BATCH, BOUND = 60, 12, 8.5
SETTINGS = {"accountant": "rdp", "orders": [2.0, 8.0, 32.0]}


def private(engine, module, data, **options):
    arguments = {
        "noise_multiplier": 1.0, "max_grad_norm": BOUND, "criterion": nn.CrossEntropyLoss(),
        **options,
    }  # fmt: skip
    return engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=arguments.pop("data_loader", None) or DataLoader(data, batch_size=BATCH),
        **arguments,
    )  # fmt: skip


def accountant(**options):
    return PerInstanceAccountant(SIZE, orders=SETTINGS["orders"], **options)


class TestSeveralOptimizers:
    """One engine, two networks: an instance pays for the steps of both."""

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_each_step_of_each_is_charged_for_its_own_rows(self, mode):
        torch.manual_seed(0)
        engine, data, truth = PerInstancePrivacyEngine(**SETTINGS), images(SIZE), accountant()
        trainings = [private(engine, convolutional(), data, grad_sample_mode=mode) for _ in "ab"]
        for batches in zip(*(made[-1] for made in trainings), strict=True):
            for made, (inputs, targets) in zip(trainings, batches, strict=True):
                rows = [int((data.tensors[0] == x).flatten(1).all(1).nonzero()) for x in inputs]
                loss = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
                made[1].zero_grad()
                loss(made[0](inputs), targets).backward()
                made[1].step()
                norms = made[0].per_sample_gradient_norms.double().numpy()
                truth.step(
                    indices=rows, noise_multiplier=1.0, sample_rate=BATCH / SIZE,
                    sensitivities=np.minimum(norms * (1 + 16 * 2.0**-23), BOUND) / BOUND,
                )  # fmt: skip
        assert engine.per_instance.steps == 2 * SIZE // BATCH
        assert engine.per_instance.unattributed_steps == 0
        # The truth raises norms by as much as the engine; float64 ties may move one level, 0.7 %.
        np.testing.assert_allclose(engine.per_instance.rdp(), truth.rdp(), rtol=0.02)

    def test_a_discriminator_s_steps_on_generated_images_cost_everyone_the_worst_case(self):
        torch.manual_seed(1)
        engine, data = PerInstancePrivacyEngine(**SETTINGS), images(SIZE)
        generator = nn.Sequential(nn.Linear(3, 36), nn.Unflatten(1, (1, 6, 6)))
        plain = torch.optim.SGD(generator.parameters(), lr=0.05)
        critic, optimizer, loader = private(engine, convolutional(), data)
        before = generator[0].weight.detach().clone()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for inputs, _ in loader:
                fakes = generator(torch.randn(BATCH, 3))
                for batch, label in ((inputs, 1), (fakes.detach(), 0)):
                    optimizer.zero_grad()
                    targets = torch.full((len(batch),), label)
                    nn.functional.cross_entropy(critic(batch), targets).backward()
                    optimizer.step()
                optimizer.zero_grad()
                plain.zero_grad()
                targets = torch.ones(BATCH, dtype=torch.int64)
                nn.functional.cross_entropy(critic(fakes), targets).backward()
                plain.step()  # sees no instance: charges nothing
        assert sum("worst case" in str(w.message) for w in said) == 1
        steps = SIZE // BATCH
        assert engine.per_instance.steps == 2 * steps
        assert engine.per_instance.unattributed_steps == steps
        assert not torch.equal(generator[0].weight, before)
        half = accountant()
        for _ in range(steps):
            half.step(indices=[], sensitivities=[], noise_multiplier=1.0, sample_rate=BATCH / SIZE)
        assert (engine.per_instance.rdp() >= half.rdp()).all()


class TestMixedPrecision:
    """torch.autocast in bfloat16, in the modes that Opacus computes gradients for."""

    @staticmethod
    def step(made, inputs, targets):
        loss = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
        made[1].zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(made[0](inputs), targets)
        value.backward()

    @pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
    def test_charges_are_raised_by_the_coarser_rounding(self, mode):
        torch.manual_seed(2)
        engine, data = PerInstancePrivacyEngine(**SETTINGS), images(SIZE)
        made = private(engine, convolutional(), data, grad_sample_mode=mode)
        inputs, targets = next(iter(made[-1]))
        rows = [int((data.tensors[0] == x).flatten(1).all(1).nonzero()) for x in inputs]
        self.step(made, inputs, targets)
        if mode == "ghost":  # no gradients are formed: the norms that the module clips by
            true = made[0].per_sample_gradient_norms.double()
        else:
            samples = [p.grad_sample.double().flatten(1) for p in made[0].parameters()]
            true = torch.cat(samples, dim=1).norm(dim=1)
        made[1].step()
        held = engine.per_instance.sensitivities[rows]
        assert (held >= np.minimum(true.numpy() / BOUND, 1.0)).all()
        # At most 16 units of bfloat16's 2^-7, and the grid's 0.7 %, above the truth.
        assert (held <= np.minimum(true.numpy() / BOUND * (1 + 17 * 2.0**-7) * 1.01, 1.0)).all()
        assert (held < 1.0).any()
        assert engine.per_instance.unattributed_steps == 0

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_caps_are_not_enforced_by_norms_coarser_than_what_is_charged(self, mode):
        torch.manual_seed(3)
        engine = PerInstancePrivacyEngine(**SETTINGS, norm_policy="capped", caps=np.full(SIZE, 0.5))
        module = convolutional()
        made = private(engine, module, images(SIZE), grad_sample_mode=mode)
        before = [p.detach().clone() for p in module.parameters()]

        def step():
            self.step(made, *next(iter(made[-1])))
            made[1].step()

        with pytest.raises(UnsupportedError, match="as precise as the parameters"):
            step()
        assert engine.per_instance.steps == 0
        assert all(map(torch.equal, module.parameters(), before))


class TimeFirst(nn.Module):
    """A sequence model whose inputs have time first and the batch second."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.head = nn.Linear(6, CLASSES)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(steps))).mean(dim=0)


class BatchFirst(nn.Module):
    """The same model, the batch first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        return self.inner(steps.transpose(0, 1))


def time_first(items):
    return torch.stack([steps for steps, _ in items], dim=1), torch.stack([y for _, y in items])


SEQUENCES = {
    "pixels": (lambda: nn.Linear(6, 6), lambda: images(SIZE).tensors[0].flatten(1, 2)),
    "words": (lambda: nn.Embedding(7, 6), lambda: sentences(SIZE).tensors[0]),
}


@pytest.mark.parametrize(
    # Opacus's own ghost clipping has no norm for an embedding whose batch comes second.
    ("kind", "mode"),
    [("pixels", "hooks"), ("pixels", "functorch"), ("pixels", "ghost"), ("words", "hooks")],
)
@pytest.mark.parametrize("policy", ["last_seen", "full"])
def test_rows_and_norms_are_right_when_the_batch_comes_second(kind, mode, policy):
    torch.manual_seed(4)
    first, inputs_of = SEQUENCES[kind]
    data = TensorDataset(inputs_of(), images(SIZE).tensors[1])
    module = TimeFirst(first())
    norms = one_by_one_norms(BatchFirst(module), data, range(SIZE), nn.CrossEntropyLoss())
    bound = float(np.median(norms))
    engine = PerInstancePrivacyEngine(**SETTINGS, norm_policy=policy)
    loader = DataLoader(data, batch_size=BATCH, collate_fn=time_first)
    made = private(
        engine, module, data, data_loader=loader, grad_sample_mode=mode, batch_first=False,
        max_grad_norm=bound,
    )  # fmt: skip
    inputs, targets = next(iter(made[-1]))
    rows = made[-1].tracker._rows.tolist()  # sentences repeat: rows cannot be read off them
    assert torch.equal(inputs, time_first([data[row] for row in rows])[0])
    loss = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    made[1].zero_grad()
    loss(made[0](inputs), targets).backward()
    made[1].step()
    # float32, as in test_sweep
    np.testing.assert_allclose(made[0].per_sample_gradient_norms, norms[rows], rtol=1e-4)
    known = np.arange(SIZE) if policy == "full" else np.array(rows)
    held, expected = engine.per_instance.sensitivities[known], np.minimum(norms[known] / bound, 1.0)
    np.testing.assert_allclose(held, expected, rtol=0.01)  # grid of 0.7 %
    assert (held >= expected * (1 - 1e-4)).all()
    assert (held < 1.0).any()
    label = "output_specific" if policy == "full" else "estimate"
    assert engine.per_instance.guarantee == label


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_noise_schedule_is_followed_in_both_modes(mode):
    torch.manual_seed(5)
    engine = PerInstancePrivacyEngine(**SETTINGS, norm_policy="worst_case")
    made = private(engine, convolutional(), images(SIZE), grad_sample_mode=mode)
    schedule = ExponentialNoise(made[1], gamma=0.9)
    loss = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    truth, noises = accountant(), []
    for inputs, targets in made[-1]:
        noises.append(made[1].noise_multiplier)
        truth.step(
            indices=[], sensitivities=[], noise_multiplier=noises[-1], sample_rate=BATCH / SIZE
        )
        made[1].zero_grad()
        loss(made[0](inputs), targets).backward()
        made[1].step()
        schedule.step()
    np.testing.assert_allclose(noises, 0.9 ** np.arange(5), rtol=1e-12)  # a product of floats
    # (z·C)/C may differ from z in the last place.
    np.testing.assert_allclose(engine.per_instance.rdp(), truth.rdp(), rtol=1e-12)
