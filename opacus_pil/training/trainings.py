"""Trainings: what one engine has made private so far, and what was said about it.

Knows which training is of which module and optimizer, and the constants they share. Charges and
trains nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from opacus.optimizers import DPOptimizer

from .._validate import FloatArray, IntArray
from ..capture.recorder import Recorder
from ..capture.row_losses import LossOf
from ..capture.sweep import Sweep
from ..capture.tracker import BatchTracker
from ..errors import UnsupportedError
from ..files.fingerprint import Fingerprint, dataset_fingerprint
from .account import Account
from .kernel import TrainingKernel
from .policies import NormPolicy
from .task import Task
from .training import Training

_LOG = logging.getLogger(__name__)


class Trainings:
    """The trainings of one engine, oldest first.

    Args:
        given_fingerprint: The caller's name for the data set's contents; None: they are read.

    Attributes:
        task: What the last training minimises and how its batches are joined, as far as named.
        kernels: Constants of every training, those of earlier processes included.
    """

    def __init__(self, given_fingerprint: str | None = None) -> None:
        self.task = Task()
        self.kernels: list[TrainingKernel] = []
        self._given = given_fingerprint
        self._fingerprint: Fingerprint | None = None  # of the data set when training began
        self._all: list[Training] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or a pickle, has: no training, which go on to charge the original."""
        read = self._fingerprint
        without_rule = None if read is None else replace(read, _old_rule=None)
        return {**self.__dict__, "_fingerprint": without_rule, "_all": []}

    def forked(self) -> Trainings:
        """Return those of a fork: the same constants and task, and no training of its own yet."""
        twin = Trainings(self._given)
        twin.task, twin.kernels = self.task, list(self.kernels)
        twin._fingerprint = self._fingerprint
        return twin

    @property
    def all(self) -> tuple[Training, ...]:
        """Every training of this process, oldest first."""
        return tuple(self._all)

    @property
    def kernel(self) -> TrainingKernel:
        """Constants of the one kind of training; see `PerInstancePrivacyEngine.kernel`."""
        if not self.kernels:
            raise ValueError(
                "Expected make_private to be called first, got an engine without training."
            )
        if any(kernel != self.kernels[0] for kernel in self.kernels):
            raise UnsupportedError(
                f"Expected one training kernel, got {len(self.kernels)} trainings with different "
                "constants. Use one engine per training."
            )
        kernel = self.kernels[0]
        clipped = kernel.clipping == "flat" or bool(kernel.output_bounds)
        if not clipped or not kernel.poisson_sampling:
            raise UnsupportedError(
                f"Expected a training with flat clipping and Poisson sampling, got clipping="
                f"{kernel.clipping!r} and poisson_sampling={kernel.poisson_sampling}. Its kernel "
                "cannot be run again on part of the data."
            )
        if kernel.world_size > 1:
            raise UnsupportedError(
                f"Expected a training in one process, got one in {kernel.world_size}. No process "
                "holds the account of all instances, which running its kernel again would charge."
            )
        return kernel

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What the data set held when the training began; None: nothing was trained."""
        if self._fingerprint is None and self._all:
            self._fingerprint = self.fingerprint_of(self._all[-1].dataset)
        return self._fingerprint

    def fingerprint_of(self, dataset: Any) -> Fingerprint:
        """Return what a data set holds now, or the name that the caller gave its contents."""
        return dataset_fingerprint(dataset, given=self._given)

    def task_with(
        self, *, criterion: Any = None, loss_of: LossOf | None = None, collate_fn: Any = None
    ) -> Task:
        """Return the training's task with what is given in place of its own."""
        task = self.task
        if loss_of is not None:
            task = replace(task, own_loss=loss_of, criterion=None)
        elif criterion is not None:
            task = replace(task, own_loss=None, criterion=criterion)
        return task if collate_fn is None else replace(task, collate_fn=collate_fn)

    def begin(
        self,
        account: Account,
        *,
        module: Any,
        optimizer: DPOptimizer,
        tracker: BatchTracker,
        kernel: TrainingKernel,
        dataset: Any,
        task: Task,
        sample_rate: float,
        population: IntArray | None = None,
        loaded: bool = True,
    ) -> None:
        """Charge an account for every step of one training from now on.

        Args:
            account: Both ledgers.
            module, optimizer, tracker, kernel, dataset, task: As in Training.
            sample_rate: Likewise.
            population: Likewise; the kernel is then that of a training before.
            loaded: Likewise.
        """
        policy = account.terms.policy
        if not task.named:  # of several trainings the same loss is taken to be meant
            task = replace(task, criterion=self.task.criterion, own_loss=self.task.own_loss)
        self.task = task
        began = None if population is not None else self._began(dataset, policy=policy)
        if population is None:
            self.kernels.append(kernel)
        caps = _Caps(account) if policy.enforced else None
        tracker.coins = account.coins_seen
        recorder = Recorder(
            tracker,
            caps=caps,
            caps_rounding=1.0 if account.enforced is None else account.enforced.rounding,
            cap_bounds=() if account.enforced is None else account.enforced.output_bounds,
            rand_on_empty=kernel.rand_on_empty,
            noise_seen=account.noise_seen,
        )
        exchanged = self._exchanged(dataset)
        if exchanged:
            recorder.note("rows_exchanged", exchanged, lasting=True)
        training = Training(
            module=module,
            optimizer=optimizer,
            recorder=recorder,
            charger=account.charger,
            kernel=kernel,
            dataset=dataset,
            task=task,
            population=population,
            sample_rate=sample_rate,
            shard=account.shard,
            loaded=loaded,
            began=began,
        )
        if caps is not None:
            caps.kernel = training.clipping_at
        self._all.append(training)
        known = account.per_instance.num_instances
        _LOG.info("accounting for %d instances by norm_policy=%r", known, policy.name)

    def require_same_rows(self, dataset: Any) -> None:
        """Raise where caps or budgets of an account would be those of other rows.

        Raises:
            UnsupportedError: Says how the data set is another one than that of the training before.
        """
        exchanged = self._exchanged(dataset)
        if exchanged:
            raise UnsupportedError(
                "Expected the data set this engine accounts for, since caps and budgets belong "
                f"to its rows, got another one: {exchanged}. Use a new engine for other data."
            )

    def measured(
        self, account: Account, *, criterion: Any = None, loss_of: LossOf | None = None
    ) -> Sweep:
        """Measure every instance of the last training at its parameters, and charge that later.

        Raises:
            ValueError: Nothing was trained, or no loss is known.
        """
        if not self._all:
            raise ValueError("Expected make_private to be called first, got nothing to measure.")
        training, task = self._all[-1], self.task_with(criterion=criterion, loss_of=loss_of)
        if not task.named:
            raise ValueError(
                "Expected criterion or loss_of to be the loss trained with, got none. Pass it here "
                "or to make_private."
            )
        training.task = self.task = task
        found = training.measure()
        account.charger.observe(found, max_grad_norm=training.clip_bound)
        if account.shard is None:
            return found
        return replace(found, indices=account.shard.rows[found.indices])

    def of_module(self, module: Any) -> list[Training]:
        """Return the trainings of a module, plain or as Opacus wrapped it."""
        return [t for t in self._all if module in (t.module, t.module._module)]

    def of_optimizer(self, optimizer: DPOptimizer) -> Training:
        """Return the training of a private optimizer.

        Raises:
            ValueError: It is of another engine.
        """
        for training in self._all:
            if training.optimizer is optimizer:
                return training
        raise ValueError(
            f"Expected optimizer to be one that this engine made private, got "
            f"{type(optimizer).__name__} of another. Pass what make_private returned."
        )

    # --- inside -------------------------------------------------------------------------------

    def _began(self, dataset: Any, *, policy: NormPolicy) -> Fingerprint | None:
        """Note what the data hold before anybody changes them; return it where order matters."""
        found = None
        if policy.certifiable and self._fingerprint is None:
            found = self._fingerprint = self.fingerprint_of(dataset)
        if not policy.attributed or self._given is not None:
            return None
        return dataset_fingerprint(dataset) if found is None else found

    def _exchanged(self, dataset: Any) -> str:
        """Return how a data set is not that of the training before; "": nothing says so."""
        before = self._all[-1].dataset if self._all else dataset
        if before is dataset:
            return ""
        return self.fingerprint_of(dataset).differs(self.fingerprint_of(before))


class _Caps:
    """The caps of rows in the step under way, of whose kernel only its training knows."""

    kernel: Callable[[], tuple[float, float]]

    def __init__(self, account: Account) -> None:
        self._account = account

    def __call__(self, rows: IntArray) -> FloatArray:
        noise, rate = self.kernel()
        return self._account.caps_in_force(rows, noise=noise, rate=rate)
