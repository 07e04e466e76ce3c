"""The runs themselves: so many noisy steps of Opacus's optimizer, or so many plain ones.

Each function takes a plain module and changes it in place; it plans and certifies nothing. Noise,
clipping and sampling are Opacus's own: there is no second implementation here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch.utils.data import Dataset
from tqdm import tqdm

from .._validate import IntArray
from ..capture import sweep
from ..capture.randomness import untouched_generators
from ..capture.row_losses import moved_to, typed_pair
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Task, training_mode
from .optimizer_copy import fresh_optimizer

AfterStep = Callable[[int], bool]  # told how many steps were taken; True: stop here
ExtraTerm = Callable[[nn.Module], torch.Tensor]


def plain_module(module: nn.Module) -> nn.Module:
    """Return the user's own module from inside Opacus's wrapper."""
    if isinstance(module, AbstractGradSampleModule | AbstractGradSampleHooks):
        inner: nn.Module = module._module
        return inner
    return module


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a copy of the user's module that shares nothing with Opacus, in the same modes.

    Opacus hangs per-sample and summed gradients on the original; a copy must not carry them over,
    because they were computed with the instances that are to be forgotten.
    """
    twin = sweep.plain_copy(module)
    for mine, theirs in zip(plain_module(module).modules(), twin.modules(), strict=True):
        theirs.training = mine.training
    return twin


def with_still_statistics(module: nn.Module) -> nn.Module:
    """Return the module itself; a copy where a frozen BatchNorm of it is in training mode.

    While training it was in evaluation mode, and every pass leaves it there; the caller's module is
    not touched.
    """
    woken = [
        part
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._NormBase)
        and part.training
        and part.track_running_stats
        and not any(p.requires_grad for p in part.parameters())
    ]
    if not woken:
        return module
    for part in woken:
        part.training = False
    try:
        return plain_copy(module)
    finally:
        for part in woken:
            part.training = True


def optimizer_like(
    optimizer: torch.optim.Optimizer, module: nn.Module, twin: nn.Module
) -> torch.optim.Optimizer:
    """Return an optimizer of the same kind and settings for `twin`, without what it computed."""
    return fresh_optimizer(optimizer, module=plain_module(module), twin=twin)


def noisy_steps(
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    task: Task,
    privacy_engine: PerInstancePrivacyEngine,
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

    Every step charges the ledgers of `privacy_engine`. Full-batch training (sample_rate 1) makes
    these the steps of noisy gradient descent (Langevin). A resumed run passes `sampler_state`, the
    state of `sampler_generator` after the last batch that was used. The module is in training mode
    meanwhile and afterwards, except for the submodules in `evaluated` and frozen statistics.
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
    )
    wrapped, private_optimizer, loader = made[0], made[1], made[-1]
    ghost = len(made) == 4
    device = next(module.parameters()).device
    with untouched_generators():
        _show_a_batch(loader, task, dataset[int(retain_set[0])])
    batches = iter(loader)  # draws a base seed that the batches do not depend on
    if sampler_state is not None and sampler_generator is not None:
        sampler_generator.set_state(sampler_state)
    for number, drawn in enumerate(batches, start=1):
        batch = moved_to(drawn, device)
        private_optimizer.zero_grad()
        if not ghost:
            loss: Any = task.batch_loss(wrapped, batch)
        elif task.own_loss is None:  # Opacus's own, which asks the criterion for a loss per row
            inputs, targets = typed_pair(module, batch)
            loss = made[2](wrapped(inputs), targets)
        else:
            losses = task.loss_of(wrapped, batch)
            loss = DPTensorFastGradientClipping(wrapped, private_optimizer, losses, task.reduction)
        loss.backward()
        private_optimizer.step()
        if reported(number, after_step, progress):
            break
    if hasattr(wrapped, "to_standard_module"):
        wrapped.to_standard_module()


def _show_a_batch(loader: Any, task: Task, item: Any) -> None:
    """Let Opacus's loader know what a batch looks like: the first draw may be an empty one."""
    with contextlib.suppress(Exception):  # one row alone may be no batch: then it is as in Opacus
        loader.collate_fn.first_batch = task.collate([item])


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
