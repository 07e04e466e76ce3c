"""Lines A2, A8, A9, A10, A11, A17, A19, A20: what was clipped, to what, and how much noise it got.

What the tripwire sees of these: A11, A19 and A20 where the sum shows it, and none where the leak is
smaller than what the other rows' clipping leaves free, or cancels; bounds and noise it does not
compare with anything, they are noted where they act.
"""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.schedulers import ExponentialGradClip
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from tests.cases.loops import (
    Partly, another_backward, hooked, hooked_a_little, scaled, scaled_unseen,
)  # fmt: skip
from tests.cases.trainings import (
    CLIP, NOISE, ORDERS, SIZE, answer, gaussian_rdp, linear, plain_loop, points, shifts, train,
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


class TestNoise:
    """A10, and noise that is left out, taken back or given twice."""

    @pytest.mark.parametrize("policy", ["worst_case", "budget", "full"])
    def test_an_earlier_hook_that_multiplies_the_noise(self, policy):
        """It is called after the noise of its step was added, and before it is charged."""
        torch.manual_seed(0)
        data, module = points(), linear()
        module, optimizer, loader = PrivacyEngine().make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=SIZE), noise_multiplier=1.0, max_grad_norm=CLIP,
        )  # fmt: skip
        optimizer.attach_step_hook(lambda own: setattr(own, "noise_multiplier", 10.0))
        settings = {"norm_policy": "capped" if policy == "budget" else policy}
        if policy == "budget":
            settings["budget"] = np.full(len(ORDERS), 1e3)
        engine = PerInstancePrivacyEngine(accountant="rdp", orders=ORDERS, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.attach(module=module, optimizer=optimizer, data_loader=loader,
                          criterion=nn.CrossEntropyLoss())  # fmt: skip
            for inputs, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(module(inputs), targets).backward()
                optimizer.step()
        spent = engine.per_instance.spent_rdp()[0]
        assert (spent >= gaussian_rdp([1.0]) * (1 - 1e-6)).all()

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_noise_lowered_between_backward_and_step_is_charged(self, mode):
        def loop(training):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                training.optimizer.noise_multiplier = 0.1
                training.optimizer.step()

        assert answer(loop, mode=mode).honest

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("policy", PROBED)
    def test_add_noise_replaced_by_nothing_is_no_noise(self, policy, mode):
        def loop(training):
            def add_noise():
                for parameter in training.optimizer.params:
                    parameter.grad = parameter.summed_grad.view_as(parameter).clone()

            training.optimizer.add_noise = add_noise
            plain_loop(training)

        found = answer(loop, policy=policy, mode=mode, truth=[np.inf] * 3)
        assert found.honest
        assert "without Opacus's noise" in found.words

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("policy", PROBED)
    def test_the_plain_optimizer_by_mistake_is_no_noise(self, policy, mode):
        def loop(training):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                training.inner.step()

        found = answer(loop, policy=policy, mode=mode, truth=[np.inf] * 3)
        assert found.honest
        assert found.label in ("estimate", "refused")

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_another_optimizer_in_place_of_the_private_one_is_no_noise(self, mode):
        """A whole pass without a private step: nothing is charged, and nothing claimed."""

        def loop(training):
            other = torch.optim.SGD(training.plain.parameters(), lr=1.0)
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                other.step()

        found = answer(loop, mode=mode, batch_size=6, truth=[np.inf] * 3)
        assert found.honest
        assert "no private step" in found.words

    @pytest.mark.parametrize("policy", PROBED)
    def test_another_optimizer_for_the_rest_of_the_model_is_no_noise(self, policy):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

            def forward(self, inputs):
                return self.head(torch.tanh(self.body(inputs)))

        def loop(training):
            rest = torch.optim.SGD(training.plain.body.parameters(), lr=1e-4)
            for _ in range(2):
                for inputs, targets in training.loader:
                    training.module.zero_grad()
                    training.step(inputs, targets)
                    rest.step()

        found = answer(
            loop, policy=policy, model=Two, truth=[np.inf] * 3,
            optimizer=lambda parameters, lr: torch.optim.SGD([*parameters][2:], lr=lr),
        )  # fmt: skip
        assert found.honest
        assert "adds no noise" in found.words or found.label == "refused"

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("policy", PROBED)
    def test_the_same_noise_twice_is_no_noise_on_the_difference(self, policy, mode):
        def loop(training):
            for _ in range(2):
                training.optimizer.generator.manual_seed(7)
                plain_loop(training)

        found = answer(loop, policy=policy, mode=mode, truth=[np.inf] * 3)
        assert found.honest
        assert "seed once" in found.words

    @pytest.mark.parametrize("policy", ["worst_case", "budget", "full"])
    def test_a_divisor_that_follows_the_batch_tells_its_size(self, policy):
        def loop(training):
            for inputs, targets in training.loader:
                training.optimizer.expected_batch_size = max(len(inputs), 1)
                training.step(inputs, targets)

        # With five rows of 24 drawn the spread of the noise alone tells a row more or less.
        found = answer(loop, policy=policy, batch_size=6, truth=[np.inf] * 3)
        assert found.honest
        assert found.label in ("estimate", "refused")


class TestPrecision:
    """A19, and precisions whose rounding moves the sum."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)

        def forward(self, inputs):
            return self.layer(inputs).mean(dim=1)

    @staticmethod
    def cancelling(size: float) -> TensorDataset:
        """Row 0: large activations whose gradients cancel but for a small sum."""
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(12, 64, 4, generator=generator)
        large = torch.randn(32, 4, generator=generator).mul(size).round()
        inputs[0] = torch.stack([large + 8.0, 8.0 - large], dim=1).reshape(64, 4)
        return TensorDataset(inputs, torch.arange(12) % 2)

    @pytest.mark.parametrize("policy", ["worst_case", "full", "participation"])
    @pytest.mark.parametrize("size", [1e4, 1e5, 3e6])
    def test_ghost_norms_of_sequences_are_formed_where_float32_loses_them(self, size, policy):
        found = answer(plain_loop, policy=policy, mode="ghost", model=self.Sequences,
                       data=self.cancelling(size))  # fmt: skip
        assert found.honest
        # At 3e6 the sum itself is lost in rounding, by more than the probe lets pass.
        assert found.label != "estimate" or size > 1e6

    @staticmethod
    def half(training):
        for inputs, targets in training.loader:
            training.step(inputs.bfloat16(), targets)

    @staticmethod
    def autocast(training):
        for inputs, targets in training.loader:
            training.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = training.criterion(training.module(inputs), targets)
            loss.backward()
            training.optimizer.step()

    @staticmethod
    def many() -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(600, 40, generator=generator) + 3.0
        return TensorDataset(inputs, (torch.arange(600) % 3 == 0).long())

    @pytest.mark.parametrize("policy", ["worst_case", "budget", "participation"])
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    @pytest.mark.parametrize("loop", ["half", "autocast"])
    def test_half_precisions_move_the_sum_by_more_than_a_clip_bound(self, loop, mode, policy):
        def model():
            return nn.Linear(40, 3).to(torch.bfloat16 if loop == "half" else torch.float32)

        options = {"mode": mode, "model": model, "data": self.many()}
        found = answer(getattr(self, loop), policy=policy, **options)
        assert found.honest
        assert found.label in ("estimate", "refused")
        assert "precis" in found.words


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
