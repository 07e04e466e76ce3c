"""Plans: what they promise, what they refuse, how they read."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.data import TensorDataset

from opacus_pil.certificates import (
    ContractionCertificate,
    DataProcessingCertificate,
    PoissonContractionCertificate,
)
from opacus_pil.errors import CertificateError, UnsupportedError
from opacus_pil.unlearning import CertifiedPlan, PredictedPlan, RetrainPlan, UnlearningEngine

from .runs import DELTA, SIZE, logistic_run, network_run


def test_a_langevin_plan_is_the_contraction_certificate_of_its_members_caps():
    run = logistic_run()
    plan = run.unlearning().plan([0, 5], epsilon=2.0, delta=DELTA, method="langevin")
    assert isinstance(plan, CertifiedPlan)
    caps = run.engine.per_instance.caps
    group, kernel = run.optimizer.param_groups[0], run.engine.kernel
    shift = group["lr"] / kernel.expected_batch_size * kernel.max_grad_norm * caps[[0, 5]].sum()
    noise = (
        group["lr"] * kernel.noise_multiplier * kernel.max_grad_norm / kernel.expected_batch_size
    )
    by_hand = ContractionCertificate(
        1.0 - group["lr"] * group["weight_decay"], noise, shifts=(shift,) * run.steps
    )
    for steps in (0, plan.steps):
        # one_output_glm raises shifts by 1e-5 for float32 arithmetic, and nothing else.
        assert plan.certificate.mu(steps) == pytest.approx(by_hand.mu(steps), rel=2e-5)
        assert plan.certificate.mu(steps) >= by_hand.mu(steps)
    assert plan.epsilon <= 2.0
    assert plan.steps % 10 == 0  # rounded up to the public grid, and no further
    assert plan.certificate.epsilon(delta=DELTA, steps=plan.steps - 10) > 2.0


def test_mini_batches_take_the_least_of_contraction_and_training_alone():
    run = logistic_run(batch_size=12, step_size=1.0, weight_decay=0.1, steps=40)
    ledger, kernel = run.engine.per_instance, run.engine.kernel
    trained = DataProcessingCertificate(ledger.rdp([3])[0].tolist(), ledger.orders.tolist())
    contraction = PoissonContractionCertificate.one_output_glm(
        caps=ledger.caps[[3]], max_grad_norm=1.0, step_size=1.0, weight_decay=0.1,
        # the features' public bound, with room for float32 and without a bias
        feature_norm=1.0 + 1e-6, noise_multiplier=1.0,
        expected_batch_size=kernel.expected_batch_size, num_instances=SIZE,
        training_steps=run.steps, sample_rate=kernel.sample_rate,
    )  # fmt: skip
    plan = run.unlearning().plan([3], steps=10, delta=DELTA, method="langevin")
    both = [certificate.epsilon(delta=DELTA, steps=10) for certificate in (trained, contraction)]
    assert plan.epsilon == min(both)
    assert plan.certificate.two_sided


def test_smaller_caps_need_fewer_steps_and_none_needs_more_than_the_worst_case():
    run = logistic_run()
    order = np.argsort(run.engine.per_instance.caps)
    unlearning = run.unlearning()

    def steps(rows):
        plan = unlearning.plan(
            rows, epsilon=1.0, delta=DELTA, method="langevin", max_steps=100_000, step_grid=1
        )
        return plan.steps, plan.steps_worst_case

    easy, worst = steps(order[:4])
    hard, same_worst = steps(order[-4:])
    assert easy < hard <= worst == same_worst


def test_an_unreachable_target_says_retrain_instead():
    plan = logistic_run().unlearning().plan([0], epsilon=1e-4, delta=1e-12, method="langevin")
    assert isinstance(plan, RetrainPlan)
    assert plan.status == "retrain instead"
    assert "retrain instead" in str(plan)
    with pytest.raises(CertificateError, match="retrain instead"):
        logistic_run().unlearning().unlearn(plan)


def test_a_certified_plan_prints_what_a_reader_must_know():
    plan = logistic_run().unlearning().plan([3], epsilon=2.0, delta=DELTA, method="langevin")
    text = str(plan)
    for words in (
        "certified", f"steps             {plan.steps}", "steps, retraining", "steps, worst case",
        "ContractionCertificate", "assumptions", *plan.certificate.assumptions,
    ):  # fmt: skip
        assert words in text


def test_a_budget_is_predicted_and_carries_no_epsilon():
    plan = network_run().unlearning().plan([1, 2], steps=3)
    assert isinstance(plan, PredictedPlan)
    assert plan.steps == 3
    assert "predicted" in str(plan)
    assert "none: no certificate is claimed" in str(plan)
    assert not hasattr(plan, "epsilon")
    assert not hasattr(plan, "certificate")


def test_training_alone_certifies_one_instance_under_a_bound_ledger():
    run = network_run(norm_policy="worst_case")
    spent = run.engine.get_per_instance_epsilon(DELTA).epsilon[0]
    plan = run.unlearning().plan([4], epsilon=spent * 1.001, delta=DELTA)
    assert isinstance(plan, CertifiedPlan)
    assert isinstance(plan.certificate, DataProcessingCertificate)
    assert plan.steps == 0
    assert plan.epsilon == pytest.approx(spent, rel=1e-9)
    retrain = run.unlearning().plan([4], epsilon=spent * 0.999, delta=DELTA)
    assert isinstance(retrain, RetrainPlan)


def test_training_alone_does_not_certify_a_set_or_an_estimate():
    bound = network_run(norm_policy="worst_case").unlearning()
    with pytest.raises(CertificateError, match="does not bound a set"):
        bound.plan([4, 5], epsilon=100.0, delta=DELTA)
    with pytest.raises(CertificateError, match="'estimate'"):
        network_run().unlearning().plan([4], epsilon=100.0, delta=DELTA)


def test_a_certificate_of_the_caller_is_used_as_given():
    certificate = ContractionCertificate(0.9, 1.0, shifts=(0.5,) * 10)
    plan = network_run().unlearning().plan(
        [4, 5], epsilon=0.1, delta=DELTA, certificate=certificate, max_steps=100,
        step_grid=1,
    )  # fmt: skip
    assert plan.certificate == certificate.with_context("supplied_by_caller")
    assert plan.steps == certificate.steps_for(epsilon=0.1, delta=DELTA)
    assert plan.steps_worst_case is None


@pytest.mark.parametrize(
    ("forget", "words"),
    [
        ([], "at least one row"),
        ([0, 0], "index 0 2 times"),
        ([-1], r"forget in \[0, "),
        ([10_000], r"forget in \[0, "),
        (range(48), "all 48 remaining rows"),
    ],
)
def test_a_forget_set_that_makes_no_sense_is_refused(forget, words):
    with pytest.raises(ValueError, match=words):
        network_run().unlearning().plan(list(forget), steps=1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "magic"}, ValueError, "one of dp_sgd, langevin, noisy_finetuning, finetuning"),
        ({}, ValueError, "epsilon and delta, or steps"),
        ({"epsilon": 1.0}, ValueError, "epsilon and delta, or steps"),
        ({"epsilon": -1.0, "delta": DELTA}, ValueError, "epsilon"),
        ({"epsilon": 1.0, "delta": 1.0}, ValueError, "delta"),
        ({"steps": -1}, ValueError, "steps"),
        ({"steps": 3, "epsilon": 1.0}, ValueError, "either steps or a target epsilon"),
        (
            {"method": "finetuning", "epsilon": 1.0, "delta": DELTA},
            CertificateError,
            "without noise",
        ),
    ],
)  # fmt: skip
def test_arguments_that_contradict_each_other_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        network_run().unlearning().plan([1], **arguments)


class TestBrokenAssumptions:
    """Whatever breaks the proof of contraction is refused by name."""

    @staticmethod
    def plan(run, **changes):
        return run.unlearning(**changes).plan([0], epsilon=1.0, delta=DELTA, method="langevin")

    def test_a_network(self):
        with pytest.raises(CertificateError, match="one output"):
            self.plan(network_run())

    def test_momentum(self):
        with pytest.raises(CertificateError, match="without momentum"):
            self.plan(logistic_run(momentum=0.5))

    def test_no_weight_decay(self):
        with pytest.raises(CertificateError, match="weight_decay"):
            self.plan(logistic_run(weight_decay=0.0))

    def test_a_step_that_expands(self):
        with pytest.raises(CertificateError, match="step_size"):
            self.plan(logistic_run(step_size=9.0))

    def test_caps_that_follow_a_budget(self):
        run = logistic_run(budget=(1.0, 1e-2))
        assert run.engine.per_instance.guarantee == "bound"
        assert not run.engine.per_instance.active.all()  # some caps have become 0 by now
        with pytest.raises(CertificateError, match="a budget"):
            self.plan(run)
        # What training alone gives stays certified: the budget itself.
        plan = run.unlearning().plan([0], epsilon=1.0, delta=1e-2, method="dp_sgd")
        assert plan.steps == 0

    def test_levels_that_are_estimates(self):
        run = logistic_run(norm_policy="last_seen")
        with pytest.raises(CertificateError, match="fixed before the run"):
            self.plan(run)

    def test_another_loss(self):
        with pytest.raises(CertificateError, match="BCEWithLogitsLoss"):
            self.plan(logistic_run(), criterion=nn.L1Loss())

    def test_weights_in_the_loss(self):
        with pytest.raises(CertificateError, match="with weights"):
            self.plan(logistic_run(), criterion=nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)))

    def test_no_public_bound_on_the_features(self):
        with pytest.raises(CertificateError, match="feature_norm"):
            self.plan(logistic_run(), feature_norm=None)

    def test_a_record_above_the_bound(self):
        with pytest.raises(CertificateError, match=r"row \d+"):
            self.plan(logistic_run(), feature_norm=0.5)


def test_batchnorm_is_refused():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(UnsupportedError, match="got BatchNorm1d at '1'"):
        UnlearningEngine(
            module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            dataset=TensorDataset(torch.zeros(3, 4), torch.zeros(3)),
            criterion=nn.MSELoss(),
            training_steps=1,
            batch_size=1,
        )


def test_a_dataset_of_another_length_is_refused():
    run = network_run()
    with pytest.raises(ValueError, match="training set of 48 instances"):
        run.unlearning(dataset=TensorDataset(torch.zeros(3, 4), torch.zeros(3).long()))
