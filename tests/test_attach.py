"""Accounting for a training that somebody else made private; the accountant in the registry."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import create_accountant
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader, default_collate

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError
from opacus_pil.accounting import DEFAULT_ORDERS, rdp_to_epsilon, sampled_gaussian_rdp
from tests.capture.models import convolutional, images

SIZE, BATCH, BOUND, DELTA = 60, 12, 2.0, 1e-2


def made_private(engine, *, seed=4, **options):
    torch.manual_seed(seed)
    module = convolutional()
    arguments = {
        "module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.05),
        "data_loader": DataLoader(images(SIZE), batch_size=BATCH), "noise_multiplier": 1.0,
        "max_grad_norm": BOUND, "criterion": nn.CrossEntropyLoss(),
    }  # fmt: skip
    return module, engine.make_private(**(arguments | options))


def run(made, *, epochs=1):
    wrapped, optimizer, loader = made[0], made[1], made[-1]
    loss = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss(wrapped(inputs), targets).backward()
            optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"grad_sample_mode": "ghost"}, {"clipping": "per_layer", "max_grad_norm": [1.0] * 6}],
    ids=["flat", "ghost", "per layer"],
)
def test_an_attached_engine_sees_what_its_own_training_would(options):
    own = PerInstancePrivacyEngine(accountant="rdp")
    module, made = made_private(own, **options)
    run(made, epochs=2)

    theirs, attached = PrivacyEngine(accountant="rdp"), PerInstancePrivacyEngine(accountant="rdp")
    other, made = made_private(theirs, **options)
    attached.attach(module=made[0], optimizer=made[1], data_loader=made[-1])
    run(made, epochs=2)

    for mine, yours in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, yours)
    np.testing.assert_array_equal(attached.per_instance.rdp(), own.per_instance.rdp())
    assert attached.get_epsilon(DELTA) == theirs.get_epsilon(DELTA) == own.get_epsilon(DELTA)


def test_hooks_that_were_there_and_that_come_later_are_all_called():
    theirs, attached = PrivacyEngine(accountant="rdp"), PerInstancePrivacyEngine(accountant="rdp")
    _, made = made_private(theirs)
    calls = []
    made[1].attach_step_hook(lambda _: calls.append("before"))  # replaces Opacus's own
    attached.attach(module=made[0], optimizer=made[1], data_loader=made[-1])
    with pytest.warns(UserWarning, match="added after"):
        made[1].attach_step_hook(lambda _: calls.append("after"))
    run(made)
    assert calls == ["before", "after"] * 5
    assert attached.per_instance.steps == 5
    assert sum(count for _, _, count in attached.accountant.history) == 5


def test_a_loader_that_was_made_private_twice_is_joined_as_the_user_joins():
    theirs, attached = PrivacyEngine(accountant="rdp"), PerInstancePrivacyEngine(accountant="rdp")
    _, first = made_private(theirs)
    _, made = made_private(theirs, data_loader=first[-1])  # Opacus wraps what it had wrapped
    attached.attach(
        module=made[0], optimizer=made[1], data_loader=made[-1], criterion=nn.CrossEntropyLoss()
    )
    assert attached.task.collate_fn is default_collate
    run(made)
    attached.require_constant_steps(made[1].original_optimizer)


def test_without_a_loader_the_caller_names_the_rows():
    theirs, attached = PrivacyEngine(accountant="rdp"), PerInstancePrivacyEngine(accountant="rdp")
    _, made = made_private(theirs)
    data = images(SIZE)
    attached.attach(module=made[0], optimizer=made[1], dataset=data, sample_rate=0.2)
    for rows in ([1, 5], [7]):
        inputs, targets = data[rows]
        made[1].zero_grad()
        nn.CrossEntropyLoss()(made[0](inputs), targets).backward()
        with attached.batch(indices=rows):
            made[1].step()
    ledger = attached.per_instance
    assert (ledger.steps, ledger.unattributed_steps) == (2, 0)
    assert (np.delete(ledger.sensitivities, [1, 5, 7]) == 1.0).all()
    made[1].zero_grad()
    nn.CrossEntropyLoss()(made[0](inputs), targets).backward()
    with pytest.warns(UserWarning, match="could not be matched"):
        made[1].step()
    assert ledger.unattributed_steps == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"optimizer": None}, TypeError, "DPOptimizer"),
        ({"data_loader": DataLoader(images(SIZE))}, UnsupportedError, "DPDataLoader"),
        ({"data_loader": None}, ValueError, "neither"),
        ({"data_loader": None, "dataset": images(SIZE)}, TypeError, "sample_rate"),
        ({"sample_rate": 0.1}, ValueError, "both"),
    ],
)
def test_what_cannot_be_attached_to_is_left_as_it_was(change, error, words):
    _, made = made_private(PrivacyEngine(accountant="rdp"))
    hook, kind = made[1].step_hook, type(made[1])
    engine = PerInstancePrivacyEngine()
    arguments = {"module": made[0], "optimizer": made[1], "data_loader": made[-1]} | change
    with pytest.raises(error, match=words):
        engine.attach(**arguments)
    assert made[1].step_hook is hook
    assert type(made[1]) is kind
    with pytest.raises(ValueError, match="make_private to be called first"):
        _ = engine.per_instance


class Foreign(DPOptimizer):
    """An optimizer that clips in a way nobody here knows."""


def test_a_foreign_optimizer_is_refused_before_the_loader_changes():
    module, made = made_private(PrivacyEngine(accountant="rdp"))
    foreign = Foreign(
        made[1].original_optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=12
    )
    with pytest.raises(UnsupportedError, match="Foreign"):
        PerInstancePrivacyEngine().attach(module=made[0], optimizer=foreign, data_loader=made[-1])
    assert type(made[-1]) is DPDataLoader
    assert foreign.step_hook is None
    assert module is made[0]._module


def test_attaching_twice_is_refused():
    _, made = made_private(PrivacyEngine(accountant="rdp"))
    first, second = PerInstancePrivacyEngine(), PerInstancePrivacyEngine()
    first.attach(module=made[0], optimizer=made[1], data_loader=made[-1])
    with pytest.raises(UnsupportedError):
        second.attach(module=made[0], optimizer=made[1], data_loader=made[-1])
    run(made)
    assert first.per_instance.steps == 5


class TestRegisteredAccountant:
    """ "per_instance_rdp" in Opacus's registry."""

    def test_it_trains_and_finds_noise_like_any_other(self):
        epsilons = {}
        for name in ("rdp", "per_instance_rdp"):
            engine = PrivacyEngine(accountant=name)
            _, made = made_private(engine)
            run(made, epochs=3)
            epsilons[name] = engine.get_epsilon(DELTA)
        assert engine.accountant.mechanism() == "per_instance_rdp"
        # Same mechanism, same conversion; its orders are other ones.
        assert epsilons["per_instance_rdp"] == pytest.approx(epsilons["rdp"], rel=0.01)

    def test_epsilon_is_one_step_rdp_times_steps(self):
        accountant = create_accountant("per_instance_rdp")
        for noise, rate in [(1.0, 0.1), (1.0, 0.1), (2.0, 0.3)]:
            accountant.step(noise_multiplier=noise, sample_rate=rate)
        total = 2 * sampled_gaussian_rdp(
            1.0, noise_multiplier=1.0, sample_rate=0.1, orders=DEFAULT_ORDERS
        ) + sampled_gaussian_rdp(1.0, noise_multiplier=2.0, sample_rate=0.3, orders=DEFAULT_ORDERS)
        expected, order = rdp_to_epsilon(total, orders=DEFAULT_ORDERS, delta=1e-5)
        found = accountant.get_epsilon(1e-5)
        assert expected <= found <= expected * (1 + 1e-12)
        assert accountant.get_privacy_spent(delta=1e-5)[1] == order
        assert create_accountant("per_instance_rdp").get_epsilon(1e-5) == 0.0

    def test_noise_for_a_target_meets_the_target(self):
        engine = PerInstancePrivacyEngine(accountant="per_instance_rdp")
        module = convolutional()
        made = engine.make_private_with_epsilon(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
            data_loader=DataLoader(images(SIZE), batch_size=BATCH), target_epsilon=3.0,
            target_delta=DELTA, epochs=2, max_grad_norm=1.0,
        )  # fmt: skip
        run(made, epochs=2)
        assert 2.9 < engine.get_epsilon(DELTA) <= 3.0
        assert engine.per_instance.worst_case_epsilon(DELTA) == pytest.approx(
            engine.get_epsilon(DELTA), rel=1e-9
        )

    def test_a_state_survives_and_another_mechanism_is_refused(self):
        first, second = (create_accountant("per_instance_rdp") for _ in range(2))
        first.step(noise_multiplier=1.0, sample_rate=0.1)
        second.load_state_dict(first.state_dict())
        assert second.get_epsilon(1e-5) == first.get_epsilon(1e-5) > 0
        with pytest.raises(ValueError, match="rdp"):
            create_accountant("rdp").load_state_dict(first.state_dict())

    def test_it_is_registered_as_soon_as_both_packages_are_imported(self):
        code = (
            "import opacus, opacus_pil\n"
            "print(opacus.PrivacyEngine(accountant='per_instance_rdp').accountant.mechanism())"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.stdout.strip() == "per_instance_rdp", done.stderr
