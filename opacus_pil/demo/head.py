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

from ..datasets import ImageData, load, split
from ..heads import (
    BoundedFeatures,
    FrozenFeatures,
    OneVsRest,
    OneVsRestLoss,
    caps_from_public_model,
)
from ..privacy_engine import PerInstancePrivacyEngine
from .forgetting import Trained

FEATURE_NORM = 1.0
CLASSES = 10


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


SETTINGS = {
    "digits": Settings(
        sizes={"public": 400, "train": 1000, "test": 397},
        noise_std=0.1, steps=311, weight_decay=3e-3,
    ),
    "mnist5k": Settings(
        sizes={"public": 1000, "train": 3000, "test": 1000},
        noise_std=0.05, steps=311, weight_decay=3e-3,
    ),
}  # fmt: skip


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


def train_head(name: str, *, settings: Settings, seed: int, progress: bool) -> Trained:
    """Train the head of a data set's private part, with caps from its public part."""
    parts = split(load(name), sizes=settings.sizes, generator=torch.Generator().manual_seed(seed))
    frozen = public_features(parts["public"], settings=settings, seed=seed)
    features = {
        part: FrozenFeatures(TensorDataset(images.images, images.labels), frozen, progress=False)
        for part, images in parts.items()
    }
    data, criterion = features["train"], OneVsRestLoss()
    caps = public_caps(features["public"], data, settings=settings)
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=caps)
    torch.manual_seed(seed)
    module, optimizer = _make(data, settings)
    # Plain tensors: whoever measures what was forgotten needs its features once more.
    dataset = TensorDataset(data.features, data.targets)
    size, clip = len(data), math.sqrt(CLASSES)
    private, private_optimizer, loader = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=size),
        noise_multiplier=settings.noise_std * size / (settings.step_size * clip),
        max_grad_norm=[1.0] * CLASSES,
        clipping="per_layer",
        criterion=criterion,
    )
    for _ in tqdm(range(settings.steps), desc="head: training", disable=None if progress else True):
        for x, y in loader:  # one batch: everyone
            private_optimizer.zero_grad()
            criterion(private(x), y).backward()
            private_optimizer.step()
    return Trained(
        module=private,
        optimizer=private_optimizer,
        engine=engine,
        dataset=dataset,
        test=(features["test"].features, features["test"].targets),
        criterion=criterion,
        make=lambda _: _make(data, settings),
        feature_norm=FEATURE_NORM,
    )
