"""What each method does to the model, and what may be said about it afterwards."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.accounting import group_rdp, sampled_gaussian_rdp
from opacus_pil.capture.averaged_clip import AveragedClipOptimizer, clip_to_norm
from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    NoisyFineTuningCertificate,
)
from opacus_pil.errors import CertificateError, UnsupportedError
from opacus_pil.unlearning import (
    CertifiedPlan,
    CertifiedResult,
    PredictedPlan,
    RetrainedResult,
    RetrainPlan,
    UncertifiedResult,
)
from opacus_pil.unlearning.steps.averaged import noisy_finetuning_steps
from opacus_pil.unlearning.twin import twin_of

from .runs import DELTA, SIZE, _train, logistic_run, network_run
from .test_engine import Killed, Watched, assert_same, weights

NOISY = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, 3.0)


def joint_norm(module):
    return float(torch.cat([p.detach().double().ravel() for p in module.parameters()]).norm())


def assert_a_killed_run_resumes(prepared, folder, *, seed):
    """`prepared` gives a new engine and plan, as a new process would; `seed`: of the second run."""

    def die(step, module):
        if step == 7:
            raise Killed

    unlearning, plan = prepared()
    whole = unlearning.unlearn(plan, seed=1)
    files = {"checkpoint_dir": folder, "checkpoint_every": 3}
    unlearning, plan = prepared()
    with pytest.raises(Killed):
        unlearning.unlearn(plan, seed=1, on_step=die, **files)
    unlearning, plan = prepared()
    assert_same(weights(unlearning.unlearn(plan, seed=seed, **files).module), weights(whole.module))


class TestAveragedClip:
    @given(
        st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=1, max_size=20),
        st.floats(0.0, 100.0),
        st.sampled_from([torch.float32, torch.float64]),
    )
    def test_the_joint_norm_is_never_above_the_bound(self, values, bound, dtype):
        tensors = [torch.tensor([value], dtype=dtype) for value in values]
        clipped = clip_to_norm(tensors, bound=bound)
        assert float(torch.cat(clipped).double().norm()) <= bound

    def test_what_is_inside_is_left_alone_and_what_is_not_finite_is_dropped(self):
        inside = [torch.tensor([0.3, -0.4])]
        assert torch.equal(clip_to_norm(inside, bound=1.0)[0], inside[0])
        for bad in (float("nan"), float("inf")):
            assert not clip_to_norm([torch.tensor([bad, 1.0])], bound=1.0)[0].any()

    def test_a_step_is_clipped_descent_with_decoupled_decay(self):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        start = [p.detach().clone() for p in module.parameters()]
        gradients = [torch.randn_like(p) for p in module.parameters()]
        optimizer = AveragedClipOptimizer(
            torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.2),
            gradient_clip=0.5,
            noise_std=0.0,
        )
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        norm = torch.cat([g.ravel() for g in gradients]).norm()
        assert norm > 0.5
        for p, before, g in zip(module.parameters(), start, gradients, strict=True):
            expected = (1 - 0.1 * 0.2) * before - 0.1 * 0.5 / norm * g
            torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


class TestNoisyFineTuning:
    @staticmethod
    def steps(module, run, *, certificate=NOISY, steps=12, seed=3, done=0, **extra):
        noisy_finetuning_steps(
            module,
            certificate=certificate,
            dataset=run.dataset,
            task=run.engine.task,
            retain_set=np.arange(5, SIZE),
            batch_size=12.0,
            steps=steps,
            done=done,
            sampler_generator=torch.Generator().manual_seed(seed),
            noise_generator=torch.Generator().manual_seed(seed + 1),
            **extra,
        )

    def test_two_models_never_part_by_more_than_the_certificate_assumes(self):
        """Same batches and noise: Δ starts at 2·C0 and obeys Δ ← (1 − ηλ)Δ + 2ηC1."""
        run, paths = network_run(), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(40.0)  # far outside the model clip
            path = []

            def record(_, module=module, path=path):
                path.append(torch.cat([p.detach().double().ravel() for p in module.parameters()]))
                return False

            self.steps(module, run, after_step=record)
            paths.append(path)
        allowed = 2.0 * NOISY.model_clip
        for first, second in zip(*paths, strict=True):
            allowed = (1 - 0.1 * 0.2) * allowed + 2 * 0.1 * NOISY.gradient_clip
            assert float((first - second).norm()) <= allowed * (1 + 1e-6)  # float32 sums

    def test_the_noise_has_the_promised_standard_deviation(self):
        """Without gradients (C1 = 0), decay or model (C0 = 0), K steps are a sum of K noises."""
        module = nn.Linear(200, 200)
        run = network_run()
        still = NoisyFineTuningCertificate(0.0, 0.0, 0.1, 0.0, 3.0)
        dataset = torch.utils.data.TensorDataset(torch.randn(SIZE, 200), torch.zeros(SIZE, 200))
        run.dataset, run.criterion = dataset, nn.MSELoss()
        self.steps(module, run, certificate=still, steps=4)
        values = torch.cat([p.detach().double().ravel() for p in module.parameters()]).numpy()
        total = (values**2).sum() / (4 * 3.0**2)
        low, high = stats.chi2(len(values)).ppf([1e-6, 1 - 1e-6])  # fails once in 500,000 seeds
        assert low < total < high

    def test_the_model_is_clipped_also_where_no_step_follows(self):
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.steps(module, network_run(), steps=0)
        assert joint_norm(module) <= NOISY.model_clip

    def test_the_plan_runs_its_certificate_and_charges_the_retained_twice_the_clip(self):
        run = network_run(norm_policy="worst_case")
        before = run.engine.per_instance.rdp()
        unlearning = run.unlearning()
        goal = {"method": "noisy_finetuning", "certificate": NOISY, "delta": DELTA}
        plan = unlearning.plan([1, 2, 3], epsilon=1.5, max_steps=500, **goal)
        assert isinstance(plan, CertifiedPlan)
        assert plan.epsilon == NOISY.epsilon(delta=DELTA, steps=plan.steps) <= 1.5
        result = unlearning.unlearn(plan, seed=1)
        assert isinstance(result, CertifiedResult)
        ledger = run.engine.per_instance
        kept = np.setdiff1d(np.arange(SIZE), [1, 2, 3])
        # shift of the averaged gradient 2·C1 against its noise ζ/η: z = ζ/(2ηC1) at sensitivity 1
        step = sampled_gaussian_rdp(
            1.0, noise_multiplier=3.0 / (2 * 0.1 * 0.5), sample_rate=0.25, orders=ledger.orders
        )
        np.testing.assert_allclose(
            (ledger.rdp(kept) - before[kept])[0], plan.steps * step, rtol=1e-6, atol=1e-12
        )
        assert ledger.guarantee == "bound"
        assert plan.steps == sum(n for z, _, n in run.engine.accountant.history if z != 1.0)

    def test_a_member_moves_a_clipped_average_by_at_most_twice_the_clip(self):
        rng = np.random.default_rng(0)
        for _ in range(200):
            rest, member = rng.normal(size=(2, 3)) * rng.choice([0.1, 1.0, 100.0], size=(2, 1))
            moved = [clip_to_norm([torch.tensor(g)], bound=0.5)[0] for g in (rest, rest + member)]
            assert float((moved[0] - moved[1]).norm()) <= 2 * 0.5

    def test_epsilon_after_a_given_number_of_steps(self):
        plan = network_run().unlearning().plan(
            [1], steps=7, delta=DELTA, method="noisy_finetuning", certificate=NOISY
        )  # fmt: skip
        assert plan.steps == 7
        assert plan.epsilon == NOISY.epsilon(delta=DELTA, steps=7)

    def test_it_needs_no_privacy_engine(self):
        unlearning = network_run().unlearning(privacy_engine=None, training_steps=20, batch_size=12)
        plan = unlearning.plan(
            [1], steps=3, delta=DELTA, method="noisy_finetuning", certificate=NOISY
        )
        assert unlearning.unlearn(plan, seed=0).epsilon == plan.epsilon

    def test_another_certificate_or_a_frozen_layer_is_refused(self):
        unlearning = network_run().unlearning()
        goal = {"epsilon": 1.0, "delta": DELTA, "method": "noisy_finetuning"}
        with pytest.raises(CertificateError, match="NoisyFineTuningCertificate"):
            unlearning.plan([1], **goal)
        with pytest.raises(CertificateError, match="got ContractionCertificate"):
            unlearning.plan([1], certificate=ContractionCertificate(0.9, 1.0), **goal)
        with pytest.raises(CertificateError, match="whose steps are other ones"):
            unlearning.plan([1], certificate=NOISY, **{**goal, "method": "dp_sgd"})
        run = network_run()
        run.module._module[0].weight.requires_grad_(False)
        with pytest.raises(CertificateError, match=r"'0\.weight'"):
            run.unlearning().plan([1], certificate=NOISY, **goal)

    def test_contraction_does_not_follow_another_kernel(self):
        unlearning = logistic_run().unlearning()
        plan = unlearning.plan(
            [1], steps=2, delta=DELTA, method="noisy_finetuning", certificate=NOISY
        )
        unlearning.unlearn(plan, seed=0)
        with pytest.raises(CertificateError, match="'noisy_finetuning'"):
            unlearning.plan([2], epsilon=1.0, delta=DELTA, method="langevin")


class TestUncertifiedMethods:
    @pytest.mark.parametrize("method", ["finetuning", "l1_sparse", "gradient_difference"])
    def test_nothing_is_claimed_and_the_plan_says_what_it_costs_the_others(self, method):
        unlearning = network_run().unlearning()
        plan = unlearning.plan([3], steps=2, method=method)
        assert isinstance(plan, PredictedPlan)
        assert "every retained instance's privacy loss is infinite" in str(plan)
        assert isinstance(unlearning.unlearn(plan, seed=0), UncertifiedResult)
        with pytest.raises(CertificateError, match="no certificate"):
            unlearning.plan([4], epsilon=1.0, delta=DELTA, method=method)
        with pytest.raises(CertificateError, match="no certificate"):
            unlearning.plan([4], steps=3, delta=DELTA, method=method)

    @pytest.mark.parametrize("method", ["l1_sparse", "gradient_difference", "noisy_finetuning"])
    def test_a_killed_run_resumes_to_the_same_model(self, tmp_path, method):
        claim = {"certificate": NOISY, "delta": DELTA} if method == "noisy_finetuning" else {}

        def prepared():
            unlearning = network_run().unlearning()
            return unlearning, unlearning.plan([3, 7], steps=11, method=method, **claim)

        assert_a_killed_run_resumes(prepared, tmp_path, seed=9)

    def test_no_penalty_is_plain_fine_tuning_and_a_large_one_shrinks_the_model(self):
        def run(**arguments):
            unlearning = network_run().unlearning()
            return unlearning.unlearn(unlearning.plan([3], steps=20, **arguments), seed=1).module

        plain = run(method="finetuning")
        assert_same(weights(run(method="l1_sparse", strength=0.0)), weights(plain))
        sparse = run(method="l1_sparse", strength=0.05)
        size = [sum(float(p.detach().abs().sum()) for p in m.parameters()) for m in (sparse, plain)]
        assert size[0] < 0.9 * size[1]

    def test_one_step_of_gradient_difference_is_descent_minus_ascent(self):
        run = network_run()
        unlearning = run.unlearning(batch_size=None)
        unlearning._state.batch_size = SIZE  # whole sets: the step is deterministic
        forget = np.array([3, 7, 20])
        twin = twin_of(unlearning.module)
        plan = unlearning.plan(forget, steps=1, method="gradient_difference", strength=0.5)
        result = unlearning.unlearn(plan, seed=1).module
        x, y = run.dataset.tensors
        kept = np.setdiff1d(np.arange(SIZE), forget)
        loss = run.criterion(twin(x[kept]), y[kept]) - 0.5 * run.criterion(
            twin(x[forget]), y[forget]
        )
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        for p, before, g in zip(result.parameters(), twin.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.detach(), (before - 0.5 * g).detach())  # lr of the run

    def test_strength_belongs_to_two_methods(self):
        with pytest.raises(ValueError, match="l1_sparse or gradient_difference only"):
            network_run().unlearning().plan([1], steps=1, strength=0.1)


class TestRetraining:
    @staticmethod
    def make():
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))
        return module, torch.optim.SGD(module.parameters(), lr=0.5)

    def test_it_depends_on_neither_the_old_model_nor_the_forget_set(self):
        results = []
        for seed in (0, 1):
            run = network_run(seed=0)
            with torch.no_grad():
                run.module._module[0].weight.add_(seed)  # another trained model
            dataset = Watched(run.dataset)
            unlearning = run.unlearning(dataset=dataset, make_model=self.make)
            plan = unlearning.plan([3, 7], method="retraining")
            assert isinstance(plan, RetrainPlan)
            assert plan.steps == run.steps
            result = unlearning.unlearn(plan, seed=5)
            assert isinstance(result, RetrainedResult)
            assert result.certificate is None
            assert result.epsilon is None
            assert not {3, 7} & set(dataset.read)
            results.append(weights(result.module))
        assert_same(*results)

    def test_a_killed_retraining_resumes_without_its_seed(self, tmp_path):
        def prepared():
            unlearning = network_run().unlearning(make_model=self.make)
            return unlearning, unlearning.plan([3], method="retraining")

        assert_a_killed_run_resumes(prepared, tmp_path, seed=None)

    def test_later_certificates_count_the_new_training_only(self):
        run = logistic_run(steps=60)

        def make():
            module = nn.Linear(5, 1, bias=False)
            nn.init.zeros_(module.weight)
            return module, torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)

        unlearning = run.unlearning(make_model=make)
        unlearning.unlearn(unlearning.plan([0], method="retraining"), seed=1)
        goal = {"epsilon": 2.0, "delta": DELTA, "method": "langevin", "max_steps": 10_000}
        after = unlearning.plan([5], **goal)
        fresh = logistic_run(steps=60).unlearning().plan([5], **goal)
        assert after.certificate.shifts == fresh.certificate.shifts

    def test_a_target_or_steps_make_no_sense_with_it(self):
        with pytest.raises(ValueError, match="retraining"):
            network_run().unlearning().plan([1], method="retraining", steps=4)


class TestAdaptiveRuns:
    def test_an_uncertified_run_stops_where_it_is_told_and_charges_what_it_ran(self, tmp_path):
        run = network_run()
        before = run.engine.per_instance.steps
        unlearning = run.unlearning()
        result = unlearning.unlearn(
            unlearning.plan([3], steps=40),
            seed=1,
            record_every=5,
            until=lambda step, module: step >= 12,
            on_step=lambda step, module: [step],
            checkpoint_dir=tmp_path,
        )
        assert result.steps == 15  # the first recorded step that is at least 12
        assert [entry[0] for entry in result.history] == [0, 5, 10, 15]
        assert run.engine.per_instance.steps == before + 15
        assert not list(tmp_path.iterdir())

    def test_it_may_stop_before_the_first_step(self):
        unlearning = network_run().unlearning()
        before = weights(unlearning.module)
        result = unlearning.unlearn(
            unlearning.plan([3], steps=4, method="finetuning"), until=lambda step, module: True
        )
        assert result.steps == 0
        assert_same(weights(result.module), before)

    def test_a_certified_run_may_not_stop_on_what_the_model_shows(self):
        unlearning = logistic_run().unlearning()
        plan = unlearning.plan([0], epsilon=2.0, delta=DELTA, method="langevin")
        with pytest.raises(CertificateError, match="voids the certificate"):
            unlearning.unlearn(plan, until=lambda step, module: True)
        assert unlearning.forgotten == frozenset()


class TestPredictedFromNorms:
    def test_measured_norms_give_steps_and_no_claim(self):
        run = logistic_run(norm_policy="last_seen")
        goal = {"epsilon": 0.5, "delta": DELTA, "method": "langevin", "max_steps": 100_000}
        with pytest.raises(CertificateError, match="guarantee='estimate'"):
            run.unlearning().plan([0, 5], **goal)
        plan = run.unlearning().plan([0, 5], predict=True, step_grid=1, **goal)
        assert isinstance(plan, PredictedPlan)
        assert not hasattr(plan, "epsilon")
        assert "prediction" in plan.reason
        # never fewer than the same formula asks for at the norms' own sizes
        levels = run.engine.per_instance.sensitivities[[0, 5]]
        by_hand = ContractionCertificate(
            1 - 7.0 * 5e-3, 7.0 / SIZE, shifts=(7.0 / SIZE * levels.sum(),) * run.steps
        )
        least = by_hand.steps_for(epsilon=0.5, delta=DELTA)
        assert least <= plan.steps <= least + 1  # shifts have 1e-5 room for float32

    def test_a_set_with_history_is_bounded_by_training_alone(self):
        run = history_run()
        plan = run.unlearning().plan([1, 2], steps=0, delta=DELTA)
        assert isinstance(plan.certificate, DataProcessingCertificate)
        np.testing.assert_array_equal(
            plan.certificate.rdp(run.engine.per_instance.orders, steps=0),
            run.engine.per_instance.group_rdp([1, 2]),
        )


def test_running_statistics_of_any_kind_are_refused():
    from opacus_pil.unlearning import UnlearningEngine

    module = nn.Sequential(nn.Conv1d(1, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True))
    with pytest.raises(UnsupportedError, match="InstanceNorm1d at '1'"):
        UnlearningEngine(
            module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            dataset=network_run().dataset,
            criterion=nn.MSELoss(),
            training_steps=1,
            batch_size=1,
        )


class TestAdaptiveRequests:
    """Whoever saw a release chooses with what it shows; the whole transcript covers that."""

    def test_contraction_is_not_used(self):
        run = logistic_run()
        goal = {"steps": 20, "delta": DELTA, "method": "langevin"}
        sharp = run.unlearning().plan([0], **goal)
        covered = run.unlearning().plan([0], adaptive=True, **goal)
        assert isinstance(sharp.certificate, ContractionCertificate)
        assert isinstance(covered.certificate, DataProcessingCertificate)
        np.testing.assert_array_equal(
            covered.certificate.rdp(run.engine.per_instance.orders, steps=20),
            run.engine.per_instance.rdp([0])[0],
        )
        assert covered.epsilon > sharp.epsilon
        with pytest.raises(CertificateError, match="the last model only"):
            run.unlearning().plan(
                [0], adaptive=True, certificate=ContractionCertificate(0.9, 1.0), **goal
            )
        with pytest.raises(CertificateError, match="the last model only"):
            run.unlearning().plan(
                [0], steps=3, delta=DELTA, method="noisy_finetuning", certificate=NOISY,
                adaptive=True,
            )  # fmt: skip

    def test_later_requests_are_counted_with_the_earlier_ones(self):
        run = history_run()
        unlearning, ledger = run.unlearning(), run.engine.per_instance
        goal = {"delta": DELTA, "adaptive": True, "steps": 5}
        unlearning.unlearn(unlearning.plan([3], **goal), seed=0)
        second = unlearning.plan([7], **goal)
        kernel = {"noise_multiplier": 4.0, "sample_rate": 0.25, "orders": ledger.orders}
        # both took part in training; in the five steps that forgot the first only the second did
        both = run.steps * group_rdp([1.0, 1.0], **kernel) + 5 * group_rdp([1.0], **kernel)
        np.testing.assert_allclose(second.certificate.rdp(ledger.orders, steps=5), both, rtol=1e-9)


def history_run():
    run = network_run(norm_policy="worst_case")
    run.engine = PerInstancePrivacyEngine(norm_policy="worst_case", history=True)
    module = nn.Linear(4, 3)
    run.module, run.optimizer = _train(
        run.engine, module, torch.optim.SGD(module.parameters(), lr=0.1), run.dataset,
        run.criterion, batch_size=12, epochs=2, noise_multiplier=4.0,
    )  # fmt: skip
    run.steps = run.engine.per_instance.steps
    return run
