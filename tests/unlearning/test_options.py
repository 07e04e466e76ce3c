"""What a method needs, what each would do, and which constants make deletions cheap."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.data import TensorDataset

from opacus_pil import CertificateError, UnlearningEngine
from opacus_pil.certificates import ContractionCertificate, NoisyFineTuningCertificate
from opacus_pil.files.model_hash import model_hash
from opacus_pil.heads import BoundedFeatures
from opacus_pil.unlearning import CertifiedPlan, RetrainPlan
from opacus_pil.unlearning.drowned import drowned
from opacus_pil.unlearning.methods import METHODS

from .runs import DELTA, SIZE, logistic_run, network_run

ASKED = {"epsilon": 2.0, "delta": DELTA}


class TestRequirements:
    def test_what_is_met_is_what_a_plan_needs(self) -> None:
        engine = logistic_run(steps=60).unlearning()
        found = engine.requirements("langevin")
        assert found.met
        assert not found.missing
        assert isinstance(engine.plan([0], method="langevin", **ASKED), CertifiedPlan)

    @pytest.mark.parametrize(
        ("changes", "missing"),
        [
            ({"momentum": 0.5}, "SGD without momentum"),
            ({"norm_policy": "last_seen"}, "caps fixed before the run (guarantee 'bound')"),
        ],
    )
    def test_what_is_missing_is_what_a_plan_refuses(self, changes, missing) -> None:
        engine = logistic_run(steps=30, **changes).unlearning()
        found = engine.requirements("langevin")
        assert missing in [one.condition for one in found.missing]
        with pytest.raises(CertificateError):
            engine.plan([0], method="langevin", **ASKED)

    def test_all_that_is_missing_is_listed_at_once(self) -> None:
        run = logistic_run(steps=30, momentum=0.5, norm_policy="last_seen")
        missing = run.unlearning(feature_norm=None).requirements("langevin").missing
        words = " | ".join(one.condition for one in missing)
        assert "feature_norm" in words
        # Without a bound on features nothing can be said of norms; what is asked beside it is.
        found = run.unlearning().requirements("langevin").missing
        assert {"SGD without momentum", "caps fixed before the run (guarantee 'bound')"} <= {
            one.condition for one in found
        }
        assert all(one.cure or one.found for one in found)

    def test_a_network_is_told_what_it_is_not(self) -> None:
        found = network_run().unlearning().requirements("langevin")
        (first, *_) = found.missing
        assert "linear outputs" in first.condition
        assert "heads" in str(found) or "freeze" in str(found)

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_can_be_asked_and_nothing_changes(self, method) -> None:
        run = network_run()
        engine = run.unlearning()
        before, steps = model_hash(engine.module), run.engine.per_instance.steps
        found = engine.requirements(method)
        assert str(found).startswith(method)
        assert len(found.to_dataframe()) == len(found) > 0
        assert (model_hash(engine.module), run.engine.per_instance.steps) == (before, steps)

    def test_weights_that_training_did_not_leave_are_missing_and_not_raised(self) -> None:
        run = logistic_run(steps=30)
        engine = run.unlearning()
        with torch.no_grad():
            engine.module.weight += 1.0
        found = engine.requirements("langevin")
        assert not found.met
        assert "other weights" in str(found)

    def test_an_unknown_method_is_refused(self) -> None:
        with pytest.raises(ValueError, match="method"):
            logistic_run(steps=10).unlearning().requirements("magic")


class TestOptions:
    def test_the_table_says_what_plans_say(self) -> None:
        run = logistic_run(steps=200)
        engine = run.unlearning()
        table = engine.options([0], **ASKED)
        assert {one.method for one in table} == set(METHODS)
        best = table.best
        assert best is not None
        plan = engine.plan([0], method=best.method, **ASKED)
        assert (best.steps, best.cost, best.epsilon) == (plan.steps, plan.cost, plan.epsilon)
        by_name = {one.method: one for one in table}
        assert by_name["finetuning"].status == "no claim"
        assert by_name["noisy_finetuning"].status == "not possible"
        assert by_name["retraining"].cost == 1.0
        assert len(table.to_dataframe()) == len(METHODS)
        assert "langevin" in str(table)

    def test_the_score_is_of_a_trial_that_changes_nothing(self) -> None:
        run = logistic_run(steps=200)
        engine = run.unlearning()
        seen: list[nn.Module] = []

        def score(module: nn.Module) -> float:
            seen.append(copy.deepcopy(module))
            return float(module.weight.detach().norm())

        before = model_hash(engine.module)
        table = engine.options([0], methods=["langevin"], score=score, **ASKED)
        (option,) = table
        assert option.score_change == pytest.approx(
            float(seen[1].weight.detach().norm()) - float(seen[0].weight.detach().norm())
        )
        assert model_hash(engine.module) == before
        assert engine.forgotten == frozenset()
        assert run.engine.per_instance.steps == 200
        assert engine.unlearn(engine.plan([0], method="langevin", **ASKED)).epsilon <= 2.0

    def test_why_not_is_the_reason_that_a_plan_gives(self) -> None:
        engine = network_run().unlearning()
        (option,) = engine.options([0], methods=["langevin"], **ASKED)
        with pytest.raises(CertificateError) as refusal:
            engine.plan([0], method="langevin", **ASKED)
        assert option.status == "not possible"
        assert option.why == str(refusal.value)
        assert math.isnan(option.score_change)

    def test_the_table_reads_and_leaves_out_what_is_empty(self) -> None:
        engine = logistic_run(steps=200).unlearning()
        table = engine.options([0], epsilon=1e-3, delta=0.01, max_steps=28)
        text = str(table)
        assert "score" not in text
        assert "epsilon " not in text.splitlines()[0]  # nothing is certified
        by_name = {one.method: one for one in table}
        assert by_name["langevin"].why.startswith("best reachable ε ")
        assert by_name["langevin"].why.endswith(" in 28 steps")
        plan = engine.plan([0], method="langevin", epsilon=1e-3, delta=0.01, max_steps=28)
        assert isinstance(plan, RetrainPlan)
        assert plan.best is not None
        shown = float(by_name["langevin"].why.split()[3])
        assert shown >= plan.best[0]  # rounded up
        assert "asked for" not in text
        other = str(network_run().unlearning().options([0], **ASKED))
        assert "Expected" not in other
        assert "needs " in other

    @pytest.mark.parametrize("rows", [[SIZE], [], [0, 0]])
    def test_rows_that_are_none_are_refused_before_anything_is_tried(self, rows) -> None:
        with pytest.raises(ValueError, match=r"."):
            logistic_run(steps=10).unlearning().options(rows, **ASKED)


class TestNoiseThatDestroys:
    def test_it_is_said_when_a_plan_is_made(self) -> None:
        engine = network_run().unlearning()
        loud = NoisyFineTuningCertificate(
            model_clip=1.0, gradient_clip=1.0, step_size=0.1, weight_decay=0.1, noise_std=5.0
        )
        with pytest.warns(UserWarning, match="little of the model will be left"):
            engine.plan([0], method="noisy_finetuning", certificate=loud, steps=20, delta=DELTA)

    def test_the_noise_left_is_that_of_the_recursion_and_quiet_noise_is_not_warned_of(self) -> None:
        module = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            module.weight.fill_(1.0)
        how = {"model_clip": 100.0, "gradient_clip": 1.0, "step_size": 0.5, "weight_decay": 0.4}
        # σ² = ζ²(1 + .8² + …) -> ζ²/(1 − .64): equal to the weights' 1 at ζ = .6.
        for noise, said in ((0.59, False), (0.61, True)):
            certificate = NoisyFineTuningCertificate(noise_std=noise, **how)
            assert bool(drowned(module, certificate, steps=200)) == said
        assert not drowned(module, NoisyFineTuningCertificate(noise_std=9.0, **how), steps=0)


class TestSuggestion:
    def public(self, rows: int = 80) -> TensorDataset:
        generator = torch.Generator().manual_seed(0)
        centres = 2.0 * torch.randn(3, 4, generator=generator)
        classes = torch.arange(rows) % 3
        x = centres[classes] + torch.randn(rows, 4, generator=generator)
        return TensorDataset(BoundedFeatures(4)(x), classes)

    def test_its_constants_contract_and_its_steps_are_the_certificates(self) -> None:
        found = UnlearningEngine.suggest(
            self.public(), epsilon=1.0, delta=1e-3, num_instances=3000, steps=60, progress=False
        )
        assert found.steps <= 60
        assert found.step_size * (2.0 * found.weight_decay + 0.25) <= 2.0
        worst = ContractionCertificate.one_vs_rest_glm(
            caps=[[1.0] * 3], max_grad_norms=found.max_grad_norm, step_size=found.step_size,
            weight_decay=found.weight_decay, feature_norm=1.0,
            noise_multiplier=found.noise_multiplier, expected_batch_size=3000, num_instances=3000,
            training_steps=found.training_steps,
        )  # fmt: skip
        assert worst.noise_std == pytest.approx(found.noise_std)
        assert worst.steps_for(epsilon=1.0, delta=1e-3) == found.steps_worst_case
        assert found.steps <= (found.steps_worst_case or np.inf)
        assert "make_private" in str(found)

    def test_more_instances_and_more_steps_allow_quieter_noise(self) -> None:
        noise = [
            UnlearningEngine.suggest(
                self.public(), epsilon=0.5, delta=1e-3, num_instances=size, steps=steps,
                progress=False,
            ).steps
            for size, steps in ((3000, 400), (300_000, 400))
        ]  # fmt: skip
        assert noise[1] <= noise[0]

    def test_out_of_reach_is_said(self) -> None:
        with pytest.raises(CertificateError, match="more instances"):
            UnlearningEngine.suggest(
                self.public(), epsilon=1e-3, delta=1e-6, num_instances=30, set_size=20, steps=1,
                progress=False,
            )  # fmt: skip
