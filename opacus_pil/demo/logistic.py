"""3 against 8, one linear output, full-batch noisy descent: here the certificate is real.

Per-instance caps are fixed before the run, from a model trained on a small public split and from
each instance's own record: how far an instance can push the model is enforced, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ..capture.sweep import sweep
from ..datasets import ImageData, binary, logistic_features, split
from ..privacy_engine import PerInstancePrivacyEngine
from ..unlearning.twin import plain_module
from .forgetting import Trained, forget_each
from .task import TaskResult, exposure_order, forget_sets, task_result

NAME = "logistic"
FEATURE_NORM = 1.0  # by construction of logistic_features
WORDS = {
    "task": "A logistic model for 3 against 8, trained by full-batch noisy gradient descent with "
    "decoupled weight decay. Each instance is clipped to its own cap, fixed before the run from a "
    "public model and its own record: these losses are bounds for the mechanism. They are large "
    "because they cover every noisy gradient of the run; the certificates below speak about the "
    "last model only.",
    "forgetting": "Steps certified by contraction: clipping one scalar derivative keeps the loss "
    "convex, weight decay pulls two runs together, and the noise hides the rest. The reference is "
    "retraining without the forget set for training and unlearning steps together.",
}


@dataclass(frozen=True)
class Settings:
    """Constants of the run, fixed before it and not from private data."""

    sizes: dict[str, int]
    noise_std: float  # per step, on the parameters
    steps: int
    weight_decay: float
    step_size: float = 7.0
    max_grad_norm: float = FEATURE_NORM  # |derivative| <= 1, so no gradient is longer
    cap_factor: float = 1.5
    cap_floor: float = 0.02
    epsilon: float = 1.0
    forget_size: int = 10
    records: int = 40


SETTINGS = {
    "digits": Settings(
        sizes={"public": 50, "train": 227, "test": 80},
        noise_std=0.1,
        steps=200,
        weight_decay=6e-3,
    ),
    "mnist5k": Settings(
        sizes={"public": 100, "train": 700, "test": 200},
        noise_std=0.03,
        steps=1000,
        weight_decay=1e-3,
    ),
}


def run_logistic(
    data: ImageData, *, settings: Settings, oracles: int, seed: int, progress: bool
) -> TaskResult:
    """Train with caps, certify and unlearn three forget sets, retrain their oracles, compare."""
    pairs = binary(data, positive=3, negative=8)
    parts = split(pairs, sizes=settings.sizes, generator=torch.Generator().manual_seed(seed))
    trained = train_logistic(parts, settings=settings, seed=seed, progress=progress)
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
        dataset=pairs.name,
        trained=trained,
        delta=delta,
        worst_case_epsilon_prv=None,
        outcomes=outcomes,
        images=train.images,
        labels=torch.where(train.labels == 1, 3, 8),
        state=plain_module(trained.module).state_dict(),
        words=WORDS,
    )


def public_caps(public: TensorDataset, private: TensorDataset, *, settings: Settings) -> np.ndarray:
    """Return each private instance's cap, in units of max_grad_norm.

    A function of a model trained on public data and of the instance's own record only; hence a
    constant of the run, whatever other private instances are in the training set.
    """
    module, optimizer = _make(public, settings)
    x, y = public.tensors
    criterion = nn.BCEWithLogitsLoss()
    for _ in range(settings.steps):
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()
    norms = sweep(module, private, criterion=criterion).norms / settings.max_grad_norm
    return np.minimum(settings.cap_factor * norms + settings.cap_floor, 1.0)


def _make(dataset: TensorDataset, settings: Settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(dataset.tensors[0].shape[1], 1, bias=False)  # the features carry the bias
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=settings.step_size, weight_decay=settings.weight_decay
    )
    return module, optimizer


def train_logistic(
    parts: dict[str, ImageData], *, settings: Settings, seed: int, progress: bool
) -> Trained:
    """Train the logistic model with caps from the public part; see `WORDS["task"]`."""
    tensors = {
        name: (logistic_features(part.images, feature_norm=FEATURE_NORM), part.labels[:, None])
        for name, part in parts.items()
    }
    dataset = TensorDataset(*tensors["train"])
    size = len(dataset)
    criterion = nn.BCEWithLogitsLoss()
    caps = public_caps(TensorDataset(*tensors["public"]), dataset, settings=settings)
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=caps)
    torch.manual_seed(seed)  # batches and noise follow it
    module, optimizer = _make(dataset, settings)
    private, private_optimizer, loader = engine.make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=size),
        # noise std on the parameters = step_size * noise_multiplier * max_grad_norm / batch size
        noise_multiplier=settings.noise_std * size / (settings.step_size * settings.max_grad_norm),
        max_grad_norm=settings.max_grad_norm,
        criterion=criterion,
    )
    steps = range(settings.steps)
    for _ in tqdm(steps, desc=f"{NAME}: training", disable=None if progress else True):
        for x, y in loader:  # one batch: everyone
            private_optimizer.zero_grad()
            criterion(private(x), y).backward()
            private_optimizer.step()
    return Trained(
        module=private,
        optimizer=private_optimizer,
        engine=engine,
        dataset=dataset,
        tensors=dataset.tensors,
        test=tensors["test"],
        criterion=criterion,
        make=lambda _: _make(dataset, settings),
        feature_norm=FEATURE_NORM,
    )
