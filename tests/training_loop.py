"""A small training with all that can change its course, to be saved, killed and compared."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from opacus.schedulers import LambdaGradClip, StepNoise
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_pil import PerInstancePrivacyEngine
from opacus_pil.capture.memory import BatchMemoryManager
from tests.capture.models import convolutional, images

SIZE, BATCH, EPOCHS, BOUND = 60, 12, 3, 8.5
STEPS = EPOCHS * SIZE // BATCH


class Augmented(Dataset):
    """Images that get numpy's and Python's randomness when they are loaded."""

    def __init__(self) -> None:
        self.data, self.targets = images(SIZE).tensors

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, row):
        shift = np.random.normal()  # noqa: NPY002 the global generator is what is saved
        return self.data[row] * random.choice([1.0, -1.0]) + shift, self.targets[row]


class Loop:
    """A training with all that can change its course; `seed` is what a new process starts from."""

    def __init__(
        self, *, seed=0, dataset=None, workers=0, own=False, dropout=0.0, noise_schedule=False,
        clip_schedule=False, physical=None, shuffle=True, size=SIZE, model=None, batch=BATCH,
        engine=None, **options,
    ):  # fmt: skip
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 as above
        random.seed(seed)
        given = torch.Generator().manual_seed(seed + 1) if own else None
        noise = torch.Generator().manual_seed(seed + 2) if own else None
        # Few levels and orders: a schedule asks for a new table at each of its steps.
        settings = {"accountant": "rdp", "levels": 64, "orders": [2.0, 8.0, 32.0], **(engine or {})}
        self.engine = PerInstancePrivacyEngine(**settings)
        self.module = convolutional(dropout=dropout) if model is None else model
        arguments = {
            "noise_multiplier": 1.0, "max_grad_norm": BOUND, "noise_generator": noise,
            "criterion": nn.CrossEntropyLoss(), **options,
        }  # fmt: skip
        made = self.engine.make_private(
            module=self.module,
            optimizer=torch.optim.SGD(self.module.parameters(), lr=0.05, momentum=0.9),
            data_loader=DataLoader(
                images(size) if dataset is None else dataset, batch_size=batch, generator=given,
                num_workers=workers, shuffle=shuffle,
            ),
            **arguments,
        )  # fmt: skip
        self.wrapped, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
        self.schedules = {}
        if noise_schedule:
            self.schedules["noise_scheduler"] = StepNoise(self.optimizer, step_size=4, gamma=0.9)
        if clip_schedule:
            self.schedules["grad_clip_scheduler"] = LambdaGradClip(
                self.optimizer,
                scheduler_function=lambda step: 1.15**step,  # stays where it is
            )
        if physical:
            self.loader = BatchMemoryManager(
                data_loader=self.loader, max_physical_batch_size=physical, optimizer=self.optimizer
            ).__enter__()
        self.epoch = self.steps = 0

    def run(self, *, until=None, after=None):
        """Train to the end, or to a step; call `after` at each step."""
        while self.epoch < EPOCHS:
            for inputs, targets in self.loader:
                self.optimizer.zero_grad()
                self.criterion(self.wrapped(inputs), targets).backward()
                self.optimizer.step()
                if self.optimizer._is_last_step_skipped:
                    continue
                for schedule in self.schedules.values():
                    schedule.step()
                self.steps += 1
                if after is not None:
                    after(self)
                if self.steps == until:
                    return self
            self.epoch += 1
        return self

    def save(self, path):
        self.engine.save_checkpoint(
            path=path, module=self.wrapped, optimizer=self.optimizer, **self.schedules,
            checkpoint_dict={"epoch": self.epoch, "steps": self.steps},
        )  # fmt: skip

    def load(self, path):
        rest = self.engine.load_checkpoint(
            path=path, module=self.wrapped, optimizer=self.optimizer, **self.schedules
        )
        self.epoch, self.steps = rest["epoch"], rest["steps"]
        return self

    def outcome(self):
        """All that the rest of a training depends on."""
        generators = {
            use: generator.get_state()
            for use, generator in self.engine._kept().generators(self.engine.trainings[0]).items()
        }
        return {
            "weights": dict(self.module.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "noise": self.optimizer.noise_multiplier,
            "clip": self.optimizer.max_grad_norm,
            "ledgers": self.engine.account.state(),
            "epsilon": self.engine.get_per_instance_epsilon(1e-2).epsilon,
            "generators": generators,
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 as above
            "python": random.getstate(),
        }


def same(one, other) -> bool:
    """Equality bit for bit of nested values."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other


def differences(one, other) -> list[str]:
    return [name for name in one if not same(one[name], other[name])]
