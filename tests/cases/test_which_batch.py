"""Lines A3, A4, A6, A16: the batch of a step is not what the loader drew, or not once.

What the tripwire sees of these: nothing. Each gradient is clipped, and the sum is what its rows
allow; that a batch is used twice, left out or not drawn at all shows where it is handed out.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opacus_pil import BatchMemoryManager
from tests.cases.loops import several_steps
from tests.cases.trainings import (
    NOISE,
    ORDERS,
    answer,
    gaussian_rdp,
    plain_loop,
    points,
    train,
)  # fmt: skip
from tests.oracles import integer_order_divergence

AMPLIFIED = ("worst_case", "budget", "full")


def sampled(steps_on_a_batch: int, *, batches: int, rate: float) -> np.ndarray:
    """RDP of a clipped row in batches of rate `rate` that each make so many equal steps.

    The coin of a batch decides on all of its steps, so that k of them are one step of shift √k.
    """
    shift = math.sqrt(steps_on_a_batch) / NOISE
    return batches * np.array([float(integer_order_divergence(shift, a, rate)) for a in (2, 8, 32)])


class TestABatchUsedAgain:
    """A3: several steps on each batch."""

    @staticmethod
    def a_kept_list(training):
        batches = list(training.loader)
        for inputs, targets in batches * 10:
            training.step(inputs, targets)

    @staticmethod
    def a_cycle(training):
        turns = 10 * len(training.loader)
        for inputs, targets in itertools.islice(itertools.cycle(training.loader), turns):
            training.step(inputs, targets)

    @staticmethod
    def interleaved(training):
        kept = None
        for inputs, targets in training.loader:
            training.step(inputs, targets)
            for _ in range(9):
                training.step(*(kept or (inputs, targets)))
            kept = inputs, targets

    @pytest.mark.parametrize("policy", [*AMPLIFIED, "capped"])
    @pytest.mark.parametrize("loop", ["several", "a_kept_list", "a_cycle", "interleaved"])
    def test_it_is_no_new_draw(self, loop, policy):
        truth = sampled(10, batches=4, rate=0.25)
        chosen = several_steps if loop == "several" else getattr(self, loop)
        found = answer(chosen, policy=policy, batch_size=6, truth=truth)
        assert found.honest
        assert found.label in ("estimate", "refused")
        assert "handed" in found.words

    def test_charged_without_amplification_it_is_above_the_truth_even_so(self):
        found = answer(several_steps, batch_size=6, truth=sampled(10, batches=4, rate=0.25))
        assert (found.claimed >= found.truth).all()


class TestABatchFromElsewhere:
    """A4: the user's own shuffled loader; every row once per epoch, whatever the coins say."""

    @staticmethod
    def own(training):
        for inputs, targets in DataLoader(training.data, batch_size=6, shuffle=True):
            training.step(inputs, targets)

    @staticmethod
    def own_beside_the_private_one(training):
        own = DataLoader(training.data, batch_size=6)
        for (inputs, targets), others in zip(training.loader, own, strict=True):
            training.step(inputs, targets)
            training.step(*others)

    @staticmethod
    def joined_with_the_private_one(training):
        own = DataLoader(training.data, batch_size=6)
        for parts in zip(training.loader, own, strict=True):
            inputs, targets = (torch.cat(pair) for pair in zip(*parts, strict=True))
            training.step(inputs, targets)

    @staticmethod
    def rebuilt_by_others(training):
        """As Accelerate and Lightning rebuild loaders: the draws are ours, the batches are not."""
        rebuilt = DataLoader(training.data, batch_sampler=training.loader.batch_sampler)
        for inputs, targets in rebuilt:
            training.step(inputs, targets)

    @pytest.mark.parametrize("policy", AMPLIFIED)
    @pytest.mark.parametrize(
        "loop",
        ["own", "own_beside_the_private_one", "joined_with_the_private_one", "rebuilt_by_others"],
    )
    def test_it_has_no_amplification(self, loop, policy):
        once = gaussian_rdp([1.0 / NOISE])  # zero-out: the row's slot stays empty
        found = answer(getattr(self, loop), policy=policy, batch_size=6, truth=once)
        assert found.honest
        assert found.label in ("estimate", "refused")


class TestAccumulation:
    """A6: two backward passes over one batch in one step, allowed by hand."""

    @pytest.mark.parametrize("policy", AMPLIFIED)
    @pytest.mark.parametrize("mode", ["hooks", "functorch"])
    def test_both_count(self, policy, mode):
        def loop(training):
            training.module.allow_grad_accumulation()
            for inputs, targets in training.loader:
                training.optimizer.zero_grad()
                for _ in range(2):
                    training.criterion(training.module(inputs), targets).backward()
                training.optimizer.step()

        found = answer(loop, policy=policy, mode=mode, truth=gaussian_rdp([2.0 / NOISE]))
        assert found.honest
        if found.label != "refused":
            assert (found.claimed >= found.truth * (1 - 1e-6)).all()

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_virtual_steps_by_hand_count_each_draw(self, mode):
        def loop(training):
            for skip in (True, False):
                for inputs, targets in training.loader:
                    training.optimizer.signal_skip_step(skip)
                    training.step(inputs, targets)

        found = answer(loop, mode=mode)
        assert found.honest
        assert (found.claimed >= gaussian_rdp([2.0 / NOISE]) * (1 - 1e-6)).all()


class TestSkippedDraws:
    """A16: how many steps there are tells who was drawn."""

    @staticmethod
    def truth(*, rows: int, rate: float, draws: int) -> np.ndarray:
        """Rényi divergence of the number of non-empty draws, with one more row and without."""
        with_it, without_it = 1 - (1 - rate) ** rows, 1 - (1 - rate) ** (rows - 1)
        values = []
        for order in ORDERS:
            total = with_it**order * without_it ** (1 - order)
            total += (1 - with_it) ** order * (1 - without_it) ** (1 - order)
            values.append(draws * math.log(total) / (order - 1))
        return np.array(values)

    def loop(self, training):
        for _ in range(12):
            for inputs, targets in training.loader:
                if len(inputs) == 0:
                    continue
                training.step(inputs, targets)

    @pytest.mark.parametrize("policy", AMPLIFIED)
    def test_empty_draws_left_out_are_noticed(self, policy):
        truth = self.truth(rows=4, rate=0.25, draws=48)
        found = answer(
            self.loop, policy=policy, data=points(4), batch_size=1, noise=1000.0, truth=truth
        )
        assert found.honest
        assert found.label in ("estimate", "refused")

    @pytest.mark.parametrize("policy", ["worst_case", "budget", "full"])
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("late", [False, True])
    def test_the_last_draw_of_all_is_noticed_too(self, policy, mode, late):
        """No step follows it, at which it could be said; with caps ghost has claimed it already."""

        def loop(training):
            for k, (inputs, targets) in enumerate(training.loader):
                if k == len(training.loader) - 1 and not late:
                    continue
                training.backward(inputs, targets)
                if k < len(training.loader) - 1:
                    training.optimizer.step()

        found = train(loop, policy=policy, mode=mode, batch_size=6)
        assert found.engine.per_instance.steps == 3
        assert found.label == "estimate"
        assert "skipped" in found.reasons

    def test_a_part_of_a_draw_that_is_left_out_is_a_draw_left_out(self):
        def loop(training):
            for _ in range(2):
                with BatchMemoryManager(
                    data_loader=training.loader, max_physical_batch_size=7,
                    optimizer=training.optimizer,
                ) as loader:  # fmt: skip
                    for k, (inputs, targets) in enumerate(loader):
                        if k != 1:
                            training.step(inputs, targets)

        assert answer(loop).label == "estimate"

    def test_evaluation_and_a_loop_that_is_left_skip_nothing(self):
        def loop(training):
            for inputs, targets in training.loader:
                training.step(inputs, targets)
                break
            training.module.eval()
            with torch.no_grad():
                for inputs, _ in training.loader:
                    training.module(inputs)
            training.module.train()
            plain_loop(training)

        assert train(loop, batch_size=6).label == "bound"


class TestDrawsThatAreNotWhatIsAccounted:
    """Found beside A3 and A4: other rates, and coins thrown twice."""

    @pytest.mark.parametrize("policy", AMPLIFIED)
    def test_a_rate_that_is_raised_is_charged(self, policy):
        def loop(training):
            training.loader.batch_sampler.sample_rate = 1.0
            plain_loop(training)

        found = answer(loop, policy=policy, batch_size=6, truth=gaussian_rdp([1 / NOISE] * 4))
        assert found.honest
        assert (found.claimed >= found.truth * (1 - 1e-6)).all()

    @pytest.mark.parametrize("policy", AMPLIFIED)
    def test_a_generator_that_is_seeded_at_every_epoch_throws_the_same_coins(self, policy):
        def loop(training):
            for _ in range(3):
                torch.manual_seed(1)
                plain_loop(training)

        # The coins of one epoch decide on all three.
        found = answer(loop, policy=policy, batch_size=6, truth=sampled(3, batches=4, rate=0.25))
        assert found.honest
        assert found.label in ("estimate", "refused")
        assert "seed once" in found.words
