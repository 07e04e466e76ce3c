"""TrainedState: a model, what it was trained with, and what has run on it since.

Plans and runs nothing. Notices whatever changed behind its back: each `require` looks at one thing
and changes nothing. Its fields are read by the whole room, and written by `become` and
`saved_state.py` alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn

from .. import _validate as check
from .._validate import IntArray
from ..accounting import PerInstanceAccountant
from ..errors import CertificateError, LedgerError, UnsupportedError
from ..files.model_hash import model_hash
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.account import Account
from ..training.kernel import TrainingKernel
from ..training.task import Task
from ..training.update import described_groups
from .methods import Method
from .phase import Phase
from .plan import CertifiedPlan, UnlearningPlan, bound_to
from .trained_data import TrainedData

MakeModel = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]


@dataclass(kw_only=True, eq=False)
class TrainedState:
    """A trained model on which runs of unlearning follow each other.

    Attributes:
        module: Plain, as it is now: trained, or unlearned by the last run.
        optimizer: Plain, of its parameters.
        task: What training minimised, and how its batches are joined.
        data: The training set, forgotten rows included, and what its rows are called.
        evaluated: Submodules that were in evaluation mode while training.
        privacy_engine: What trained it; None: nothing bounds what training gave away.
        account: The ledgers of it, which runs charge by copies; None with `privacy_engine`.
        training_steps: Of the training, whatever has run since.
        batch_size: Expected number of rows in a step.
        feature_norm: Public bound on the norm of every feature vector, if there is one.
        make_model: Gives a new plain module and its optimizer, if one may train again.
        weights: Whether training left the weights it was built with; None: not known.
        phases: What has run, in order.
        forgotten: Rows forgotten so far.
        requests_served: Runs so far.
        seeds: Of the runs that made this model.
        ledger_steps: Steps of the ledger when it was looked at last.
        kernel: Constants of the training, as they were when it was looked at last.
        retain_set: Rows that are still in the training set, ascending.
        model_hash: SHA-256 of the module when it was built or last ran.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    task: Task
    data: TrainedData
    evaluated: frozenset[str]
    privacy_engine: PerInstancePrivacyEngine | None
    account: Account | None
    training_steps: int
    batch_size: float
    feature_norm: float | None
    make_model: MakeModel | None
    weights: bool | None
    phases: list[Phase] = field(default_factory=list)
    forgotten: frozenset[int] = frozenset()
    requests_served: int = 0
    seeds: frozenset[int] = frozenset()
    ledger_steps: int = field(init=False)
    kernel: TrainingKernel | None = field(init=False)
    retain_set: IntArray = field(init=False)
    model_hash: str = field(init=False)

    def __post_init__(self) -> None:
        """Remember the weights, the training's constants and how far the ledger is."""
        self.kernel = None if self.privacy_engine is None else self.privacy_engine.kernel
        self.note(model_hash(self.module))

    @property
    def ledger(self) -> PerInstanceAccountant | None:
        """The per-instance ledger; None without privacy_engine."""
        return None if self.account is None else self.account.per_instance

    # --- copies, and what a run leaves --------------------------------------------------------

    def fork_account(self) -> Account | None:
        """Return copies of both ledgers, to be charged by a run until it has ended."""
        return None if self.account is None else self.account.fork()

    def branch(self) -> Self:
        """Return the same state on ledgers of its own."""
        branch = copy.copy(self)
        branch.account = self.fork_account()
        branch.phases = list(self.phases)
        return branch

    def become(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        account: Account | None,
        phase: Phase,
        seed: int,
        retrained: bool,
        model_hash: str,
    ) -> None:
        """Take over what a run left: its model, its fork of the ledgers, and that it ran.

        Args:
            module, optimizer: Plain.
            account: From `fork_account`.
            phase: The run, with everything that is forgotten after it.
            seed: Of its batches and noise.
            retrained: Nothing of the model before is left.
            model_hash: Of `module`.

        Raises:
            LedgerError: Something was charged since the fork. Nothing is changed.
        """
        if account is not None and self.account is not None:
            self.account.adopt(account)
        self.module, self.optimizer = module, optimizer
        self.seeds |= {seed}
        self.forgotten = phase.forgotten
        if retrained:  # whatever was edited before is gone
            self.weights = None if account is None else True
        self.phases = [phase] if retrained else [*self.phases, phase]
        self.requests_served += 1
        self.note(model_hash)

    @contextmanager
    def whole_or_not(self) -> Iterator[None]:
        """Give the state and its ledgers back as they were if the block raises."""
        before = copy.copy(vars(self))
        ledgers = None if self.account is None else self.account.state()
        try:
            yield
        except BaseException:
            vars(self).update(before)
            if self.account is not None and ledgers is not None:
                self.account.load_state(ledgers)
            raise

    def note(self, model_hash: str) -> None:
        """Remember the model and how far the ledger is: who trains on behind it is noticed."""
        ledger = self.ledger
        self.ledger_steps = 0 if ledger is None else ledger.steps
        self.retain_set = np.setdiff1d(np.arange(self.data.size), list(self.forgotten))
        self.model_hash = model_hash

    # --- what is required of it ---------------------------------------------------------------

    def named(self, forget: npt.ArrayLike | None, rows: npt.ArrayLike | None) -> IntArray:
        """Return the rows that a caller names, ascending."""
        return np.sort(self.data.ids.rows(forget, rows=rows, size=self.data.size, name="forget"))

    def forgettable(self, rows: IntArray) -> IntArray:
        """Return rows that can be forgotten: some, none of them twice, not the last ones.

        Raises:
            ValueError: Others.
        """
        if not len(rows):
            raise ValueError("Expected forget to name at least one row, got none.")
        before = sorted(self.forgotten.intersection(rows.tolist()))
        if before:
            raise ValueError(
                f"Expected rows that are still in the training set, got {len(before)} of "
                f"{len(rows)} forgotten before (first: {self.data.ids.of(before[:1])[0]}). Leave "
                "them out."
            )
        if len(rows) + len(self.forgotten) == self.data.size:
            raise ValueError(
                f"Expected a forget set that leaves something to train on, got all "
                f"{len(rows)} remaining rows. Delete the model instead."
            )
        return rows

    def require_untouched(self) -> None:
        """Raise if the model moved, or the ledger has steps or tombstones that nobody noted here.

        Reads the whole model; nothing else does.

        Raises:
            LedgerError: Says what, and the cure.
            UnsupportedError: Other trainings were made private beside this one.
        """
        if model_hash(self.module) != self.model_hash:
            raise LedgerError(
                "Expected the model as it was when this engine was built or last ran, got other "
                "weights. Whoever moves them outside of it charges no ledger; build the engine "
                "after training, and work on copies of its module."
            )
        ledger = self.ledger
        if ledger is None:
            return
        if ledger.steps != self.ledger_steps:
            raise LedgerError(
                f"Expected a ledger of {self.ledger_steps} steps, got {ledger.steps}: training "
                "went on since this engine was built. Build it after training."
            )
        gone = frozenset(np.flatnonzero(ledger.forgotten).tolist())
        if gone != self.forgotten:
            raise LedgerError(
                f"Expected the ledger to have the {len(self.forgotten)} forgotten rows of this "
                f"engine, got {len(gone)}: another engine has unlearned with it. Go on with that "
                "one, or load its state_dict()."
            )
        if self.privacy_engine is not None:
            self.kernel = self.privacy_engine.kernel  # raises where there are several

    def require_chargeable(self, method: Method) -> None:
        """Raise where the ledger could not be charged for a method's steps.

        Raises:
            UnsupportedError: It has budgets, and the steps do not say who takes part.
        """
        ledger = self.ledger
        if ledger is not None and ledger.budgeted and not method.charges_rows:
            raise UnsupportedError(
                f"Expected a method of the training's own steps with budgets, got {method.name!r}. "
                "It would charge everybody beyond their budget."
            )

    def require_current(self, plan: UnlearningPlan, *, untouched: bool = False) -> None:
        """Raise unless a plan was made for this state as it is.

        Args:
            plan: Made by whomever.
            untouched: `require_untouched` was asked since anything but this package ran.

        Raises:
            ValueError: An earlier state, an edited plan, or another's.
            LedgerError: As `require_untouched`.
            CertificateError: A certificate that gives another ε.
        """
        if plan.requests_served != self.requests_served:
            raise ValueError(
                f"Expected a plan made after {self.requests_served} served requests, got one made "
                f"after {plan.requests_served}. Plan again: the model has changed since."
            )
        if not untouched:
            self.require_untouched()
        if plan.basis != bound_to(plan, self.basis()):
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
        rows = check.index_array("forget", plan.forget_set, size=self.data.size)
        self.forgettable(np.sort(rows))

    def basis(self) -> str:
        """Return a digest of what a plan depends on."""
        digest = hashlib.sha256(self.model_hash.encode())
        digest.update(
            f"{type(self.optimizer).__name__} {described_groups(self.optimizer)} {self.kernel} "
            f"{self.ledger_steps} {self.requests_served} {sorted(self.forgotten)} "
            f"{self.batch_size}".encode()
        )
        return digest.hexdigest()
