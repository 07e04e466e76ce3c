"""PerInstancePrivacyEngine: Opacus's PrivacyEngine that also knows each instance's privacy loss.

Training is Opacus's, bit for bit (except with caps, which clip more). Watching and charging it is
`recording_engine.py`, saving it and going on `resuming_engine.py`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader

from . import _validate as check
from .capture.collate import unwrapped
from .capture.fixed_batches import recording_copy
from .capture.indices import record_indices
from .capture.row_losses import LossOf
from .capture.shards import Shard
from .distributed import require_same_arguments, separate_coins
from .resuming_engine import ResumingEngine
from .training.task import Task
from .training_kernel import (
    TrainingKernel,
    is_distributed,
    require_known_options,
    require_map_style,
    require_plain,
    require_supported,
    require_uniform_batches,
)

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


class PerInstancePrivacyEngine(ResumingEngine):
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
            [0, 1], from public data and each instance's own record only.
        budget: With "capped": as in PerInstanceAccountant. Nobody exceeds it: whoever could is
            clipped to 0 from that step on.
        history: As in PerInstanceAccountant: log levels, so that `per_instance.group_rdp` works.
        instance_ids: Shape (instances,), your own ids of the data set's rows, texts or integers, in
            their order. With ids every call that names instances takes ids, and rows by `rows=`.
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
        require_known_options(options)
        loss_of = self._loss_of if loss_of is None else loss_of
        noise = check.real(
            "noise_multiplier", noise_multiplier, low=0.0,
            cure="Pass the noise std on the gradient sum divided by max_grad_norm.",
        )  # fmt: skip
        bound = _checked_bound(max_grad_norm, clipping=options.get("clipping", "flat"))
        if options.get("clipping") == "per_layer":
            _require_bound_per_layer(max_grad_norm, optimizer)
        mode = options.get("grad_sample_mode", "hooks")
        poisson = options.get("poisson_sampling", True)
        named = not any(criterion is default for default in _DEFAULT_CRITERIA)
        require_map_style(data_loader)
        policy = self._policy_for(poisson_sampling=poisson)
        require_supported(module, options, norm_policy=policy)
        distributed = is_distributed(module)
        if poisson:
            require_uniform_batches(data_loader, distributed=distributed)
        size = len(data_loader.dataset)  # type: ignore[arg-type]
        shard = Shard.of_process(size) if distributed else None
        charger = self._ready_charger(
            module,
            data_loader.dataset,
            options,
            shard=shard,
            policy=policy,
            noise_multiplier=noise,
            loss_known=named or mode == "ghost" or loss_of is not None,
        )
        if distributed:
            require_same_arguments(
                noise_multiplier=noise, max_grad_norm=bound, norm_policy=policy, instances=size,
                batches=len(data_loader), grad_sample_mode=mode, policy_settings=self._settings(),
            )  # fmt: skip
        made = super().make_private(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            criterion=criterion,
            **options,
        )
        private_module, private_optimizer, loader = made[0], made[1], made[-1]
        if poisson:
            tracker = record_indices(loader)
            collate = unwrapped(loader.collate_fn)
            drawn_rate = float(loader.batch_sampler.sample_rate)
        else:
            loader, tracker = recording_copy(loader)
            made = (*made[:-1], loader)
            collate, drawn_rate = loader.collate_fn, 1.0
        kernel = TrainingKernel(
            sample_rate=drawn_rate,
            expected_batch_size=private_optimizer.expected_batch_size,
            noise_multiplier=noise,
            max_grad_norm=bound,
            loss_reduction=private_optimizer.loss_reduction,
            grad_sample_mode=mode,
            batch_first=options.get("batch_first", True),
            num_instances=len(loader.dataset),
            clipping=options.get("clipping", "flat"),
            poisson_sampling=poisson,
            world_size=1 if shard is None else shard.world_size,
            rand_on_empty=bool(options.get("rand_on_empty", False)),
        )
        if shard is not None and not self.secure_mode:
            separate_coins(loader.batch_sampler)
        if policy == "participation" and not self._policy_named:
            warnings.warn(
                "poisson_sampling=False: fixed batches are charged by norm_policy='participation', "
                "without amplification by sampling and for zero-out neighbours (an instance's slot "
                "stays empty), not for adding or removing one. get_epsilon stays Opacus's, which "
                "claims the amplification. Name the policy to accept this.",
                stacklevel=2,
            )
        self._settle(charger, shard)
        self._kernels.append(kernel)
        self._account(
            private_module,
            private_optimizer,
            tracker,
            kernel=kernel,
            dataset=loader.dataset,
            task=Task(
                criterion=criterion if named or mode == "ghost" else None,
                own_loss=loss_of,
                collate_fn=collate,
                reduction=kernel.loss_reduction,
                per_row=mode == "ghost",
            ),
            # Opacus may account at 1 / (n - 1) while drawing at 1 / n: the larger counts.
            sample_rate=max(1 / len(loader), drawn_rate),
        )
        return made

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
        require_supported(module, options, norm_policy=self._policy_for(poisson_sampling=poisson))
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
    ) -> Any:
        """Make a plain module private with the training's own kernel, drawing from `population`.

        Sample rate, expected batch size, noise and clip bound are those of training: they are
        public constants and do not follow the size of the population. Every step charges this
        engine's ledgers.

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
        if not task.named and (ghost or self._refresh_every):
            raise ValueError(
                "Expected criterion to be the loss to train with, got criterion=None. Pass it."
            )
        generator = self.secure_rng if self.secure_mode else sampler_generator
        loader = DPDataLoader(
            dataset,
            sample_rate=kernel.sample_rate,
            collate_fn=task.collate_fn,
            generator=generator,
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
        private_optimizer = self._prepare_optimizer(
            optimizer=optimizer,
            noise_multiplier=kernel.noise_multiplier,
            max_grad_norm=kernel.max_grad_norm,
            expected_batch_size=kernel.expected_batch_size,
            loss_reduction=kernel.loss_reduction,
            noise_generator=noise_generator,
            grad_sample_mode=kernel.grad_sample_mode,
        )
        private_optimizer.attach_step_hook(
            self.accountant.get_optimizer_hook_fn(sample_rate=kernel.sample_rate)
        )
        self._account(
            private_module,
            private_optimizer,
            record_indices(loader, population=rows, steps=count),
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


def _require_bound_per_layer(bounds: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless there is a clip bound for each parameter tensor that trains."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if len(bounds) != len(held):
        raise ValueError(
            f"Expected max_grad_norm to be one bound per parameter tensor of the optimizer "
            f"({len(held)}), got {len(bounds)}. With clipping='per_layer' pass a list of as many."
        )


def _checked_bound(max_grad_norm: Any, *, clipping: str) -> float:
    """Return the clip bound on a whole gradient; one bound per layer with per-layer clipping."""
    cure = "Pass a positive number; with clipping='per_layer' a list of one per parameter."
    if clipping != "per_layer":
        return check.real("max_grad_norm", max_grad_norm, low=0.0, open_low=True, cure=cure)
    bounds = check.real_array("max_grad_norm", max_grad_norm, low=0.0, open_low=True, cure=cure)
    if bounds.ndim != 1 or not len(bounds):
        raise ValueError(check.expected("max_grad_norm", "to be a list", max_grad_norm, cure))
    return float(np.linalg.norm(bounds))
