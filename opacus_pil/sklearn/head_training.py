"""A head trained full batch with caps from public rows: the constants, the caps and the run.

Knows features and class numbers; nothing of scikit-learn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from .._validate import FloatArray
from ..heads import FrozenFeatures, OneVsRest, OneVsRestLoss, caps_from_public_model
from ..privacy_engine import PerInstancePrivacyEngine
from ..unlearning import UnlearningEngine

FEATURE_NORM = 1.0
_HORIZON = 7.0  # training ends when the start has shrunk by e^-7
_BELOW = 1.0 - 1e-6  # of the largest step size that contracts, for rounding


@dataclass(frozen=True, kw_only=True)
class HeadConstants:
    """What a run is made of; fixed before it, and not from private data.

    Attributes:
        weight_decay: λ of torch.optim.SGD.
        noise_std: On every parameter at every step.
        training_steps: Full-batch steps.
    """

    weight_decay: float
    noise_std: float
    training_steps: int

    @classmethod
    def of(
        cls, *, weight_decay: float, noise_std: float, training_steps: int | None
    ) -> HeadConstants:
        """Return constants; without training_steps as many as the start takes to be forgotten."""
        if training_steps is None:
            training_steps = math.ceil(_HORIZON / (_step_size(weight_decay) * weight_decay))
        return cls(weight_decay=weight_decay, noise_std=noise_std, training_steps=training_steps)

    @property
    def step_size(self) -> float:
        """η, the largest that contracts: η(2λ + 1/4) <= 2, for features of norm at most 1."""
        return _step_size(self.weight_decay)

    def noise_multiplier(self, *, instances: int, classes: int) -> float:
        """Return the noise as Opacus takes it: std on the summed gradient / joint clip bound."""
        return self.noise_std * instances / (self.step_size * math.sqrt(classes))

    def optimizer(self, head: OneVsRest) -> torch.optim.SGD:
        """Return the optimizer of a run."""
        return torch.optim.SGD(head.parameters(), lr=self.step_size, weight_decay=self.weight_decay)


def _step_size(weight_decay: float) -> float:
    return _BELOW * 2.0 / (2.0 * weight_decay + FEATURE_NORM**2 / 4.0)


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Leave out torch's notice about hooks on inputs without gradient: features never have one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


def caps_by_public_rows(
    public: TensorDataset, private: FrozenFeatures, *, constants: HeadConstants, classes: int,
    factor: float, floor: float,
) -> FloatArray:  # fmt: skip
    """Return the private rows' caps, shape (rows, classes), by a head trained on public rows."""
    features, targets = public.tensors
    head, criterion = OneVsRest(features.shape[1], classes), OneVsRestLoss()
    optimizer = constants.optimizer(head)
    for _ in range(constants.training_steps):
        optimizer.zero_grad()
        criterion(head(features), targets).backward()
        optimizer.step()
    return caps_from_public_model(
        head, private, max_grad_norm=[1.0] * classes, factor=factor, floor=floor
    )


def trained(
    data: FrozenFeatures, *, constants: HeadConstants, classes: int, caps: FloatArray,
    instance_ids: npt.ArrayLike | Sequence[Any] | None, seed: int, progress: bool,
) -> tuple[PerInstancePrivacyEngine, UnlearningEngine]:  # fmt: skip
    """Train a head with privacy; what accounts for it, and what can forget rows of it.

    Args:
        data: The private rows.
        constants: Of the run.
        classes: Number of outputs.
        caps: Shape (rows, classes), fixed before the run.
        instance_ids: Shape (rows,), or None.
        seed: Of the noise.
        progress: Show a progress bar when the output is a terminal.
    """
    size = len(data)
    engine = PerInstancePrivacyEngine(norm_policy="capped", caps=caps, instance_ids=instance_ids)
    head, criterion = OneVsRest(data.width, classes), OneVsRestLoss()
    coins = torch.Generator()  # of draws that take everyone; keeps the global generator as it is
    module, optimizer, loader = engine.make_private(
        module=head,
        optimizer=constants.optimizer(head),
        data_loader=DataLoader(data, batch_size=size, generator=coins),
        noise_multiplier=constants.noise_multiplier(instances=size, classes=classes),
        max_grad_norm=[1.0] * classes,
        clipping="per_layer",
        criterion=criterion,
        noise_generator=torch.Generator().manual_seed(seed),
    )
    steps = tqdm(range(constants.training_steps), desc="training", disable=not progress or None)
    with quiet_hooks():
        for _ in steps:
            for features, targets in loader:  # one batch: everyone
                optimizer.zero_grad()
                criterion(module(features), targets).backward()
                optimizer.step()
    unlearning = UnlearningEngine(
        module, optimizer=optimizer, dataset=data, privacy_engine=engine,
        feature_norm=FEATURE_NORM, progress=progress,
    )  # fmt: skip
    return engine, unlearning
