"""Lines C5, C6, C9, C11: settings that were swallowed, and reasons that were not the reason."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)  # fmt: skip

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from tests.cases.trainings import answer, linear, plain_loop, points, train


class Own(Sampler):
    """Any order of one's own."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(range(self.size))


class OwnBatches(Sampler):
    def __len__(self):
        return 4

    def __iter__(self):
        return iter([list(range(k, k + 6)) for k in range(0, 24, 6)])


class TestSamplers:
    """C5: Opacus draws every row of the data set and drops the sampler without a word."""

    def private(self, **options):
        module, data = linear(), options.pop("data", points())
        loader = DataLoader(data, **options)
        return PerInstancePrivacyEngine(accountant="rdp").make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("SubsetRandomSampler", {"sampler": SubsetRandomSampler(range(20)), "batch_size": 5}),
            ("Own", {"sampler": Own(24), "batch_size": 6}),
            ("OwnBatches", {"batch_sampler": OwnBatches()}),
            ("WeightedRandomSampler",
             {"sampler": WeightedRandomSampler([1.0] * 24, 24), "batch_size": 6}),
            ("RandomSampler with replacement",
             {"sampler": RandomSampler(range(24), replacement=True), "batch_size": 6}),
            ("RandomSampler", {"sampler": RandomSampler(range(24), num_samples=12),
                               "batch_size": 6}),
        ],
    )  # fmt: skip
    def test_one_that_draws_something_else_is_refused_with_a_cure(self, name, options):
        with pytest.raises(UnsupportedError, match=r"Train on a Subset") as caught:
            self.private(**options)
        assert name.split(" ")[0] in str(caught.value) or "len(data_loader)" in str(caught.value)

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 6},
            {"batch_size": 6, "shuffle": True},
            {"sampler": SequentialSampler(range(24)), "batch_size": 6},
            {"batch_sampler": BatchSampler(RandomSampler(range(24)), 6, drop_last=False)},
            {"data": Subset(points(), range(20)), "batch_size": 5},
            {"batch_size": 5, "drop_last": True},
        ],
    )
    def test_whole_passes_are_taken(self, options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self.private(**options)
        assert len(made) == 3

    def test_held_out_rows_stay_out_of_a_subset(self):
        seen = []
        data = points()

        def loop(training):
            for _ in range(3):
                for inputs, targets in training.loader:
                    seen.extend(inputs[:, 0].tolist())
                    training.step(inputs, targets)

        train(loop, data=Subset(data, range(20)), batch_size=5)
        held_out = set(data.tensors[0][20:, 0].tolist())
        assert seen
        assert not held_out & set(seen)


class TestPrecisionOfTheLoop:
    """C6: batches cast in the loop, as a model of another precision needs it."""

    @pytest.mark.parametrize("policy", ["worst_case", "capped", "full", "participation"])
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_float64_keeps_every_label(self, policy, mode):
        def loop(training):
            for inputs, targets in training.loader:
                training.step(inputs.double(), targets)

        found = answer(loop, row=1, policy=policy, mode=mode, model=lambda: linear().double())
        assert found.label != "estimate"
        assert found.honest
        # One level of 256 on three decades, squared.
        assert policy in ("worst_case", "capped") or (found.claimed <= found.truth * 1.06).all()

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_bfloat16_is_measured_and_called_what_it_is(self, mode):
        def loop(training):
            for inputs, targets in training.loader:
                training.step(inputs.bfloat16(), targets)

        found = train(loop, policy="full", mode=mode, model=lambda: linear().bfloat16())
        assert found.label == "estimate"
        assert "precision" in found.reasons
        assert "other gradients" not in found.reasons
        held = found.engine.per_instance.sensitivities
        assert held.min() < 0.9 < held.max()  # measured, not given up

    def test_float_targets_are_cast_too(self):
        inputs, targets = points().tensors
        data = TensorDataset(inputs, (targets % 2).float()[:, None])

        def loop(training):
            for inputs, targets in training.loader:
                training.step(inputs.double(), targets.double())

        found = train(loop, policy="full", data=data, criterion=nn.MSELoss(),
                      model=lambda: nn.Linear(6, 1).double())  # fmt: skip
        assert found.label == "output_specific"


class TestKeywords:
    """C9: a keyword that nobody knows is a mistake, not an option."""

    @pytest.mark.parametrize("name", ["instance_ids", "norm_policy", "caps", "budget"])
    def test_of_the_engine_are_sent_there(self, name):
        with pytest.raises(TypeError, match=rf"PerInstancePrivacyEngine\({name}="):
            self.private(**{name: 1})

    @staticmethod
    def private(**options):
        module = linear()
        return PerInstancePrivacyEngine(accountant="rdp").make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(points(), batch_size=6), noise_multiplier=1.0,
            max_grad_norm=1.0, **options,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("typo", "meant"),
        [("poison_sampling", "poisson_sampling"), ("noise_genarator", "noise_generator"),
         ("grad_sampling_mode", "grad_sample_mode"), ("clippin", "clipping")],
    )  # fmt: skip
    def test_typos_are_named_with_what_was_meant(self, typo, meant):
        with pytest.raises(TypeError, match=rf"'{typo}'. Did you mean '{meant}'"):
            self.private(**{typo: True})


class Augmented(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, row):
        inputs, target = points()[row]
        return inputs + 0.1 * torch.randn(6), target


class FrozenNorm(nn.Module):
    """A backbone that never trains, in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.norm.requires_grad_(False)
        self.norm.eval()

    def forward(self, inputs):
        return self.head(self.norm(inputs))


def evaluated(training):
    training.plain.norm.eval()
    plain_loop(training)


def turned(training):
    for inputs, targets in training.loader:
        training.step(inputs.flip(0), targets.flip(0))


def mixing(training):
    for inputs, targets in training.loader:
        training.step(inputs + inputs.roll(1, 0), targets)


def scaling(training):
    for inputs, targets in training.loader:
        training.optimizer.zero_grad()
        (50.0 * training.criterion(training.module(inputs), targets)).backward()
        training.optimizer.step()


def casting(training):
    for inputs, targets in training.loader:
        training.step(inputs.double(), targets)


def training_norm(training):
    training.plain.norm.train()
    plain_loop(training)


def squared(training):
    for inputs, _ in training.loader:
        training.optimizer.zero_grad()
        training.module(inputs).square().mean().backward()
        training.optimizer.step()


CAUSES = {
    "dropout": (plain_loop, {"model": lambda: nn.Sequential(nn.Dropout(0.3), linear())}, "random"),
    "augmentation": (plain_loop, {"data": Augmented()}, "other items"),
    "another order": (turned, {}, "another order|other gradients"),
    "mixed rows": (mixing, {}, "other gradients in training"),
    "a factor": (scaling, {}, "all norms are 50 times as large; pass loss_of with the factor"),
    "a cast": (casting, {"model": lambda: linear().double()}, ""),
    "a frozen BatchNorm": (evaluated, {"model": FrozenNorm}, ""),
    "a BatchNorm that trains": (training_norm, {"model": FrozenNorm}, "BatchNorm1d at 'norm'"),
    "a collate function that sorts": (
        plain_loop,
        {"loader": {"collate_fn": lambda items: default_collate(items[::-1])}},
        "",
    ),
    "a collate function that drops": (
        plain_loop,
        {"loader": {"collate_fn": lambda items: default_collate(items[:-1] or items)}},
        "rows",
    ),
    "another loss": (squared, {}, "other gradients in training"),
}


@pytest.mark.parametrize("cause", list(CAUSES))
def test_each_cause_has_words_of_its_own(cause):
    """C11: "Pass make_private the criterion that you train with", for all of them."""
    loop, options, words = CAUSES[cause]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(loop, policy="full", quiet=False, **options)
    said = found.reasons + " ".join(str(w.message) for w in caught)
    assert "the criterion that you train with" not in said
    if not words:  # nothing is wrong with it
        assert found.label == "output_specific"
        return
    assert found.label == "estimate"
    assert any(part in found.reasons for part in words.split("|"))


def test_a_full_pass_that_fails_charges_the_clip_bound_and_lets_training_go_on():
    def dropped(items):
        return default_collate([item for item in items if item[0][0] < 5.0])

    found = train(plain_loop, policy="full", loader={"collate_fn": dropped})
    assert found.label == "estimate"
    assert len(found.moves) == 1
    held = found.engine.per_instance.sensitivities
    assert (held == 1.0).all()
    assert np.isfinite(found.spent()).all()
    assert "a full pass failed" in found.reasons
