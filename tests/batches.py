"""Trainings whose every step is checked against the gradient that really moved the model."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager
from torch import nn
from torch.utils.data import DataLoader

from opacus_pil import BatchMemoryManager, PerInstancePrivacyEngine
from tests.capture.models import convolutional, images

SIZE, BATCH, PHYSICAL = 60, 12, 5
BOUND = 8.5  # between the smallest and largest gradient norm of the model
FLOAT32 = 1e-4  # sums of some ten float32 gradients, as in test_sweep
GRID = 0.01  # 1024 levels are less than a hundredth apart where these norms are
MANAGERS = {"none": None, "ours": BatchMemoryManager, "Opacus's": OpacusManager}
WORKERS: dict[str, dict[str, Any]] = {
    "0": {},
    "2": {"num_workers": 2},
    "2 persistent": {"num_workers": 2, "persistent_workers": True},
}


class Training:
    """A private training under per-instance accounting, and what its steps really consisted of.

    At every noisy step the recorded rows must be those whose clipped gradients, computed one by one
    with plain autograd, add up to the sum that Opacus adds noise to.
    """

    def __init__(self, *, data: Any = None, mode: str = "hooks", manager: Any = None, seed: int = 1,
                 engine: dict[str, Any] | None = None, loader: dict[str, Any] | None = None,
                 **options: Any) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.data = images(SIZE) if data is None else data
        self.caps = (engine or {}).get("caps")
        self.engine = PerInstancePrivacyEngine(accountant="rdp", **(engine or {}))
        self.module = convolutional()
        arguments = {
            "module": self.module, "criterion": nn.CrossEntropyLoss(), "noise_multiplier": 1.0,
            "optimizer": torch.optim.SGD(self.module.parameters(), lr=0.05),
            "data_loader": DataLoader(self.data, **({"batch_size": BATCH} | (loader or {}))),
            "max_grad_norm": BOUND, "grad_sample_mode": mode,
        }  # fmt: skip
        made = self.engine.make_private(**(arguments | options))
        self.wrapped, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
        self.manager = manager
        self.records: list[Any] = []
        self.used: list[torch.Tensor] = []  # inputs of the physical batches that were stepped on
        self.last_seen = np.full(len(self.data), np.inf)
        self._take = self.optimizer.recorder.take
        self.optimizer.recorder.take = self._checked_take

    def loading(self, physical: int = PHYSICAL) -> Any:
        """The context that a user trains in: no manager, ours or Opacus's."""
        if self.manager is None:
            return contextlib.nullcontext(self.loader)
        return self.manager(
            data_loader=self.loader, max_physical_batch_size=physical, optimizer=self.optimizer
        )

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.used.append(inputs)
        self.optimizer.zero_grad()
        self.criterion(self.wrapped(inputs), targets).backward()
        self.optimizer.step()

    def gradient(self, row: int) -> torch.Tensor:
        """Gradient of one instance by itself, as one vector."""
        inputs, target = pair(self.data[row])
        plain = convolutional()
        plain.load_state_dict(
            {k.removeprefix("_module."): v for k, v in self.module.state_dict().items()}
        )
        loss = nn.functional.cross_entropy(plain(inputs[None]), torch.as_tensor(target)[None])
        parts = torch.autograd.grad(loss, list(plain.parameters()))
        return torch.cat([part.flatten() for part in parts])

    def _checked_take(self, **options: Any) -> Any:
        summed = torch.cat([p.summed_grad.flatten() for p in self.module.parameters()])
        record = self._take(**options)
        self.records.append(record)
        if record.indices is None:
            return record
        rows = record.indices.tolist()
        # By content: what was stepped on last is what was recorded.
        recorded = [pair(self.data[row])[0] for row in rows]
        seen = [one for inputs in self.used for one in inputs]
        if rows:
            assert torch.equal(torch.stack(seen[-len(rows) :]), torch.stack(recorded))
        gradients = [self.gradient(row) for row in rows]
        norms = np.array([gradient.norm().item() for gradient in gradients])
        np.testing.assert_allclose(record.norms, norms, rtol=FLOAT32)
        if rows:
            caps = np.ones(len(rows)) if self.caps is None else self.caps[rows]
            factors = np.minimum(caps * BOUND / norms, 1.0)
            expected = sum(g * f for g, f in zip(gradients, factors, strict=True))
            assert (summed - expected).norm() <= FLOAT32 * factors @ norms
        self.last_seen[rows] = norms
        self.used = []
        return record

    @property
    def unattributed(self) -> int:
        return sum(record.indices is None for record in self.records)

    def check_ledger(self) -> None:
        """Levels are the norms each instance was last seen with, rounded up by less than a step."""
        assert self.engine.per_instance.steps == len(self.records) > 0
        assert self.engine.per_instance.unattributed_steps == self.unattributed
        truth = np.minimum(self.last_seen / BOUND, 1.0)
        held = self.engine.per_instance.sensitivities
        assert (held >= truth * (1 - FLOAT32)).all()
        least = self.engine.per_instance.levels[1]  # level 0 is for exact zeros
        np.testing.assert_allclose(held, truth, rtol=GRID, atol=least)


def pair(item: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target of an item or batch, whatever its container."""
    if isinstance(item, dict):
        return item["pixels"], item["label"]
    return item[0], item[1]
