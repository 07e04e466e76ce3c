"""Small heads and rows that the tests of several rooms train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.heads import BoundedFeatures, OneVsRest, OneVsRestLoss

SIZE, WIDTH, CLASSES = 24, 4, 3
ORDERS = (2.0, 8.0)


def raw(size: int = SIZE, *, seed: int = 0) -> TensorDataset:
    """Rows for a frozen part."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(size, WIDTH, generator=generator), torch.arange(size) % CLASSES
    )


def bounded(size: int = SIZE, *, seed: int = 0) -> TensorDataset:
    """Rows of norm at most 1, the constant feature included."""
    inputs, targets = raw(size, seed=seed).tensors
    return TensorDataset(BoundedFeatures(WIDTH)(inputs), targets)


def binary(data: TensorDataset) -> TensorDataset:
    """The same rows with targets of one output."""
    return TensorDataset(data.tensors[0], (data.tensors[1] > 0).float()[:, None])


def head(classes: int = CLASSES) -> OneVsRest:
    return OneVsRest(WIDTH + 1, classes)


def linear(outputs: int = 1) -> nn.Linear:
    layer = nn.Linear(WIDTH + 1, outputs, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def frozen(outputs: nn.Module, *, last: nn.Module | None = None) -> nn.Sequential:
    """A head on a small fixed network; `last` layer of it: BoundedFeatures."""
    generator = torch.Generator().manual_seed(1)
    first = nn.Linear(WIDTH, WIDTH)
    for p in first.parameters():
        nn.init.normal_(p, generator=generator)
    first.requires_grad_(False)
    return nn.Sequential(first, nn.ReLU(), last or BoundedFeatures(WIDTH), outputs)


class Heads:
    """A private training of a head: every row in every batch unless told otherwise."""

    def __init__(
        self, module: nn.Module | None = None, *, data: Any = None, criterion: Any = None,
        caps: Any = None, policy: str = "capped", bounds: Any = None, clipping: str = "per_layer",
        noise: float = 2.0, rate: float = 1.0, decay: float = 0.01, batch: int | None = None,
        seed: int = 0, engine: Any = None, make: Any = None, reverse: bool = False,
        collate: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.data = bounded() if data is None else data
        self.plain = head() if module is None else module
        trained = [p for p in self.plain.parameters() if p.requires_grad]
        made = make or (lambda p: torch.optim.SGD(p, lr=rate, weight_decay=decay))
        if engine is None:
            settings = {"norm_policy": policy} | options.pop("settings", {})
            if policy == "capped" and "budget" not in settings:
                caps = np.ones(len(self.data)) if caps is None else caps
            if caps is not None:
                settings["caps"] = caps
            engine = PerInstancePrivacyEngine(
                accountant="rdp", orders=ORDERS, levels=256, **settings
            )
        self.engine = engine
        self.criterion = OneVsRestLoss() if criterion is None else criterion
        if bounds is None:
            bounds = [1.0] * len(trained) if clipping == "per_layer" else 1.0
        private = self.engine.make_private(
            module=self.plain, optimizer=made(trained[::-1] if reverse else trained),
            data_loader=DataLoader(
                self.data, batch_size=batch or len(self.data), collate_fn=collate
            ),
            noise_multiplier=noise, max_grad_norm=bounds, clipping=clipping,
            criterion=self.criterion, noise_generator=torch.Generator().manual_seed(seed + 1),
            **options,
        )  # fmt: skip
        self.module, self.optimizer, self.loader = private[0], private[1], private[-1]

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.module(inputs), targets).backward()
        self.optimizer.step()

    def run(self, steps: int = 3, *, before: Any = None, after: Any = None) -> Heads:
        """Train; `before(step, self)` and `after(step, self)` may meddle."""
        taken = 0
        while taken < steps:
            for batch in self.loader:
                if before is not None:
                    before(taken, self)
                self.step(*batch)
                taken += 1
                if after is not None:
                    after(taken, self)
                if taken == steps:
                    break
        return self

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.plain.parameters()])

    @property
    def label(self) -> str:
        return self.engine.per_instance.guarantee
