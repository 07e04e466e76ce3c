"""PrivateTraining with the real Lightning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.auditing import watch
from opacus_pil.integrations.lightning import PrivateTraining

ROWS, BATCH, DELTA = 24, 6, 1e-2

pytestmark = [
    # Lightning's own, of its dependencies and of how it would like to be used.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches.*"),
]


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (ROWS,), generator=generator)
    return TensorDataset(torch.randn(ROWS, 4, generator=generator), labels)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def private(
    engine=None, *, module=None, cls=PrivateTraining, rows=None, batch=BATCH, loader=None, **options
):
    module = network() if module is None else module
    if not {"criterion", "loss_of"} & set(options):
        options["criterion"] = nn.CrossEntropyLoss()
    return cls(
        module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader or DataLoader(data() if rows is None else rows, batch_size=batch),
        privacy_engine=engine or PerInstancePrivacyEngine(accountant="rdp"),
        noise_multiplier=1.0, max_grad_norm=0.5, **options,
    )  # fmt: skip


def own_generators():
    """Coins and noise apart: Lightning draws a batch ahead of the step before it."""
    coins, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
    return DataLoader(data(), batch_size=BATCH, generator=coins), {"noise_generator": noise}


def of_dict(module, batch):
    return nn.functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")


def fit(module, **options):
    settings = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    trainer = Trainer(**(settings | options))
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("policy", ["last_seen", "full"])
def test_lightning_does_what_the_loop_by_hand_does(policy):
    engines = [PerInstancePrivacyEngine(accountant="rdp", norm_policy=policy) for _ in range(2)]
    theirs, own = network(), network()
    loader, noise = own_generators()
    fit(private(engines[0], module=theirs, loader=loader, make_private_options=noise))
    loader, noise = own_generators()
    made, optimizer, loader = engines[1].make_private(
        module=own, optimizer=torch.optim.SGD(own.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=0.5, criterion=nn.CrossEntropyLoss(), **noise,
    )  # fmt: skip
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(made(x), y).backward()
            optimizer.step()
    for one, other in zip(theirs.parameters(), own.parameters(), strict=True):
        # The mean is taken in two ways, so that the last bit may differ.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert engines[0].per_instance.unattributed_steps == 0
    first, second = (e.get_per_instance_epsilon(DELTA) for e in engines)
    # Levels are rounded up on a grid of 1,024: a last bit may move an instance by one of them.
    np.testing.assert_allclose(first.epsilon, second.epsilon, rtol=2e-2)
    assert engines[0].get_epsilon(DELTA) == engines[1].get_epsilon(DELTA)
    assert first.guarantee == {"last_seen": "estimate", "full": "output_specific"}[policy]


def test_dict_batches_are_trained_by_loss_of():
    rows = [{"x": x, "y": y} for x, y in data()]
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="full")
    fit(private(engine, rows=rows, loss_of=of_dict))
    assert engine.get_per_instance_epsilon(DELTA).guarantee == "output_specific"


def test_draws_of_nobody_are_steps_too():
    engine = PerInstancePrivacyEngine(accountant="rdp")
    drawn = []

    class Counting(PrivateTraining):
        def training_step(self, batch, batch_idx):
            drawn.append(len(batch["y"]))
            return super().training_step(batch, batch_idx)

    rows = [{"x": x, "y": int(y)} for x, y in TensorDataset(*data()[:4])]
    fit(private(engine, cls=Counting, batch=1, rows=rows, loss_of=of_dict), max_epochs=3)
    assert engine.per_instance.steps == len(drawn) == 12
    assert 0 in drawn  # (3/4)^4 of 12 in the mean
    assert np.isfinite(engine.get_per_instance_epsilon(DELTA).epsilon).all()


def test_a_first_draw_of_nobody_has_the_shape_of_a_batch():
    rows = [{"x": x, "y": int(y)} for x, y in data()]
    loader = private(rows=rows, loss_of=of_dict).train_dataloader()
    empty = loader.collate_fn([])
    assert {name: tuple(v.shape) for name, v in empty.items()} == {"x": (0, 4), "y": (0,)}


def test_fixed_batches_are_accounted_without_amplification():
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="participation")
    fit(private(engine, make_private_options={"poisson_sampling": False}))
    assert engine.per_instance.steps == 2 * ROWS // BATCH
    assert engine.get_per_instance_epsilon(DELTA).guarantee == "output_specific"


def test_epsilon_is_logged_if_asked_and_quantiles_only_then():
    engine = PerInstancePrivacyEngine(accountant="rdp")
    assert fit(private(engine, delta=DELTA)).callback_metrics["epsilon"] == pytest.approx(
        engine.get_epsilon(DELTA)
    )  # Lightning keeps float32
    assert set(fit(private()).callback_metrics) == set()
    found = fit(private(delta=DELTA, log_quantiles=True)).callback_metrics
    assert found["per_instance_epsilon_median"] <= found["per_instance_epsilon_most"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"overfit_batches": 1}, "overfit_batches"),
    ],
)
def test_steps_that_are_another_mechanism_are_refused_before_the_model_moves(options, words):
    module = network()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(UnsupportedError, match=words):
        fit(private(module=module), **options)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_arguments_that_name_no_loss_are_refused():
    with pytest.raises(TypeError, match="neither"):
        private(criterion=None)
    with pytest.raises(TypeError, match="both"):
        private(criterion=nn.CrossEntropyLoss(), loss_of=lambda module, batch: batch)
    with pytest.raises(UnsupportedError, match="ghost"):
        private(make_private_options={"grad_sample_mode": "ghost"})


def test_a_checkpoint_has_the_plain_names_and_no_ledger(tmp_path):
    module = private()
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(kept) == {f"module.{name}" for name in network().state_dict()}
    with pytest.raises(UnsupportedError, match="ledger"):
        trainer.fit(private(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_lightning_steps_on_the_private_loaders_batches_although_it_fetches_ahead():
    with watch(canaries=0) as audit:
        fit(private())
    loader = audit.result.trainings[0].conformance["loader"]
    assert loader.state == "agrees"
    assert loader.measured == 8
