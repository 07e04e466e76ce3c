"""The loss barrier between two models: how far the loss rises on the straight line between them.

Knows torch modules and a criterion. Does not know where the models come from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .. import _validate as check
from ..errors import UnsupportedError
from .gap import Criterion, evaluate

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class LossBarrier:
    """Loss along the straight line between two models, on one split.

    Attributes:
        barrier: max over the alphas of loss − chord, ≥ 0 because both ends are among them.
        alphas: Positions on the line, ascending from 0 (first model) to 1 (second model).
        losses: Loss at each alpha, in the unit of the criterion.
    """

    barrier: float
    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def chord(self) -> tuple[float, ...]:
        """The straight line between the two end losses, at each alpha."""
        first, last = self.losses[0], self.losses[-1]
        # Not (1 − a)·first + a·last: this form is exactly constant where the ends are equal.
        return tuple(first + a * (last - first) for a in self.alphas)

    @property
    def above_ends(self) -> float:
        """How far the path rises above the larger end loss, ≥ 0: not more than `barrier`.

        A path that climbs all the way to one end never rises above it, and yet may lie above the
        chord; only a rise above both ends is a ridge that descent has to cross.
        """
        with np.errstate(invalid="ignore"):  # inf − inf: the NaN is the answer
            return float(np.max(self.losses) - np.maximum(self.losses[0], self.losses[-1]))


def loss_barrier(
    module_a: nn.Module,
    module_b: nn.Module,
    *,
    splits: Mapping[str, tuple[Tensor, Tensor]],
    criterion: Criterion,
    points: int = 11,
    batch_size: int = 512,
) -> dict[str, LossBarrier]:
    """Return the loss barrier between two models of one architecture, for each split.

    With θ0, θ1 the parameters of the two models and L the criterion on a split, it is
    max_a [ L((1−a)θ0 + aθ1) − (1−a)L(θ0) − aL(θ1) ], a on an even grid that includes 0 and 1. It is
    0 where the loss is convex between them and large where the models lie in different valleys.

    Args:
        module_a: Model at a = 0.
        module_b: Model at a = 1, with parameters of the same names and shapes.
        splits: Name -> (x, y), as in `evaluate`.
        criterion: As in `evaluate`; the criterion gives L.
        points: Grid points, ≥ 11. A finer grid that contains the coarser one (21 contains 11)
            never finds less.
        batch_size: Rows per forward pass.

    Returns:
        Split name -> LossBarrier. Neither module, their modes and gradients, nor the global random
        state is changed.

    Raises:
        ValueError: Modules that do not match (names the first parameter), fewer than 11 points.
        UnsupportedError: BatchNorm or other running statistics: they are not parameters, and
            statistics gathered at θ0 or θ1 are wrong for every point between, so the rise would
            measure the statistics and not the loss. Buffers that differ between the modules are
            refused for the same reason: there is no agreed point between them.

    Edge cases:
        the same model twice   0
        a loss not finite      inf where only inner points are inf, else NaN

    Source: Frankle et al. (2020), arXiv:1912.05671, Sec. 2 (error barrier); here against the
        chord between the end losses, where the paper takes their mean.
    Privacy: as in `evaluate`.
    """
    count = check.integer("points", points, low=11)
    _refuse_mismatch(module_a, module_b)
    # A copy carries each point of the line, so the callers' modules are only read.
    middle = copy.deepcopy(module_a)
    ends = dict(module_a.named_parameters()), dict(module_b.named_parameters())
    alphas = tuple(np.linspace(0.0, 1.0, count).tolist())
    losses: dict[str, list[float]] = {name: [] for name in splits}
    for alpha in alphas:
        with torch.no_grad():
            for name, parameter in middle.named_parameters():
                start, stop = ends[0][name], ends[1][name].to(parameter.device)
                # lerp is exact at both ends and where the ends are equal; a sum of products is not.
                parameter.copy_(torch.lerp(start, stop, alpha))
        for name, (x, y) in splits.items():
            metrics = evaluate(middle, x, y, criterion=criterion, batch_size=batch_size)
            losses[name].append(metrics.loss)
    return {name: _barrier(alphas, tuple(values)) for name, values in losses.items()}


def _barrier(alphas: tuple[float, ...], losses: tuple[float, ...]) -> LossBarrier:
    """Measure losses against the chord between their ends."""
    line = LossBarrier(0.0, alphas, losses)
    with np.errstate(invalid="ignore"):  # inf − inf: the NaN is the answer
        rise = np.subtract(losses, line.chord)
    return LossBarrier(float(rise.max()), alphas, losses)  # NaN, if any, survives max


def _refuse_mismatch(module_a: nn.Module, module_b: nn.Module) -> None:
    """Raise unless the straight line between the two modules is defined by their parameters."""
    for module in (module_a, module_b):
        for name, part in module.named_modules():
            if isinstance(part, _BATCH_NORMS) or getattr(part, "running_mean", None) is not None:
                raise UnsupportedError(
                    f"Expected modules without running statistics, got {type(part).__name__} at "
                    f"{name!r}. Statistics of an end point are wrong between the two; use "
                    "GroupNorm or LayerNorm (opacus.validators.ModuleValidator.fix)."
                )
    for kind in ("parameters", "buffers"):
        first = dict(getattr(module_a, f"named_{kind}")())
        second = dict(getattr(module_b, f"named_{kind}")())
        if first.keys() != second.keys():
            odd = sorted(first.keys() ^ second.keys())[0]
            raise ValueError(
                f"Expected modules with the same {kind}, got {odd!r} in one only. "
                "Pass two models of one architecture, both plain or both wrapped."
            )
        for name, value in first.items():
            if value.shape != second[name].shape:
                raise ValueError(
                    f"Expected modules with the same shapes, got {kind[:-1]} {name!r} of "
                    f"{tuple(value.shape)} and {tuple(second[name].shape)}. "
                    "Pass two models of one architecture."
                )
            if kind == "buffers" and not torch.equal(value, second[name].to(value.device)):
                raise UnsupportedError(
                    f"Expected equal buffers in both modules, got a different {name!r}. "
                    "A buffer has no agreed value between two models; make it a constant."
                )
