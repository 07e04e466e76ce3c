"""Lines A18, A21, C7, C8, C13: ledgers that are loaded, composed, and read at odd moments."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.accounting import compose_per_instance
from tests.cases.trainings import ORDERS, SIZE, linear, plain_loop, points, train

DELTA = 1e-3


def several(training, passes=3):
    for _ in range(passes):
        plain_loop(training)


class TestCheckpoints:
    """A18, C8: whose ledger it is after load_checkpoint."""

    @pytest.mark.parametrize("policy", ["worst_case", "budget", "last_seen"])
    def test_a_copy_takes_its_weights_and_leaves_the_ledger(self, policy, tmp_path):
        """A18: the live model goes on, after 2 + 5 steps."""
        path, copied = tmp_path / "file", linear()

        def loop(training):
            several(training, 2)
            training.engine.save_checkpoint(
                path=path, module=training.module, optimizer=training.optimizer
            )
            several(training, 5)
            before = training.spent()
            training.engine.load_checkpoint(path=path, module=copied_wrapper(training))
            assert training.engine.per_instance.steps == 7
            np.testing.assert_array_equal(training.spent(), before)
            assert training.engine.get_epsilon(DELTA) > 0

        def copied_wrapper(training):
            return type(training.module)(copied)

        train(loop, policy=policy)

    def test_loading_into_the_live_model_is_said_to_forget(self, tmp_path):
        path = tmp_path / "file"

        def loop(training):
            training.engine.save_checkpoint(
                path=path, module=training.module, optimizer=training.optimizer
            )
            several(training, 3)
            with pytest.warns(UserWarning, match="went back by 3 steps"):
                training.engine.load_checkpoint(
                    path=path, module=training.module, optimizer=training.optimizer
                )
            several(training, 2)  # the same noise again, which the ledger knows of once
            assert training.engine.per_instance.steps == 2
            assert training.label == "bound"

        train(loop)

    def test_other_data_are_charged_the_worst_case_and_training_goes_on(self, tmp_path):
        """C8: as Opacus goes on; `strict` refuses."""
        path = tmp_path / "file"
        first = train(several, policy="last_seen")
        first.engine.save_checkpoint(path=path, module=first.module, optimizer=first.optimizer)
        other = points()
        other.tensors[0].mul_(-1.0)

        def loop(training):
            with pytest.warns(UserWarning, match="other"):
                training.engine.load_checkpoint(
                    path=path, module=training.module, optimizer=training.optimizer
                )
            plain_loop(training)

        second = train(loop, policy="last_seen", data=other)
        assert second.engine.per_instance.steps == 4
        assert (second.spent() >= first.spent()).all()
        assert second.label == "estimate"


class TestComposition:
    """A21: the same run passed twice is one run."""

    @pytest.mark.parametrize("copies", [2, 3])
    def test_copies_of_a_run_are_no_further_draws(self, copies):
        run = np.random.default_rng(0).random((4, 1, 6))
        for steps in (
            np.repeat(run, copies, axis=1),
            np.concatenate([run, *[run.copy() + 0.0] * (copies - 1)], axis=1),
        ):
            found = compose_per_instance(lambda order, s=steps: s * order, order=4.0)
            assert found.guarantee == "estimate"


class TestOddMoments:
    """C7, C13: before the first step, and after a gradient that is not finite."""

    @pytest.mark.parametrize("accountant", ["prv", "rdp", "per_instance_rdp"])
    def test_nothing_is_lost_before_the_first_step(self, accountant):
        """C13: PRV would convert NaN to an integer."""
        engine = PerInstancePrivacyEngine(accountant=accountant)
        assert engine.get_epsilon(DELTA) == 0.0
        with pytest.raises(ValueError, match="delta"):
            engine.get_epsilon(1.5)

    def test_instances_neither(self):
        found = train(lambda training: None)
        assert (found.spent() == 0.0).all()
        assert (found.engine.get_per_instance_epsilon(DELTA).epsilon >= 0.0).all()

    @pytest.mark.parametrize("policy", ["worst_case", "last_seen", "full", "participation"])
    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_noise_that_overflows_the_model_does_not_stop_it(self, mode, policy):
        """C7: Opacus trains on; whoever has a gradient without a norm has lost everything."""
        found = train(several, policy=policy, mode=mode, noise=1e38, clip=10.0, moving=True)
        assert found.engine.per_instance.steps == 3
        assert not torch.isfinite(found.plain.weight).all()
        assert found.engine.get_epsilon(DELTA) == float("inf")
        assert (found.spent() == np.inf).all()

    @pytest.mark.parametrize("policy", ["worst_case", "last_seen", "full", "participation"])
    def test_a_record_without_a_loss_is_a_fact_of_its_own(self, policy):
        """NaN features of row 3: not a loss that couples rows, and not another criterion."""
        data = points()
        data.tensors[0][3] = float("nan")
        found = train(plain_loop, policy=policy, data=data)
        assert found.engine.get_epsilon(DELTA) == float("inf")
        assert (found.spent(3) == np.inf).all()
        assert "depends on other rows" not in found.reasons

    def test_a_record_too_large_for_float32_too(self):
        data = points()
        data.tensors[0][3] = 1e30
        found = train(plain_loop, data=data)
        assert (found.spent(3) == np.inf).all()
        assert "not finite" in found.reasons

    def test_under_caps_the_step_is_not_made(self):
        data = points()
        data.tensors[0][3] = float("nan")
        seen = []

        def loop(training):
            seen.append(training)
            plain_loop(training)

        with pytest.raises(Exception, match="first: instance 3"):
            train(loop, policy="capped", data=data)
        assert seen[0].engine.per_instance.steps == 0
        assert not seen[0].moves


def test_warnings_are_given_once_and_name_the_reason():
    def loop(training):
        for _ in range(4):
            for inputs, targets in training.loader:
                training.step(inputs.flip(0), targets)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(loop, quiet=False)
    ours = [str(w.message) for w in caught if "Per-instance losses" in str(w.message)]
    assert len(ours) == 1
    assert "other gradients in training" in ours[0]


def test_a_read_in_the_middle_of_training_changes_nothing():
    def reading(training):
        for _ in range(2):
            for inputs, targets in training.loader:
                training.backward(inputs, targets)
                training.engine.get_per_instance_epsilon(DELTA)
                training.optimizer.step()
                training.engine.get_epsilon(DELTA)

    read, unread = train(reading), train(lambda training: several(training, 2))
    np.testing.assert_array_equal(read.spent(), unread.spent())
    for one, other in itertools.zip_longest(read.moves, unread.moves):
        assert torch.equal(one, other)
    assert len(ORDERS) == read.spent().size
    assert read.engine.per_instance.num_instances == SIZE
    assert isinstance(read.plain, nn.Module)
