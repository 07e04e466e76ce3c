"""Runs of unlearning found by attacking the package: certified, but not by what the run was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_pil import CertificateError, LedgerError, PerInstancePrivacyEngine
from opacus_pil.certificates import NoisyFineTuningCertificate
from opacus_pil.unlearning.result import CertifiedResult
from tests.cases.test_attack_trainings import Renormed
from tests.cases.unlearning_models import DELTA, LANGEVIN, logistic, network, train


def test_a_seed_is_used_for_one_certified_run():
    """Its noise is in the model already: the next request would get the same again."""
    unlearning = logistic().unlearning()
    assert isinstance(unlearning.unlearn(unlearning.plan([0], **LANGEVIN), seed=5), CertifiedResult)
    before = unlearning.module.weight.clone()
    plan = unlearning.plan([1], **LANGEVIN)
    with pytest.raises(CertificateError, match="seed=5 again"):
        unlearning.unlearn(plan, seed=5)
    assert torch.equal(unlearning.module.weight, before)
    assert isinstance(unlearning.unlearn(plan, seed=6), CertifiedResult)


def test_a_run_that_did_not_end_leaves_its_seed_free(tmp_path):
    unlearning = logistic().unlearning()
    plan = unlearning.plan([0], **LANGEVIN)

    def fails(step, module):
        if step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        unlearning.unlearn(plan, seed=5, on_step=fails, checkpoint_dir=tmp_path, checkpoint_every=2)
    result = unlearning.unlearn(plan, seed=5, checkpoint_dir=tmp_path)
    assert isinstance(result, CertifiedResult)


@pytest.mark.parametrize("goal", [LANGEVIN, {"steps": 4, "method": "finetuning"}])
def test_rows_that_are_moved_during_the_run_stop_it(goal):
    """The forgotten record would be trained on, under another row's number."""
    trained = logistic()
    unlearning = trained.unlearning()
    before = unlearning.module.weight.clone()

    def moves(step, module):
        if step == 2:
            for tensor in trained.dataset.tensors:
                tensor.copy_(tensor.flip(0))

    with pytest.raises(LedgerError, match="another one"):
        unlearning.unlearn(unlearning.plan([0], **goal), on_step=moves)
    assert not unlearning.forgotten
    assert torch.equal(unlearning.module.weight, before)


def tokens() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(0, 30, (32, 4), generator=generator), torch.arange(32) % 3)


@pytest.mark.filterwarnings("ignore:Per-instance losses")
@pytest.mark.parametrize("method", ["dp_sgd", "noisy_finetuning"])
def test_an_embedding_that_rescales_itself_carries_no_certificate(method):
    """Each look-up moves weights, by no noise, in unlearning as in training."""
    trained = train(Renormed(), tokens(), criterion=nn.CrossEntropyLoss())
    goal = {"delta": DELTA, "steps": 3, "method": method}
    if method == "noisy_finetuning":
        goal["certificate"] = NoisyFineTuningCertificate(
            model_clip=1.0, gradient_clip=1.0, step_size=0.1, noise_std=5.0, weight_decay=0.1
        )
    with pytest.raises(CertificateError, match="max_norm"):
        trained.unlearning().plan([0], **goal)


@pytest.mark.filterwarnings("ignore:Per-instance losses")
def test_training_on_with_the_rows_that_were_forgotten_is_noticed():
    """The loader of the training still draws them; their accounts are closed."""
    trained = network(batch_size=8)
    unlearning = trained.unlearning()
    unlearning.unlearn(unlearning.plan([0], steps=2, delta=DELTA))
    engine: PerInstancePrivacyEngine = trained.engine
    assert engine.per_instance.guarantee == "bound"
    inputs, targets = next(iter(engine.trainings[0].tracker.loader))
    trained.optimizer.zero_grad()
    nn.CrossEntropyLoss()(trained.module(inputs), targets).backward()
    trained.optimizer.step()
    assert engine.per_instance.guarantee == "estimate"
    assert "forgotten" in "; ".join(engine.per_instance.reasons)
