"""Small trained models that the unlearning tests start from; trained anew for each caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.certificates import NoisyFineTuningCertificate

DELTA = 1e-2
SIZE = 48
NOISY_GOAL = {
    "steps": 2, "delta": DELTA, "method": "noisy_finetuning",
    "certificate": NoisyFineTuningCertificate(1.5, 0.5, 0.1, 0.2, [3.0, 2.0, 4.0]),
}  # fmt: skip


def three_classes(size: int) -> TensorDataset:
    """The rows that servers of the tests were trained on, whichever process asks."""
    torch.manual_seed(1)
    x = torch.randn(size, 4)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


@dataclass
class Run:
    module: nn.Module
    optimizer: Any
    engine: PerInstancePrivacyEngine
    dataset: TensorDataset
    criterion: nn.Module
    feature_norm: float | None
    steps: int

    def unlearning(self, **changes):
        arguments = {
            "optimizer": self.optimizer,
            "dataset": self.dataset,
            "criterion": self.criterion,
            "privacy_engine": self.engine,
            "feature_norm": self.feature_norm,
            "progress": False,
        }
        return UnlearningEngine(self.module, **{**arguments, **changes})


def _train(engine, module, optimizer, dataset, criterion, *, batch_size, epochs, **extra):
    made = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=batch_size),
        max_grad_norm=1.0,
        criterion=criterion,
        **extra,
    )
    private, private_optimizer, loader = made[0], made[1], made[-1]
    loss = made[2] if len(made) == 4 else criterion
    for _ in range(epochs):
        for x, y in loader:
            private_optimizer.zero_grad()
            loss(private(x), y).backward()
            private_optimizer.step()
    return private, private_optimizer


def network_run(
    *, norm_policy="last_seen", momentum=0.0, grad_sample_mode="hooks", dropout=0.0, seed=0
) -> Run:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=momentum)
    x = torch.randn(SIZE, 4)
    dataset = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    criterion = nn.CrossEntropyLoss()
    engine = PerInstancePrivacyEngine(norm_policy=norm_policy)
    private, private_optimizer = _train(
        engine, module, optimizer, dataset, criterion,
        batch_size=12, epochs=5, noise_multiplier=1.0, grad_sample_mode=grad_sample_mode,
    )  # fmt: skip
    return Run(
        private, private_optimizer, engine, dataset, criterion, None, engine.per_instance.steps
    )


def logistic_run(
    *,
    norm_policy="capped",
    batch_size=SIZE,
    momentum=0.0,
    weight_decay=5e-3,
    step_size=7.0,
    steps=300,
    noise_multiplier=1.0,
    seed=0,
    budget=None,
) -> Run:
    torch.manual_seed(seed)
    x = torch.randn(SIZE, 5)
    x = x / x.norm(dim=1, keepdim=True)
    dataset = TensorDataset(x, (x[:, :1] > 0).float())
    module = nn.Linear(5, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=step_size, momentum=momentum, weight_decay=weight_decay
    )
    criterion = nn.BCEWithLogitsLoss()
    caps = np.random.default_rng(seed).uniform(0.05, 1.0, SIZE)
    engine = PerInstancePrivacyEngine(
        norm_policy=norm_policy, budget=budget,
        **({"caps": caps} if norm_policy == "capped" else {}),
    )  # fmt: skip
    private, private_optimizer = _train(
        engine, module, optimizer, dataset, criterion,
        batch_size=batch_size, epochs=steps * batch_size // SIZE,
        noise_multiplier=noise_multiplier,
    )  # fmt: skip
    return Run(
        private, private_optimizer, engine, dataset, criterion, 1.0, engine.per_instance.steps
    )
