"""Models retrained without the forget set: what unlearning is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import _validate as check
from ..capture.row_losses import LossOf
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Collate
from ..unlearning.described import described_task, evaluated_in_training
from ..unlearning.steps.noisy import noisy_steps

MakeSeeded = Callable[[int], tuple[nn.Module, torch.optim.Optimizer]]


def retrained_oracles(
    make: MakeSeeded,
    *,
    privacy_engine: PerInstancePrivacyEngine,
    dataset: Dataset,
    steps: int,
    seeds: Sequence[int],
    criterion: Any = None,
    loss_of: LossOf | None = None,
    collate_fn: Collate | None = None,
    forget_set: npt.ArrayLike | None = None,
    rows: npt.ArrayLike | None = None,
    progress: bool = True,
) -> list[nn.Module]:
    """Retrain from scratch on the data without the forget set, once per seed.

    The training's own kernel is kept: sample rate, expected batch size, clipping, noise, and
    per-instance caps where there were any (THEORY: constants are not re-derived from n − |F|).
    Nothing is charged to the ledgers of `privacy_engine`: oracles are for measuring only.

    Args:
        make: make(seed) -> (plain module, plain optimizer), freshly initialised.
        privacy_engine: The engine of the original training.
        dataset: Its training set, in the same row order.
        steps: Steps of each retraining.
        seeds: One per oracle; batches, noise and the global generator follow it.
        criterion, loss_of, collate_fn: As in UnlearningEngine: what the training minimised and how
            its batches are joined. Default: what `privacy_engine` trained with.
        forget_set: Instances to leave out, shape (members,), by their ids if the engine has
            instance_ids, else by row.
        rows: Rows in their place.
        progress: Show a progress bar when the output is a terminal.

    Returns:
        One plain module per seed.

    Raises:
        TypeError, ValueError: No seed, rows out of range or repeated, or nothing left to train on.
        UnsupportedError: Batches that the task does not describe.
    """
    size = privacy_engine.kernel.num_instances
    gone = privacy_engine.instance_ids.rows(forget_set, rows=rows, size=size, name="forget_set")
    retain = np.setdiff1d(np.arange(size), gone)
    task = described_task(
        privacy_engine, criterion=criterion, loss_of=loss_of, collate_fn=collate_fn
    )
    if not len(retain) or not len(seeds):
        raise ValueError(
            f"Expected rows to train on and at least one seed, got {len(retain)} rows and "
            f"{len(seeds)} seeds."
        )
    count = check.integer("steps", steps, low=1)
    policy = privacy_engine.norm_policy if privacy_engine.norm_policy == "capped" else "worst_case"
    oracles = []
    with tqdm(
        total=count * len(seeds), desc="retraining", disable=None if progress else True
    ) as bar:
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                module, optimizer = make(seed)
                noisy_steps(
                    module,
                    optimizer=optimizer,
                    dataset=dataset,
                    task=task,
                    evaluated=evaluated_in_training(privacy_engine),
                    privacy_engine=privacy_engine,
                    account=privacy_engine.account.fork(norm_policy=policy),
                    retain_set=retain,
                    steps=count,
                    noise_generator=torch.Generator().manual_seed(2 * seed),
                    sampler_generator=torch.Generator().manual_seed(2 * seed + 1),
                    progress=bar,
                )
            oracles.append(module)
    return oracles
