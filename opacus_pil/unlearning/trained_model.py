"""TrainedModel: a model, what it was trained with, and what has run on it since.

Plans and runs nothing: `engine.py` does. Notices whatever changed behind its back.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from opacus.optimizers import DPOptimizer
from torch.utils.data import Dataset

from .. import _validate as check
from .._validate import IntArray
from ..accounting.instance_ids import InstanceIds
from ..capture.row_losses import LossOf
from ..dataset_fingerprint import dataset_fingerprint
from ..errors import CertificateError, LedgerError, UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from ..step_accounting import described_groups
from ..training.task import Collate, Task
from .calibration import mean_log_loss
from .described import described_task, evaluated_in_training, optimizer_of, require_own_engine
from .engine_state import engine_state, load_engine_state
from .grounds import require_no_running_statistics, weights_left
from .methods import plain_module, with_still_statistics
from .model_hash import model_hash
from .phase import Phase
from .plan import NOISE_FREE_METHODS, CertifiedPlan, UnlearningPlan
from .rehearsal import Rehearsal, rehearsed
from .step_size import require_moving_steps
from .trained_data import TrainedData

MakeModel = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]


class TrainedModel:
    """A trained model on which runs of unlearning follow each other.

    Args and Raises: those of UnlearningEngine, without requests.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        criterion: Any = None,
        privacy_engine: PerInstancePrivacyEngine | None = None,
        loss_of: LossOf | None = None,
        collate_fn: Collate | None = None,
        instance_ids: npt.ArrayLike | None = None,
        training_steps: int | None = None,
        feature_norm: float | None = None,
        batch_size: int | None = None,
        make_model: MakeModel | None = None,
        progress: bool = True,
    ) -> None:
        if privacy_engine is not None:
            require_own_engine(privacy_engine)
        self._evaluated = evaluated_in_training(privacy_engine)
        require_no_running_statistics(plain_module(module), evaluated=self._evaluated)
        self._module = with_still_statistics(plain_module(module))
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        self._optimizer = optimizer_of(self._module, inner, privacy_engine=privacy_engine)
        self._dataset = dataset
        self._task = described_task(
            privacy_engine, criterion=criterion, loss_of=loss_of, collate_fn=collate_fn
        )
        self._engine = privacy_engine
        self._feature_norm = feature_norm
        self._make_model = make_model
        self._progress = progress
        self._size = len(dataset)  # type: ignore[arg-type]
        if privacy_engine is not None:
            kernel = privacy_engine.kernel
            if instance_ids is not None:
                raise ValueError(
                    "Expected instance_ids without privacy_engine only, got both. Pass them to "
                    "PerInstancePrivacyEngine(instance_ids=...), whose ledger names them too."
                )
            if kernel.num_instances != self._size:
                raise ValueError(
                    check.expected(
                        "dataset",
                        f"to be the training set of {kernel.num_instances} instances",
                        self._size,
                        "Pass it in the row order of training.",
                    )
                )
            steps = privacy_engine.per_instance.steps
            if training_steps not in (None, steps):
                raise ValueError(
                    f"Expected training_steps to be the {steps} steps of the ledger, got "
                    f"{training_steps}. Leave it out with privacy_engine."
                )
            self._batch_size = float(kernel.expected_batch_size)
        else:
            cure = "It cannot be read off a ledger without privacy_engine."
            steps = check.integer("training_steps", training_steps, low=1, cure=cure)
            self._batch_size = float(check.integer("batch_size", batch_size, low=1, cure=cure))
        self._ids = InstanceIds(instance_ids)
        if privacy_engine is not None:
            self._ids = privacy_engine.instance_ids
        self._ids.require_size(self._size)
        self._data = TrainedData(
            dataset,
            began=None if privacy_engine is None else privacy_engine.fingerprint,
            fingerprint_of=(
                dataset_fingerprint if privacy_engine is None else privacy_engine.fingerprint_of
            ),
            ids=self._ids,
        )
        self._weights = weights_left(privacy_engine, self._module)
        self._training_steps = check.integer("training_steps", steps, low=0)
        self._phases = [Phase(self._training_steps, frozenset(), "training")]
        self._forgotten: frozenset[int] = frozenset()
        self._requests_served = 0
        self._seeds: frozenset[int] = frozenset()  # of the runs that made this model
        self._ledger_steps = 0
        self._note_ledger()

    @property
    def module(self) -> nn.Module:
        """The plain model as it is now: trained, or unlearned by the last run."""
        return self._module

    @property
    def forgotten(self) -> frozenset[int]:
        """Rows forgotten so far."""
        return self._forgotten

    @property
    def retain_set(self) -> IntArray:
        """Rows that are still in the training set, ascending."""
        return np.setdiff1d(np.arange(self._size), list(self.forgotten))

    def branch(self) -> Self:
        """Return an engine in the same state, whose runs leave this one and its ledgers alone.

        For trying out plans, as `evaluation.calibrate` does.
        """
        branch = copy.copy(self)
        branch._engine = None if self._engine is None else self._engine.fork()
        branch._phases = list(self._phases)
        return branch

    @property
    def dataset(self) -> Dataset:
        """The training set, forgotten rows included."""
        return self._dataset

    @property
    def task(self) -> Task:
        """What training minimised, and how its batches are joined: unlearning does the same."""
        return self._task

    @property
    def instance_ids(self) -> InstanceIds:
        """The ids of the data set's rows."""
        return self._ids

    def mean_log_loss(
        self,
        forget: npt.ArrayLike | None = None,
        *,
        rows: npt.ArrayLike | None = None,
        order: float = 2.0,
    ) -> float:
        """Return the mean over a set of the log of its privacy losses (RDP at `order`, in nats).

        What `calibrate` fits times to unlearn against. The labels of the losses are the ledger's.

        Args:
            forget: Instances, by their ids if there are ids, else by row.
            rows: Rows in their place.
            order: Rényi order, one of the ledger's.

        Raises:
            ValueError: No privacy_engine, an order the ledger does not have, losses of 0 or inf.
        """
        if self._engine is None:
            raise ValueError("Expected privacy_engine for privacy losses, got None. Pass it.")
        ledger, found = self._engine.per_instance, self._named(forget, rows)
        return mean_log_loss(ledger.rdp(found), orders=ledger.orders, order=order)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, phases, optimizer settings and both ledgers, to be saved.

        Tensors, arrays and plain values only; no optimizer state, which was computed with instances
        that are forgotten since.

        Privacy: the ledgers are not private to release.
        """
        return engine_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, in an engine that was built like the one that saved it.

        Raises:
            LedgerError: Another data set size, kernel, model, optimizer, training or ledger.
                Nothing is changed.
        """
        load_engine_state(self, state)

    # --- inside -------------------------------------------------------------------------------

    def _named(self, forget: npt.ArrayLike | None, rows: npt.ArrayLike | None) -> IntArray:
        """Return the rows that a caller names, ascending."""
        return np.sort(self._ids.rows(forget, rows=rows, size=self._size, name="forget"))

    def _checked_forget(self, rows: IntArray) -> IntArray:
        if not len(rows):
            raise ValueError("Expected forget to name at least one row, got none.")
        before = sorted(self.forgotten.intersection(rows.tolist()))
        if before:
            raise ValueError(
                f"Expected rows that are still in the training set, got {len(before)} of "
                f"{len(rows)} forgotten before (first: {self._ids.of(before[:1])[0]}). Leave them "
                "out."
            )
        if len(rows) + len(self.forgotten) == self._size:
            raise ValueError(
                f"Expected a forget set that leaves something to train on, got all "
                f"{len(rows)} remaining rows. Delete the model instead."
            )
        return rows

    def _rehearsed(self, rows: IntArray, seen: list[Rehearsal] | None = None) -> Rehearsal:
        """Run the task on two rows that stay; what was `seen` before is not run again.

        Raises:
            UnsupportedError: It cannot be run as it is described.
        """
        if seen:
            return seen[0]
        stay = np.setdiff1d(self.retain_set, rows)
        found = rehearsed(
            self._task,
            module=self._module,
            optimizer=self._optimizer,
            dataset=self._dataset,
            rows=np.unique(stay[[0, -1]]),
            evaluated=self._evaluated,
        )
        if seen is not None:
            seen.append(found)
        return found

    def _moving(self, plan: UnlearningPlan) -> UnlearningPlan:
        """Return the plan, unless its steps would leave the model where it is."""
        if plan.steps == 0 or plan.method in ("retraining", "noisy_finetuning"):
            return plan
        noise = None
        if self._engine is not None and plan.method not in NOISE_FREE_METHODS:
            kernel = self._engine.kernel
            share = kernel.expected_batch_size if kernel.loss_reduction == "mean" else 1
            noise = kernel.noise_multiplier * kernel.max_grad_norm / share or None
        require_moving_steps(self._optimizer, noise_std=noise)
        return plan

    def _note_ledger(self) -> None:
        """Remember how far the ledger is: whoever trains on without this engine is noticed."""
        self._ledger_steps = 0 if self._engine is None else self._engine.per_instance.steps
        self._model_hash = model_hash(self._module)

    def _require_own_ledger(self) -> None:
        """Raise if the ledger has steps or tombstones that this engine knows nothing about."""
        if model_hash(self._module) != self._model_hash:
            raise LedgerError(
                "Expected the model as it was when this engine was built or last ran, got other "
                "weights. Whoever moves them outside of it charges no ledger; build the engine "
                "after training, and work on copies of its module."
            )
        if self._engine is None:
            return
        ledger = self._engine.per_instance
        if ledger.steps != self._ledger_steps:
            raise LedgerError(
                f"Expected a ledger of {self._ledger_steps} steps, got {ledger.steps}: training "
                "went on since this engine was built. Build it after training."
            )
        gone = frozenset(np.flatnonzero(ledger.forgotten).tolist())
        if gone != self._forgotten:
            raise LedgerError(
                f"Expected the ledger to have the {len(self._forgotten)} forgotten rows of this "
                f"engine, got {len(gone)}: another engine has unlearned with it. Go on with that "
                "one, or load its state_dict()."
            )

    def _require_chargeable(self, method: str) -> None:
        """Raise where the ledger could not be charged for a method's steps."""
        unknown_rows = method in (*NOISE_FREE_METHODS, "noisy_finetuning")
        if unknown_rows and self._engine is not None and self._engine.per_instance.budgeted:
            raise UnsupportedError(
                f"Expected a method of the training's own steps with budgets, got {method!r}. It "
                "would charge everybody beyond their budget."
            )

    def _basis(self) -> str:
        """Return a digest of what a plan depends on."""
        digest = hashlib.sha256(self._model_hash.encode())
        groups = described_groups(self._optimizer)
        kernel = None if self._engine is None else self._engine.kernel
        digest.update(
            f"{type(self._optimizer).__name__} {groups} {kernel} {self._ledger_steps} "
            f"{self._requests_served} {sorted(self._forgotten)} {self._batch_size}".encode()
        )
        return digest.hexdigest()

    def _bound(self, plan: UnlearningPlan) -> UnlearningPlan:
        """Return the plan, bound to what it says and to the state it was made for."""
        return replace(plan, basis=bound_to(plan, self._basis()))

    def _check_current(self, plan: UnlearningPlan) -> None:
        if plan.requests_served != self._requests_served:
            raise ValueError(
                f"Expected a plan made after {self._requests_served} served requests, got one made "
                f"after {plan.requests_served}. Plan again: the model has changed since."
            )
        self._require_own_ledger()
        if plan.basis != bound_to(plan, self._basis()):
            raise ValueError(
                "Expected a plan for this engine's model, optimizer and ledger as they are, got "
                "one for others. Plan again: something was changed since, in the plan too, or it "
                "is another's plan."
            )
        if isinstance(plan, CertifiedPlan):
            now = plan.certificate.epsilon(delta=plan.delta, steps=plan.steps)
            if now > plan.epsilon * (1.0 + 1e-12):
                raise CertificateError(
                    f"Expected a plan whose certificate gives epsilon={plan.epsilon:g}, got "
                    f"{now:g} after {plan.steps} steps. Plan again instead of editing a plan."
                )
        self._checked_forget(np.sort(check.index_array("forget", plan.forget_set, size=self._size)))


def bound_to(plan: UnlearningPlan, state: str) -> str:
    """Return a digest of what a plan says and of the state it was made for."""
    claim = ""
    if isinstance(plan, CertifiedPlan):
        claim = f"{plan.epsilon!r} {plan.delta!r} {type(plan.certificate).__name__}"
        if plan.method == "noisy_finetuning":
            claim += repr(plan.certificate)  # the run follows its constants
    text = (
        f"{state} {type(plan).__name__} {plan.method} {plan.steps} {plan.strength} "
        f"{plan.fixed_length} {plan.forget_set.tolist()} {claim}"
    )
    if list(plan.ids) not in ([], plan.forget_set.tolist()):  # what the certificate will name
        text += f" {list(plan.ids)!r}"
    return hashlib.sha256(text.encode()).hexdigest()
