"""What else is asked of the training side: custom loops, forks, caps, charges by hand.

Public API only. Each entry is one short story that ends with both ledgers, or with an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from behaviour_parts import (
    DELTA,
    Story,
    digest,
    ledger,
    losses,
    plain,
    refusal,
    told,
    weights,
)
from behaviour_training import (
    BATCH,
    BOUND,
    CAPS,
    MIDDLE,
    ORDERS,
    POLICIES,
    SIZE,
    Training,
    convolutional,
    images,
)
from opacus import PrivacyEngine
from opacus.accountants import create_accountant
from torch import nn
from torch.utils.data import DataLoader, Subset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.accounting import PerInstanceAccountant

# --- custom loops ---------------------------------------------------------------------------------


def foreign_batches(found: dict[str, Any], **options: Any) -> None:
    """Some steps on batches of nobody: they cannot be matched with rows."""
    training = Training(**options)
    inputs, targets = training.data.tensors
    for number, (x, y) in enumerate(training.loader):
        training.step(x, y)
        if number % 2:
            training.step(inputs[:5] + 0.5, targets[:5])
    found |= training.outcome()


def named_rows(found: dict[str, Any], *, policy: str = "last_seen") -> None:
    """A loop with batches of its own, attached without a loader."""
    theirs = PrivacyEngine(accountant="rdp")
    engine = PerInstancePrivacyEngine(
        accountant="rdp", orders=ORDERS, levels=512, **POLICIES[policy]
    )
    module, data = convolutional(), images()
    made = theirs.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=BATCH), noise_multiplier=1.0, max_grad_norm=BOUND,
    )  # fmt: skip
    engine.attach(
        module=made[0], optimizer=made[1], dataset=data, sample_rate=0.2,
        criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip
    for rows in ([1, 5, 9], [7], [5, 30, 39, 2]):
        inputs, targets = data[rows]
        made[1].zero_grad()
        with engine.batch(indices=rows):
            nn.CrossEntropyLoss()(made[0](inputs), targets).backward()
            made[1].step()
    found |= {"weights": weights(module), **losses(engine)}
    found["repeated row"] = refusal(lambda: engine.batch(indices=[1, 1]).__enter__())
    found["row too large"] = refusal(lambda: engine.batch(indices=[SIZE]).__enter__())


def left_early(found: dict[str, Any], *, manager: str) -> None:
    """Passes in small parts that end in the middle of a draw."""
    training = Training(manager=manager)
    for _ in range(3):
        with training.loading() as loader:
            for number, (x, y) in enumerate(loader):
                training.step(x, y)
                if number == 3:  # most often the first part of a draw
                    break
    found |= training.outcome()


def accumulated(found: dict[str, Any], *, mode: str) -> None:
    """Two drawn batches in one step."""
    training = Training(grad_sample_mode=mode)
    for number, (x, y) in enumerate(training.loader):
        training.loss(training.wrapped(x), y).backward()
        training.optimizer.signal_skip_step(number % 2 == 0)
        training.optimizer.step()
        training.optimizer.zero_grad()
    found |= training.outcome()


def not_finite(found: dict[str, Any], *, mode: str) -> None:
    training = Training(grad_sample_mode=mode)
    inputs, targets = next(iter(training.loader))
    inputs = inputs.clone()
    inputs[0] = torch.nan
    found["step"] = refusal(lambda: training.step(inputs, targets))
    found |= losses(training.engine)


# --- ledgers --------------------------------------------------------------------------------------


def before_anything(found: dict[str, Any]) -> None:
    engine = PerInstancePrivacyEngine(accountant="rdp")
    for name in ("kernel", "per_instance", "norm_policy"):
        found[name] = refusal(lambda name=name: getattr(engine, name))
    found["epsilon"] = refusal(lambda: engine.get_epsilon(DELTA))
    found["per instance"] = refusal(lambda: engine.get_per_instance_epsilon(DELTA))
    found["refresh"] = refusal(engine.refresh_norms)
    found["caps"] = refusal(lambda: engine.set_caps(CAPS))
    training = Training()
    found["no step"] = refusal(lambda: training.engine.get_epsilon(DELTA))
    found["ledger"] = ledger(training.engine.per_instance)


def refreshed(found: dict[str, Any], *, policy: str) -> None:
    training = Training(policy).run(until=4)
    sweep = training.engine.refresh_norms()
    found["norms"], found["deterministic"] = digest(sweep.norms), sweep.deterministic
    found |= training.run().outcome()


def other_caps(found: dict[str, Any], *, policy: str) -> None:
    training = Training(policy).run(until=4)
    training.engine.set_caps(CAPS[::-1].copy())
    found |= training.run().outcome()


def fork(found: dict[str, Any], *, mode: str, policy: str) -> None:
    """Steps on part of the data by a fork, which is then adopted."""
    training = Training(policy, grad_sample_mode=mode, engine={"history": True}).run(until=MIDDLE)
    engine = training.engine
    found["kernel"] = refusal(lambda: vars(engine.kernel))
    copy = engine.fork()
    copy.account.forget([0, 3])
    module = convolutional()
    rest = np.setdiff1d(np.arange(SIZE), [0, 3])
    made = copy.make_private_on(
        rest, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        dataset=training.data, criterion=nn.CrossEntropyLoss(), steps=4,
        noise_generator=torch.Generator().manual_seed(11),
        sampler_generator=torch.Generator().manual_seed(12),
    )  # fmt: skip
    loss = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    for x, y in made[-1]:
        made[1].zero_grad()
        loss(made[0](x), y).backward()
        made[1].step()
    found["population"] = weights(module)
    found["fork"] = ledger(copy.per_instance)
    found["before"] = ledger(engine.per_instance)
    engine.adopt(copy)
    found["after"] = ledger(engine.per_instance)
    found["twice"] = refusal(lambda: engine.adopt(PerInstancePrivacyEngine()))


def charged(found: dict[str, Any]) -> None:
    training = Training(engine={"history": True}).run(until=3)
    engine = training.engine
    engine.account.charge_everyone(noise_multiplier=2.0, sample_rate=0.1)
    found["everyone"] = ledger(engine.per_instance)
    engine.account.forget([2])
    found["again"] = refusal(lambda: engine.account.forget([2]))
    engine.account.charge_without_noise(2)
    found["without noise"] = losses(engine)
    state = engine.account.state()
    found["keys"] = sorted(state["per_instance"])
    other = Training(engine={"history": True})
    other.engine.account.load_state(state)
    found["loaded"] = ledger(other.engine.per_instance)
    gathered = engine.gather_per_instance()
    found["gathered"] = ledger(gathered)
    found["constant"] = refusal(
        lambda: engine.require_constant_steps(training.optimizer.original_optimizer)
    )


def two_trainings(found: dict[str, Any]) -> None:
    """One engine makes two models private; then data of another size is refused."""
    training = Training().run(until=3)
    module = convolutional()
    made = training.engine.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=DataLoader(training.data, batch_size=4), noise_multiplier=2.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    for x, y in made[-1]:
        made[1].zero_grad()
        nn.CrossEntropyLoss()(made[0](x), y).backward()
        made[1].step()
    found |= losses(training.engine)
    found["kernel"] = refusal(lambda: training.engine.kernel)
    part = DataLoader(Subset(training.data, range(20)), batch_size=4)
    other = convolutional()
    found["part"] = refusal(
        lambda: training.engine.make_private(
            module=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.05),
            data_loader=part, noise_multiplier=2.0, max_grad_norm=1.0,
        )
    )  # fmt: skip


def for_target(found: dict[str, Any], **options: Any) -> None:
    engine = PerInstancePrivacyEngine(accountant="rdp", orders=ORDERS, levels=512)
    module, data = convolutional(), images()
    made = engine.make_private_with_epsilon(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=BATCH), target_epsilon=4.0, target_delta=1e-2,
        epochs=2, max_grad_norm=BOUND, **options,
    )  # fmt: skip
    for x, y in made[-1]:
        made[1].zero_grad()
        nn.CrossEntropyLoss()(made[0](x), y).backward()
        made[1].step()
    found |= {"noise": float(made[1].noise_multiplier).hex(), **losses(engine)}


def registered(found: dict[str, Any]) -> None:
    accountant = create_accountant("per_instance_rdp")
    found["mechanism"] = accountant.mechanism()
    for _ in range(3):
        accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    found["epsilon"] = float(accountant.get_epsilon(DELTA)).hex()
    found["steps"] = len(accountant)


def charged_by_hand(found: dict[str, Any], **options: Any) -> None:
    """The accountant without any training."""
    accountant = PerInstanceAccountant(6, orders=ORDERS, levels=32, history=True, **options)
    everyone = [0.9, 0.5, 0.1, 0.0, 1.0, 0.3]
    kernel = {"noise_multiplier": 1.0, "sample_rate": 0.25}
    if options:
        accountant.step(indices=[], sensitivities=[], guarantee="bound", **kernel)
    else:
        accountant.observe_all(everyone)
        accountant.step(indices=[], sensitivities=[], guarantee="output_specific", **kernel)
        accountant.step(indices=[1, 4], sensitivities=[0.25, 0.75], **kernel)
        accountant.step(indices=None, sensitivities=None, **kernel)
    accountant.forget([2])
    accountant.step(indices=[], sensitivities=[], **kernel)
    found["caps for"] = plain(accountant.caps_for(**kernel).tolist())
    found |= ledger(accountant)
    found["above 1"] = refusal(lambda: accountant.step(indices=[0], sensitivities=[1.5], **kernel))
    found["repeated"] = refusal(
        lambda: accountant.step(indices=[0, 0], sensitivities=[0.1, 0.1], **kernel)
    )
    found["forgotten"] = refusal(
        lambda: accountant.step(indices=[2], sensitivities=[0.1], **kernel)
    )
    found["new caps"] = refusal(lambda: accountant.set_caps(np.full(6, 0.5)))


def record() -> dict[str, Any]:
    stories: dict[str, Story] = {
        "before anything": before_anything, "charged without steps": charged,
        "two trainings": two_trainings, "for a target": for_target, "registered": registered,
        "for a target, fixed batches": lambda f: for_target(f, poisson_sampling=False),
        "by hand": charged_by_hand,
        "by hand, caps": lambda f: charged_by_hand(f, caps=np.linspace(0.1, 1.0, 6)),
        "by hand, budget": lambda f: charged_by_hand(f, budget=(9.0, DELTA)),
    }  # fmt: skip
    for policy in POLICIES:
        stories[f"foreign batches, {policy}"] = lambda f, p=policy: foreign_batches(f, policy=p)
        stories[f"named rows, {policy}"] = lambda f, p=policy: named_rows(f, policy=p)
        stories[f"refreshed, {policy}"] = lambda f, p=policy: refreshed(f, policy=p)
        stories[f"other caps, {policy}"] = lambda f, p=policy: other_caps(f, policy=p)
        stories[f"fork, {policy}"] = lambda f, p=policy: fork(f, mode="hooks", policy=p)
    for manager in ("opacus_pil", "opacus"):
        stories[f"left early, {manager}"] = lambda f, m=manager: left_early(f, manager=m)
    for mode in ("hooks", "ghost"):
        stories[f"accumulated, {mode}"] = lambda f, m=mode: accumulated(f, mode=m)
        stories[f"not finite, {mode}"] = lambda f, m=mode: not_finite(f, mode=m)
    stories["fork, ghost"] = lambda f: fork(f, mode="ghost", policy="last_seen")
    return {name: told(story) for name, story in stories.items()}
