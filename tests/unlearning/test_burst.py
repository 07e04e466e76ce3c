"""More noise in the first unlearning step: counted by the certificate, run, and seen by ledgers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from opacus_pil import CertificateError
from opacus_pil.certificates import (
    ContractionCertificate,
    read_certificate,
    verify_certificate,
    write_certificate,
)
from opacus_pil.certificates.burst import with_burst
from opacus_pil.certificates.fields import constants_of, rebuilt
from opacus_pil.unlearning.noise_burst import least_burst
from tests.unlearning.runs import DELTA, logistic_run

CHAIN = ContractionCertificate(0.93, 0.5, shifts=(0.4,) * 30)
TARGET = {"epsilon": 0.3, "delta": DELTA, "method": "langevin"}


class TestCertificate:
    @pytest.mark.parametrize("burst", [1.5, 4.0, 60.0])
    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_it_is_the_chain_whose_steps_are_written_out(self, burst, steps) -> None:
        noise = (0.5,) * 30 + (0.5 * burst,) + (0.5,) * (steps - 1)
        shifts = (0.4,) * 30 + (0.0,) * steps
        explicit = ContractionCertificate(
            0.93, noise, shifts=shifts, unlearning_noise_std=0.5, unlearning_contraction=0.93
        )
        # Two ways through the same hull; logarithms round a few times on either.
        assert with_burst(CHAIN, burst).mu(steps) == pytest.approx(explicit.mu(0), rel=1e-9)

    def test_no_step_has_no_burst_and_a_factor_of_one_is_none(self) -> None:
        assert with_burst(CHAIN, 9.0).mu(0) == CHAIN.mu(0)
        assert with_burst(CHAIN, 1.0) is CHAIN
        with pytest.raises(ValueError, match="burst"):
            with_burst(CHAIN, 0.5)

    def test_more_noise_and_more_steps_never_give_more_away(self) -> None:
        found = np.array(
            [[with_burst(CHAIN, b).mu(k) for k in range(8)] for b in (1.0, 1.3, 2.0, 10.0)]
        )
        assert (np.diff(found, axis=0) <= 0.0).all()
        assert (np.diff(found, axis=1) <= 1e-12).all()

    @pytest.mark.parametrize("where", range(6))
    def test_which_step_is_noisier_counts_only_through_what_decay_leaves_of_it(self, where) -> None:
        # The programme's value depends on Σ c^(2(K−t))ζ_t²: the same extra variance at another
        # step, scaled by what the steps between take of it, gives the same μ.
        steps, burst = 6, 5.0
        first = with_burst(CHAIN, burst).mu(steps)
        extra = 0.25 * (burst**2 - 1.0) * 0.93 ** (2 * where)
        noise = np.full(steps, 0.5)
        noise[where] = math.sqrt(0.25 + extra)
        other = ContractionCertificate(
            0.93, (0.5,) * 30 + tuple(noise),
            shifts=(0.4,) * 30 + (0.0,) * steps,
            unlearning_noise_std=0.5, unlearning_contraction=0.93,
        )  # fmt: skip
        assert other.mu(0) == pytest.approx(first, rel=1e-9)

    @pytest.mark.parametrize("steps", [1, 5, 20])
    def test_the_least_burst_reaches_the_target_and_the_grid_point_below_does_not(
        self, steps
    ) -> None:
        burst = least_burst(CHAIN, epsilon=0.5, delta=1e-3, steps=steps)
        reached = with_burst(CHAIN, burst).epsilon(delta=1e-3, steps=steps)
        below = with_burst(CHAIN, burst / 1.1).epsilon(delta=1e-3, steps=steps)
        assert reached <= 0.5 < below

    def test_constants_survive_a_file_and_old_ones_have_no_new_name(self) -> None:
        noisy = with_burst(CHAIN, 3.0)
        assert rebuilt(*constants_of(noisy)) == noisy
        assert "first_unlearning_noise_std" not in constants_of(CHAIN)[1]


class TestRun:
    def test_only_the_first_step_is_noisier_and_both_ledgers_are_charged_for_it(self) -> None:
        run = logistic_run(steps=60)
        engine = run.unlearning()
        plan = engine.plan([3], steps=4, **TARGET)
        assert plan.noise_burst > 1.0
        assert plan.epsilon <= 0.3
        result = engine.unlearn(plan)
        assert result.epsilon == plan.epsilon
        z, scaled = 1.0, plan.noise_burst
        history = [(noise, steps) for noise, _, steps in run.engine.accountant.history]
        assert history == [(z, 60), (z * scaled, 1), (z, 3)]
        assert run.engine.per_instance.guarantee == "bound"

    def test_a_plain_plan_has_none_and_a_reachable_target_asks_for_none(self) -> None:
        run = logistic_run(steps=60)
        engine = run.unlearning()
        easy = engine.plan([3], steps=50, epsilon=50.0, delta=DELTA, method="langevin")
        assert easy.noise_burst == 1.0
        assert engine.plan([3], epsilon=50.0, delta=DELTA, method="langevin").noise_burst == 1.0

    def test_a_request_after_it_counts_the_noise_of_training_only(self) -> None:
        run = logistic_run(steps=60)
        engine = run.unlearning()
        engine.unlearn(engine.plan([3], steps=4, **TARGET))
        later = engine.plan([5], steps=6, **TARGET)
        kept = later.certificate
        assert isinstance(kept.noise_std, float)  # more noise than is counted hides more
        assert len(kept.shifts) == 64
        assert engine.unlearn(later).epsilon <= 0.3

    def test_a_killed_run_goes_on_without_a_second_burst(self, tmp_path: Path) -> None:
        def killed(step, module):
            if step == 2:
                raise KeyboardInterrupt

        weights = []
        for kill in (False, True):
            run = logistic_run(steps=60)
            engine = run.unlearning()
            plan = engine.plan([3], steps=4, **TARGET)
            folder = tmp_path / str(kill)
            folder.mkdir()
            how = {"checkpoint_dir": folder, "checkpoint_every": 1, "seed": 11}
            if kill:
                with pytest.raises(KeyboardInterrupt):
                    engine.unlearn(plan, on_step=killed, **how)
            result = engine.unlearn(plan, **how)
            weights.append(result.module.weight.detach().clone())
            noises = [noise for noise, _, _ in run.engine.accountant.history]
            assert noises.count(plan.noise_burst) == 1
        assert torch.equal(*weights)

    def test_a_plan_edited_to_less_noise_is_refused_before_it_runs(self) -> None:
        engine = logistic_run(steps=60).unlearning()
        plan = engine.plan([3], steps=4, **TARGET)
        with pytest.raises(ValueError, match="in the plan too"):
            engine.unlearn(dataclasses.replace(plan, noise_burst=1.0))

    def test_noise_that_nobody_declared_is_no_burst(self) -> None:
        run = logistic_run(steps=60)
        engine = run.unlearning()
        plan = engine.plan([3], steps=4, **TARGET)
        training = "opacus_pil.training.training.Training.scale_noise"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, lambda self, scale: None)  # the noise stays as it was
            with pytest.raises(CertificateError, match="times the noise"):
                engine.unlearn(plan)
        assert engine.forgotten == frozenset()

    def test_the_page_names_it_and_an_edited_burst_is_found(self, tmp_path: Path) -> None:
        engine = logistic_run(steps=60).unlearning()
        plan = engine.plan([3], steps=4, **TARGET)
        record = engine.unlearn(plan).record()
        assert any("times the noise of the others" in one for one in record.assumptions)
        write_certificate(record, path=tmp_path / "c.json")
        assert verify_certificate(read_certificate(tmp_path / "c.json")).holds
        text = (tmp_path / "c.json").read_text()
        burst = f"{plan.noise_burst!r}"
        assert burst in text
        (tmp_path / "d.json").write_text(text.replace(burst, repr(2.0 * plan.noise_burst), 1))
        assert not verify_certificate(read_certificate(tmp_path / "d.json")).holds

    @pytest.mark.parametrize("goal", [{"steps": 0}, {"steps": 3, "predict": True}])
    def test_it_takes_steps_and_no_prediction(self, goal) -> None:
        with pytest.raises(ValueError, match="steps"):
            logistic_run(steps=20).unlearning().plan([3], **TARGET, **goal)

    def test_mini_batches_have_none(self) -> None:
        run = logistic_run(steps=40, batch_size=12, step_size=2.0)
        with pytest.raises(CertificateError, match="full batches"):
            run.unlearning().plan([3], steps=4, **TARGET)
