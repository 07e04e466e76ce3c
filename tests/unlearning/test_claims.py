"""A claim is about one run: whatever makes the run another one is noticed and refused."""

import contextlib
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.certificates import (
    ContractionCertificate,
    NoisyFineTuningCertificate,
    best_of,
)
from opacus_pil.errors import CertificateError, LedgerError, UnsupportedError
from opacus_pil.unlearning import RetrainedResult, UnlearningEngine
from opacus_pil.unlearning.generators import seeds

from .runs import DELTA, SIZE, logistic_run, network_run
from .test_engine import Killed, Watched

NOISY = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, 3.0)
LANGEVIN = {"epsilon": 2.0, "delta": DELTA, "method": "langevin"}


class TestNoNoise:
    def test_steps_without_noise_carry_no_certificate_of_the_caller(self):
        unlearning = network_run().unlearning(
            privacy_engine=None, training_steps=100, batch_size=12
        )
        mine = ContractionCertificate(0.9, 1.0, shifts=(0.5,) * 100)
        for method in ("dp_sgd", "langevin"):
            with pytest.raises(CertificateError, match="add no noise"):
                unlearning.plan([0], epsilon=1.0, delta=DELTA, method=method, certificate=mine)

    @pytest.mark.parametrize("method", ["finetuning", "l1_sparse", "retraining"])
    def test_a_certified_plan_cannot_be_turned_into_one_without_noise(self, method):
        plan = logistic_run().unlearning().plan([0], **LANGEVIN)
        with pytest.raises(CertificateError, match="method with noise"):
            replace(plan, method=method)

    def test_a_certificate_of_noisy_fine_tuning_does_not_hide_among_others(self):
        with pytest.raises(CertificateError, match="whose steps are other ones"):
            network_run().unlearning().plan(
                [0], steps=20, delta=DELTA, certificate=best_of([NOISY])
            )

    def test_training_without_noise_carries_no_certificate_of_the_caller(self):
        run = logistic_run(norm_policy="worst_case", noise_multiplier=0.0, steps=5)
        mine = ContractionCertificate(0.9, 1.0, shifts=(0.5,) * 5)
        with pytest.raises(CertificateError, match="add no noise"):
            run.unlearning().plan([0], epsilon=1.0, delta=DELTA, certificate=mine)

    def test_optimizers_that_remember_void_a_certificate_of_the_caller(self):
        run = network_run()
        run.optimizer = torch.optim.Adagrad(run.module.parameters(), lr=0.1)
        mine = ContractionCertificate(0.9, 1.0, shifts=(0.5,) * 10)
        with pytest.raises(CertificateError, match="got Adagrad"):
            run.unlearning().plan([0], epsilon=1.0, delta=DELTA, certificate=mine)

    def test_momentum_voids_a_certificate_of_the_caller(self):
        mine = ContractionCertificate(0.9, 1.0, shifts=(0.5,) * 10)
        with pytest.raises(CertificateError, match="with momentum"):
            network_run(momentum=0.9).unlearning().plan(
                [0], epsilon=1.0, delta=DELTA, certificate=mine
            )


class TestLedgerAndEngineGoTogether:
    def test_training_on_after_the_engine_was_built_is_noticed(self):
        run = logistic_run(steps=60)
        unlearning = run.unlearning()
        plan = unlearning.plan([0], **{**LANGEVIN, "max_steps": 10_000})
        run.engine.account.charge_everyone(noise_multiplier=1.0, sample_rate=1.0)
        for call in (lambda: unlearning.plan([0], **LANGEVIN), lambda: unlearning.unlearn(plan)):
            with pytest.raises(LedgerError, match="training went on"):
                call()

    def test_the_ledger_knows_the_steps_of_training(self):
        run = logistic_run(steps=60)
        with pytest.raises(ValueError, match="60 steps of the ledger, got 59"):
            run.unlearning(training_steps=59)

    def test_another_engine_on_the_same_ledger_is_refused(self):
        run = logistic_run()
        unlearning = run.unlearning()
        unlearning.unlearn(unlearning.plan([0], **LANGEVIN), seed=1)
        other = run.unlearning()
        with pytest.raises(LedgerError, match="another engine has unlearned"):
            other.plan([1], **LANGEVIN)
        other.load_state_dict(unlearning.state_dict())  # the cure that the message names
        assert other.forgotten == {0}
        other.plan([1], **LANGEVIN)

    def test_caps_are_not_taken_over_by_an_engine_that_does_not_enforce_them(self):
        capped = logistic_run(steps=20)
        state = capped.unlearning().state_dict()
        other = logistic_run(norm_policy="worst_case", steps=20)
        before = other.engine.per_instance.rdp()
        with pytest.raises(LedgerError, match="norm_policy='capped' enforces"):
            other.unlearning().load_state_dict(state)
        np.testing.assert_array_equal(other.engine.per_instance.rdp(), before)

    def test_steps_behind_the_engines_back_are_noticed(self):
        run = logistic_run()
        unlearning = run.unlearning()
        unlearning.unlearn(unlearning.plan([0], **LANGEVIN), seed=1)
        with torch.no_grad():
            unlearning.module.weight.mul_(0.5)
        with pytest.raises(LedgerError, match="got other weights"):
            unlearning.plan([1], **LANGEVIN)

    def test_budgets_refuse_methods_that_they_could_not_bear_before_anything_runs(self):
        run = logistic_run(budget=(1e4, DELTA))
        for method in ("finetuning", "gradient_difference"):
            with pytest.raises(UnsupportedError, match="beyond their budget"):
                run.unlearning().plan([0], steps=3, method=method)


class TestAPlanIsForOneState:
    @staticmethod
    def planned():
        run = logistic_run()
        unlearning = run.unlearning()
        return run, unlearning, unlearning.plan([0], **LANGEVIN)

    def test_of_another_engine(self):
        _, _, plan = self.planned()
        other = logistic_run(noise_multiplier=0.5).unlearning()
        with pytest.raises(ValueError, match="Plan again"):
            other.unlearn(plan)

    @pytest.mark.parametrize(("name", "value"), [("lr", 1e-6), ("momentum", 0.9)])
    def test_settings_changed_after_planning(self, name, value):
        run, unlearning, plan = self.planned()
        run.optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match="Plan again"):
            unlearning.unlearn(plan)

    def test_weights_changed_after_planning(self):
        _, unlearning, plan = self.planned()
        with torch.no_grad():
            unlearning.module.weight.fill_(1e3)
        for call in (lambda: unlearning.plan([1], **LANGEVIN), lambda: unlearning.unlearn(plan)):
            with pytest.raises(LedgerError, match="got other weights"):
                call()

    @pytest.mark.parametrize(
        "edit",
        [{"steps": 0}, {"forget_set": np.arange(30)}, {"epsilon": 0.01}, {"method": "dp_sgd"}],
    )
    def test_edited_plans_are_refused(self, edit):
        _, unlearning, plan = self.planned()
        with pytest.raises(ValueError, match="in the plan too"):
            unlearning.unlearn(replace(plan, **edit))
        assert unlearning.forgotten == frozenset()

    def test_a_run_is_not_resumed_under_other_settings(self, tmp_path):
        def die(step, module):
            if step == 4:
                raise Killed

        run, goal = logistic_run(steps=60), {"steps": 20, "method": "langevin"}
        unlearning = run.unlearning()
        folder = {"checkpoint_dir": tmp_path, "checkpoint_every": 2}
        with pytest.raises(Killed):
            unlearning.unlearn(unlearning.plan([0], **goal), on_step=die, **folder)
        other = logistic_run(steps=60, noise_multiplier=2.0)
        other.module.load_state_dict(run.module.state_dict())
        fresh = other.unlearning()
        with pytest.raises(LedgerError, match="this plan and model"):
            fresh.unlearn(fresh.plan([0], **goal), **folder)


class TestConstantSteps:
    """Contraction counts every step at the settings of the last one."""

    @staticmethod
    def trained(change, grad_sample_mode="hooks"):
        torch.manual_seed(0)
        run = logistic_run(steps=2)
        module = nn.Linear(5, 1, bias=False)
        if grad_sample_mode == "ghost":  # which clips losses of shape (rows,) only
            module = nn.Sequential(module, nn.Flatten(0))
            run.dataset = TensorDataset(run.dataset.tensors[0], run.dataset.tensors[1][:, 0])
        optimizer = torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)
        engine = PerInstancePrivacyEngine(norm_policy="worst_case")
        made = engine.make_private(
            module=module, optimizer=optimizer,
            data_loader=DataLoader(run.dataset, batch_size=SIZE),
            noise_multiplier=1.0, max_grad_norm=1.0, criterion=run.criterion,
            grad_sample_mode=grad_sample_mode,
        )  # fmt: skip
        private, private_optimizer, loader = made[0], made[1], made[-1]
        criterion = made[2] if len(made) == 4 else run.criterion
        for number in range(20):
            change(number, private_optimizer)
            for x, y in loader:
                private_optimizer.zero_grad()
                criterion(private(x), y).backward()
                private_optimizer.step()
        run.module, run.optimizer, run.engine = private, private_optimizer, engine
        return run

    @staticmethod
    def set_group(name, first, last):
        def change(number, optimizer):
            optimizer.param_groups[0][name] = first if number < 10 else last

        return change

    @staticmethod
    def set_optimizer(name, first, last):
        def change(number, optimizer):
            setattr(optimizer, name, first if number < 10 else last)

        return change

    def test_constant_ones_are_certified(self):
        self.trained(lambda number, optimizer: None).unlearning().plan(
            [0], steps=30, delta=DELTA, method="langevin"
        )

    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            ("set_group", ("lr", 7.0, 0.01)),
            ("set_group", ("weight_decay", 1e-3, 5e-3)),
            ("set_group", ("momentum", 0.5, 0.0)),
            ("set_optimizer", ("noise_multiplier", 1.0, 1e-3)),
            ("set_optimizer", ("noise_multiplier", 0.5, 1.0)),
            ("set_optimizer", ("max_grad_norm", 2.0, 1.0)),
            ("set_optimizer", ("loss_reduction", "sum", "mean")),
        ],
    )
    def test_schedules_are_refused(self, kind, arguments):
        run = self.trained(getattr(self, kind)(*arguments))
        with pytest.raises(CertificateError, match="constant steps"):
            run.unlearning().plan([0], steps=30, delta=DELTA, method="langevin")

    def test_noise_scaled_to_another_bound_than_the_clip_is_refused_in_ghost_mode(self):
        def shrink(number, optimizer):
            optimizer.max_grad_norm = 0.1  # as Opacus's clip scheduler: the module clips to 1 still

        with pytest.warns(UserWarning, match="noise is scaled"):
            run = self.trained(shrink, grad_sample_mode="ghost")
        with pytest.raises(CertificateError, match="constant steps"):
            run.engine.require_constant_steps(run.optimizer.original_optimizer)

    def test_step_sizes_are_compared_with_every_digit(self):
        run = self.trained(self.set_group("lr", torch.tensor(1.49e-4), torch.tensor(1.01e-4)))
        with pytest.raises(CertificateError, match="constant steps"):
            run.unlearning().plan([0], steps=30, delta=DELTA, method="langevin")

    @pytest.mark.parametrize("kind", [np.float64, torch.tensor])
    def test_but_not_with_their_types(self, kind, tmp_path):
        run = self.trained(self.set_group("lr", 7.0, 7.0))
        run.optimizer.param_groups[0]["lr"] = kind(7.0)
        run.unlearning().plan([0], steps=30, delta=DELTA, method="langevin")

    def test_two_draws_in_one_step_are_charged_and_seen(self):
        torch.manual_seed(0)
        run = logistic_run(steps=2)
        module = nn.Linear(5, 1, bias=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)
        engine = PerInstancePrivacyEngine(norm_policy="worst_case")
        private, private_optimizer, loader = engine.make_private(
            module=module, optimizer=optimizer,
            data_loader=DataLoader(run.dataset, batch_size=SIZE),
            noise_multiplier=4.0, max_grad_norm=1.0, criterion=run.criterion,
        )  # fmt: skip
        (x, y), (x2, y2) = next(iter(loader)), next(iter(loader))
        run.criterion(private(torch.cat([x, x2])), torch.cat([y, y2])).backward()
        with pytest.warns(UserWarning, match="'estimate' from now on"):
            private_optimizer.step()
        ledger = engine.per_instance
        # everybody is in twice: a shift of 2C against noise 4C is one of C against 2C
        np.testing.assert_allclose(
            ledger.rdp([0])[0], np.asarray(ledger.orders) / (2 * 2.0**2), rtol=1e-9
        )
        run.module, run.optimizer, run.engine = private, private_optimizer, engine
        with pytest.raises(CertificateError, match="another number of gradients"):
            run.unlearning().plan([0], steps=30, delta=DELTA, method="langevin")

    def test_what_was_varied_stays_known_in_a_checkpoint(self, tmp_path):
        run = self.trained(self.set_group("lr", 0.01, 7.0))
        run.engine.save_checkpoint(path=tmp_path / "c.pt", module=run.module)
        fresh = self.trained(lambda number, optimizer: None)
        fresh.engine.load_checkpoint(path=tmp_path / "c.pt", module=fresh.module)
        with pytest.raises(CertificateError, match="got varied"):
            fresh.unlearning().plan([0], steps=30, delta=DELTA, method="langevin")


class TestOneOutput:
    def test_a_subclass_may_compute_anything(self):
        run = logistic_run(steps=2)

        class Cubic(nn.Linear):
            def forward(self, x):
                return super().forward(x) ** 3

        module = Cubic(5, 1, bias=False)
        run.module._module = module
        run.optimizer = torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)
        with pytest.raises(CertificateError, match="got Cubic"):
            run.unlearning().plan([0], **LANGEVIN)

    @pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
    def test_hooks_may_change_what_is_computed(self, register):
        run = logistic_run(steps=2)
        getattr(run.module._module, register)(lambda *arguments: None)
        with pytest.raises(CertificateError, match="forward hooks of yours"):
            run.unlearning().plan([0], **LANGEVIN)

    def test_features_with_more_dimensions_are_several_outputs(self):
        run = logistic_run(steps=2)
        x, y = run.dataset.tensors
        run.dataset = TensorDataset(x[:, None, :].repeat(1, 3, 1) / 3, y)
        with pytest.raises(CertificateError, match=r"shape \(3, 5\)"):
            run.unlearning().plan([0], **LANGEVIN)


class TestPrivateLengths:
    def test_after_a_run_that_stopped_on_the_model_nothing_of_its_length_is_certified(self):
        run = logistic_run()
        unlearning = run.unlearning()
        assert run.engine.per_instance.guarantee == "bound"
        unlearning.unlearn(
            unlearning.plan([0], steps=40), seed=0, until=lambda step, module: step == 21
        )
        assert run.engine.per_instance.guarantee == "estimate"
        for method in ("langevin", "dp_sgd"):
            with pytest.raises(CertificateError, match="length fixed before it"):
                unlearning.plan([1], epsilon=5.0, delta=DELTA, method=method)
        unlearning.plan([1], steps=3, delta=DELTA, method="noisy_finetuning", certificate=NOISY)

    def test_nor_after_a_predicted_number_of_steps(self):
        run = logistic_run()
        unlearning = run.unlearning()
        plan = unlearning.plan([0], predict=True, **LANGEVIN)
        assert not plan.fixed_length
        unlearning.unlearn(plan, seed=0)
        with pytest.raises(CertificateError, match="length fixed before it"):
            unlearning.plan([1], **LANGEVIN)
        restored = run.unlearning()
        restored.load_state_dict(unlearning.state_dict())
        with pytest.raises(CertificateError, match="length fixed before it"):
            restored.plan([1], **LANGEVIN)


def test_layers_frozen_after_planning_are_noticed():
    unlearning = network_run().unlearning()
    plan = unlearning.plan([1], steps=2, delta=DELTA, method="noisy_finetuning", certificate=NOISY)
    unlearning.module[0].weight.requires_grad_(False)
    with pytest.raises((CertificateError, ValueError), match=r"0\.weight|Plan again"):
        unlearning.unlearn(plan)


def test_the_first_weights_do_not_tell_who_is_in_the_first_batches():
    """One generator for both would: row i is drawn where the i-th uniform is below q."""
    run = network_run()
    drawn = {}

    def make():
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 3))
        drawn["next"] = torch.rand(SIZE)
        return module, torch.optim.SGD(module.parameters(), lr=0.5)

    dataset = Watched(run.dataset)
    unlearning = run.unlearning(dataset=dataset, make_model=make)
    result = unlearning.unlearn(unlearning.plan([3], method="retraining"), seed=7)
    assert isinstance(result, RetrainedResult)
    assert len(set(seeds(7))) == 3
    states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds(7)]
    assert not any(
        torch.equal(first, second)
        for number, first in enumerate(states)
        for second in states[number + 1 :]
    )


def test_ascending_on_the_forget_set_costs_its_members_too():
    run = network_run()
    unlearning = run.unlearning()
    unlearning.unlearn(unlearning.plan([3], steps=2, method="gradient_difference"), seed=0)
    assert run.engine.get_per_instance_epsilon(DELTA).epsilon[3] == np.inf
    assert run.engine.per_instance.forgotten[3]


def test_certificates_of_the_last_model_say_that_requests_were_not_adaptive():
    plan = logistic_run().unlearning().plan([0], **LANGEVIN)
    assert any(
        "without a look at a model released" in line for line in plan.certificate.assumptions
    )


def test_a_plan_can_be_copied():
    run = logistic_run()
    unlearning = run.unlearning()
    plan = copy.deepcopy(unlearning.plan([0], **LANGEVIN))
    assert unlearning.unlearn(plan, seed=0).epsilon == plan.epsilon
    assert isinstance(unlearning, UnlearningEngine)


def test_a_module_with_hooks_instead_of_a_wrapper_is_found():
    run = logistic_run(steps=2)
    module = nn.Linear(5, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3)
    engine = PerInstancePrivacyEngine(norm_policy="worst_case")
    hooks, private_optimizer, _ = engine.make_private(
        module=module, optimizer=optimizer, data_loader=DataLoader(run.dataset, batch_size=SIZE),
        noise_multiplier=1.0, max_grad_norm=1.0, wrap_model=False,
    )  # fmt: skip
    unlearning = UnlearningEngine(
        hooks, optimizer=private_optimizer, dataset=run.dataset, criterion=run.criterion,
        privacy_engine=engine, progress=False,
    )  # fmt: skip
    assert unlearning.module is module


def test_a_random_row_in_an_empty_draw_is_no_bound():
    """Alone in its batch an instance takes the random row's place: it moves the sum by both."""
    run = logistic_run(steps=2)
    module = nn.Linear(5, 1, bias=False)
    engine = PerInstancePrivacyEngine(norm_policy="worst_case")
    private, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(run.dataset, batch_size=12), noise_multiplier=1.0,
        max_grad_norm=1.0, rand_on_empty=True,
    )  # fmt: skip
    x, y = next(iter(loader))
    run.criterion(private(x), y).backward()
    optimizer.step()
    assert engine.per_instance.guarantee == "estimate"


@pytest.mark.parametrize("known", [True, False])
def test_batches_of_an_unknown_loader_are_not_taken_for_the_data_sets_items(known):
    from opacus import PrivacyEngine

    run = logistic_run(steps=2)
    module = nn.Linear(5, 1, bias=False)
    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1),
        data_loader=DataLoader(run.dataset, batch_size=SIZE), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="worst_case")
    given = {"data_loader": loader} if known else {"dataset": run.dataset, "sample_rate": 1.0}
    engine.attach(module=private, optimizer=optimizer, **given)
    x, y = next(iter(loader))
    with contextlib.nullcontext() if known else engine.batch(indices=np.arange(SIZE)):
        run.criterion(private(x), y).backward()
        optimizer.step()
    if known:
        engine.require_constant_steps(optimizer.original_optimizer)
    else:
        with pytest.raises(CertificateError, match="another collate_fn"):
            engine.require_constant_steps(optimizer.original_optimizer)


def test_attaching_after_a_step_is_refused():
    from opacus import PrivacyEngine

    run = logistic_run(steps=2)
    module = nn.Linear(5, 1, bias=False)
    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(run.dataset, batch_size=12), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    x, y = next(iter(loader))
    run.criterion(private(x), y).backward()
    optimizer.step()
    engine = PerInstancePrivacyEngine(accountant="rdp")
    with pytest.raises(ValueError, match="has made no step"):
        engine.attach(module=private, optimizer=optimizer, data_loader=loader)


def test_a_rate_that_opacus_rounds_is_no_schedule():
    """Of 93 batches Opacus's sampler draws 92: the charge is at 1/92, the coins at 1/93."""
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(93, 5), torch.ones(93, 1))
    module = nn.Linear(5, 1, bias=False)
    engine = PerInstancePrivacyEngine(norm_policy="worst_case")
    private, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=1), noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    batches = iter(loader)
    for _ in range(3):
        x, y = next(batches)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(private(x), y).backward()
        optimizer.step()
    engine.require_constant_steps(optimizer.original_optimizer)
    optimizer.original_optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(CertificateError, match="constant steps"):
        engine.require_constant_steps(optimizer.original_optimizer)


def test_caps_are_refused_where_part_of_the_gradients_is_coarse():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 1)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inner = self.body(x).relu()
            return self.head(inner.float())

    run = logistic_run(steps=2)
    module = Partly()
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=np.full(SIZE, 0.05))
    private, optimizer, loader = engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(run.dataset, batch_size=SIZE), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    x, y = next(iter(loader))
    run.criterion(private(x), y).backward()
    with pytest.raises(UnsupportedError, match="as precise as the parameters"):
        optimizer.step()
