"""What the training side refuses: files of other trainings, settings, loaders; and Opacus's files.

Public API only. Each entry is one short story that ends with both ledgers, or with an error.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from behaviour_parts import DELTA, Story, losses, refusal, sheet, told
from behaviour_training import (
    BATCH,
    BOUND,
    CAPS,
    CLIPPINGS,
    POLICIES,
    SIZE,
    Training,
    convolutional,
    images,
)
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine

# --- files ----------------------------------------------------------------------------------------


def of_another(found: dict[str, Any]) -> None:
    """A checkpoint is loaded into trainings that differ from its own in one thing."""
    files: list[bytes] = []
    Training("capped").run(until=3, after=lambda it: it.steps == 3 and files.append(it.saved()))
    capped = files[-1]
    Training().run(until=3, after=lambda it: it.steps == 3 and files.append(it.saved()))
    entries = torch.load(io.BytesIO(files[-1]), weights_only=True)
    found["entries"] = sorted(entries)
    same = Training()
    found["returned"] = sorted(same.load(files[-1]).rest)
    found["once more"] = refusal(lambda: sorted(same.load(files[-1]).rest))
    others: dict[str, dict[str, Any]] = {
        "policy": {"policy": "full"}, "orders": {"engine": {"orders": [2.0, 4.0]}},
        "levels": {"engine": {"levels": 32}}, "accountant": {"engine": {"accountant": "gdp"}},
        "noise": {"noise_multiplier": 1.5}, "bound": {"max_grad_norm": 1.0},
        "batch": {"batch": 4}, "mode": {"grad_sample_mode": "ghost"},
        "clipping": CLIPPINGS["per_layer"], "history": {"engine": {"history": True}},
        "generators": {"own": True}, "schedules": {"schedules": ("noise",)},
        "data": {"data": Subset(images(), range(SIZE))},
        "model": {"model": lambda: convolutional().append(nn.Linear(4, 4))},
    }  # fmt: skip
    for name, options in others.items():
        with sheet(4) as found[name]:
            training = Training(**options)
            training.load(files[-1])
            found[name] |= losses(training.engine)
    with sheet(4) as found["capped into last_seen"]:
        Training().load(capped)
    with sheet(4) as found["without an optimizer"]:
        training = Training()
        training.engine.load_checkpoint(path=io.BytesIO(files[-1]), module=training.wrapped)
        found["without an optimizer"] |= training.outcome()
    for name, data in (("cut", files[-1][:2000]), ("text", b"no checkpoint")):
        with sheet(4) as found[name]:
            Training().load(data)


def from_opacus(found: dict[str, Any], *, policy: str) -> None:
    """A checkpoint of plain Opacus: everyone is charged the worst case."""
    theirs, module = PrivacyEngine(accountant="rdp"), convolutional()
    made = theirs.make_private(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        data_loader=DataLoader(images(), batch_size=BATCH), noise_multiplier=1.0,
        max_grad_norm=BOUND,
    )  # fmt: skip
    for x, y in made[-1]:
        made[1].zero_grad()
        nn.CrossEntropyLoss()(made[0](x), y).backward()
        made[1].step()
    file = io.BytesIO()
    theirs.save_checkpoint(path=file, module=made[0], optimizer=made[1])
    training = Training(policy)
    file.seek(0)
    training.engine.load_checkpoint(
        path=file, module=training.wrapped, optimizer=training.optimizer
    )
    found |= training.outcome()


# --- refusals -------------------------------------------------------------------------------------


def refused_settings(found: dict[str, Any]) -> None:
    cases: dict[str, dict[str, Any]] = {
        "unknown policy": {"norm_policy": "x"},
        "refresh without interval": {"norm_policy": "refresh"},
        "interval without refresh": {"refresh_every": 3},
        "interval 0": {"norm_policy": "refresh", "refresh_every": 0},
        "caps without capped": {"caps": CAPS},
        "capped without caps": {"norm_policy": "capped"},
        "budget without capped": {"budget": (1.0, DELTA)},
        "one level": {"levels": 1},
        "order 1": {"orders": [1.0]},
        "no orders": {"orders": []},
        "unknown accountant": {"accountant": "x"},
        "unknown keyword": {"nonsense": 1},
    }
    for name, arguments in cases.items():
        found[name] = refusal(lambda a=arguments: type(PerInstancePrivacyEngine(**a)).__name__)


def refused_trainings(found: dict[str, Any]) -> None:
    ordered = DataLoader(images(), batch_size=BATCH)
    weighted = DataLoader(
        images(), batch_size=BATCH, sampler=WeightedRandomSampler(torch.ones(SIZE), SIZE)
    )
    cases: dict[str, dict[str, Any]] = {
        "negative noise": {"noise_multiplier": -1.0}, "bound 0": {"max_grad_norm": 0.0},
        "bounds of layers, flat": {"max_grad_norm": [1.0, 1.0]},
        "one bound, per layer": {"clipping": "per_layer"},
        "unknown clipping": {"clipping": "x"}, "unknown mode": {"grad_sample_mode": "x"},
        "fixed batches, last_seen": {"poisson_sampling": False},
        "weighted rows": {"data_loader": weighted}, "no loader": {"data_loader": [1, 2]},
        "caps too few": {"policy": {"norm_policy": "capped", "caps": [0.5, 0.5]}},
        "caps above 1": {"policy": {"norm_policy": "capped", "caps": np.full(SIZE, 1.5)}},
        "budget too small": {"policy": {"norm_policy": "capped", "budget": (1e-3, DELTA)}},
        "unknown keyword": {"nonsense": 1},
    }  # fmt: skip
    for name, options in cases.items():
        found[name] = refusal(lambda o=options: type(Training(**o).optimizer).__name__)
    module = convolutional()
    engine = PerInstancePrivacyEngine(norm_policy="full")
    found["full without criterion"] = refusal(
        lambda: engine.make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=ordered, noise_multiplier=1.0, max_grad_norm=1.0,
        )
    )  # fmt: skip


def refused_managers(found: dict[str, Any]) -> None:
    training, other = Training(), Training()
    size = {"max_physical_batch_size": 4}
    cases: dict[str, dict[str, Any]] = {
        "size 0": {"data_loader": training.loader, "max_physical_batch_size": 0},
        "plain loader": {"data_loader": DataLoader(images(), batch_size=4), **size},
        "loader of another": {"data_loader": other.loader, **size},
    }
    for name, arguments in cases.items():
        found[name] = refusal(
            lambda a=arguments: type(BatchMemoryManager(optimizer=training.optimizer, **a)).__name__
        )


def record() -> dict[str, Any]:
    stories: dict[str, Story] = {
        "checkpoint of another": of_another, "settings": refused_settings,
        "trainings": refused_trainings, "managers": refused_managers,
    }  # fmt: skip
    for policy in POLICIES:
        stories[f"from Opacus, {policy}"] = lambda f, p=policy: from_opacus(f, policy=p)
    return {name: told(story) for name, story in stories.items()}
