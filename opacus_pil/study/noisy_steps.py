"""The models and the steps of the sweeps: Poisson batches, SGD, and the same noise as DP-SGD's.

A plain loop without per-sample gradients, for speed: nothing is clipped, so that a noisy step is
one of Opacus's with a clipping bound that never binds (a test compares the two). Noise comes from
Opacus's own function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from opacus.optimizers.optimizer import _generate_noise
from torch.nn.functional import cross_entropy

from .. import _validate as check
from .settings import Condition

AfterStep = Callable[[int, torch.Tensor, torch.Tensor], None]


def make_model(kind: str, *, side: int, seed: int) -> nn.Module:
    """Return a freshly initialised network for side × side grey images of ten classes.

    About 5,000 parameters ("cnn") or 25,000 ("mlp") on 28 × 28.
    """
    check.choice("kind", kind, ("cnn", "mlp"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "mlp":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(side * side, 32), nn.ReLU(), nn.Linear(32, 10)
            )
        stride = 3 if side >= 16 else 1
        wide = (side - 1) // stride + 1
        after = (wide - 1) // 2 + 1
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride, 2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * after * after, 10),
        )


def noise_multiplier(condition: Condition, *, batch_size: int) -> float:
    """Return the nominal noise on the summed gradient, as a multiple of a clipping bound of 1.

    A step moves the parameters by step_size / batch_size times the noisy sum.
    """
    return condition.nominal_noise_std * batch_size / condition.step_size


def run_steps(
    module: nn.Module,
    *,
    images: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    condition: Condition,
    sample_rate: float,
    batch_size: int,
    steps: int,
    seed: int,
    after_step: AfterStep | None = None,
) -> None:
    """Take `steps` steps on Poisson batches of some rows, in place.

    Args:
        module: Trained in place, in training mode.
        images, labels: The whole training set.
        rows: Rows to draw from, shape (n,).
        condition: Step size, weight decay and noise.
        sample_rate: Probability of each row at each step; that of the whole set, also on a part.
        batch_size: Divides the sum of gradients; that of the whole set, also on a part.
        steps: Number of steps.
        seed: Of batches and noise.
        after_step: Called as after_step(step, rows drawn, their outputs before the step).
    """
    coins = torch.Generator().manual_seed(2 * seed)
    noise = torch.Generator().manual_seed(2 * seed + 1)
    scale = condition.noise_std * batch_size / condition.step_size
    optimizer = torch.optim.SGD(
        module.parameters(), lr=condition.step_size, weight_decay=condition.weight_decay
    )
    x, y = images[rows], labels[rows]
    module.train()
    for step in range(1, steps + 1):
        drawn = (torch.rand(len(rows), generator=coins) < sample_rate).nonzero()[:, 0]
        optimizer.zero_grad()
        outputs = module(x[drawn])
        cross_entropy(outputs, y[drawn], reduction="sum").backward()
        for parameter in module.parameters():
            assert parameter.grad is not None
            if scale:
                parameter.grad += _generate_noise(scale, parameter, generator=noise)
            parameter.grad /= batch_size
        optimizer.step()
        if after_step is not None:
            after_step(step, rows[drawn], outputs.detach())


@torch.no_grad()
def losses_and_correct(
    module: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every row's own cross-entropy and whether it is predicted correctly."""
    outputs = torch.cat([module(part) for part in images.split(512)])
    losses = cross_entropy(outputs, labels, reduction="none")
    return losses, outputs.argmax(dim=1) == labels
