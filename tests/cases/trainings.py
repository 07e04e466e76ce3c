"""A user's training as a black box: what it claims for a row, and what the row really moved.

The truth is measured on the model, not on anything that the package records: the same training runs
with and without one row, by the same noise, and every step starts at the same parameters. The
difference of the two models after a step is then the difference of the two noised sums.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine

ORDERS = (2.0, 8.0, 32.0)
NOISE, CLIP = 2.0, 1.0
STRONG = ("bound", "output_specific")
# Float32: sums of some tens of gradients, subtracted and divided by the step size.
ROUNDING = 1e-3

POLICIES: dict[str, dict[str, Any]] = {
    "worst_case": {"norm_policy": "worst_case"},
    "capped": {"norm_policy": "capped"},
    "budget": {"norm_policy": "capped"},
    "full": {"norm_policy": "full"},
    "participation": {"norm_policy": "participation"},
    "last_seen": {"norm_policy": "last_seen"},
}
Loop = Callable[["Training"], None]


@dataclass
class Training:
    """What make_private gave a loop, and what its steps did to the model."""

    engine: PerInstancePrivacyEngine
    module: Any
    optimizer: Any
    criterion: Any
    loader: Any
    plain: nn.Module
    inner: torch.optim.Optimizer
    data: Any
    moves: list[torch.Tensor] = field(default_factory=list)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """The step that everybody writes."""
        self.optimizer.zero_grad()
        self.criterion(self.module(inputs), targets).backward()
        self.optimizer.step()


def plain_loop(training: Training) -> None:
    for inputs, targets in training.loader:
        training.step(inputs, targets)


def points(size: int = 24, *, width: int = 6, classes: int = 3, seed: int = 0) -> TensorDataset:
    """Rows with gradients on both sides of the clip bound; row 0 is the largest."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, width, generator=generator)
    inputs *= torch.linspace(0.1, 2.0, size)[:, None]
    inputs[0] = 10.0
    return TensorDataset(inputs, torch.arange(size) % classes)


def linear(*, width: int = 6, outputs: int = 3) -> nn.Module:
    return nn.Linear(width, outputs)


def without(data: Any, row: int) -> TensorDataset:
    keep = [k for k in range(len(data)) if k != row]
    return TensorDataset(*(tensor[keep] for tensor in data.tensors))


def train(
    loop: Loop,
    *,
    data: Any = None,
    policy: str = "worst_case",
    mode: str = "hooks",
    model: Callable[[], nn.Module] = linear,
    criterion: Any = None,
    named: bool = True,
    batch_size: int | None = None,
    divisor: int | None = None,
    caps: Any = None,
    budget: Any = None,
    seed: int = 3,
    noise: float = NOISE,
    clip: Any = CLIP,
    collate: Any = None,
    rate: float = 1.0,
    keep: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    loader: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    attach: bool = False,
    **options: Any,
) -> Training:
    """Run a loop under one policy. Every row is in every draw, unless `batch_size` says other.

    Args:
        divisor: Expected batch size; with a row less it stays what it was: a public constant.
        keep: Whether the model keeps its moves; else every step starts where the first did.
    """
    torch.manual_seed(seed)
    data = points() if data is None else data
    size = len(data)
    plain = model()
    inner = optimizer(plain.parameters(), lr=rate)
    settings: dict[str, Any] = {"accountant": "rdp", "orders": ORDERS, "levels": 256}
    settings |= POLICIES[policy]
    if policy == "capped":
        settings["caps"] = np.ones(size) if caps is None else np.asarray(caps)[:size]
    if policy == "budget":
        settings["budget"] = np.full(3, 1e3) if budget is None else budget
        if caps is not None:
            settings["caps"] = np.asarray(caps)[:size]
    made_by = PerInstancePrivacyEngine(**(settings | (engine or {})))
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    arguments = {
        "module": plain, "optimizer": inner, "noise_multiplier": noise, "max_grad_norm": clip,
        "data_loader": DataLoader(
            data, batch_size=batch_size or size, collate_fn=collate, **(loader or {})
        ),
        "grad_sample_mode": mode, "poisson_sampling": policy != "participation",
        "noise_generator": torch.Generator().manual_seed(seed + 1),
    } | options  # fmt: skip
    if named or mode == "ghost":
        arguments["criterion"] = criterion
    made = made_by.make_private(**arguments)
    private = made[2] if len(made) == 4 else criterion
    training = Training(
        made_by, made[0], made[1], private, made[-1], plain, inner, data,
    )  # fmt: skip
    if divisor is not None:
        training.optimizer.expected_batch_size = divisor
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    parameters = list(plain.parameters())
    first = [p.detach().clone() for p in parameters]

    def moved(*_: Any) -> None:
        scale = training.optimizer.expected_batch_size / rate
        found = [(a.detach() - b) * scale for a, b in zip(parameters, first, strict=True)]
        training.moves.append(torch.cat([f.flatten().double() for f in found]))
        if not keep:
            with torch.no_grad():
                for p, f in zip(parameters, first, strict=True):
                    p.copy_(f)
        else:
            for f, p in zip(first, parameters, strict=True):
                f.copy_(p.detach())

    inner.register_step_post_hook(moved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(training)
    del start
    return training


def shifts(
    loop: Loop, *, row: int = 0, data: Any = None, caps: Any = None, **options: Any
) -> np.ndarray:
    """How far each step's noised sum moves when the row goes, in units of the clip bound."""
    data = points() if data is None else data
    options.setdefault("divisor", len(data))
    whole = train(loop, data=data, caps=caps, **options)
    less = None if caps is None else np.delete(np.asarray(caps), row)
    part = train(loop, data=without(data, row), caps=less, **options)
    assert len(whole.moves) == len(part.moves)
    bound = options.get("clip", CLIP)
    return np.array(
        [
            float((a - b).norm()) / np.linalg.norm(bound)
            for a, b in zip(whole.moves, part.moves, strict=True)
        ]
    )
