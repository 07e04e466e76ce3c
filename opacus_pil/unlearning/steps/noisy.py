"""Noisy steps of the training's own kernel.

Changes a plain module in place; plans and certifies nothing. Noise, clipping and sampling are
Opacus's own: there is no second implementation here.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn as nn
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch.utils.data import Dataset
from tqdm import tqdm

from ..._validate import IntArray
from ...capture.randomness import untouched_generators
from ...capture.row_losses import moved_to, typed_pair
from ...privacy_engine import PerInstancePrivacyEngine
from ...training.account import Account
from ...training.task import Task, training_mode
from .plain import AfterStep, reported


def noisy_steps(
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    task: Task,
    privacy_engine: PerInstancePrivacyEngine,
    account: Account,
    retain_set: IntArray,
    steps: int,
    evaluated: frozenset[str] = frozenset(),
    noise_generator: torch.Generator | None = None,
    sampler_generator: torch.Generator | None = None,
    sampler_state: torch.Tensor | None = None,
    after_step: AfterStep | None = None,
    progress: tqdm | None = None,
) -> None:
    """Run `steps` steps of the training's own DP-SGD kernel on the retain set, in place.

    Every step charges the ledgers of `account`, a fork of those of `privacy_engine`, whose kernel
    it is. Full-batch training (sample_rate 1) makes these the steps of noisy gradient descent
    (Langevin). A resumed run passes `sampler_state`, the state of `sampler_generator` after the
    last batch that was used. The module is in training mode meanwhile and afterwards, except for
    the submodules in `evaluated` and frozen statistics.
    """
    training_mode(module, evaluated=evaluated)
    made = privacy_engine.make_private_on(
        retain_set,
        module=module,
        optimizer=optimizer,
        dataset=dataset,
        criterion=task.criterion,
        loss_of=task.own_loss,
        collate_fn=task.collate_fn,
        steps=steps,
        noise_generator=noise_generator,
        sampler_generator=sampler_generator,
        account=account,
    )
    wrapped, private_optimizer, loader = made[0], made[1], made[-1]
    ghost = privacy_engine.kernel.grad_sample_mode == "ghost"
    device = next(module.parameters()).device
    with untouched_generators():
        _show_a_batch(loader, task, dataset[int(retain_set[0])])
    batches = iter(loader)  # draws a base seed that the batches do not depend on
    if sampler_state is not None and sampler_generator is not None:
        sampler_generator.set_state(sampler_state)
    for number, drawn in enumerate(batches, start=1):
        batch = moved_to(drawn, device)
        private_optimizer.zero_grad()
        if ghost:
            _ghost_loss(task, batch, module=module, made=made).backward()
        else:
            task.batch_loss(wrapped, batch).backward()
        private_optimizer.step()
        if reported(number, after_step, progress):
            break
    if hasattr(wrapped, "to_standard_module"):
        wrapped.to_standard_module()


def _ghost_loss(task: Task, batch: Any, *, module: nn.Module, made: Any) -> Any:
    """Return what ghost clipping differentiates, in place of a loss."""
    wrapped, private_optimizer, private_loss, _ = made
    if task.own_loss is None:  # Opacus's own, which asks the criterion for a loss per row
        inputs, targets = typed_pair(module, batch)
        return private_loss(wrapped(inputs), targets)
    losses = task.loss_of(wrapped, batch)
    return DPTensorFastGradientClipping(wrapped, private_optimizer, losses, task.reduction)


def _show_a_batch(loader: Any, task: Task, item: Any) -> None:
    """Let Opacus's loader know what a batch looks like: the first draw may be an empty one."""
    with contextlib.suppress(Exception):  # one row alone may be no batch: then it is as in Opacus
        loader.collate_fn.first_batch = task.collate([item])
