"""Running a plan: the kernel of training, the ledgers, the copies, the resume."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from opacus.grad_sample import AbstractGradSampleModule

from opacus_pil.errors import LedgerError
from opacus_pil.unlearning import CertifiedResult, UncertifiedResult
from opacus_pil.unlearning.steps.noisy import noisy_steps
from opacus_pil.unlearning.twin import twin_of

from .runs import DELTA, SIZE, logistic_run, network_run


class Watched(torch.utils.data.Dataset):
    """A data set that remembers which rows were read."""

    def __init__(self, inner):
        self.inner, self.read = inner, []

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, row):
        self.read.append(row)
        return self.inner[row]


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_run_takes_the_planned_steps_on_the_retain_set_only(mode):
    run = network_run(grad_sample_mode=mode)
    dataset = Watched(run.dataset)
    unlearning = run.unlearning(dataset=dataset)
    before = run.engine.per_instance.steps
    charged = len(run.engine.accountant.history) and sum(
        n for _, _, n in run.engine.accountant.history
    )
    result = unlearning.unlearn(unlearning.plan([3, 7], steps=9), seed=1)
    assert run.engine.per_instance.steps == before + 9
    assert sum(n for _, _, n in run.engine.accountant.history) == charged + 9
    assert dataset.read
    assert not {3, 7} & set(dataset.read)
    assert isinstance(result, UncertifiedResult)
    assert result.certificate is None
    assert result.epsilon is None


def test_the_kernel_of_training_is_kept_not_derived_again(monkeypatch):
    from opacus.optimizers import DPOptimizer

    run = network_run()
    seen = []
    step = DPOptimizer.add_noise

    def add_noise(self):
        seen.append((self.noise_multiplier, self.max_grad_norm, self.expected_batch_size))
        step(self)

    monkeypatch.setattr(DPOptimizer, "add_noise", add_noise)
    unlearning = run.unlearning()
    unlearning.unlearn(unlearning.plan(range(20), steps=4), seed=1)
    # 28 rows are left; batches of 12 out of 48 would be re-derived as 28 // 2 = 14.
    assert seen == [(1.0, 1.0, 12)] * 4
    assert set(run.engine.accountant.history) == {(1.0, 0.25, 24)}


def test_nothing_of_the_callers_changes_but_the_ledgers():
    run = network_run(momentum=0.9)
    before = weights(run.module)
    state = run.optimizer.state_dict()
    unlearning = run.unlearning()
    result = unlearning.unlearn(unlearning.plan([3], steps=3), seed=1)
    assert_same(before, weights(run.module))
    assert str(state) == str(run.optimizer.state_dict())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(result.module.parameters(), run.module.parameters(), strict=True)
    )


def test_the_result_is_a_plain_module_without_traces_of_opacus():
    run = network_run()
    unlearning = run.unlearning()
    module = unlearning.unlearn(unlearning.plan([3], steps=2), seed=1).module
    assert type(module) is nn.Sequential
    for part in module.modules():
        assert not isinstance(part, AbstractGradSampleModule)
        assert not part._forward_hooks
        assert not part._backward_hooks
    for parameter in module.parameters():
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None
        assert getattr(parameter, "summed_grad", None) is None


def test_momentum_of_training_is_not_carried_over():
    def one_step(*, clear):
        run = network_run(momentum=0.9)
        buffers = run.optimizer.original_optimizer.state
        assert any("momentum_buffer" in state for state in buffers.values())
        if clear:
            buffers.clear()
        unlearning = run.unlearning()
        return weights(unlearning.unlearn(unlearning.plan([3], steps=1), seed=5).module)

    assert_same(one_step(clear=False), one_step(clear=True))


def test_retained_instances_go_on_paying_and_forgotten_ones_do_not():
    run = network_run()
    before = run.engine.per_instance.rdp()
    unlearning = run.unlearning()
    unlearning.unlearn(unlearning.plan([3, 7], steps=5), seed=1)
    after = run.engine.per_instance.rdp()
    kept = np.setdiff1d(np.arange(SIZE), [3, 7])
    assert (after[kept] > before[kept]).all()
    np.testing.assert_allclose(after[[3, 7]], before[[3, 7]], rtol=1e-12)
    assert not run.engine.per_instance.active[[3, 7]].any()
    assert unlearning.forgotten == {3, 7}
    np.testing.assert_array_equal(unlearning.retain_set, kept)


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    def unlearned(seed):
        unlearning = network_run(dropout=0.3).unlearning()
        torch.manual_seed(0)
        return weights(unlearning.unlearn(unlearning.plan([3], steps=4), seed=seed).module)

    assert_same(unlearned(1), unlearned(1))
    assert not torch.equal(unlearned(1)["0.weight"], unlearned(2)["0.weight"])


def test_watching_a_run_does_not_change_it():
    def unlearned(**watch):
        unlearning = network_run(dropout=0.3).unlearning()
        torch.manual_seed(0)
        return unlearning.unlearn(unlearning.plan([3], steps=5), seed=1, **watch)

    def watch(step, module):
        assert not module.training
        return [step, torch.rand(3).tolist()]

    watched = unlearned(on_step=watch, record_every=2)
    assert_same(weights(watched.module), weights(unlearned().module))
    assert [entry[0] for entry in watched.history] == [0, 2, 4, 5]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", ["dp_sgd", "finetuning"])
def test_a_killed_run_resumes_to_the_same_model_and_ledger(tmp_path, method):
    def run_and_plan():
        run = network_run(dropout=0.3)
        unlearning = run.unlearning()
        torch.manual_seed(0)
        return run, unlearning, unlearning.plan([3, 7], steps=11, method=method)

    def record(step, module):
        return [step, float(module[0].weight.detach().sum())]

    run, unlearning, plan = run_and_plan()
    whole = unlearning.unlearn(plan, seed=1, on_step=record)
    ledger = run.engine.per_instance.state_dict()

    def die(step, module):
        if step == 7:
            raise Killed
        return record(step, module)

    run, unlearning, plan = run_and_plan()
    before = run.engine.per_instance.state_dict()
    with pytest.raises(Killed):
        unlearning.unlearn(plan, seed=1, on_step=die, checkpoint_dir=tmp_path, checkpoint_every=3)
    for key, value in before.items():  # the caller's ledger waits for the end
        np.testing.assert_array_equal(run.engine.per_instance.state_dict()[key], value)
    assert unlearning.forgotten == frozenset()

    run, unlearning, plan = run_and_plan()  # a new process
    resumed = unlearning.unlearn(
        plan, seed=99, on_step=record, checkpoint_dir=tmp_path, checkpoint_every=3
    )
    assert_same(weights(resumed.module), weights(whole.module))
    assert resumed.history == whole.history
    for key, value in ledger.items():
        np.testing.assert_array_equal(run.engine.per_instance.state_dict()[key], value)
    assert not list(tmp_path.iterdir())  # computed next to the forget set: not kept


def test_a_checkpoint_of_another_request_is_refused(tmp_path):
    def die(step, module):
        if step == 4:
            raise Killed

    unlearning = network_run().unlearning()
    with pytest.raises(Killed):
        unlearning.unlearn(
            unlearning.plan([3], steps=6), on_step=die, checkpoint_dir=tmp_path, checkpoint_every=2
        )
    other = network_run().unlearning()
    with pytest.raises(LedgerError, match="this plan and model"):
        other.unlearn(other.plan([4], steps=6), checkpoint_dir=tmp_path)
    assert other.forgotten == frozenset()
    with pytest.raises(NotADirectoryError, match="checkpoint_dir"):
        other.unlearn(other.plan([4], steps=6), checkpoint_dir=tmp_path / "missing")


def test_a_failing_run_changes_nothing():
    run = network_run()
    before, ledger = weights(run.module), run.engine.per_instance.rdp()

    def fail(step, module):
        if step == 2:
            raise ValueError("disk full")

    unlearning = run.unlearning()
    plan = unlearning.plan([3], steps=4)
    with pytest.raises(ValueError, match="disk full"):
        unlearning.unlearn(plan, on_step=fail)
    assert_same(before, weights(run.module))
    np.testing.assert_array_equal(ledger, run.engine.per_instance.rdp())
    unlearning.unlearn(plan)  # the plan is still good
    assert unlearning.forgotten == {3}


def test_fine_tuning_without_noise_costs_every_retained_instance_an_infinite_loss():
    run = network_run()
    unlearning = run.unlearning()
    result = unlearning.unlearn(unlearning.plan([3], steps=6, method="finetuning"), seed=1)
    assert isinstance(result, UncertifiedResult)
    assert not hasattr(result.plan, "epsilon")
    epsilon = run.engine.get_per_instance_epsilon(DELTA).epsilon
    assert np.isinf(np.delete(epsilon, 3)).all()
    assert np.isfinite(epsilon[3])
    assert run.engine.get_epsilon(DELTA) == np.inf


def test_fine_tuning_works_without_a_privacy_engine():
    run = network_run()
    unlearning = run.unlearning(privacy_engine=None, training_steps=20, batch_size=12)
    result = unlearning.unlearn(unlearning.plan([3], steps=6, method="finetuning"), seed=1)
    assert result.epsilon is None
    with pytest.raises(Exception, match="privacy_engine"):
        unlearning.plan([4], epsilon=1.0, delta=DELTA)


def test_a_certified_run_hands_on_the_certificate_of_its_plan():
    unlearning = logistic_run().unlearning()
    plan = unlearning.plan([0], epsilon=2.0, delta=DELTA, method="langevin")
    result = unlearning.unlearn(plan, seed=1)
    assert isinstance(result, CertifiedResult)
    assert result.certificate is plan.certificate
    assert result.epsilon == plan.epsilon


def test_a_plan_made_before_another_run_is_stale():
    unlearning = network_run().unlearning()
    first, second = unlearning.plan([3], steps=2), unlearning.plan([4], steps=2)
    unlearning.unlearn(first)
    with pytest.raises(ValueError, match="Plan again"):
        unlearning.unlearn(second)
    with pytest.raises(ValueError, match="forgotten before"):
        unlearning.plan([3], steps=2)


def test_a_second_request_counts_what_the_first_left_behind():
    """Both are forgotten together: F1 shifts T steps, F2 also those of the first unlearning."""
    run = logistic_run()
    goal = {"epsilon": 2.0, "delta": DELTA, "method": "langevin"}
    unlearning = run.unlearning()
    first = unlearning.plan([0], **goal)
    unlearning.unlearn(first, seed=1)
    second = unlearning.plan([5], **goal)
    caps = run.engine.per_instance.caps
    one = np.array(first.certificate.shifts[:1]) / caps[0]
    expected = np.r_[
        np.full(run.steps, one[0] * (caps[0] + caps[5])), np.full(first.steps, one[0] * caps[5])
    ]
    np.testing.assert_allclose(second.certificate.shifts, expected, rtol=1e-9)
    alone = run_alone_steps(goal)
    assert second.steps >= alone


def run_alone_steps(goal):
    return logistic_run().unlearning().plan([5], **goal).steps


def test_coupled_runs_never_part_by_more_than_the_certificate_assumes():
    """Same noise, with and without F: the distance obeys z_t = c z_{t-1} + s_t at every step."""
    run = logistic_run(steps=60)
    forget = np.array([1, 2, 30])
    plan = run.unlearning().plan(
        forget, epsilon=50.0, delta=DELTA, method="langevin", max_steps=10_000
    )
    certificate = plan.certificate
    paths = []
    for rows in (np.arange(SIZE), np.setdiff1d(np.arange(SIZE), forget)):
        module = nn.Linear(5, 1, bias=False)
        nn.init.zeros_(module.weight)
        path = []
        noisy_steps(
            module,
            optimizer=torch.optim.SGD(module.parameters(), lr=7.0, weight_decay=5e-3),
            dataset=run.dataset,
            task=run.engine.task,
            privacy_engine=run.engine,
            account=run.engine.account.fork(),
            retain_set=rows,
            steps=60,
            noise_generator=torch.Generator().manual_seed(4),
            sampler_generator=torch.Generator().manual_seed(5),
            after_step=lambda step, path=path, module=module: path.append(
                module.weight.detach().double().clone()
            ),
        )
        paths.append(path)
    allowed = 0.0
    for shift, first, second in zip(certificate.shifts, *paths, strict=True):
        allowed = certificate.contraction * allowed + shift
        assert float((first - second).norm()) <= allowed
    assert float((paths[0][-1] - paths[1][-1]).norm()) > 0.05 * allowed  # and is not vacuous


def test_a_copy_shares_nothing_with_the_wrapped_module():
    run = network_run()
    twin = twin_of(run.module)
    assert_same(weights(twin), weights(run.module._module))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert any(parameter.abs().sum() > 0 for parameter in run.module.parameters())


def test_instances_in_place_of_a_plan_are_refused_with_the_cure():
    with pytest.raises(
        TypeError, match=r"Expected a plan, got list. Pass unlearning.plan\(\[...\]\)"
    ):
        network_run().unlearning().unlearn(["p3"])


def test_without_a_privacy_engine_it_is_asked_for_first():
    with pytest.raises(TypeError, match=r"got training_steps=None. Pass privacy_engine=, "):
        network_run().unlearning(privacy_engine=None)
