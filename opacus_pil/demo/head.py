"""Ten classes, one output each, on features of a network that saw public images only.

The commonest way to train with privacy at useful accuracy, and one where contraction is proved:
each output is a logistic regression, clipped to its own cap per instance, fixed before the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ..datasets import ImageData, split
from ..heads import (
    BoundedFeatures,
    FrozenFeatures,
    OneVsRest,
    OneVsRestLoss,
    caps_from_public_model,
)
from ..privacy_engine import PerInstancePrivacyEngine
from ..unlearning.twin import plain_module
from .forgetting import Trained, forget_each
from .task import TaskResult, exposure_order, forget_sets, task_result

NAME = "head"
FEATURE_NORM = 1.0
CLASSES = 10
WORDS = {
    "task": "Ten classes, one output each, on frozen features of a network that saw public images "
    "only; full-batch noisy gradient descent with weight decay. Each image is clipped to its own "
    "cap per class, fixed before the run from a public model and its own record: these losses are "
    "bounds for the mechanism. They cover every noisy gradient of the run; the certificates below "
    "speak about the last model only.",
    "forgetting": "Steps certified by contraction: each output is a clipped logistic regression, "
    "weight decay pulls two runs together, and the noise hides the rest. The reference is "
    "retraining without the forget set for training and unlearning steps together. The hard set "
    "is the most exposed images of one digit: taking them away changes what the model says about "
    "them, and there is something to see.",
}


@dataclass(frozen=True)
class Settings:
    """Constants of the run, fixed before it and not from private data."""

    sizes: dict[str, int]
    noise_std: float  # per step, on the parameters
    steps: int
    weight_decay: float
    step_size: float = 7.5  # η(2λ + 1/4) <= 2: the loss is a sum of logistic ones
    width: int = 64
    public_epochs: int = 20
    cap_factor: float = 1.5
    cap_floor: float = 0.02
    epsilon: float = 1.0
    forget_size: int = 40
    records: int = 20


SETTINGS = {
    "digits": Settings(
        sizes={"public": 300, "train": 1200, "test": 297},
        noise_std=0.1, steps=200, weight_decay=4e-3, public_epochs=60,
    ),
    "mnist5k": Settings(
        sizes={"public": 1000, "train": 2000, "test": 1000},
        noise_std=0.06, steps=200, weight_decay=4e-3,
    ),
}  # fmt: skip


def run_head(
    data: ImageData, *, settings: Settings, oracles: int, seed: int, progress: bool
) -> TaskResult:
    """Train the head, certify and unlearn three forget sets, retrain their oracles, compare."""
    parts = split(data, sizes=settings.sizes, generator=torch.Generator().manual_seed(seed))
    frozen, features = head_features(parts, settings=settings, seed=seed)
    trained = train_head(features, settings=settings, seed=seed, progress=progress)
    engine, train = trained.engine, parts["train"]
    delta = 1.0 / len(train)
    order = exposure_order(engine.per_instance, delta)
    sets = forget_sets(order, size=settings.forget_size, seed=seed, labels=train.labels.numpy())
    outcomes = forget_each(
        trained,
        sets,
        plan={"epsilon": settings.epsilon, "delta": delta, "method": "langevin"},
        record_every=max(settings.steps // settings.records, 1),
        oracles=oracles,
        seed=seed,
        progress=progress,
    )
    return task_result(
        name=NAME,
        dataset=data.name,
        trained=trained,
        delta=delta,
        worst_case_epsilon_prv=None,
        outcomes=outcomes,
        images=train.images,
        labels=train.labels,
        state=nn.Sequential(frozen, plain_module(trained.module)).state_dict(),
        words=WORDS,
    )


def public_features(public: ImageData, *, settings: Settings, seed: int) -> nn.Module:
    """Return a network trained on public images, without its head, with bounded features."""
    side = public.images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stride = 2 if side >= 16 else 1
        wide = (-(-side // stride) + 1) // 2
        body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * wide * wide, settings.width), nn.ReLU(),
        )  # fmt: skip
        model = nn.Sequential(body, nn.Linear(settings.width, CLASSES))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(settings.public_epochs):
            for rows in torch.randperm(len(public)).split(64):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(public.images[rows]), public.labels[rows])
                loss.backward()
                optimizer.step()
    found = nn.Sequential(body, BoundedFeatures(settings.width, FEATURE_NORM))
    return found.requires_grad_(requires_grad=False)


def public_caps(
    public: FrozenFeatures, private: FrozenFeatures, *, settings: Settings
) -> np.ndarray:
    """Return each private instance's caps per class, by a head trained on public images."""
    module, optimizer = _make(public, settings)
    criterion = OneVsRestLoss()
    for _ in range(settings.steps):
        optimizer.zero_grad()
        criterion(module(public.features), public.targets).backward()
        optimizer.step()
    return caps_from_public_model(
        module, private, max_grad_norm=[1.0] * CLASSES, factor=settings.cap_factor,
        floor=settings.cap_floor,
    )  # fmt: skip


def _make(data: FrozenFeatures, settings: Settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = OneVsRest(data.width, CLASSES)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=settings.step_size, weight_decay=settings.weight_decay
    )
    return module, optimizer


def head_features(
    parts: dict[str, ImageData], *, settings: Settings, seed: int
) -> tuple[nn.Module, dict[str, FrozenFeatures]]:
    """Return the network that the public part trained, and what it makes of every part."""
    frozen = public_features(parts["public"], settings=settings, seed=seed)
    return frozen, {
        part: FrozenFeatures(TensorDataset(images.images, images.labels), frozen, progress=False)
        for part, images in parts.items()
    }


def train_head(
    features: dict[str, FrozenFeatures], *, settings: Settings, seed: int, progress: bool
) -> Trained:
    """Train a head on the features of the private part, with caps from those of the public part."""
    data, criterion = features["train"], OneVsRestLoss()
    caps = public_caps(features["public"], data, settings=settings)
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=caps)
    torch.manual_seed(seed)
    module, optimizer = _make(data, settings)
    size, clip = len(data), math.sqrt(CLASSES)
    private, private_optimizer, loader = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=size),
        noise_multiplier=settings.noise_std * size / (settings.step_size * clip),
        max_grad_norm=[1.0] * CLASSES,
        clipping="per_layer",
        criterion=criterion,
    )
    for _ in tqdm(
        range(settings.steps), desc=f"{NAME}: training", disable=None if progress else True
    ):
        for x, y in loader:  # one batch: everyone
            private_optimizer.zero_grad()
            criterion(private(x), y).backward()
            private_optimizer.step()
    return Trained(
        module=private,
        optimizer=private_optimizer,
        engine=engine,
        dataset=data,
        tensors=(data.features, data.targets),
        test=(features["test"].features, features["test"].targets),
        criterion=criterion,
        make=lambda _: _make(data, settings),
        feature_norm=FEATURE_NORM,
    )
