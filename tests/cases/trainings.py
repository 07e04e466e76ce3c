"""A user's training as a black box: what it claims for a row, and what the row really moved.

The truth is measured on the model, not on anything that the package records: the same training runs
with and without one row, by the same noise, and every step starts at the parameters of the first.
Then the difference of the two models after a step is the difference of the two noised sums, and the
Rényi divergence of the steps is the sum of α · shift² / (2 · std²): every row is in every draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pil import PerInstancePrivacyEngine, UnsupportedError

ORDERS = (2.0, 8.0, 32.0)
NOISE, CLIP, SIZE = 2.0, 1.0, 24
STRONG = ("bound", "output_specific")
MODES = ("hooks", "functorch", "ghost")
POLICIES = ("worst_case", "capped", "budget", "full", "participation", "last_seen")
# Float32: shifts of 1 out of sums of some ten, measured as differences of parameters.
ROUNDING = 1e-3
TINY = 1e-6  # RDP of a shift that is float32's: some 1e-5 of the noise

Loop = Callable[["Training"], None]


@dataclass
class Training:
    """What make_private gave to a loop, and what its steps did to the model."""

    engine: PerInstancePrivacyEngine
    module: Any
    optimizer: Any
    criterion: Any
    loader: Any
    plain: nn.Module
    inner: torch.optim.Optimizer
    data: Any
    moves: list[torch.Tensor] = field(default_factory=list)  # of the sum, by each step
    deviations: list[float] = field(default_factory=list)  # of the noise in it

    def backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.module(inputs), targets).backward()

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """The step that everybody writes."""
        self.backward(inputs, targets)
        self.optimizer.step()

    @property
    def label(self) -> str:
        return self.engine.per_instance.guarantee

    @property
    def reasons(self) -> str:
        return "; ".join(getattr(self.engine.per_instance, "reasons", ()))

    def spent(self, row: int = 0) -> np.ndarray:
        """What is claimed to be spent along the run, shape (orders,); under a budget not this."""
        return self.engine.per_instance.spent_rdp()[row]


def plain_loop(training: Training) -> None:
    for inputs, targets in training.loader:
        training.step(inputs, targets)


def points(size: int = SIZE, *, width: int = 6, classes: int = 3) -> TensorDataset:
    """Rows with gradients on both sides of the clip bound; row 0 has the largest by far."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, width, generator=generator)
    inputs *= torch.linspace(0.1, 2.0, size)[:, None]
    inputs[0] = 10.0
    return TensorDataset(inputs, torch.arange(size) % classes)


def linear() -> nn.Module:
    return nn.Linear(6, 3)


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
    caps: Any = None,
    budget: Any = None,
    seed: int = 3,
    noise: float = NOISE,
    clip: Any = CLIP,
    loader: dict[str, Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    attach: bool = False,
    quiet: bool = True,
    moving: bool = False,
    **options: Any,
) -> Training:
    """Run a loop under one policy; by default every row is in every draw.

    Args:
        named: Whether the criterion is named to the engine, as ghost clipping always does.
        caps: With "capped": shape (instances,), default 1; with "budget" too, if given.
        budget: With "budget": RDP, shape (orders,); default: more than any of these loops spends.
        quiet: Whether warnings are let go.
        moving: Whether the model keeps its moves.
    """
    torch.manual_seed(seed)
    data = points() if data is None else data
    plain = model()
    inner = optimizer(plain.parameters(), lr=1.0)
    settings: dict[str, Any] = {"accountant": "rdp", "orders": ORDERS, "levels": 256}
    settings["norm_policy"] = "capped" if policy == "budget" else policy
    if policy == "capped":
        caps = np.ones(len(data)) if caps is None else caps
    if policy == "budget":
        settings["budget"] = np.full(len(ORDERS), 1e3) if budget is None else budget
    if caps is not None:
        settings["caps"] = np.asarray(caps, dtype=float)
    engine = PerInstancePrivacyEngine(**settings)
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    arguments = {
        "module": plain, "optimizer": inner, "noise_multiplier": noise, "max_grad_norm": clip,
        "data_loader": DataLoader(data, batch_size=batch_size or len(data), **(loader or {})),
        "grad_sample_mode": mode, "poisson_sampling": policy != "participation",
        "noise_generator": torch.Generator().manual_seed(seed + 1),
    } | options  # fmt: skip
    if named or mode == "ghost":
        arguments["criterion"] = criterion
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        made = engine.make_private(**arguments)
        private = made[2] if len(made) == 4 else criterion
        training = Training(engine, made[0], made[1], private, made[-1], plain, inner, data)
        _watch(training, moving=moving)
        loop(training)
    return training


def _watch(training: Training, *, moving: bool) -> None:
    """Note what each step of the plain optimizer did, and take it back."""
    parameters = list(training.plain.parameters())
    first = [p.detach().clone() for p in parameters]

    def moved(*_: Any) -> None:
        optimizer = training.optimizer
        divisor = optimizer.expected_batch_size if optimizer.loss_reduction == "mean" else 1
        found = [
            (p.detach() - f).flatten().double() for p, f in zip(parameters, first, strict=True)
        ]
        training.moves.append(torch.cat(found) * divisor)
        training.deviations.append(float(optimizer.noise_multiplier) * optimizer.max_grad_norm)
        with torch.no_grad():
            for p, f in zip(parameters, first, strict=True):
                (f if moving else p).copy_(p if moving else f)

    training.inner.register_step_post_hook(moved)


def shifts(loop: Loop, *, row: int = 0, data: Any = None, caps: Any = None, **options: Any) -> Any:
    """How far each step's sum moves when the row goes, in units of the noise that it got."""
    data = points() if data is None else data
    whole = train(loop, data=data, caps=caps, **options)
    less = None if caps is None else np.delete(np.asarray(caps), row)
    part = train(loop, data=without(data, row), caps=less, **options)
    assert len(whole.moves) == len(part.moves)
    pairs = zip(whole.moves, part.moves, whole.deviations, strict=True)
    return np.array([float((a - b).norm()) / std for a, b, std in pairs])


def gaussian_rdp(shift: Any) -> np.ndarray:
    """RDP of Gaussian releases that move by so many standard deviations, shape (orders,)."""
    return np.array(ORDERS) * float(np.square(shift).sum()) / 2.0


@dataclass(frozen=True)
class Answer:
    """What the package says of a training, beside the truth.

    Attributes:
        label: Of the per-instance losses; "refused": the training was, with an error of ours.
        words: Reasons of the label, or the error.
        claimed: RDP said to be spent by the row, shape (orders,).
        truth: The same, measured.
    """

    label: str
    words: str
    claimed: np.ndarray
    truth: np.ndarray

    @property
    def honest(self) -> bool:
        """Whether no strong label stands on a number below the truth."""
        below = self.claimed < self.truth * (1.0 - ROUNDING) - TINY
        return self.label not in STRONG or not bool(below.any())

    @property
    def false_by(self) -> float:
        """How many times as large the truth is as the number."""
        return float((self.truth / np.maximum(self.claimed, 1e-300)).max())


def answer(loop: Loop, *, row: int = 0, truth: Any = None, **options: Any) -> Answer:
    """Run a user's training and measure what the package says of it.

    Args:
        truth: RDP, shape (orders,), where it is known; None: it is measured.
    """
    nothing = np.zeros(len(ORDERS))
    try:
        training = train(loop, **options)
    except UnsupportedError as error:
        words = str(error)
        assert "Expected" in words, "an error says what was expected"
        return Answer("refused", words, nothing, nothing)
    if truth is None and training.label in STRONG:
        capped = options.get("policy") in ("capped", "budget")
        measured = options if capped else {**options, "policy": _measuring(options)}
        truth = gaussian_rdp(shifts(loop, row=row, **measured))
    truth = nothing if truth is None else np.asarray(truth)
    return Answer(training.label, training.reasons, training.spent(row), truth)


def _measuring(options: dict[str, Any]) -> str:
    """The policy that a truth is measured under: steps are the same, and nothing is swept."""
    fixed = options.get("policy") == "participation"
    return "participation" if fixed else "worst_case"
