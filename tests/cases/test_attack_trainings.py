"""Trainings found by attacking the package: strong labels on numbers below the truth, and stops.

Several trainings of one engine, random numbers that two uses share, rows that come back, layers
that write to weights by themselves.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine, UnsupportedError
from tests.cases.trainings import (
    MODES,
    NOISE,
    ORDERS,
    SIZE,
    answer,
    gaussian_rdp,
    linear,
    plain_loop,
    points,
    train,
)

DATA = points()  # Opacus warns where the object is another one
AMPLIFIED = ("worst_case", "budget", "full")
STEP = gaussian_rdp([1.0 / NOISE])  # of one clipped row in every draw


def engine_of(policy: str, **settings) -> PerInstancePrivacyEngine:
    return PerInstancePrivacyEngine(
        norm_policy=policy, accountant="rdp", orders=ORDERS, levels=256, **settings
    )


def private(engine, *, module=None, optimizer=None, loader=None, mode="hooks", **options):
    """Make one more training private with this engine."""
    module = linear() if module is None else module
    return engine.make_private(
        module=module,
        optimizer=optimizer or torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader or DataLoader(DATA, batch_size=SIZE),
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        criterion=nn.CrossEntropyLoss(),
        grad_sample_mode=mode,
        **options,
    )


def steps(made) -> None:
    module, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(module(inputs), targets).backward()
            optimizer.step()


class TestDrawsUntilSomebodyIsIn:
    """An empty draw thrown away and drawn again: rates are those of another law."""

    @staticmethod
    def again(training):
        done = 0
        while done < 12:
            inputs, targets = next(iter(training.loader))
            if len(inputs) == 0:
                continue
            training.step(inputs, targets)
            done += 1

    @staticmethod
    def left(training):
        done = 0
        while done < 12:
            for inputs, targets in training.loader:
                if len(inputs) == 0:
                    break
                training.step(inputs, targets)
                done += 1

    @pytest.mark.parametrize("policy", AMPLIFIED)
    @pytest.mark.parametrize("loop", ["again", "left"])
    def test_it_is_noticed(self, loop, policy):
        # Without the last row nobody is ever in, and the loop does not end: everything shows.
        found = answer(getattr(self, loop), policy=policy, data=points(2), batch_size=1,
                       truth=[np.inf] * 3)  # fmt: skip
        assert found.honest
        assert "skipped" in found.words

    def test_a_look_at_a_batch_that_is_not_empty_takes_nothing_away(self):
        def loop(training):
            for _ in range(2):
                next(iter(training.loader))
                plain_loop(training)

        assert train(loop).label == "bound"


class TestOneEngineForSeveralTrainings:
    @pytest.mark.parametrize("policy", ["worst_case", "full"])
    def test_the_same_seed_before_each_is_the_same_noise(self, policy):
        """A sweep of a setting, seeded alike for comparison: the difference has no noise."""
        engine = engine_of(policy)
        for _ in range(2):
            torch.manual_seed(0)
            steps(private(engine))
        assert engine.per_instance.guarantee == "estimate"
        assert (engine.per_instance.spent_rdp() == np.inf).all()
        assert "seed once" in "; ".join(engine.per_instance.reasons)

    def test_under_caps_it_is_refused(self):
        engine = engine_of("capped", caps=np.ones(SIZE))
        generator = torch.Generator()
        steps(private(engine, noise_generator=generator.manual_seed(4711)))
        again = private(engine, noise_generator=generator.manual_seed(4711))
        with pytest.raises(UnsupportedError, match="seed once"):
            steps(again)
        assert engine.per_instance.steps == 1

    def test_seeds_of_their_own_keep_the_label(self):
        engine = engine_of("worst_case")
        for seed in range(2):
            torch.manual_seed(seed)
            steps(private(engine))
        assert engine.per_instance.guarantee == "bound"
        np.testing.assert_allclose(engine.per_instance.spent_rdp()[0], 2 * STEP, rtol=1e-6)

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_in_lockstep_they_do_not_spend_one_budget_twice(self, mode):
        """Ghost clipping has clipped both before either step was charged."""
        budget = 1.2 * STEP  # one step of a clipped row, not two
        torch.manual_seed(0)
        engine = engine_of("capped", budget=budget)
        both = [private(engine, mode=mode) for _ in range(2)]
        for module, optimizer, *rest in both:
            inputs, targets = next(iter(rest[-1]))
            optimizer.zero_grad()
            criterion = rest[0] if mode == "ghost" else nn.CrossEntropyLoss()
            criterion(module(inputs), targets).backward()
        both[0][1].step()
        if mode == "ghost":
            before = [p.detach().clone() for p in both[1][1].params]
            with pytest.raises(UnsupportedError, match="budgets as they were"):
                both[1][1].step()
            assert all(map(torch.equal, before, both[1][1].params))
        else:  # clips at the step: whoever is spent is left out
            both[1][1].step()
            assert all(not p.summed_grad.any() for p in both[1][1].params)
        assert (engine.per_instance.spent_rdp()[0] <= budget).all()

    @pytest.mark.parametrize("policy", ["worst_case", "full", "last_seen", "capped"])
    def test_a_cell_that_is_run_again_goes_on_as_with_opacus(self, policy):
        """make_private on what it returned: the plain optimizer's steps have their noise."""
        caps = {"caps": np.ones(SIZE)} if policy == "capped" else {}
        engine = engine_of(policy, **caps)
        plain = linear()
        made = plain, torch.optim.SGD(plain.parameters(), lr=0.1), DataLoader(DATA, SIZE)
        for _ in range(3):
            made = private(engine, module=made[0], optimizer=made[1], loader=made[2])
            steps(made)
        assert engine.per_instance.steps == 3
        spent = engine.per_instance.spent_rdp()[0]
        labels = {"full": "output_specific", "last_seen": "estimate"}
        assert engine.per_instance.guarantee == labels.get(policy, "bound")
        if policy in labels:
            assert (spent <= 3 * STEP * (1 + 1e-5)).all()  # at what was measured
        else:
            np.testing.assert_allclose(spent, 3 * STEP, rtol=1e-5)

    def test_a_plain_step_after_that_is_still_no_noise(self):
        engine, plain = engine_of("worst_case"), linear()
        inner = torch.optim.SGD(plain.parameters(), lr=0.1)
        made = private(engine, module=plain, optimizer=inner)
        made = private(engine, module=made[0], optimizer=made[1])
        inputs, targets = points().tensors
        nn.CrossEntropyLoss()(made[0](inputs), targets).backward()
        with pytest.warns(UserWarning, match="without noise"):
            inner.step()
        assert (engine.per_instance.spent_rdp() == np.inf).all()

    @pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset")
    @pytest.mark.parametrize("policy", ["worst_case", "full", "capped"])
    def test_folds_of_one_size_are_other_rows(self, policy):
        """Cross-validation: row 0 is somebody else in each fold."""
        caps = {"caps": np.linspace(0.1, 1, 16)} if policy == "capped" else {}
        engine = engine_of(policy, **caps)
        folds = [Subset(points(), [i for i in range(SIZE) if i % 3 != k]) for k in range(2)]
        steps(private(engine, loader=DataLoader(folds[0], batch_size=16)))
        if policy == "capped":
            with pytest.raises(UnsupportedError, match="belong to its rows"):
                private(engine, loader=DataLoader(folds[1], batch_size=16))
            return
        steps(private(engine, loader=DataLoader(folds[1], batch_size=16)))
        label = "bound" if policy == "worst_case" else "estimate"  # all are charged for all steps
        assert engine.per_instance.guarantee == label

    @pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset")
    def test_an_equal_data_set_is_the_same_rows(self):
        engine = engine_of("full")
        for _ in range(2):
            steps(private(engine, loader=DataLoader(points(), batch_size=SIZE)))
        assert engine.per_instance.guarantee == "output_specific"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["worst_case", "capped"])
def test_a_clip_bound_that_changes_between_parts_of_a_draw_depends_on_who_is_before_whom(
    policy, mode
):
    """A schedule stepped at every physical batch: a row that leaves moves others to other parts."""

    def loop(training):
        holder = training.module if mode == "ghost" else training.optimizer
        with BatchMemoryManager(
            data_loader=training.loader, max_physical_batch_size=5, optimizer=training.optimizer
        ) as loader:
            for k, (inputs, targets) in enumerate(loader):
                holder.max_grad_norm = 1.0 if k < 3 else 0.1
                training.step(inputs, targets)

    found = answer(loop, policy=policy, mode=mode, truth=[np.inf] * 3)
    assert found.honest
    assert found.label == ("refused" if policy == "capped" else "estimate")


class TestADataSetThatIsReordered:
    """Rows put into another order between epochs: caps, budgets and norms are other people's."""

    @staticmethod
    def reordered(training):
        for _ in range(3):
            plain_loop(training)
            data = training.data
            if isinstance(data, Subset):
                data.indices.reverse()
            else:
                data.tensors = tuple(tensor.flip(0) for tensor in data.tensors)

    @pytest.mark.parametrize("policy", ["capped", "full", "participation"])
    @pytest.mark.parametrize("subset", [False, True])
    def test_it_is_noticed(self, subset, policy):
        data = Subset(points(), list(range(SIZE))) if subset else points()
        caps = {"caps": np.linspace(1.0, 0.05, SIZE)} if policy == "capped" else {}
        truth = gaussian_rdp([0.05 / NOISE, 1.0 / NOISE, 0.05 / NOISE])  # of the last row, capped
        found = answer(self.reordered, row=SIZE - 1, policy=policy, data=data, truth=truth, **caps)
        assert found.honest
        assert found.label == ("refused" if policy == "capped" else "estimate")
        assert "another order" in found.words

    def test_rows_that_are_made_anew_in_their_places_keep_the_label(self):
        def loop(training):
            for _ in range(3):
                plain_loop(training)
                training.data.tensors[0].mul_(0.9)

        assert train(loop, policy="capped", data=points()).label == "bound"
        assert train(loop, policy="full", data=points()).label == "output_specific"


class TestCoinsAndNoise:
    """Two generators with one seed: Opacus's coins and its noise are made of the same numbers."""

    def test_a_generator_seeded_alike_tells_one_from_the_other(self):
        coins = torch.rand(16, generator=torch.Generator().manual_seed(42))
        noise = torch.randn(16, generator=torch.Generator().manual_seed(42))
        # Box and Muller: what decides a coin is the size of two numbers of the noise. A coin below
        # q = 0.01 is two numbers below 0.15: little noise where a drawn row may have its gradient.
        sizes = torch.hypot(noise[:8], noise[8:])
        torch.testing.assert_close(sizes, torch.sqrt(-2.0 * torch.log1p(-coins[:8])))

    @pytest.mark.parametrize("policy", AMPLIFIED)
    @pytest.mark.parametrize("which", ["both", "noise", "loader"])
    def test_it_is_noticed(self, which, policy):
        def seeded(wanted):
            return torch.Generator().manual_seed(42) if which in ("both", wanted) else None

        found = answer(
            plain_loop, policy=policy, batch_size=6, seed=42, noise_generator=seeded("noise"),
            loader={"generator": seeded("loader")}, truth=[np.inf] * 3,
        )  # fmt: skip
        assert found.honest
        assert "same seed" in found.words

    def test_one_generator_for_both_is_fine(self):
        generator = torch.Generator().manual_seed(42)
        found = train(plain_loop, batch_size=6, noise_generator=generator,
                      loader={"generator": generator})  # fmt: skip
        assert found.label == "bound"


class Renormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(30, 6, max_norm=1.0), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.layer(self.embedding(tokens).mean(1))


def tokens() -> TensorDataset:
    """Row 0 alone has its words."""
    found = torch.randint(0, 20, (SIZE, 4), generator=torch.Generator().manual_seed(0))
    found[0] = torch.tensor([25, 26, 27, 28])
    return TensorDataset(found, torch.arange(SIZE) % 3)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("policy", ["worst_case", "capped", "full", "participation"])
def test_an_embedding_that_rescales_what_it_looks_up_tells_who_was_there(policy, mode):
    found = answer(plain_loop, policy=policy, mode=mode, model=Renormed, data=tokens(),
                   truth=[np.inf] * 3)  # fmt: skip
    assert found.honest
    assert "max_norm" in found.words


def test_and_no_look_of_ours_rescales_anything():
    def trained(named):
        return train(plain_loop, model=Renormed, data=tokens(), moving=True, named=named).plain

    for mine, theirs in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_rows_drawn_with_replacement_are_charged_each_time_and_stop_nothing(mode):
    """Fixed batches of a weighted sampler: row 0 is in a batch several times, at a clip each."""
    weights = torch.cat([torch.tensor([50.0]), torch.ones(SIZE - 1)])
    sampler = WeightedRandomSampler(weights, SIZE, generator=torch.Generator().manual_seed(0))
    times = [batch.count(0) for batch in DataLoader(points(), 6, sampler=sampler).batch_sampler]
    assert max(times) > 1
    sampler.generator.manual_seed(0)
    found = answer(
        plain_loop, policy="participation", mode=mode, batch_size=6, loader={"sampler": sampler},
        truth=gaussian_rdp([n / NOISE for n in times]),
    )  # fmt: skip
    assert found.label == "estimate"
    assert (found.claimed >= found.truth * (1 - 1e-6)).all()


@pytest.mark.parametrize("policy", ["worst_case", "full", "last_seen"])
def test_rows_that_were_forgotten_and_are_drawn_again_take_the_label_away(policy):
    def loop(training):
        plain_loop(training)
        training.engine.account.forget([0])
        plain_loop(training)

    found = answer(loop, policy=policy, truth=2 * STEP)
    assert found.honest
    assert "forgotten" in found.words


def test_under_caps_they_are_left_out():
    def loop(training):
        plain_loop(training)
        training.engine.account.forget([0])
        plain_loop(training)

    with_it = train(loop, policy="capped")
    assert with_it.label == "bound"
    other = points()
    other.tensors[0][0] *= -1.0  # only the first step knows the row

    twin = train(loop, policy="capped", data=other)
    assert not torch.equal(with_it.moves[0], twin.moves[0])
    assert torch.equal(with_it.moves[1], twin.moves[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["worst_case", "capped"])
def test_masks_that_evaluation_has_too_are_not_taken_for_rows_that_depend_on_each_other(
    policy, mode
):
    class Masked(nn.Module):
        """As in Monte-Carlo dropout: F.dropout drops by default, whatever the mode."""

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, inputs):
            return self.head(F.dropout(torch.tanh(self.body(inputs)), 0.2))

    found = train(plain_loop, model=Masked, policy=policy, mode=mode)
    assert found.engine.per_instance.steps == 1
    assert "depends on other rows" not in found.reasons
    assert found.label == ("bound" if policy == "worst_case" else "estimate")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))]
)
def test_a_copy_of_the_engine_has_its_ledgers_as_with_opacus(copied):
    opacus = PrivacyEngine(accountant="rdp")
    opacus.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    assert copied(opacus).get_epsilon(1e-3) == opacus.get_epsilon(1e-3)
    training = train(plain_loop)
    twin = copied(training.engine)
    before = training.spent()
    plain_loop(training)
    np.testing.assert_array_equal(twin.per_instance.spent_rdp()[0], before)
    assert twin.get_epsilon(1e-3) < training.engine.get_epsilon(1e-3)
    assert twin.trainings == ()
