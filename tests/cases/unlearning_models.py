"""Small trainings that cases of unlearning start from, by loops of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine

DELTA, SIZE = 1e-2, 32
LANGEVIN = {"epsilon": 0.5, "delta": DELTA, "method": "langevin", "max_steps": 5000}


@dataclass
class Trained:
    """A model, and what unlearning is built with."""

    module: Any
    optimizer: Any
    engine: PerInstancePrivacyEngine
    dataset: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def unlearning(self, **changes: Any) -> UnlearningEngine:
        arguments = {
            "optimizer": self.optimizer, "dataset": self.dataset, "privacy_engine": self.engine,
            "progress": False, **self.arguments, **changes,
        }  # fmt: skip
        return UnlearningEngine(changes.pop("module", self.module), **_without(arguments, "module"))


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def train(
    module: nn.Module,
    dataset: Any,
    *,
    loss_of: Callable[[Any, Any], torch.Tensor] | None = None,
    criterion: Any = None,
    backward: Callable[[int, Any, Any], None] | None = None,
    mode: str = "hooks",
    policy: str = "worst_case",
    batch_size: int = 8,
    steps: int = 6,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    collate_fn: Any = None,
    noise_multiplier: float = 1.0,
    **engine: Any,
) -> Trained:
    """Train by a loop that calls `backward(step, wrapped module, batch)`, or the loss named."""
    if policy == "capped":
        engine.setdefault("caps", np.linspace(0.1, 1.0, len(dataset)))
    private = PerInstancePrivacyEngine(
        accountant="rdp", norm_policy=policy, orders=[1.5, 2.0, 4.0, 8.0, 32.0], levels=32, **engine
    )
    optimizer = (make_optimizer or (lambda p: torch.optim.SGD(p, lr=0.5)))(module.parameters())
    named = {"criterion": criterion} if criterion is not None else {}
    made = private.make_private(
        module=module, optimizer=optimizer, noise_multiplier=noise_multiplier, max_grad_norm=1.0,
        data_loader=DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn),
        grad_sample_mode=mode, **named, **({} if loss_of is None else {"loss_of": loss_of}),
    )  # fmt: skip
    wrapped, private_optimizer, loader = made[0], made[1], made[-1]

    def usual(step: int, wrapped: Any, batch: Any) -> None:
        if loss_of is None:
            loss = (made[2] if len(made) == 4 else criterion)(wrapped(batch[0]), batch[1])
        elif mode == "ghost":
            losses = loss_of(wrapped, batch)
            loss = DPTensorFastGradientClipping(wrapped, private_optimizer, losses)
        else:
            loss = loss_of(wrapped, batch).mean()
        loss.backward()

    while private.per_instance.steps < steps:
        for batch in loader:
            private_optimizer.zero_grad()
            (backward or usual)(private.per_instance.steps, wrapped, batch)
            private_optimizer.step()
            if private.per_instance.steps == steps:
                break
    arguments = {} if criterion is None else {"criterion": criterion}
    return Trained(wrapped, private_optimizer, private, dataset, arguments)


def features(size: int = SIZE, width: int = 5) -> torch.Tensor:
    x = torch.randn(size, width)
    return x / x.norm(dim=1, keepdim=True)


def logistic(
    *, scale: Callable[[int], float] | None = None, bias: bool = False, **options: Any
) -> Trained:
    """One linear output on full batches, as contraction needs it."""
    torch.manual_seed(0)
    x = features()
    dataset = TensorDataset(x, (x[:, :1] > 0).float())
    module = nn.Linear(5, 1, bias=bias)
    nn.init.zeros_(module.weight)
    criterion = nn.BCEWithLogitsLoss()

    def scaled(step: int, wrapped: Any, batch: Any) -> None:
        assert scale is not None
        (scale(step) * criterion(wrapped(batch[0]), batch[1])).backward()

    settings = {"policy": "capped", "batch_size": SIZE, "steps": 20, **options}
    trained = train(
        module, dataset, criterion=criterion, backward=None if scale is None else scaled,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=6.0, weight_decay=5e-3), **settings,
    )  # fmt: skip
    trained.arguments["feature_norm"] = 1.0
    return trained


def network_module(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def classes(size: int = SIZE) -> TensorDataset:
    x = features(size)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def network(*, module: nn.Module | None = None, **options: Any) -> Trained:
    """Three classes by a small network, on Poisson batches."""
    torch.manual_seed(0)
    dataset = options.pop("dataset", None) or classes()
    module = network_module() if module is None else module
    return train(module, dataset, criterion=nn.CrossEntropyLoss(), **options)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in module.parameters()])
