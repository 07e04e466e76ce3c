"""B4, B6: a model that did not move, and weights that no step of the ledger made."""

import copy

import pytest
import torch
from torch import nn

from opacus_pil.certificates import NoisyFineTuningCertificate
from opacus_pil.errors import CertificateError
from opacus_pil.unlearning import CertifiedPlan, CertifiedResult, UncertifiedResult

from .unlearning_models import DELTA, LANGEVIN, logistic, network, network_module, weights

CERTIFIED = {"steps": 3, "delta": DELTA}


# --- B4: steps that do not move the model ---------------------------------------------------------


def cosine_to_its_end(optimizer):
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    for _ in range(6):
        optimizer.step()
        scheduler.step()


def tiny(optimizer):
    optimizer.param_groups[0]["lr"] = 1e-12


def zero_as_a_tensor(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)


@pytest.mark.parametrize("end", [cosine_to_its_end, tiny, zero_as_a_tensor])
@pytest.mark.parametrize("goal", [CERTIFIED, {"steps": 4, "method": "langevin"}])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_size_at_the_end_of_its_schedule_is_no_unlearning(end, goal, kind):
    trained = network(make_optimizer=lambda p: kind(p, lr=0.5))
    trained.optimizer.zero_grad(set_to_none=True)
    end(trained.optimizer.original_optimizer)
    unlearning = trained.unlearning()
    with pytest.raises(CertificateError, match="step size that moves the model"):
        unlearning.plan([0], **goal)
    assert unlearning.forgotten == frozenset()


def test_small_steps_are_steps_and_no_steps_need_none():
    trained = network()
    trained.optimizer.param_groups[0]["lr"] = 1e-4
    unlearning = trained.unlearning()
    before = weights(unlearning.module)
    result = unlearning.unlearn(unlearning.plan([0], steps=1), seed=0)
    assert not torch.equal(weights(result.module), before)
    again = network()
    again.optimizer.param_groups[0]["lr"] = 0.0
    assert again.unlearning().plan([0], epsilon=1e3, delta=DELTA).steps == 0


def test_a_run_that_left_the_model_as_it_was_is_not_certified(monkeypatch):
    unlearning = network().unlearning()
    plan = unlearning.plan([0], **CERTIFIED)
    from opacus_pil.unlearning.steps import running

    monkeypatch.setattr(
        running, "noisy_steps", lambda module, *, steps, after_step, **rest: after_step(steps)
    )
    with pytest.raises(CertificateError, match="the model that was there before"):
        unlearning.unlearn(plan)
    assert unlearning.forgotten == frozenset()


def test_a_result_cannot_be_made_of_it_either():
    unlearning = network().unlearning()
    plan = unlearning.plan([0], **CERTIFIED)
    with pytest.raises(CertificateError, match="model"):
        CertifiedResult(
            module=unlearning.module, plan=plan, steps=3, history=(), model_before="a" * 64,
            model_after="a" * 64,
        )  # fmt: skip


# --- B6: weights that are not the ones training left ----------------------------------------------


def one_bit(module):
    with torch.no_grad():
        p = next(module.parameters()).view(-1)
        p[0] = torch.nextafter(p[0], torch.tensor(9.0))


def of_another_training(module):
    other = network_module() if isinstance(module, nn.Sequential) else nn.Linear(5, 1, bias=False)
    module.load_state_dict(other.state_dict())


def behind_autograds_back(module):
    next(module.parameters()).data *= 1.5


@pytest.mark.parametrize("edit", [one_bit, of_another_training, behind_autograds_back])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(("make", "goal"), [(logistic, LANGEVIN), (network, {"epsilon": 50.0})])
def test_edited_weights_carry_no_certificate(edit, copied, make, goal):
    trained = make()
    inner = trained.module._module
    edited = copy.deepcopy(inner) if copied else inner
    edit(edited)
    unlearning = trained.unlearning(module=edited)
    with pytest.raises(CertificateError, match="weights that are not the ones training left"):
        unlearning.plan([0], **{"delta": DELTA, **goal})
    result = unlearning.unlearn(unlearning.plan([0], steps=2))  # without a claim
    assert isinstance(result, UncertifiedResult)


@pytest.mark.parametrize("copied", [False, True])
def test_the_trained_weights_do_and_so_does_a_copy(copied):
    trained = logistic()
    module = copy.deepcopy(trained.module._module) if copied else trained.module
    plan = trained.unlearning(module=module).plan([0], **LANGEVIN)
    assert isinstance(plan, CertifiedPlan)
    assert "labels_without_evidence" not in plan.certificate.context


def test_weights_out_of_a_checkpoint_are_those_that_were_left(tmp_path):
    trained = network()
    trained.engine.save_checkpoint(
        path=tmp_path / "c.pt", module=trained.module, optimizer=trained.optimizer
    )
    fresh = network(steps=0)
    fresh.engine.load_checkpoint(
        path=tmp_path / "c.pt", module=fresh.module, optimizer=fresh.optimizer
    )
    assert fresh.unlearning().plan([0], **CERTIFIED).certificate.context == ()
    one_bit(fresh.module)
    with pytest.raises(CertificateError, match="weights that are not"):
        fresh.unlearning().plan([0], **CERTIFIED)


def test_where_nobody_noted_them_the_certificate_says_so():
    trained = network()
    trained.engine.trainings[0].weights.load(None)  # as after a checkpoint of an older release
    plan = trained.unlearning().plan([0], **CERTIFIED)
    assert "labels_without_evidence" in plan.certificate.context


def test_it_is_remembered_in_the_engines_state():
    trained = network()
    one_bit(trained.module)
    state = trained.unlearning().state_dict()
    again = network(steps=0).unlearning()
    again.load_state_dict(state)
    with pytest.raises(CertificateError, match="weights that are not"):
        again.plan([0], **CERTIFIED)


def test_noisy_fine_tuning_speaks_of_any_weights():
    trained = network(policy="last_seen")
    one_bit(trained.module)
    certificate = NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, 3.0)
    plan = trained.unlearning().plan(
        [0], steps=2, delta=DELTA, method="noisy_finetuning", certificate=certificate
    )
    assert plan.certificate == certificate
    assert plan.reasons == ()
