"""Lines A2, A8, A9, A11, A17, A20: what was clipped, and to what.

What the tripwire sees of these: A11 and A20 where the sum shows it, and nothing where the leak is
smaller than what the other rows' clipping leaves free, or cancels; bounds and noise it compares
with nothing, they are noted where they act.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from opacus.schedulers import ExponentialGradClip
from torch import nn
from torch.nn import functional as F

from opacus_pil import UnsupportedError
from tests.cases.loops import (
    Partly,
    another_backward,
    hooked,
    hooked_a_little,
    scaled,
    scaled_unseen,
)  # fmt: skip
from tests.cases.trainings import (
    NOISE,
    ORDERS,
    SIZE,
    answer,
    gaussian_rdp,
    plain_loop,
    shifts,
    train,
)  # fmt: skip
from tests.oracles import integer_order_divergence

PROBED = ("worst_case", "budget", "full", "participation")


class TestClipBounds:
    """A2, A9: bounds that follow a schedule, or change between backward and step."""

    @pytest.mark.parametrize("policy", ["worst_case", "full", "participation"])
    def test_a_schedule_of_the_noise_s_bound_is_none_of_the_clips(self, policy):
        def loop(training):
            schedule = ExponentialGradClip(training.optimizer, gamma=0.1)
            for _ in range(3):
                plain_loop(training)
                schedule.step()

        found = answer(loop, policy=policy, clipping="per_layer", clip=[1.0, 1.0])
        assert found.honest
        assert found.truth[0] > 1000.0  # noise of a hundredth on clips that stayed

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("policy", ["worst_case", "full", "participation"])
    def test_bounds_lowered_between_backward_and_step(self, policy, mode):
        def loop(training):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                training.optimizer.max_grad_norm = 0.1
                if mode == "ghost":  # too late for gradients that it has clipped
                    training.module.max_grad_norm = 0.1
                training.optimizer.step()

        found = answer(loop, policy=policy, mode=mode, clip=10.0)
        assert found.honest
        assert mode == "hooks" or found.truth[0] > 1000.0

    @pytest.mark.parametrize("policy", ["worst_case", "full"])
    def test_a_bound_raised_in_ghost_s_module_alone(self, policy):
        """Its noise stays what it was: five clip bounds of shift for one of noise."""

        def loop(training):
            training.module.max_grad_norm = 5.0
            plain_loop(training)

        found = answer(loop, policy=policy, mode="ghost")
        assert found.honest
        assert found.truth[0] > gaussian_rdp([4.0 / NOISE])[0]

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("setting", ["noise_multiplier", "max_grad_norm", "caps"])
    def test_nothing_that_a_budget_was_tested_for_changes_in_between(self, setting, mode):
        """A8, A9: the test of the budget is when gradients are clipped."""

        def loop(training):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                if setting == "caps":
                    training.engine.set_caps(np.full(len(training.data), 0.5))
                else:
                    setattr(training.optimizer, setting, 0.05)
                training.optimizer.step()

        found = answer(loop, policy="budget", mode=mode, noise=100.0, clip=1.0,
                       budget=np.array(ORDERS) * 1e-3)  # fmt: skip
        assert found.honest
        # Without ghost clipping the clip is at the step: noise changed before it is noise known.
        assert found.label == "refused" or mode == "hooks"

    def test_a_budget_holds_at_the_noise_of_the_step(self):
        """Nobody can bear a step with noise .05: everybody is left out, and the model shows it."""

        def loop(training):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                training.optimizer.noise_multiplier = 0.05
                training.optimizer.step()

        options = {"policy": "budget", "noise": 100.0, "budget": np.array(ORDERS) * 1e-3}
        assert shifts(loop, **options) == pytest.approx(0.0, abs=1e-4)

    @pytest.mark.parametrize("bounds", [[1.0], [1.0, 1.0, 1.0]])
    def test_as_many_bounds_as_layers(self, bounds):
        with pytest.raises(ValueError, match=r"one bound per parameter tensor .* \(2\)"):
            train(plain_loop, clipping="per_layer", clip=bounds)

    @pytest.mark.parametrize("policy", ["worst_case", "full"])
    def test_a_list_that_gets_shorter_leaves_layers_unclipped(self, policy):
        def loop(training):
            training.optimizer.max_grad_norms = training.optimizer.max_grad_norms[:1]
            with contextlib.suppress(AttributeError, TypeError):  # Opacus on the layer without one
                plain_loop(training)

        found = answer(loop, policy=policy, clipping="per_layer", clip=[1.0, 1.0],
                       truth=[0.0, 0.0, 0.0])  # fmt: skip
        assert found.label == "estimate" or not found.claimed.any()


def clipped_as_a_whole(training):
    for inputs, targets in training.loader:
        training.backward(inputs, targets)
        nn.utils.clip_grad_norm_(training.plain.parameters(), 0.5)
        training.optimizer.step()


def parameters_used_directly(training):
    for inputs, targets in training.loader:
        training.optimizer.zero_grad()
        outputs = training.module(inputs) + F.linear(inputs, training.plain.weight)
        training.criterion(outputs, targets).backward()
        training.optimizer.step()


class TestGradientsChangedAfterTheClip:
    """A11: ghost clipping leaves its clipped sum in `.grad`, where everybody can reach it."""

    @pytest.mark.parametrize("policy", PROBED)
    @pytest.mark.parametrize(
        "loop",
        [another_backward, clipped_as_a_whole, scaled, scaled_unseen, hooked, hooked_a_little,
         parameters_used_directly],
    )  # fmt: skip
    def test_it_is_noticed_in_ghost_clipping(self, loop, policy):
        for row in (1, 0):
            found = answer(loop, row=row, policy=policy, mode="ghost")
            assert found.honest
            assert found.label in ("estimate", "refused")

    @pytest.mark.parametrize("loop", [another_backward, clipped_as_a_whole, scaled])
    def test_elsewhere_it_changes_nothing(self, loop):
        """Opacus puts the noisy sum in place of whatever is in `.grad`."""
        found = answer(loop)
        assert found.label == "bound"
        assert found.honest

    def test_a_step_without_a_clipped_backward_pass_is_none(self):
        def loop(training):
            for inputs, targets in training.loader:
                training.optimizer.zero_grad()
                F.cross_entropy(training.module(inputs), targets).backward()
                training.optimizer.step()

        assert answer(loop, mode="ghost").label == "estimate"


class TestTrainableParameters:
    """A20: parameters that are trained and were not when the training was made private."""

    @pytest.mark.parametrize("policy", PROBED)
    def test_unfrozen_after_make_private_they_are_not_in_ghost_s_norm(self, policy):
        def loop(training):
            training.plain.body.requires_grad_(True)
            plain_loop(training)

        for row in (5, 0):
            found = answer(loop, row=row, policy=policy, mode="ghost", model=Partly)
            assert found.honest
            assert found.label in ("estimate", "refused")
            assert "unfrozen" in found.words

    @pytest.mark.parametrize("policy", ["worst_case", "budget", "participation"])
    def test_frozen_between_backward_and_step_they_get_no_noise(self, policy):
        """The plain optimizer still holds them, and their raw gradient."""

        def loop(training):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                training.plain.bias.requires_grad_(False)
                training.optimizer.step()

        found = answer(loop, policy=policy)
        assert found.honest
        assert "without noise" in found.words

    @pytest.mark.parametrize("policy", ["worst_case", "full"])
    def test_frozen_before_the_loop_they_are_left_alone(self, policy):
        def loop(training):
            training.plain.bias.requires_grad_(False)
            plain_loop(training)

        found = answer(loop, row=1, policy=policy)
        assert found.label != "estimate"
        assert found.honest


class TestCapsThatKnowTheCoins:
    """A17: whoever is not drawn gets a cap of 0 and pays nothing, in expectation what is true."""

    @staticmethod
    def loop(training):
        known = training.data.tensors[0]
        for inputs, targets in training.loader:
            drawn = (known[:, None] == inputs[None]).all(2).any(1)
            training.engine.set_caps(drawn.double().numpy())
            training.step(inputs, targets)

    @pytest.mark.parametrize("policy", ["budget", "capped"])
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_they_are_refused(self, mode, policy):
        one = [float(integer_order_divergence(1 / NOISE, a, 0.25)) for a in (2, 8, 32)]
        found = answer(self.loop, policy=policy, mode=mode, batch_size=6, truth=4 * np.array(one))
        assert found.honest
        assert found.label == "refused"
        assert "before the next batch" in found.words

    def test_between_passes_they_are_the_caller_s_right(self):
        kept = train(plain_loop, policy="budget", batch_size=6)
        kept.engine.set_caps(np.full(SIZE, 0.1))
        with torch.no_grad():  # a look, no training
            for _ in kept.loader:
                with pytest.raises(UnsupportedError, match="in hand"):
                    kept.engine.set_caps(np.full(SIZE, 0.1))
