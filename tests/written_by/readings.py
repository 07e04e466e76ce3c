"""The small trainings behind the files in this folder, and what is read out of them.

Public API only. Data are exact binary fractions and files bring their own weights, so that nothing
here depends on a processor. `make.py` in each folder wrote the files; `tests/test_written_by.py`
builds the same engines, loads the files and holds what it reads against `expected.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.schedulers import StepNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine

SIZE, BATCH, FEATURES, CLASSES, EPOCHS, DELTA = 24, 6, 4, 3, 3, 1e-5
STEPS, MIDDLE = EPOCHS * SIZE // BATCH, 6  # of 12; 4 in a pass
SET = [0, 3, 5]  # whose loss is read at every order, and from a history together
ORDERS = [1.5, 2.0, 4.0, 8.0, 16.0, 64.0]
CAPS = np.arange(1, SIZE + 1) / 32  # exact
SETTINGS: dict[str, Any] = {
    "accountant": "rdp", "orders": ORDERS, "levels": 32, "history": True
}  # fmt: skip
POLICIES: dict[str, dict[str, Any]] = {
    "last_seen": {"norm_policy": "last_seen"},
    "worst_case": {"norm_policy": "worst_case"},
    "full": {"norm_policy": "full"},
    "capped": {"norm_policy": "capped", "caps": CAPS},
    "budget": {"norm_policy": "capped", "caps": CAPS, "budget": (4.0, DELTA)},
    "participation": {"norm_policy": "participation"},
}


def features() -> torch.Tensor:
    """Return rows of multiples of 1/64 in [-7/16, 7/16]: no two are alike, norms are below 1."""
    return ((torch.arange(SIZE * FEATURES) * 37 + 11) % 57 - 28).reshape(SIZE, FEATURES) / 64


class Training:
    """A small network made private, to be trained or to take over a checkpoint.

    Args:
        policy: Key of POLICIES.
        mode: grad_sample_mode.
        middle: Whether it is the training that is saved in the middle of a pass: with generators
            of its own and a noise schedule.
    """

    def __init__(self, policy: str, *, mode: str = "hooks", middle: bool = False) -> None:
        x = features()
        self.dataset = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.engine = PerInstancePrivacyEngine(**SETTINGS, **POLICIES[policy])
        self.module = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        rows, noise = (torch.Generator().manual_seed(n) if middle else None for n in (21, 22))
        made = self.engine.make_private(
            module=self.module,
            optimizer=torch.optim.SGD(self.module.parameters(), lr=0.25, momentum=0.5),
            data_loader=DataLoader(self.dataset, batch_size=BATCH, shuffle=True, generator=rows),
            noise_multiplier=1.0, max_grad_norm=1.0, criterion=self.criterion,
            grad_sample_mode=mode, noise_generator=noise,
            poisson_sampling=policy != "participation",
        )  # fmt: skip
        self.wrapped, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.loss = made[2] if len(made) == 4 else self.criterion
        self.schedules: dict[str, Any] = {}
        if middle:
            self.schedules["noise_scheduler"] = StepNoise(self.optimizer, step_size=4, gamma=0.5)

    def run(self, *, after: Callable[[Training], Any]) -> None:
        """Train; call `after` right after each step, inside the loop."""
        for _ in range(EPOCHS):
            for x, y in self.loader:
                self.step(x, y)
                after(self)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.wrapped(x), y).backward()
        self.optimizer.step()
        for schedule in self.schedules.values():
            schedule.step()

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(
            path=path, module=self.wrapped, optimizer=self.optimizer, **self.schedules,
            checkpoint_dict={"steps": self.engine.per_instance.steps},
        )  # fmt: skip

    def load(self, path: Path) -> dict[str, Any]:
        return self.engine.load_checkpoint(
            path=path, module=self.wrapped, optimizer=self.optimizer, **self.schedules
        )

    @torch.no_grad()  # whoever only looks at batches skips no step
    def left(self) -> list[list[int]]:
        """Return the rows of the batches of the next pass, found by their contents."""
        return [rows_of(x) for x, _ in self.loader]

    def unlearning(self, **changes: Any) -> UnlearningEngine:
        return UnlearningEngine(
            self.wrapped, optimizer=self.optimizer, dataset=self.dataset, progress=False,
            criterion=self.criterion, privacy_engine=self.engine, **changes,
        )  # fmt: skip


class Logistic:
    """One linear output under caps: the model that contraction is proved for.

    Args:
        batch: SIZE for full batches, less for Poisson mini-batches.
    """

    def __init__(self, *, batch: int = SIZE) -> None:
        x = features()
        self.dataset = TensorDataset(x, (x[:, :1] > 0).float())
        self.criterion = nn.BCEWithLogitsLoss()
        self.engine = PerInstancePrivacyEngine(
            **{**SETTINGS, **POLICIES["capped"], "history": False}
        )
        self.module = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(self.module.weight)
        full = batch == SIZE
        self.wrapped, self.optimizer, self.loader = self.engine.make_private(
            module=self.module, noise_multiplier=1.0, max_grad_norm=1.0, criterion=self.criterion,
            data_loader=DataLoader(self.dataset, batch_size=batch),
            optimizer=torch.optim.SGD(
                self.module.parameters(), lr=4.0 if full else 1.0,
                weight_decay=0.0625 if full else 0.125,
            ),
        )  # fmt: skip

    def train(self, steps: int) -> Logistic:
        while self.engine.per_instance.steps < steps:
            for x, y in self.loader:
                self.optimizer.zero_grad()
                self.criterion(self.wrapped(x), y).backward()
                self.optimizer.step()
        return self

    def unlearning(self, **changes: Any) -> UnlearningEngine:
        return UnlearningEngine(
            self.wrapped, optimizer=self.optimizer, dataset=self.dataset, progress=False,
            criterion=self.criterion, privacy_engine=self.engine, feature_norm=1.0, **changes,
        )  # fmt: skip


# --- what is read ---------------------------------------------------------------------------------


def rows_of(x: torch.Tensor) -> list[int]:
    """Return the rows of the data set that a batch holds."""
    return [int((features() == one).all(dim=1).nonzero()) for one in x]


def of_accountant(accountant: Any) -> dict[str, Any]:
    """Return what an accountant says, as JSON; floats by every bit."""
    result = accountant.get_epsilon(DELTA)
    group = accountant.group_rdp(SET) if accountant.keeps_history else []
    return {
        "label": result.guarantee,
        "realised_label": accountant.realised_guarantee,
        "epsilon": hexes(result.epsilon),
        "spent": hexes(accountant.spent_rdp(SET).ravel()),
        "worst_case": hexes([accountant.worst_case_epsilon(DELTA)]),
        "group": hexes(group),
        "sensitivities": hexes(accountant.sensitivities),
        "steps": accountant.steps,
        "unattributed_steps": accountant.unattributed_steps,
        "ids": accountant.instance_ids.tolist(),
        "active": accountant.active.tolist(),
        "forgotten": accountant.forgotten.tolist(),
    }


def of_training(training: Training | Logistic) -> dict[str, Any]:
    """Return what both ledgers of a training say, its weights, and the noise in force."""
    return {
        **of_accountant(training.engine.per_instance),
        "opacus_epsilon": hexes([training.engine.get_epsilon(DELTA)]),
        "weights": weights(training.module),
        "noise": hexes([training.optimizer.noise_multiplier]),
    }


def hexes(values: Any) -> list[str]:
    return [float(value).hex() for value in values]


def weights(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state: names and float32 bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.removeprefix("_module.").encode() + value.numpy().tobytes())
    return digest.hexdigest()


def as_tensors(value: Any) -> Any:
    """Return nested values with tensors for arrays, which torch.load reads without code."""
    if isinstance(value, dict):
        return {key: as_tensors(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
