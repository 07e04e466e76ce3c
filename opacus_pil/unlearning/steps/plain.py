"""Plain steps: ordinary fine-tuning, without noise and without a certificate.

Changes a plain module in place. Knows no method: what is added to the loss is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..._validate import IntArray
from ...training.task import Task, training_mode

AfterStep = Callable[[int], bool]  # told how many steps were taken; True: stop here
ExtraTerm = Callable[[nn.Module], torch.Tensor]


def plain_steps(
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    task: Task,
    retain_set: IntArray,
    batch_size: int,
    steps: int,
    sampler_generator: torch.Generator,
    evaluated: frozenset[str] = frozenset(),
    sampler_state: torch.Tensor | None = None,
    extra: ExtraTerm | None = None,
    after_step: AfterStep | None = None,
    progress: tqdm | None = None,
) -> None:
    """Run `steps` steps of ordinary fine-tuning on random batches of the retain set, in place.

    There is no noise, hence no certificate, and every retained instance's loss becomes infinite.
    `extra(module)` is added to the loss of each batch. Modes are as in `noisy_steps`.
    """
    if sampler_state is not None:
        sampler_generator.set_state(sampler_state)
    training_mode(module, evaluated=evaluated)
    for number in range(1, steps + 1):
        batch = random_batch(
            dataset,
            retain_set,
            task=task,
            size=batch_size,
            generator=sampler_generator,
            module=module,
        )
        optimizer.zero_grad()
        loss = task.batch_loss(module, batch)
        (loss if extra is None else loss + extra(module)).backward()
        optimizer.step()
        if reported(number, after_step, progress):
            break


def random_batch(
    dataset: Dataset,
    rows: IntArray,
    *,
    task: Task,
    size: int,
    generator: torch.Generator,
    module: nn.Module,
) -> Any:
    """Return `size` of the rows without repetition (all if there are fewer), on the device."""
    drawn = torch.randperm(len(rows), generator=generator)[:size]
    items = [dataset[int(row)] for row in rows[drawn.numpy()]]
    return task.collate(items, device=next(module.parameters()).device)


def reported(number: int, after_step: AfterStep | None, progress: tqdm | None) -> bool:
    """Tell the observers about a step; whether one of them wants to stop."""
    if progress is not None:
        progress.update()
    return after_step is not None and after_step(number)
