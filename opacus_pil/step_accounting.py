"""StepAccounting: the hook on one optimizer, from a noisy step to a charge of both ledgers.

Runs after clipping and noise and before the parameters move, so that a full pass measures the
parameters the step was computed at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.utils.data import default_collate

from ._validate import IntArray
from .capture.norms import record_norms
from .capture.recorder import Recorder
from .capture.shards import Shard
from .capture.sweep import Sweep, sweep
from .norm_policy import Charger
from .training_kernel import TrainingKernel


class StepAccounting:
    """Called by Opacus's optimizer once per noisy step.

    Args:
        module: What Opacus made of the module: wrapper or hooks object.
        optimizer: Opacus's optimizer, its accounting hook already attached.
        recorder: Collects the step's rows and norms.
        charger: Turns them into charges.
        kernel: Constants of the training.
        dataset: Rows to measure in a full pass.
        collate_fn: Joins them to a batch.
        population: Rows that may be drawn; None: all.
        criterion: Loss to measure with; None: not known.
        sample_rate: Largest of the accounted and the drawn rate.
        shard: Rows that the charger's instances are; None: all, in order.
        loaded: Whether batches come from a loader that joins them by `collate_fn`; else from one
            that nothing is known about.
    """

    def __init__(
        self,
        *,
        module: Any,
        optimizer: DPOptimizer,
        recorder: Recorder,
        charger: Charger,
        kernel: TrainingKernel,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] | None,
        population: IntArray | None,
        criterion: Any,
        sample_rate: float,
        shard: Shard | None = None,
        loaded: bool = True,
    ) -> None:
        self.criterion = criterion
        self.tracker = recorder.tracker
        self.module = module
        self.optimizer = optimizer
        self.recorder = recorder
        self._charger = charger
        self.kernel = kernel
        self.dataset = dataset
        self._collate_fn = collate_fn
        self._population = population
        self.sample_rate = sample_rate
        self._shard = shard
        self._loaded = loaded
        self._opacus_hook = optimizer.step_hook
        self._ghost = kernel.grad_sample_mode == "ghost"
        record_norms(optimizer, recorder, module=module)
        optimizer.step_hook = self
        recorder.guarded = True

    def __call__(self, optimizer: DPOptimizer) -> None:
        """Charge Opacus's ledger, then the per-instance one."""
        record = self.recorder.take(max_grad_norm=self.clip_bound)
        if self._shard is not None and record.indices is not None:
            record = replace(record, indices=self._shard.positions(record.indices))
        self._opacus_hook(optimizer)
        if self.clip_bound != optimizer.max_grad_norm:
            self._charger.warn(
                "clip bound",
                f"The module clips to {self.clip_bound:g}, the noise is scaled to "
                f"{optimizer.max_grad_norm:g}. Instances are charged for what happened; Opacus's "
                "own epsilon is not.",
            )
        noise, count = self._noise(optimizer)
        # An instance is in at least one of k summed draws with probability at most k·q, and then
        # moves the sum by at most k clip bounds. Only steps of unknown rows have k > 1.
        batches = max(optimizer.accumulated_iterations, record.draws)
        std = noise * float(optimizer.max_grad_norm)
        self._charger.note_update(
            described_update(
                optimizer.original_optimizer,
                clip_bound=self.clip_bound,
                noise_std=std,
                divisor=optimizer.expected_batch_size,
                loss_reduction=optimizer.loss_reduction,
                batches=batches,
                default_batches=self._loaded and self._collate_fn in (None, default_collate),
            )
        )
        self._charger.charge(
            record,
            noise_std=std / record.draws,
            sample_rate=min(self.sample_rate * batches, 1.0),
            measure=self.measure,
            random_forward=self.random_forward,
            released_count=count,
        )
        if self.kernel.rand_on_empty:
            # Alone in a batch, an instance takes the place of Opacus's random one: it moves the sum
            # by both gradients.
            self._charger.accountant.weaken("estimate")

    @property
    def clip_bound(self) -> float:
        """Bound that gradients are clipped to: the module's own in ghost mode."""
        holder = self.module if self._ghost else self.optimizer
        return float(holder.max_grad_norm)

    def coming_kernel(self) -> tuple[float, float]:
        """Return noise multiplier and sample rate that the step under way will be charged at."""
        noise, _ = self._noise(self.optimizer)
        std = noise * float(self.optimizer.max_grad_norm)  # in the order of the charge, to the bit
        return std / self.clip_bound, self.sample_rate  # one batch per step: caps refuse several

    def _noise(self, optimizer: DPOptimizer) -> tuple[float, float]:
        """Return the gradient's noise multiplier, and the released count's shift in its units."""
        noise = float(optimizer.noise_multiplier)
        if self.kernel.clipping != "adaptive":
            return noise, 0.0
        return adaptive_noise(noise, float(optimizer.unclipped_num_std))

    def random_forward(self) -> bool:
        """Whether the training's forward pass draws dropout masks."""
        return any(
            isinstance(part, _DropoutNd) and part.training and part.p > 0
            for part in self.module._module.modules()
        )

    def measure(self) -> tuple[Sweep, bool]:
        """Run a full pass over the instances in training; say whether dropout is active there.

        The pass's indices are the charger's, in a shard not the data set's.
        """
        rows = members = self._charger.active_rows()
        if self._population is not None:
            rows = members = np.intersect1d(rows, self._population)
        if self._shard is not None:
            rows = self._shard.rows[members]
        inner = self.module._module
        names = None
        if not self._ghost:  # flat clipping clips what the optimizer holds
            held = {id(p) for p in self.optimizer.params}
            names = {n for n, p in inner.named_parameters() if id(p) in held and p.requires_grad}
        found = sweep(
            self.module,
            self.dataset,
            criterion=self.criterion,
            indices=rows,
            loss_reduction=self.kernel.loss_reduction,
            batch_first=self.kernel.batch_first,
            collate_fn=self._collate_fn,
            parameters=names,
        )
        return replace(found, indices=members), self.random_forward()


def described_update(
    optimizer: Optimizer,
    *,
    clip_bound: float,
    noise_std: float,
    divisor: int | None,
    loss_reduction: str,
    batches: int,
    default_batches: bool,
) -> str:
    """Return in words what makes a step of a batch; equal words mean equal steps.

    Args:
        optimizer: The plain one.
        clip_bound: That gradients are clipped to.
        noise_std: On their sum.
        divisor: What a mean is divided by.
        loss_reduction: "mean" or "sum".
        batches: How many drawn batches the step may have summed.
        default_batches: Whether torch's default_collate joins the data set's items to a batch.
    """
    return (
        f"{type(optimizer).__name__} {described_groups(optimizer)}, {batches} drawn, clipped to "
        f"{float(clip_bound)!r}, noise {float(noise_std)!r} on the {loss_reduction}, over "
        f"{divisor}, joined by {'default_collate' if default_batches else 'another collate_fn'}"
    )


def described_groups(optimizer: Optimizer) -> str:
    """Return the settings of all groups, numbers with every digit, whatever their type."""
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "initial_lr")}
        for group in optimizer.param_groups
    ]
    return repr(groups)


def _plain(value: Any) -> Any:
    """Return a setting as Python numbers: a tensor prints four digits only."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if type(value) is int else value


def adaptive_noise(noise_multiplier: float, unclipped_num_std: float) -> tuple[float, float]:
    """Return adaptive clipping's noise on gradients, and its count's shift in units of that noise.

    It splits the nominal noise: gradients get (z^-2 - (2σ)^-2)^(-1/2), the count of unclipped rows
    gets σ. The count is a sum of zeros and ones, so that an instance moves it by 1, not by the 1/2
    that the split assumes.

    Source: Andrew et al. (2021), arXiv:1905.03871, Theorem 1, as in Opacus's AdaClipDPOptimizer.

    >>> adaptive_noise(1.0, 10.0)[1] > 0.1
    True
    """
    if noise_multiplier == 0.0:
        return 0.0, 0.0
    noise = (noise_multiplier**-2 - (2.0 * unclipped_num_std) ** -2) ** -0.5
    return noise, noise / unclipped_num_std
