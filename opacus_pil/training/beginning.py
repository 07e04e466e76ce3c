"""Where a training begins to be charged: what Opacus made is watched, its constants are noted.

One function for trainings that the engine made private, one for somebody else's. Both end in
`Trainings.begin`, after which every step charges the account.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from opacus.optimizers import DPOptimizer

from ..capture.collate import unwrapped
from ..capture.fixed_batches import recording_copy
from ..capture.indices import record_indices
from ..capture.norms import chained
from ..capture.shards import Shard
from ..capture.tracker import BatchTracker
from .account import Account
from .attached import Attached
from .distributed import separate_coins
from .kernel import TrainingKernel
from .support import Asked
from .task import Task
from .terms import Ready
from .trainings import Trainings


def begin_made(
    account: Account,
    trainings: Trainings,
    made: tuple[Any, ...],
    *,
    asked: Asked,
    options: Mapping[str, Any],
    ready: Ready,
    shard: Shard | None,
    criterion: Any,
    loss_of: Any,
    secure_mode: bool,
) -> tuple[Any, ...]:
    """Charge for the steps of what Opacus's make_private returned; return it, the loader watched.

    Args:
        account, trainings: Of the engine.
        made: Module, optimizer, the criterion in ghost mode, loader.
        asked: The arguments of make_private.
        options: Those that only Opacus knows.
        ready: What the account has prepared for them.
        shard: Instances of this process; None: all.
        criterion: The loss that was named; None: none was.
        loss_of: In its place.
        secure_mode: As in Opacus.
    """
    module, optimizer, loader = made[0], made[1], made[-1]
    if asked.poisson_sampling:
        tracker = record_indices(loader)
        collate = unwrapped(loader.collate_fn)
        drawn_rate = float(loader.batch_sampler.sample_rate)
    else:
        loader, tracker = recording_copy(loader)
        collate, drawn_rate = loader.collate_fn, 1.0
    if shard is not None and not secure_mode:
        separate_coins(loader.batch_sampler)
    if ready.policy.fixed_batches and not account.terms.named:
        warnings.warn(
            "poisson_sampling=False: fixed batches are charged by norm_policy='participation', "
            "without amplification by sampling and for zero-out neighbours (an instance's slot "
            "stays empty), not for adding or removing one. get_epsilon stays Opacus's, which "
            "claims the amplification. Name the policy to accept this.",
            stacklevel=3,
        )
    account.settle(ready, shard)
    kernel = _kernel(
        asked, optimizer, sample_rate=drawn_rate, shard=shard,
        batch_first=options.get("batch_first", True),
        rand_on_empty=bool(options.get("rand_on_empty", False)),
    )  # fmt: skip
    trainings.begin(
        account,
        module=module,
        optimizer=optimizer,
        tracker=tracker,
        kernel=kernel,
        dataset=loader.dataset,
        task=_task(kernel, criterion=criterion, loss_of=loss_of, collate_fn=collate),
        # Opacus may account at 1 / (n - 1) while drawing at 1 / n: the larger counts.
        sample_rate=max(1 / len(loader), drawn_rate),
    )
    return (*made[:-1], loader)


def begin_attached(
    account: Account,
    trainings: Trainings,
    theirs: Attached,
    *,
    module: Any,
    optimizer: DPOptimizer,
    data_loader: Any,
    asked: Asked,
    ready: Ready,
    shard: Shard | None,
    criterion: Any,
    loss_of: Any,
) -> None:
    """Charge for the steps of a training that was made private elsewhere; arguments as above."""
    tracker = BatchTracker() if data_loader is None else record_indices(data_loader)
    if shard is not None and not optimizer.secure_mode:
        separate_coins(data_loader.batch_sampler)
    counts = account.opacus.get_optimizer_hook_fn(sample_rate=theirs.sample_rate)
    previous = optimizer.step_hook
    optimizer.step_hook = counts if previous is None else chained(previous, counts)
    account.settle(ready, shard)
    kernel = _kernel(
        asked, optimizer, sample_rate=theirs.sample_rate, shard=shard,
        batch_first=getattr(module, "batch_first", True), rand_on_empty=theirs.rand_on_empty,
    )  # fmt: skip
    trainings.begin(
        account,
        module=module,
        optimizer=optimizer,
        tracker=tracker,
        kernel=kernel,
        dataset=theirs.dataset,
        task=_task(kernel, criterion=criterion, loss_of=loss_of, collate_fn=theirs.collate_fn),
        sample_rate=theirs.sample_rate,
        loaded=data_loader is not None,
    )


def _kernel(
    asked: Asked,
    optimizer: DPOptimizer,
    *,
    sample_rate: float,
    shard: Shard | None,
    batch_first: bool,
    rand_on_empty: bool,
) -> TrainingKernel:
    return TrainingKernel(
        sample_rate=sample_rate,
        expected_batch_size=optimizer.expected_batch_size,
        noise_multiplier=asked.noise_multiplier,
        # Opacus scales the noise by the norm of several bounds as it rounds it
        max_grad_norm=float(optimizer.max_grad_norm) if asked.output_bounds else asked.max_grad_norm,
        loss_reduction=optimizer.loss_reduction,
        grad_sample_mode=asked.grad_sample_mode,
        batch_first=batch_first,
        num_instances=asked.size,
        clipping=asked.clipping,
        poisson_sampling=asked.poisson_sampling,
        world_size=1 if shard is None else shard.world_size,
        rand_on_empty=rand_on_empty,
        output_bounds=asked.output_bounds,
    )


def _task(kernel: TrainingKernel, *, criterion: Any, loss_of: Any, collate_fn: Any) -> Task:
    return Task(
        criterion=criterion, own_loss=loss_of, collate_fn=collate_fn,
        reduction=kernel.loss_reduction, per_row=kernel.grad_sample_mode == "ghost",
    )  # fmt: skip
