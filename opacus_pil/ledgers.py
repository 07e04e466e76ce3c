"""LedgerEngine: an Opacus PrivacyEngine that keeps two ledgers, worst case and per instance.

What they hold, how they are read, copied, saved and taken over. How training charges them is
`privacy_engine.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from opacus import PrivacyEngine

from . import _validate as check
from . import worst_case_accountant as worst_case_accountant  # registers itself with Opacus
from ._validate import IntArray
from .accounting import DEFAULT_ORDERS, PerInstanceAccountant, PerInstanceEpsilon
from .accounting.instance_ids import InstanceIds
from .capture.randomness import Seen
from .capture.row_losses import LossOf
from .capture.shards import Shard
from .dataset_fingerprint import Fingerprint, dataset_fingerprint
from .distributed import gathered
from .errors import CertificateError, LedgerError, UnsupportedError
from .norm_policy import Charger, checked_policy
from .step_accounting import StepAccounting, described_update
from .training.evidence import uncertifiable
from .training.task import Task
from .training_kernel import TrainingKernel


class LedgerEngine(PrivacyEngine):
    """Opacus's ledger and the per-instance ledger of the same trainings, always charged together.

    Args and Raises: those of PerInstancePrivacyEngine.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        norm_policy: str | None = None,
        refresh_every: int | None = None,
        orders: Sequence[float] = DEFAULT_ORDERS,
        levels: int = 1024,
        caps: npt.ArrayLike | None = None,
        budget: Any = None,
        history: bool = False,
        instance_ids: npt.ArrayLike | None = None,
        fingerprint: str | None = None,
    ) -> None:
        ids = InstanceIds(instance_ids)
        policy, every = checked_policy(
            "last_seen" if norm_policy is None else norm_policy,
            refresh_every=refresh_every, caps=caps, budget=budget,
        )  # fmt: skip
        self._orders = tuple(check.orders(orders).tolist())
        self._levels = check.integer("levels", levels, low=2)
        super().__init__(accountant=accountant, secure_mode=secure_mode)
        self._norm_policy = policy
        self._policy_named = norm_policy is not None
        self._refresh_every = every
        self._caps = None if caps is None else np.array(caps, dtype=np.float64)
        self._budget = budget
        self._history = history
        self._ids = ids
        self._given_fingerprint = fingerprint
        self._fingerprint: Fingerprint | None = None  # of the data set when training began
        self._kernels: list[TrainingKernel] = []
        self._charger: Charger | None = None
        self._shard: Shard | None = None  # rows of this process among several; None: all rows
        self._accountings: list[StepAccounting] = []
        self._task = Task()  # of the last training
        # Where coins and noise were drawn from: what repeats is found over all trainings.
        self._coins_seen, self._noise_seen = Seen(), Seen()
        self._origin: tuple[LedgerEngine, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or a pickle, has: the ledgers as they are, and no training.

        The trainings go on to charge the engine that made them private.
        """
        state = dict(self.__dict__)
        read = self._fingerprint
        state["_fingerprint"] = None if read is None else replace(read, _old_rule=None)
        return {**state, "_accountings": [], "_origin": None}

    # --- what it knows ------------------------------------------------------------------------

    @property
    def norm_policy(self) -> str:
        """How an instance's sensitivity at a step is found.

        Unless it was named: "last_seen" before make_private, after it the default for its batches.
        """
        return self._norm_policy

    @property
    def kernel(self) -> TrainingKernel:
        """Constants of the training recorded by make_private.

        Raises:
            ValueError: make_private was not called yet.
            UnsupportedError: It was called several times with different constants, with other
                than flat clipping, without Poisson sampling, or in several processes.
        """
        if not self._kernels:
            raise ValueError(
                "Expected make_private to be called first, got an engine without training."
            )
        if any(kernel != self._kernels[0] for kernel in self._kernels):
            raise UnsupportedError(
                f"Expected one training kernel, got {len(self._kernels)} trainings with different "
                "constants. Use one engine per training."
            )
        kernel = self._kernels[0]
        if kernel.clipping != "flat" or not kernel.poisson_sampling:
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
    def per_instance(self) -> PerInstanceAccountant:
        """The per-instance ledger; in a distributed training that of this process's shard.

        Its `instance_ids` are rows of the data set; `gather_per_instance` joins the shards.

        Raises:
            ValueError: make_private was not called yet, so the number of instances is unknown.
        """
        return self._charges().accountant

    def get_epsilon(self, delta: float) -> float:
        """Return Opacus's worst-case epsilon.

        Edge cases (first match wins):
            before the first step    0
            noise-free steps         inf
            a gradient that was not finite   inf from then on: no clip bounds it. Opacus goes on
                                     with its own number; this is the one departure from it
            poisson_sampling=False   Opacus's value too, and it is no bound: it takes batches as
                                     drawn by independent coins and claims the amplification, which
                                     fixed or shuffled batches do not have. The per-instance values
                                     of such a training claim none.
        """
        if not self.accountant.history:
            check.delta(delta)
            return 0.0
        unbounded = self._charger is not None and self._charger.unbounded
        if unbounded or any(noise == 0 for noise, _, _ in self.accountant.history):
            return float("inf")
        return super().get_epsilon(delta)

    def get_per_instance_epsilon(
        self,
        delta: float,
        *,
        indices: npt.ArrayLike | None = None,
        rows: npt.ArrayLike | None = None,
    ) -> PerInstanceEpsilon:
        """Return each instance's epsilon at `delta`, with its guarantee and why not a stronger one.

        Args:
            delta: In (0, 1).
            indices: Instances to read, by their ids if the engine was given `instance_ids`, else by
                row. None: all.
            rows: Rows in their place.

        Raises:
            TypeError, ValueError: δ outside (0, 1), or an instance that is not there or named
                twice.
        """
        return self.per_instance.get_epsilon(delta, indices=self._asked(indices, rows))

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What the data set held when the training was made private; None: nothing was trained."""
        if self._fingerprint is None and self._accountings:
            self._fingerprint = self.fingerprint_of(self._accountings[-1].dataset)
        return self._fingerprint

    def fingerprint_of(self, dataset: Any) -> Fingerprint:
        """Return what a data set holds now, or the name that the caller gave its contents."""
        return dataset_fingerprint(dataset, given=self._given_fingerprint)

    @property
    def trainings(self) -> tuple[StepAccounting, ...]:
        """What is known of each training that this engine made private, oldest first."""
        return tuple(self._accountings)

    @property
    def findings(self) -> dict[str, int]:
        """What was found at the steps of this ledger: code of a fact -> number of steps."""
        return dict(self._charges().findings)

    @property
    def largest_norm(self) -> float:
        """The largest finite norm of a gradient before it was clipped; inf: it was not kept."""
        return self._charges().largest_norm

    @property
    def instance_ids(self) -> InstanceIds:
        """The ids of the data set's rows."""
        return self._ids

    def gather_per_instance(self, *, dst: int | None = None) -> PerInstanceAccountant | None:
        """Return one ledger of all instances of a distributed training, in order of the data set.

        Every process must call it; what each has charged is left as it is.

        Guarantee: that of the shards, weakest label first. An instance's numbers are those that a
            single process would have charged for the same draws and norms.

        Args:
            dst: Rank that gets the ledger; the others get None. Default: every rank gets it.

        Returns:
            A new accountant over the whole data set. In one process a copy of `per_instance`.

        Raises:
            LedgerError: On every rank: the ranks counted other steps, other noise or other rates.
            ValueError: make_private was not called yet.
            UnsupportedError: The process group is gone.
        """
        if self._shard is None:
            return self.per_instance.copy()
        history = [(float(z), float(q), int(n)) for z, q, n in self.accountant.history]
        claims = {"norm_policy": self._norm_policy, "history of noise and rates": history}
        whole = gathered(self.per_instance, claims=claims, dst=dst)
        if whole is not None and self._ids.array is not None:
            whole.rename(self._ids.array)  # shards go by row, so that they join in order
        return whole

    @property
    def task(self) -> Task:
        """What the last training minimises and how its batches are joined, as far as named."""
        return self._task

    def task_with(
        self, *, criterion: Any = None, loss_of: LossOf | None = None, collate_fn: Any = None
    ) -> Task:
        """Return the training's task with what is given in place of its own."""
        task = self._task
        if loss_of is not None:
            task = replace(task, own_loss=loss_of, criterion=None)
        elif criterion is not None:
            task = replace(task, own_loss=None, criterion=criterion)
        return task if collate_fn is None else replace(task, collate_fn=collate_fn)

    # --- both ledgers -------------------------------------------------------------------------

    def require_constant_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise unless all steps so far were alike, and are those that `optimizer` takes now.

        Certificates of the last model are computed for constant step size, decay, clip and noise.

        Raises:
            CertificateError: A schedule, other settings now, or steps that nothing is known about.
        """
        kernel, charges = self.kernel, self._charges()
        now = described_update(
            optimizer,
            clip_bound=kernel.max_grad_norm,
            noise_std=kernel.noise_multiplier * float(kernel.max_grad_norm),
            divisor=kernel.expected_batch_size,
            loss_reduction=kernel.loss_reduction,
            batches=1,
            default_batches=True,
        )
        if charges.accountant.steps and charges.update != now:
            raise CertificateError(
                "Expected every step of training to be one of the optimizer as it is now, "
                f"{now}; got {charges.update or 'steps that nothing is known about'}. The "
                "certificate counts constant steps; train without schedules, and leave the "
                "optimizer's settings as they are."
            )

    def require_evidence(self) -> None:
        """Raise unless what was seen of every step lets a certificate rest on the ledger.

        Raises:
            CertificateError: Names what was found, or what nobody has looked at.
        """
        charges = self._charges()
        found = uncertifiable(charges.findings, policy=charges.claims_as)
        if found is not None:
            raise CertificateError(
                f"Expected steps that a certificate can rest on, got some where {found}. "
                "get_per_instance_epsilon(delta).reasons lists everything."
            )

    def fork(self, *, norm_policy: str | None = None) -> Self:
        """Return an engine with copies of both ledgers, the same kernel and the same caps.

        What it trains charges the copies only; `adopt` takes them over.

        Args:
            norm_policy: Policy of the fork; default: this engine's. A ledger with caps keeps
                "capped", another cannot become it.

        Raises:
            ValueError: The policy does not fit this engine's caps or refresh interval.
        """
        charges = self._charges()
        policy = self._norm_policy if norm_policy is None else norm_policy
        every = self._refresh_every if policy == "refresh" else None
        policy, every = checked_policy(
            policy, refresh_every=every, caps=self._caps, budget=self._budget
        )
        fork = copy.copy(self)
        fork.accountant = copy.deepcopy(self.accountant)
        fork._norm_policy, fork._refresh_every = policy, every
        fork._policy_named = self._policy_named or norm_policy is not None
        fork._kernels = list(self._kernels)
        fork._charger = Charger(charges.accountant.copy(), norm_policy=policy, refresh_every=every)
        fork._charger.load_state_dict(charges.state_dict())
        fork._accountings = []
        fork._coins_seen, fork._noise_seen = self._coins_seen.copied(), self._noise_seen.copied()
        fork._origin = (self, charges.accountant.steps)
        return fork

    def adopt(self, other: LedgerEngine) -> None:
        """Take over the ledgers of a fork of this engine.

        Raises:
            LedgerError: `other` is no fork of this engine, or this engine was charged since the
                fork, which the fork's ledgers would forget. Nothing is changed.
        """
        origin, steps = other._origin or (None, 0)
        if origin is not self:
            raise LedgerError("Expected a fork of this engine, got another engine.")
        if self.per_instance.steps != steps:
            raise LedgerError(
                f"Expected no step since the fork, got {self.per_instance.steps - steps}. Their "
                "charges would be lost; fork again."
            )
        self.load_ledger_state(other.ledger_state())
        self._coins_seen.join(other._coins_seen)
        self._noise_seen.join(other._noise_seen)
        other._origin = (self, self.per_instance.steps)

    def charge_everyone(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge both ledgers for one Poisson step that everybody may move by the clip bound.

        Args:
            noise_multiplier: Noise std / the most that one instance moves what is noised.
            sample_rate: Probability that an instance is drawn.

        Raises:
            ValueError: A value outside its range, or a ledger with budgets, which must know rows.
        """
        self.per_instance.step(
            indices=None,
            sensitivities=None,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            guarantee="bound" if self._norm_policy == "worst_case" else "output_specific",
        )
        self.accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
        self._charges().note_update("of another kind")

    def forget(self, indices: npt.ArrayLike) -> None:
        """Charge instances no more that left the training set; their rows become tombstones.

        Raises:
            TypeError, ValueError: An index out of range, repeated, or forgotten before.
        """
        rows = check.index_array("indices", indices, size=self.per_instance.num_instances)
        self._charges().forget(rows)

    def note_new_model(self) -> None:
        """Say that the steps to come train another model from its start, on the same ledgers."""
        self._charges().note_new_model()

    def charge_without_noise(self, steps: int) -> None:
        """Charge both ledgers for noise-free steps: infinitely, whoever may have taken part."""
        for _ in range(check.integer("steps", steps, low=0)):
            self.accountant.history.append((0.0, 1.0, 1))
            self.per_instance.step(
                indices=None, sensitivities=None, noise_multiplier=0.0, sample_rate=1.0
            )

    def ledger_state(self) -> dict[str, Any]:
        """Return both ledgers as arrays and plain values."""
        history = [(float(z), float(q), int(n)) for z, q, n in self.accountant.history]
        return {
            "opacus": {"history": history, "mechanism": self.accountant.mechanism()},
            "per_instance": self._charges().state_dict(),
        }

    def load_ledger_state(self, state: Mapping[str, Any]) -> None:
        """Take over both ledgers from `ledger_state`.

        Raises:
            LedgerError: They do not fit this engine. Nothing is changed.
        """
        opacus = {**state["opacus"], "history": [tuple(run) for run in state["opacus"]["history"]]}
        if opacus["mechanism"] != self.accountant.mechanism():
            raise LedgerError(
                f"Expected a ledger of accountant {self.accountant.mechanism()!r}, got "
                f"{opacus['mechanism']!r}. Build the engine with that accountant."
            )
        self._require_enforced(state["per_instance"]["ledger"])
        self._charges().load_state_dict(state["per_instance"])
        self.accountant.load_state_dict(opacus)

    # --- inside ------------------------------------------------------------------------------

    def _asked(self, indices: npt.ArrayLike | None, rows: npt.ArrayLike | None) -> IntArray | None:
        """Return this process's positions of the instances that a caller names; None: all."""
        if indices is None and rows is None:
            return None
        shard = self._shard
        size = self.per_instance.num_instances if shard is None else shard.num_instances
        found = self._ids.rows(indices, rows=rows, size=size)
        return found if shard is None else shard.positions(found)

    def _require_enforced(self, ledger: Mapping[str, Any]) -> None:
        """Raise if a ledger charges by caps or budgets that this engine does not clip to."""
        capped = ledger.get("caps") is not None or ledger.get("privacy_filter") is not None
        if capped and self._norm_policy != "capped":
            raise LedgerError(
                "Expected a ledger without caps or budgets, got one with: it charges what only "
                f"norm_policy='capped' enforces, and this engine's is {self._norm_policy!r}. Build "
                "the engine with the policy that the ledger was kept under."
            )

    def _policy_for(self, *, poisson_sampling: bool) -> str:
        """Return the policy of a training with such batches: the one in force, or the default."""
        if self._policy_named or self._charger is not None:
            return self._norm_policy
        return "last_seen" if poisson_sampling else "participation"

    def _settings(self) -> tuple[Any, ...]:
        """Return what ledgers must share to be joined, beside the charges."""
        budgeted = self._budget is not None
        return self._orders, self._levels, self._refresh_every, self._history, budgeted

    def _settle(self, charger: Charger, shard: Shard | None) -> None:
        """Charge by `charger` from now on: its training was made private."""
        if self._charger is None and shard is not None and self._caps is not None:
            self._caps = self._caps[shard.rows]
        self._charger, self._norm_policy, self._shard = charger, charger.norm_policy, shard

    def _charges(self) -> Charger:
        if self._charger is None:
            raise ValueError(
                "Expected make_private to be called first, got an engine without training."
            )
        return self._charger
