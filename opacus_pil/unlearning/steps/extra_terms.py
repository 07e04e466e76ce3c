"""What well-known uncertified methods add to the loss of a retained batch.

Nothing is proved about either; they are baselines.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from ..._validate import IntArray
from ...training.task import Task
from .plain import ExtraTerm, random_batch


def l1_sparse(*, strength: float, steps: int, done: int = 0) -> ExtraTerm:
    """Return the term strength · (1 − t/steps) · ‖θ‖₁ of step t = done, done + 1, …

    The penalty decays linearly, so that sparsity is sought first and accuracy after it.

    Source: Jia et al. (2023), arXiv:2304.04934, sparsity-aware unlearning, linear decay.
    """
    taken = done

    def term(module: nn.Module) -> torch.Tensor:
        nonlocal taken
        weight = strength * (1.0 - taken / steps)
        taken += 1
        size = torch.stack([parameter.abs().sum() for parameter in module.parameters()]).sum()
        return weight * size

    return term


def gradient_difference(
    *,
    strength: float,
    dataset: Dataset,
    forget_set: IntArray,
    task: Task,
    batch_size: int,
    generator: torch.Generator,
) -> ExtraTerm:
    """Return the term −strength · loss on a random batch of the forget set: ascent there.

    It reads the forget set, so the result depends on it in a new way; the loss ascended on is
    unbounded, and long runs ruin the model.

    Source: Liu, Liu, Stone (2022), arXiv:2203.12817, as named in Maini et al. (2024),
        arXiv:2401.06121.
    """

    def term(module: nn.Module) -> torch.Tensor:
        batch = random_batch(
            dataset, forget_set, task=task, size=batch_size, generator=generator, module=module
        )
        return -strength * task.batch_loss(module, batch)

    return term
