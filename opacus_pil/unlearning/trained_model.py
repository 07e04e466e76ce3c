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
from ..errors import CertificateError, LedgerError, UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from ..step_accounting import described_groups
from .calibration import mean_log_loss
from .engine_state import engine_state, load_engine_state
from .methods import plain_module
from .model_hash import model_hash
from .phase import Phase
from .plan import NOISE_FREE_METHODS, CertifiedPlan, UnlearningPlan

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
        criterion: nn.Module,
        privacy_engine: PerInstancePrivacyEngine | None = None,
        training_steps: int | None = None,
        feature_norm: float | None = None,
        batch_size: int | None = None,
        make_model: MakeModel | None = None,
        progress: bool = True,
    ) -> None:
        self._module = plain_module(module)
        _require_no_running_statistics(self._module)
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        self._optimizer = inner
        self._dataset = dataset
        self._criterion = getattr(criterion, "criterion", criterion)  # ghost mode wraps the loss
        self._engine = privacy_engine
        self._feature_norm = feature_norm
        self._make_model = make_model
        self._progress = progress
        self._size = len(dataset)  # type: ignore[arg-type]
        if privacy_engine is not None:
            kernel = privacy_engine.kernel
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
        self._training_steps = check.integer("training_steps", steps, low=0)
        self._phases = [Phase(self._training_steps, frozenset(), "training")]
        self._forgotten: frozenset[int] = frozenset()
        self._requests_served = 0
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

    def mean_log_loss(self, rows: npt.ArrayLike, *, order: float = 2.0) -> float:
        """Return the mean over `rows` of the log of their privacy loss (RDP at `order`, in nats).

        What `calibrate` fits times to unlearn against. The labels of the losses are the ledger's.

        Raises:
            ValueError: No privacy_engine, an order the ledger does not have, losses of 0 or inf.
        """
        if self._engine is None:
            raise ValueError("Expected privacy_engine for privacy losses, got None. Pass it.")
        ledger = self._engine.per_instance
        return mean_log_loss(ledger.rdp(rows), orders=ledger.orders, order=order)

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

    def _checked_forget(self, forget: npt.ArrayLike) -> IntArray:
        rows = np.sort(check.index_array("forget", forget, size=self._size))
        if not len(rows):
            raise ValueError("Expected forget to name at least one row, got none.")
        before = sorted(self.forgotten.intersection(rows.tolist()))
        if before:
            raise ValueError(
                f"Expected rows that are still in the training set, got {len(before)} of "
                f"{len(rows)} forgotten before (first: {before[0]}). Leave them out."
            )
        if len(rows) + len(self.forgotten) == self._size:
            raise ValueError(
                f"Expected a forget set that leaves something to train on, got all "
                f"{len(rows)} remaining rows. Delete the model instead."
            )
        return rows

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
        self._checked_forget(plan.forget_set)


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
    return hashlib.sha256(text.encode()).hexdigest()


def _require_no_running_statistics(module: nn.Module) -> None:
    for name, part in module.named_modules():
        batch = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if batch or getattr(part, "track_running_stats", False):
            raise UnsupportedError(
                f"Expected a model without BatchNorm or other running statistics, got "
                f"{type(part).__name__} at {name or 'the top'!r}. They keep traces of forgotten "
                "instances. Use GroupNorm."
            )
