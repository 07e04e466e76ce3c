"""PerInstancePrivacyEngine: Opacus's PrivacyEngine that also knows each instance's privacy loss.

Training is Opacus's, bit for bit (except with caps, which clip more). Composed of an `Account`,
both ledgers, and the `Trainings` that charge it; says in which order they are asked.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.utils.data import DataLoader

from . import _validate as check
from .accounting import DEFAULT_ORDERS, PerInstanceAccountant
from .accounting.instance_ids import InstanceIds
from .capture.indices import record_indices
from .capture.row_losses import LossOf
from .capture.shards import Shard
from .capture.sweep import Sweep
from .errors import UnsupportedError
from .exposure import PerInstanceEpsilon
from .exposure.persons import of_persons
from .files.fingerprint import Fingerprint
from .training import checkpoint
from .training import worst_case_accountant as worst_case_accountant  # registers itself with Opacus
from .training.account import Account
from .training.attached import attached, attached_shard
from .training.beginning import begin_attached, begin_made
from .training.distributed import require_same_arguments
from .training.kernel import TrainingKernel
from .training.support import (
    asked,
    checked_arguments,
    is_distributed,
    require_known_options,
    require_map_style,
    require_plain,
    require_supported,
    require_uniform_batches,
)
from .training.task import Task
from .training.terms import Terms
from .training.training import Training
from .training.trainings import Trainings

# What Opacus returns. Its classes are Any to a type checker for as long as it ships no types; the
# number of values, and the loader, are known.
Made = tuple[AbstractGradSampleModule, DPOptimizer, DataLoader[Any]]
MadeGhost = tuple[
    AbstractGradSampleModule, DPOptimizer, DPLossFastGradientClipping, DataLoader[Any]
]
_NotGhost = Literal["hooks", "functorch", "ew"]

# Opacus's default criterion objects; getting one of them means that the caller named none.
_DEFAULT_CRITERIA = tuple(
    inspect.signature(function).parameters["criterion"].default
    for function in (PrivacyEngine.make_private, PrivacyEngine.make_private_with_epsilon)
)


@contextmanager
def _naming_the_cure() -> Iterator[None]:
    """Add to Opacus's refusal of a module what to do; its type and words stay Opacus's."""
    try:
        yield
    except UnsupportedModuleError as error:
        error.add_note(
            "Before the optimizer is built: model = engine.get_compatible_module(model), which "
            "puts a GroupNorm in place of a BatchNorm, say."
        )
        raise


class PerInstancePrivacyEngine(PrivacyEngine):
    """Opacus's PrivacyEngine with a second ledger: the privacy loss of every training instance.

    Guarantee: `get_epsilon` is Opacus's. Per-instance values hold for adding or removing one
        instance under Poisson sampling, with the label in their `guarantee`:
        worst_case       "bound"
        last_seen        "estimate": the norm of the last batch an instance was in
        refresh          "estimate": a full pass every so many steps
        full             "output_specific": a full pass at every step (with randomness in the
                         forward pass: "estimate")
        capped           "bound": each instance is clipped to its own cap, fixed before the run, or
                         to 0 once its budget is spent
        participation    "output_specific", for poisson_sampling=False: only who is in a batch is
                         charged, without amplification, under zero-out adjacency (with randomness
                         in the forward pass: "estimate")
        Adaptive clipping is an "estimate" under every policy.

    Args:
        accountant: Opacus's accountant: "prv", "rdp", "gdp" or "per_instance_rdp".
        secure_mode: As in Opacus.
        norm_policy: One of the above. Default: "last_seen", and "participation" for a training
            with poisson_sampling=False, which says so in a warning.
        refresh_every: With "refresh": a full pass over the data every so many steps.
        orders: Rényi orders of the per-instance ledger.
        levels: Number of sensitivities it tells apart.
        caps: With "capped": shape (instances,), clipping bounds in units of max_grad_norm, in
            [0, 1], from public data and each instance's own record only. For a head of
            `opacus_pil.heads.OneVsRest` with clipping="per_layer" also (instances, classes).
        budget: With "capped": as in PerInstanceAccountant. Nobody exceeds it: whoever could is
            clipped to 0 from that step on.
        history: As in PerInstanceAccountant: log levels, so that `per_instance.group_rdp` works.
        instance_ids: Shape (instances,), your own ids of the data set's rows, texts or integers, in
            their order. With ids every call that names instances takes ids, and rows by `rows=`.
        groups: Shape (instances,), whose row each one is, texts or integers, where a person has
            several. Per-instance results are then per person, by the group bound of all their rows
            (a log is kept for it, as with `history`), and calls that name instances take persons.
        fingerprint: Your own name for the data set's contents (a version, a file's checksum), where
            they are not in memory and cannot be read here; see `dataset_fingerprint`.

    Raises:
        ValueError: Arguments that do not fit each other.

    Distributed: wrap the module in Opacus's DifferentiallyPrivateDistributedDataParallel and start
        the processes with torchrun. Each keeps the account of its own rows, fixed for the run
        (`per_instance.instance_ids`), full passes cover them only, and no step exchanges more than
        Opacus's gradients. Caps and budgets per instance are given for the whole data set on every
        rank. An empty draw is an empty batch, so that all ranks make the same steps.
        `gather_per_instance` joins the accounts; every rank has checkpoints of its own.

    Privacy: per-instance values depend on private data and are not private to release.
    """

    _loss_of: LossOf | None = None  # on its way through Opacus's make_private_with_epsilon

    @check.known_keywords
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
        groups: npt.ArrayLike | None = None,
        fingerprint: str | None = None,
    ) -> None:
        terms = Terms.checked(
            norm_policy, refresh_every=refresh_every, orders=orders, levels=levels, caps=caps,
            budget=budget, history=history, instance_ids=instance_ids, groups=groups,
        )  # fmt: skip
        super().__init__(accountant=accountant, secure_mode=secure_mode)
        self.account = Account(self.accountant, terms, caps=caps)
        self._trainings = Trainings(fingerprint)

    def __repr__(self) -> str:
        """Say in a line what is accounted for."""
        known = f"norm_policy={self.norm_policy!r}"
        if self.account.begun:
            ledger = self.per_instance
            known += f", {ledger.num_instances:,} instances, {ledger.steps:,} steps"
            known += f", label {ledger.guarantee!r}"
        return f"{type(self).__name__}({known})"

    # --- what it knows ------------------------------------------------------------------------

    @property
    def norm_policy(self) -> str:
        """How an instance's sensitivity at a step is found.

        Unless it was named: "last_seen" before make_private, after it the default for its batches.
        """
        return self.account.norm_policy

    @property
    def kernel(self) -> TrainingKernel:
        """Constants of the training recorded by make_private.

        Raises:
            ValueError: make_private was not called yet.
            UnsupportedError: It was called several times with different constants, with other
                than flat clipping, without Poisson sampling, or in several processes.
        """
        return self._trainings.kernel

    @property
    def per_instance(self) -> PerInstanceAccountant:
        """The per-instance ledger; in a distributed training that of this process's shard.

        Its `instance_ids` are rows of the data set; `gather_per_instance` joins the shards.

        Raises:
            ValueError: make_private was not called yet, so the number of instances is unknown.
        """
        return self.account.per_instance

    @property
    def task(self) -> Task:
        """What the last training minimises and how its batches are joined, as far as named."""
        return self._trainings.task

    @property
    def trainings(self) -> tuple[Training, ...]:
        """What is known of each training that this engine made private, oldest first."""
        return self._trainings.all

    @property
    def instance_ids(self) -> InstanceIds:
        """The ids of the data set's rows."""
        return self.account.terms.ids

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What the data set held when the training was made private; None: nothing was trained."""
        return self._trainings.fingerprint

    def fingerprint_of(self, dataset: Any) -> Fingerprint:
        """Return what a data set holds now, or the name that the caller gave its contents."""
        return self._trainings.fingerprint_of(dataset)

    def task_with(
        self, *, criterion: Any = None, loss_of: LossOf | None = None, collate_fn: Any = None
    ) -> Task:
        """Return the training's task with what is given in place of its own."""
        return self._trainings.task_with(
            criterion=criterion, loss_of=loss_of, collate_fn=collate_fn
        )

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
        return float("inf") if self.account.unbounded else super().get_epsilon(delta)

    @check.known_keywords
    def get_per_instance_epsilon(
        self,
        delta: float,
        *,
        indices: npt.ArrayLike | None = None,
        rows: npt.ArrayLike | None = None,
    ) -> PerInstanceEpsilon:
        """Return each instance's epsilon at `delta`, with its guarantee and why not a stronger one.

        The result answers: `spent[id]`, `spent.top(10)`, `spent.to_dataframe()`, `spent.plot()`.

        Args:
            delta: In (0, 1).
            indices: Instances to read, by their ids if the engine was given `instance_ids`, else by
                row. None: all.
            rows: Rows in their place.

        Raises:
            TypeError, ValueError: δ outside (0, 1), or an instance that is not there or named
                twice.
        """
        norms, ids = self.account.charger.norms.seen, self.instance_ids
        if not ids.grouped:
            chosen = self.account.positions(indices, rows)
            return PerInstanceEpsilon.of(self.per_instance, delta=delta, rows=chosen, norms=norms)
        if rows is not None or self.account.shard is not None:
            raise UnsupportedError(
                "Expected persons in one process, since rows have groups, got "
                f"{'rows' if rows is not None else 'several processes'}. Name persons, or read "
                "single rows off per_instance."
            )
        persons = list(ids.members) if indices is None else list(np.asarray(indices).tolist())
        self.account.positions(persons, None)
        return of_persons(
            self.per_instance, delta=delta, members={p: ids.members[p] for p in persons},
            kernels=self.accountant.history, norms=norms,
        )  # fmt: skip

    @check.known_keywords
    def write_report(
        self,
        path: str | os.PathLike[str],
        *,
        delta: float,
        test: Any = None,
        public: bool = False,
    ) -> None:
        """Write the run as a page: one HTML file that loads nothing from outside, mode 0600.

        Who is exposed (sortable, by id, with charts), upper numbers beside lower ones, why the
        label is what it is, constants, versions, and what each number means.

        Args:
            path: Target file; the old one stays whole until the new one is complete.
            delta: In (0, 1).
            test: What was measured: an `Audit`, or a list of lower bounds; or a data set that was
                not trained on, for the loss beside that of the training instances.
            public: Constants only: no value of an instance, no distribution, no ranking, no
                fingerprint, no measurement. The page is then made of what is public by assumption
                (N, steps, noise, rate) and may be shown.

        Raises:
            ValueError, UnsupportedError: δ outside (0, 1), make_private was not called yet, or a
                data set that no loss of the training can be computed on. Nothing is written.
            ImportError: An extra is missing; install `report`.
            OSError: The folder is missing or not writable.

        Privacy: unless `public` the page shows values that no ε covers, and says so at its top.
        """
        from .report import write_page  # an optional extra
        from .training.reported import Run, public_report, run_report

        spent = self.get_per_instance_epsilon(delta)
        with np.errstate(divide="ignore"):  # Opacus's PRV takes log(1 - q) of full batches
            worst_case = self.get_epsilon(delta)
        run = Run(self.account, self._trainings, worst_case, delta)
        report = public_report(run) if public else run_report(run, spent, test=test)
        write_page(path, report)

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
        return self.account.gathered(dst=dst)

    def require_constant_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise unless all steps so far were alike, and are those that `optimizer` takes now.

        Raises:
            CertificateError: A schedule, other settings now, or steps that nothing is known about.
        """
        self.account.require_constant_steps(self.kernel.update_by(optimizer))

    def fork(self, *, norm_policy: str | None = None) -> Self:
        """Return an engine with copies of both ledgers, the same kernel and the same caps.

        What it trains charges the copies only; `adopt` takes them over.

        Args:
            norm_policy: Policy of the fork; default: this engine's. A ledger with caps keeps
                "capped", another cannot become it.

        Raises:
            ValueError: The policy does not fit this engine's caps or refresh interval.
        """
        fork = copy.copy(self)  # Opacus's own settings, its secure generator among them
        fork.account = self.account.fork(norm_policy=norm_policy)
        fork.accountant, fork._trainings = fork.account.opacus, self._trainings.forked()
        return fork

    def adopt(self, other: PerInstancePrivacyEngine) -> None:
        """Take over the ledgers of a fork of this engine.

        Raises:
            LedgerError: `other` is no fork of this engine, or this engine was charged since the
                fork, which the fork's ledgers would forget. Nothing is changed.
        """
        self.account.adopt(other.account)

    # --- training -----------------------------------------------------------------------------

    @overload
    def make_private(
        self, *, module: nn.Module, optimizer: torch.optim.Optimizer, data_loader: DataLoader[Any],
        noise_multiplier: float, max_grad_norm: float | list[float], criterion: Any = ...,
        loss_of: LossOf | None = ..., grad_sample_mode: _NotGhost = ..., **options: Any,
    ) -> Made: ...  # fmt: skip
    @overload
    def make_private(
        self, *, module: nn.Module, optimizer: torch.optim.Optimizer, data_loader: DataLoader[Any],
        noise_multiplier: float, max_grad_norm: float | list[float], criterion: Any = ...,
        loss_of: LossOf | None = ..., grad_sample_mode: Literal["ghost"], **options: Any,
    ) -> MadeGhost: ...  # fmt: skip
    @overload
    def make_private(
        self, *, module: nn.Module, optimizer: torch.optim.Optimizer, data_loader: DataLoader[Any],
        noise_multiplier: float, max_grad_norm: float | list[float], criterion: Any = ...,
        loss_of: LossOf | None = ..., grad_sample_mode: str, **options: Any,
    ) -> Any: ...  # fmt: skip

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        criterion: Any = _DEFAULT_CRITERIA[0],
        loss_of: LossOf | None = None,
        **options: Any,
    ) -> Any:
        """Make training private as Opacus does, and account for every instance.

        Args:
            criterion: As in Opacus. Name it in hooks mode too: full passes measure with it,
                unlearning trains with it, and only a named loss can be checked for what strong
                labels and certificates need, that each row's loss is its own.
            loss_of: In its place, where batches are no pairs (inputs, targets) or the loop does
                more: loss_of(module, batch) -> one loss per row, shape (rows,), unreduced.
            options: Opacus's other arguments.

        Returns:
            Opacus's tuple: (module, optimizer, data_loader), in ghost mode
            (module, optimizer, criterion, data_loader).

        Raises:
            UnsupportedError, TypeError, ValueError: A use without a sound per-instance number, or a
                keyword that nobody knows; nothing was changed.
        """
        poisson = options.get("poisson_sampling", True)
        policy = self.account.policy_for(poisson_sampling=poisson)
        found = checked_arguments(
            module, optimizer=optimizer, data_loader=data_loader,
            noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, options=options,
            policy=policy,
        )  # fmt: skip
        loss_of = self._loss_of if loss_of is None else loss_of
        ghost = found.grad_sample_mode == "ghost"
        named = not any(criterion is default for default in _DEFAULT_CRITERIA)
        shard = Shard.of_process(found.size) if found.distributed else None
        ready = self.account.prepared(
            found, shard=shard, policy=policy, loss_known=named or ghost or loss_of is not None
        )
        if ready.policy.enforced:
            self._trainings.require_same_rows(data_loader.dataset)
        if found.distributed:
            require_same_arguments(
                noise_multiplier=found.noise_multiplier, max_grad_norm=found.max_grad_norm,
                norm_policy=policy.name, instances=found.size, batches=len(data_loader),
                grad_sample_mode=found.grad_sample_mode,
                policy_settings=self.account.terms.shared,
            )  # fmt: skip
        with _naming_the_cure():
            made = super().make_private(
                module=module,
                optimizer=optimizer,
                data_loader=data_loader,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                criterion=criterion,
                **options,
            )
        return begin_made(
            self.account, self._trainings, made, asked=found, options=options, ready=ready,
            shard=shard, criterion=criterion if named or ghost else None, loss_of=loss_of,
            secure_mode=self.secure_mode,
        )  # fmt: skip

    @overload
    def make_private_with_epsilon(
        self, *, module: nn.Module, data_loader: DataLoader[Any], loss_of: LossOf | None = ...,
        grad_sample_mode: _NotGhost = ..., **options: Any,
    ) -> Made: ...  # fmt: skip
    @overload
    def make_private_with_epsilon(
        self, *, module: nn.Module, data_loader: DataLoader[Any], loss_of: LossOf | None = ...,
        grad_sample_mode: Literal["ghost"], **options: Any,
    ) -> MadeGhost: ...  # fmt: skip
    @overload
    def make_private_with_epsilon(
        self, *, module: nn.Module, data_loader: DataLoader[Any], loss_of: LossOf | None = ...,
        grad_sample_mode: str, **options: Any,
    ) -> Any: ...  # fmt: skip

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        data_loader: DataLoader[Any],
        loss_of: LossOf | None = None,
        **options: Any,
    ) -> Any:
        """Choose the noise for a target epsilon as Opacus does, then make_private.

        Args:
            loss_of: As in make_private.
            options: Those of make_private, Opacus's target_epsilon, target_delta and epochs, and
                what Opacus's accountants take (`alphas`, `eps_error`, …).
        """
        require_known_options(options)
        require_map_style(data_loader)
        poisson = options.get("poisson_sampling", True)
        policy = self.account.policy_for(poisson_sampling=poisson)
        require_supported(module, options, policy=policy)
        if poisson:
            require_uniform_batches(data_loader, distributed=is_distributed(module))
        # Opacus hands its options to the accountant's conversion too, which knows no loss.
        self._loss_of = loss_of
        try:
            return super().make_private_with_epsilon(
                module=module, data_loader=data_loader, **options
            )
        finally:
            self._loss_of = None

    def make_private_on(
        self,
        population: npt.ArrayLike,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        criterion: Any = None,
        loss_of: LossOf | None = None,
        steps: int,
        noise_generator: torch.Generator | None = None,
        sampler_generator: torch.Generator | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        account: Account | None = None,
    ) -> Any:
        """Make a plain module private with the training's own kernel, drawing from `population`.

        Sample rate, expected batch size, noise and clip bound are those of training: they are
        public constants and do not follow the size of the population. Every step charges this
        engine's ledgers, or those of `account`; then nothing of this engine is changed.

        Args:
            population: Rows of `dataset` that may be drawn, each once.
            module: Plain module, not one that Opacus wrapped.
            optimizer: Plain optimizer of its parameters.
            dataset: The training set, forgotten rows included.
            criterion: Loss. Default: what training named.
            loss_of: As in make_private. Default: likewise.
            steps: Number of batches of one pass over the loader.
            noise_generator: Source of the noise; None: torch's global generator.
            sampler_generator: Source of the batches; None: torch's global generator.
            collate_fn: Joins items to a batch. Default: the training's.
            account: A fork of this engine's account, which is charged in its place.

        Returns:
            The tuple of make_private. In ghost mode its criterion is None with `loss_of`.

        Raises:
            TypeError, ValueError, UnsupportedError: An argument that does not fit the kernel.
        """
        kernel = self.kernel
        count = check.integer("steps", steps, low=1)
        if len(dataset) != kernel.num_instances:
            raise ValueError(
                f"Expected dataset to be the training set of {kernel.num_instances} instances, got "
                f"{len(dataset)}. Pass it whole; `population` says which rows remain."
            )
        rows = check.index_array("population", population, size=len(dataset))
        check.integer("len(population)", len(rows), low=1)
        require_supported(module, {})
        require_plain(module, optimizer)
        task = self.task_with(criterion=criterion, loss_of=loss_of, collate_fn=collate_fn)
        ghost = kernel.grad_sample_mode == "ghost"
        if not task.named and (ghost or self.account.terms.policy.refresh_every):
            raise ValueError(
                "Expected criterion to be the loss to train with, got criterion=None. Pass it."
            )
        loader = DPDataLoader(
            dataset,
            sample_rate=kernel.sample_rate,
            collate_fn=task.collate_fn,
            generator=self.secure_rng if self.secure_mode else sampler_generator,
            batch_first=kernel.batch_first,
        )
        private_module = self._prepare_model(
            module,
            batch_first=kernel.batch_first,
            max_grad_norm=kernel.max_grad_norm,
            loss_reduction=kernel.loss_reduction,
            grad_sample_mode=kernel.grad_sample_mode,
        )
        private_module.forbid_grad_accumulation()
        bounds = list(kernel.output_bounds)
        private_optimizer = self._prepare_optimizer(
            optimizer=optimizer,
            noise_multiplier=kernel.noise_multiplier,
            max_grad_norm=bounds or kernel.max_grad_norm,
            clipping=kernel.clipping,
            expected_batch_size=kernel.expected_batch_size,
            loss_reduction=kernel.loss_reduction,
            noise_generator=noise_generator,
            grad_sample_mode=kernel.grad_sample_mode,
        )
        charged = self.account if account is None else account
        private_optimizer.attach_step_hook(
            charged.opacus.get_optimizer_hook_fn(sample_rate=kernel.sample_rate)
        )
        trainings = self._trainings if account is None else self._trainings.forked()
        trainings.begin(
            charged,
            module=private_module,
            optimizer=private_optimizer,
            tracker=record_indices(loader, population=rows, steps=count),
            kernel=kernel,
            dataset=dataset,
            task=task,
            sample_rate=kernel.sample_rate,
            population=rows,
        )
        if not ghost:
            return private_module, private_optimizer, loader
        private_loss = None
        if task.own_loss is None:
            private_loss = self._prepare_criterion(
                module=private_module,
                optimizer=private_optimizer,
                criterion=task.criterion,
                loss_reduction=kernel.loss_reduction,
            )
        return private_module, private_optimizer, private_loss, loader

    def attach(
        self,
        *,
        module: Any,
        optimizer: DPOptimizer,
        data_loader: DataLoader[Any] | None = None,
        dataset: Any = None,
        sample_rate: float | None = None,
        criterion: Any = None,
        loss_of: LossOf | None = None,
    ) -> None:
        """Account for a training that was made private elsewhere, before its first step.

        For loops whose framework calls Opacus itself. A step hook that is attached already stays,
        and is called first; this engine's own worst-case ledger counts beside it.

        Args:
            module: What Opacus's make_private returned first.
            optimizer: Opacus's optimizer, flat, per-layer, adaptive or ghost clipping.
            data_loader: Opacus's DPDataLoader, not yet iterated. None: rows come from
                `batch(indices=...)`; then `dataset` and `sample_rate` are needed.
            dataset: The training set, without a `data_loader`.
            sample_rate: Probability that an instance is drawn, without a `data_loader`.
            criterion: The loss trained with; as in make_private, name it.
            loss_of: In its place, as in make_private.

        Raises:
            UnsupportedError, TypeError, ValueError: A training without a sound per-instance number;
                nothing was changed.
        """
        theirs = attached(
            optimizer=optimizer, data_loader=data_loader, dataset=dataset, sample_rate=sample_rate
        )
        policy = self.account.policy_for(poisson_sampling=True)
        require_supported(module, theirs.options, policy=policy)
        shard = attached_shard(module, data_loader)
        found = asked(
            module, theirs.options, size=len(theirs.dataset),
            noise_multiplier=float(optimizer.noise_multiplier),
            max_grad_norm=float(optimizer.max_grad_norm), optimizer=optimizer,
            layer_bounds=tuple(map(float, getattr(optimizer, "max_grad_norms", ()))),
        )  # fmt: skip
        known = criterion is not None or loss_of is not None
        ready = self.account.prepared(found, shard=shard, policy=policy, loss_known=known)
        if ready.policy.enforced:
            self._trainings.require_same_rows(theirs.dataset)
        begin_attached(
            self.account, self._trainings, theirs, module=module, optimizer=optimizer,
            data_loader=data_loader, asked=found, ready=ready, shard=shard, criterion=criterion,
            loss_of=loss_of,
        )  # fmt: skip

    # --- during training ----------------------------------------------------------------------

    @contextmanager
    def batch(
        self, *, indices: npt.ArrayLike | None = None, rows: npt.ArrayLike | None = None
    ) -> Iterator[None]:
        """Say which rows the next step's batch holds, for loops with loaders of their own.

        The caller vouches that the rows were drawn by independent coins at the accounted rate.

        Args:
            indices: Instances, each once, in the order of the batch, by their ids if the engine was
                given `instance_ids`, else by row; in a distributed training of this process's
                shard.
            rows: Rows in their place.
        """
        named = self.account.rows(indices, rows, persons=False)
        trackers = [training.tracker for training in self.trainings]
        for tracker in trackers:
            tracker.set_explicit(named)
        try:
            yield
        finally:
            for tracker in trackers:
                tracker.set_explicit(None)

    def refresh_norms(self, *, criterion: Any = None, loss_of: LossOf | None = None) -> Sweep:
        """Measure every instance at the current parameters; later steps charge these norms.

        Args:
            criterion: The loss trained with. Default: the one make_private was given.
            loss_of: In its place, as in make_private.

        Raises:
            ValueError: No loss is known.
            UnsupportedError: norm_policy is "worst_case" or "capped", which charge no norms.
        """
        if not self.account.terms.policy.measured:
            raise UnsupportedError(
                f"Expected a norm policy that charges norms, got norm_policy="
                f"{self.norm_policy!r}. Use 'last_seen' or 'refresh'; "
                "opacus_pil.capture.sweep measures without charging."
            )
        return self._trainings.measured(self.account, criterion=criterion, loss_of=loss_of)

    def set_caps(self, caps: npt.ArrayLike) -> None:
        """Clip each instance to another cap from the next step on.

        Guarantee: with a budget the ledger stays "bound" if each cap is a function of the released
            models and of the instance's own record only; without one it becomes "output_specific".

        Args:
            caps: As the constructor takes them; in a distributed
                training of the whole data set, on every rank.

        Raises:
            ValueError: Not one finite cap per instance; norm_policy is not "capped"; or steps
                labelled "bound" were charged already and there is no budget.
            UnsupportedError: A batch is in hand: caps are fixed before a step's rows are drawn.
        """
        if not self.account.terms.policy.enforced:
            raise ValueError(
                f"Expected norm_policy='capped', got norm_policy={self.norm_policy!r}. "
                "Caps are enforced under that policy only."
            )
        if any(training.in_hand for training in self.trainings):
            raise UnsupportedError(
                "Expected caps to be set between steps, got a drawn batch in hand that no step has "
                "used. Caps that could depend on who was drawn bound nothing: call set_caps after "
                "optimizer.step() and before the next batch is taken from the loader."
            )
        self.account.set_caps(caps)

    # --- checkpoints --------------------------------------------------------------------------

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: Any,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save as Opacus does, and with it both ledgers and where the training stands.

        Guarantee: with `optimizer`, a process that loads the file goes on with the run that was
            saved: on CPU the weights and ledgers that follow are equal bit for bit, if items and
            the forward pass draw their randomness from torch's, numpy's or Python's global
            generator in the main process. With num_workers > 0 this holds for items without
            randomness: the workers' generators are not saved. Save after `optimizer.step()`: a
            batch that was handed out and not stepped on is not handed out again.

        Args:
            path: A path: the file is replaced as a whole, mode 0600. An open binary file is
                written as it is.
            module: As in Opacus.
            optimizer: The private optimizer. None: weights and ledgers only.
            noise_scheduler: As in Opacus; functions it holds are not saved.
            grad_clip_scheduler: Likewise.
            checkpoint_dict: More entries, of tensors and plain values; for example the epoch.
            module_state_dict_kwargs: As in Opacus.
            torch_save_kwargs: As in Opacus.

        Raises:
            ValueError: make_private was not called yet, or `optimizer` is not of this engine.
            UnsupportedError: Within a logical batch, or in a pass whose position is not known.
            TypeError: An entry that would have to be unpickled by running code.

        Privacy: the file holds per-instance losses and the states that the noise is drawn from.
            Whoever has it can undo the noise to come: never release it; release the weights.
        """
        checkpoint.save(
            self._kept(), path, module=module, optimizer=optimizer,
            schedulers=(noise_scheduler, grad_clip_scheduler), extra=checkpoint_dict,
            module_options=module_state_dict_kwargs, options=torch_save_kwargs,
        )  # fmt: skip

    def load_checkpoint(
        self,
        *,
        path: str | os.PathLike[str] | IO[bytes],
        module: Any,
        optimizer: DPOptimizer | None = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
        strict: bool = False,
    ) -> dict[str, Any]:
        """Load what `save_checkpoint` saved, or a file of plain Opacus.

        Call it after make_private with the saved training's arguments, right before the loop. With
        `optimizer`, the next pass over the private loader hands out what was left of the pass that
        was saved (nothing, if it was saved after its last batch), the ones after it are whole, and
        all generators continue. Without, only weights and ledgers are loaded.

        A file of plain Opacus knows no instances: every instance is charged the worst case for its
        history, with a warning. So is everybody where the file's training had other data, as Opacus
        goes on there; `strict` refuses. Where `module` is a copy that this engine does not train,
        the ledgers stay with the training that goes on, with a warning.

        Args:
            path: File or open binary file; nothing in it is run.
            module: As in Opacus.
            optimizer: The private optimizer of the same training.
            noise_scheduler: As in Opacus.
            grad_clip_scheduler: As in Opacus.
            module_load_dict_kwargs: As in Opacus.
            torch_load_kwargs: As in Opacus, for example map_location.
            strict: Refuse a file of a training on other data.

        Returns:
            The other entries of the file, as in Opacus.

        Raises:
            ValueError: make_private was not called yet, or `optimizer` is not of this engine.
            FileNotFoundError: There is no such file.
            LedgerError: A damaged or edited file; or one of another training: orders, levels, norm
                policy, accountant, clipping, mode, kernel, loader, generators or model, with
                `strict` also other data; or another training of this engine would be forgotten.
                Only the noise may be another one, as in Opacus: the training
                goes on with its own, with a warning. Module, optimizer, schedulers, engine and
                generators are as they were.
        """
        return checkpoint.load(
            self._kept(), path, module=module, optimizer=optimizer,
            schedulers=(noise_scheduler, grad_clip_scheduler),
            module_options=module_load_dict_kwargs, options=torch_load_kwargs, strict=strict,
        )  # fmt: skip

    def _kept(self) -> checkpoint.Kept:
        return checkpoint.Kept(self.account, self._trainings, self.secure_mode, self.secure_rng)
