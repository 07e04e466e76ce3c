"""Ten classes, a small CNN, DP-SGD: per-instance losses and a fixed budget of unlearning steps.

No certificate is claimed here: none is known to hold for such a network yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ..datasets import ImageData, split
from ..privacy_engine import PerInstancePrivacyEngine
from ..unlearning.twin import plain_module
from .forgetting import Trained, forget_each
from .task import TaskResult, exposure_order, forget_sets, task_result

NAME = "cnn"
WORDS = {
    "task": "A small convolutional network trained by DP-SGD. Norms of all instances were measured "
    "once per epoch and held in between, so these losses are estimates: good for ranking, not a "
    "guarantee.",
    "forgetting": "A fixed budget of fine-tuning with the training's own noisy steps on the "
    "retained data. No certificate is claimed for a network; what is shown is measured against "
    "models retrained without the forget set. Where accuracy is theirs before the first step, "
    "training with this much noise had learned nothing from the set that it would not know without "
    "it; that is seen, not proved.",
}


@dataclass(frozen=True)
class Settings:
    """Constants of the run, fixed before it."""

    epochs: int
    batch_size: int
    noise_multiplier: float
    learning_rate: float
    max_grad_norm: float = 1.0
    forget_size: int = 30
    unlearning_epochs: int = 4
    records_per_epoch: int = 4


SETTINGS = {
    "digits": Settings(epochs=12, batch_size=64, noise_multiplier=1.0, learning_rate=1.0),
    "mnist5k": Settings(epochs=10, batch_size=128, noise_multiplier=1.0, learning_rate=1.0),
}


def make_cnn(side: int) -> nn.Module:
    """Return a small CNN for side × side grey images; GroupNorm, because BatchNorm mixes rows."""
    stride = 1 if side < 16 else 2
    after = (side + stride - 1) // stride // 2
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=stride),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * after * after, 10),
    )


def run_cnn(
    data: ImageData, *, settings: Settings, oracles: int, seed: int, progress: bool
) -> TaskResult:
    """Train, account, unlearn three forget sets, retrain their oracles, compare."""
    parts = split(
        data, sizes={"train": 0.8, "test": 0.2}, generator=torch.Generator().manual_seed(seed)
    )
    train, test = parts["train"], parts["test"]
    trained = _train(train, test, settings=settings, seed=seed, progress=progress)
    engine = trained.engine
    delta = 1.0 / len(train)
    order = exposure_order(engine.per_instance, delta)
    epoch = round(1.0 / engine.kernel.sample_rate)
    sets = forget_sets(order, size=settings.forget_size, seed=seed, labels=train.labels.numpy())
    outcomes = forget_each(
        trained,
        sets,
        plan={"steps": settings.unlearning_epochs * epoch},
        record_every=max(epoch // settings.records_per_epoch, 1),
        oracles=oracles,
        seed=seed,
        progress=progress,
    )
    return task_result(
        name=NAME,
        dataset=data.name,
        trained=trained,
        delta=delta,
        worst_case_epsilon_prv=float(engine.get_epsilon(delta)),
        outcomes=outcomes,
        images=train.images,
        labels=train.labels,
        state=plain_module(trained.module).state_dict(),
        words=WORDS,
    )


def _train(
    train: ImageData, test: ImageData, *, settings: Settings, seed: int, progress: bool
) -> Trained:
    def make(_: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        # Oracles differ by batches and noise, not by initialisation: between models from different
        # ones a loss barrier says nothing about the forget set.
        torch.manual_seed(seed)
        module = make_cnn(train.images.shape[-1])
        return module, torch.optim.SGD(module.parameters(), lr=settings.learning_rate)

    dataset = TensorDataset(train.images, train.labels)
    criterion = nn.CrossEntropyLoss()
    module, optimizer = make(seed)
    engine = PerInstancePrivacyEngine(
        norm_policy="refresh", refresh_every=max(len(train) // settings.batch_size, 1)
    )
    private, private_optimizer, loader = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=settings.batch_size),
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        criterion=criterion,
    )
    epochs = range(settings.epochs)
    for _ in tqdm(epochs, desc=f"{NAME}: training", disable=None if progress else True):
        for x, y in loader:
            private_optimizer.zero_grad()
            criterion(private(x), y).backward()
            private_optimizer.step()
    return Trained(
        module=private,
        optimizer=private_optimizer,
        engine=engine,
        dataset=dataset,
        tensors=dataset.tensors,
        test=(test.images, test.labels),
        criterion=criterion,
        make=make,
    )
