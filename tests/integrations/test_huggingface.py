"""PrivateTrainer with the real Trainer, and a model of random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
    default_data_collator,
)

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.auditing import watch
from opacus_pil.integrations.huggingface import (
    PrivateTrainer,
    label_losses,
    next_token_losses,
    own_generators,
    token_losses,
)

ROWS, LENGTH, BATCH, DELTA = 24, 6, 6, 1e-2


def rows(*, count=ROWS):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 20, (LENGTH,), generator=generator),
            "position_ids": torch.arange(LENGTH),  # learned positions: one gradient per row
            "labels": k % 2,
        }
        for k in range(count)
    ]


def model(*, dropout=0.0):
    torch.manual_seed(1)
    settings = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=LENGTH, num_labels=2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(settings)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "num_train_epochs": 2,
        "lr_scheduler_type": "constant", "report_to": [], "logging_steps": 2, "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**(settings | changes))


def trainer(folder, *, engine=None, module=None, changes=None, **options):
    module = model() if module is None else module
    settings = {
        "args": arguments(folder, **(changes or {})), "model": module, "train_dataset": rows(),
        "privacy_engine": engine or PerInstancePrivacyEngine(accountant="rdp"),
        "noise_multiplier": 1.0, "max_grad_norm": 0.5, "noise_seed": 7,
        "optimizers": (torch.optim.SGD(module.parameters(), lr=0.1), None),
    }  # fmt: skip
    return PrivateTrainer(**(settings | options))


def by_hand(engine, module, *, loss_of=label_losses, epochs=2):
    coins, noise = own_generators(7)
    made, optimizer, loader = engine.make_private(
        module=module.train(), optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(
            rows(), batch_size=BATCH, collate_fn=default_data_collator, generator=coins
        ),
        noise_multiplier=1.0, max_grad_norm=0.5, loss_of=loss_of, noise_generator=noise,
    )  # fmt: skip
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            losses = loss_of(made, batch)
            (losses.sum() / max(len(losses), 1)).backward()
            optimizer.step()


@pytest.fixture(params=["last_seen", "full"])
def policy(request):
    return request.param


def test_the_trainer_does_what_the_loop_by_hand_does(tmp_path, policy):
    engines = [PerInstancePrivacyEngine(accountant="rdp", norm_policy=policy) for _ in range(2)]
    theirs, own = model(), model()
    trainer(tmp_path, engine=engines[0], module=theirs).train()
    by_hand(engines[1], own)
    for one, other in zip(theirs.parameters(), own.parameters(), strict=True):
        assert torch.equal(one, other)
    first, second = (e.get_per_instance_epsilon(DELTA) for e in engines)
    np.testing.assert_array_equal(first.epsilon, second.epsilon)
    assert engines[0].get_epsilon(DELTA) == engines[1].get_epsilon(DELTA)
    assert engines[0].per_instance.steps == 2 * math.ceil(ROWS / BATCH)
    assert first.guarantee == {"last_seen": "estimate", "full": "output_specific"}[policy]


def test_the_trainers_seed_is_no_source_of_noise(tmp_path):
    modules = [model(), model()]
    for module in modules:  # the same args.seed, which the Trainer gives to torch
        trainer(tmp_path, module=module, noise_seed=None, changes={"max_steps": 1}).train()
    one, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in modules)
    assert not torch.isclose(one, other).all()


def test_dropout_lowers_the_label(tmp_path):
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="full")
    trainer(tmp_path, engine=engine, module=model(dropout=0.5), changes={"max_steps": 1}).train()
    assert engine.get_per_instance_epsilon(DELTA).guarantee == "estimate"


def test_training_again_goes_on_with_the_same_ledger(tmp_path):
    engine = PerInstancePrivacyEngine(accountant="rdp")
    again = trainer(tmp_path, engine=engine)
    again.train()
    spent = engine.get_epsilon(DELTA)
    again.train()
    assert engine.per_instance.steps == 4 * math.ceil(ROWS / BATCH)
    assert engine.get_epsilon(DELTA) > spent
    assert len(engine.trainings) == 1


def test_draws_of_nobody_are_steps_too(tmp_path):
    engine = PerInstancePrivacyEngine(accountant="rdp", norm_policy="full")
    few = trainer(
        tmp_path, engine=engine, changes={"per_device_train_batch_size": 1, "num_train_epochs": 3},
        train_dataset=rows(count=4),
    )  # fmt: skip
    calls = []
    few._step_of_nobody = lambda: calls.append(1) or PrivateTrainer._step_of_nobody(few)
    few.train()
    assert engine.per_instance.steps == 12
    assert 0 < len(calls) < 12  # (3/4)^4 of 12 in the mean; seed 7 has some
    assert engine.per_instance.unattributed_steps == 0
    assert engine.get_per_instance_epsilon(DELTA).guarantee == "output_specific"


def test_evaluation_is_the_trainers_own(tmp_path):
    own = trainer(tmp_path, eval_dataset=rows(count=5))
    own.train()
    found = own.evaluate()
    with torch.no_grad():
        batch = default_data_collator(rows(count=5))
        wanted = own.model(**batch).loss.item()
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-5)  # float32, another batch size


def test_logs_hold_epsilon_if_asked_and_nothing_of_a_gradient(tmp_path):
    engine = PerInstancePrivacyEngine(accountant="rdp")
    own = trainer(tmp_path, engine=engine, delta=DELTA)
    own.train()
    logs = own.state.log_history
    assert logs[-1]["epsilon"] == engine.get_epsilon(DELTA)
    assert not any("grad_norm" in entry and entry["grad_norm"] is not None for entry in logs)
    assert not any(name.startswith("per_instance") for entry in logs for name in entry)
    silent = trainer(tmp_path)
    silent.train()
    assert not any("epsilon" in entry for entry in silent.state.log_history)
    asked = trainer(tmp_path, delta=DELTA, log_quantiles=True)
    asked.train()
    last = asked.state.log_history[-1]
    assert last["per_instance_epsilon_median"] <= last["per_instance_epsilon_most"]
    spent = asked.privacy_engine.get_per_instance_epsilon(DELTA)
    assert last["per_instance_epsilon_most"] == spent.epsilon.max() <= spent.worst_case


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"gradient_accumulation_steps": 2}, {}, "accumulation"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing"),
        ({"auto_find_batch_size": True}, {}, "auto_find"),
        ({"bf16": True}, {}, "bf16"),
        ({"activation_checkpointing": True}, {}, "computed twice"),
        ({}, {"compute_loss_func": lambda *_, **__: 0.0}, "compute_loss_func"),
        ({}, {"train_dataset": None}, "train_dataset"),
        ({}, {"make_private_options": {"grad_sample_mode": "ghost"}}, "ghost"),
    ],
)
def test_steps_that_are_another_mechanism_are_refused(tmp_path, changes, options, words):
    with pytest.raises(UnsupportedError, match=words):
        trainer(tmp_path, changes=changes, **options)


def test_a_checkpoint_without_a_ledger_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="ledger"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_row_has_the_loss_that_it_has_alone():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 1:] = -100
    labels[1] = -100

    def joined(**inputs):
        return {"logits": logits[inputs["rows"]]}

    for losses in (token_losses, next_token_losses):
        whole = losses(joined, {"rows": torch.arange(3), "labels": labels})
        alone = [losses(joined, {"rows": torch.tensor([k]), "labels": labels[[k]]}) for k in (0, 2)]
        torch.testing.assert_close(whole[[0, 2]], torch.cat(alone))
        assert whole[1] == 0.0  # nothing to learn from
    plain = torch.nn.functional.cross_entropy(logits[2], labels[2])
    torch.testing.assert_close(token_losses(joined, {"rows": [2], "labels": labels[[2]]})[0], plain)


def test_labels_that_the_default_loss_does_not_know_are_refused():
    module = model()
    batch = default_data_collator(rows(count=2))
    assert label_losses(module, batch).shape == (2,)
    tokens = {**batch, "labels": batch["input_ids"]}
    with pytest.raises(UnsupportedError, match="token_losses"):
        label_losses(module, tokens)
    del tokens["labels"]
    with pytest.raises(UnsupportedError, match="labels"):
        label_losses(module, tokens)


def test_the_model_that_comes_out_is_the_plain_one(tmp_path):
    module = model()
    before = copy.deepcopy(module.state_dict())
    own = trainer(tmp_path, module=module)
    own.train()
    own.save_model(str(tmp_path / "saved"))
    back = BertForSequenceClassification.from_pretrained(str(tmp_path / "saved"))
    for name, value in module.state_dict().items():
        assert torch.equal(value, back.state_dict()[name])
    assert any(not torch.equal(before[name], value) for name, value in back.state_dict().items())


def test_the_trainer_steps_on_the_private_loaders_batches_although_it_fetches_ahead(tmp_path):
    with watch(canaries=0) as audit:
        trainer(tmp_path).train()
    loader = audit.result.trainings[0].conformance["loader"]
    assert loader.state == "agrees"
    assert loader.measured == 8
