"""PerInstancePrivacyEngine: Opacus's PrivacyEngine that also knows each instance's privacy loss.

Training is Opacus's, bit for bit (except with caps, which clip more). Here capture meets
accounting; neither knows the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader

from . import _validate as check
from ._validate import IntArray
from .accounting import PerInstanceAccountant
from .capture.clipping import checked_caps
from .capture.indices import record_indices
from .capture.norms import Recorder
from .capture.sweep import Sweep
from .errors import UnsupportedError
from .ledgers import LedgerEngine
from .norm_policy import Charger, raised
from .step_accounting import StepAccounting
from .training_kernel import (
    TrainingKernel,
    require_map_style,
    require_plain,
    require_supported,
    require_uniform_batches,
)

# Opacus's default criterion objects; getting one of them means that the caller named none.
_DEFAULT_CRITERIA = tuple(
    inspect.signature(function).parameters["criterion"].default
    for function in (PrivacyEngine.make_private, PrivacyEngine.make_private_with_epsilon)
)


class PerInstancePrivacyEngine(LedgerEngine):
    """Opacus's PrivacyEngine with a second ledger: the privacy loss of every training instance.

    Guarantee: `get_epsilon` is Opacus's. Per-instance values hold for adding or removing one
        instance under Poisson sampling, with the label in their `guarantee`:
        worst_case       "bound"
        last_seen        "estimate": the norm of the last batch an instance was in
        refresh          "estimate"; with refresh_every=1 and a forward pass without randomness
                         "output_specific"
        capped           "bound": each instance is clipped to its own cap, fixed before the run

    Args:
        accountant: Opacus's accountant: "prv", "rdp" or "gdp".
        secure_mode: As in Opacus.
        norm_policy: "worst_case", "last_seen", "refresh" or "capped".
        refresh_every: With "refresh": a full pass over the data every so many steps.
        orders: Rényi orders of the per-instance ledger.
        levels: Number of sensitivities it tells apart.
        caps: With "capped": shape (instances,), clipping bounds in units of max_grad_norm, in
            [0, 1], from public data and each instance's own record only.

    Raises:
        ValueError: Arguments that do not fit each other.
        UnsupportedError: A norm policy that is not available yet.

    Privacy: per-instance values depend on private data and are not private to release.
    """

    # --- training -----------------------------------------------------------------------------

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        criterion: Any = _DEFAULT_CRITERIA[0],
        **options: Any,
    ) -> Any:
        """Make training private as Opacus does, and account for every instance.

        Args:
            criterion: As in Opacus. norm_policy="refresh" and refresh_norms() measure with it, so
                name it in hooks mode too.
            options: Opacus's other arguments.

        Returns:
            Opacus's tuple: (module, optimizer, data_loader), in ghost mode
            (module, optimizer, criterion, data_loader).

        Raises:
            UnsupportedError, TypeError, ValueError: A use without a sound per-instance number;
                nothing was changed.
        """
        noise = check.real(
            "noise_multiplier", noise_multiplier, low=0.0,
            cure="Pass the noise std on the gradient sum divided by max_grad_norm.",
        )  # fmt: skip
        bound = check.real(
            "max_grad_norm", max_grad_norm, low=0.0, open_low=True,
            cure="Per-layer bounds need clipping='per_layer', which is not supported yet.",
        )  # fmt: skip
        mode = options.get("grad_sample_mode", "hooks")
        named = not any(criterion is default for default in _DEFAULT_CRITERIA)
        charger = self._ready_charger(
            module, data_loader, options, criterion_known=named or mode == "ghost"
        )
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
        sampler_rate = float(loader.batch_sampler.sample_rate)
        kernel = TrainingKernel(
            sample_rate=sampler_rate,
            expected_batch_size=private_optimizer.expected_batch_size,
            noise_multiplier=noise,
            max_grad_norm=bound,
            loss_reduction=private_optimizer.loss_reduction,
            grad_sample_mode=mode,
            batch_first=options.get("batch_first", True),
            num_instances=len(loader.dataset),
        )
        self._charger = charger
        self._kernels.append(kernel)
        if named or mode == "ghost":
            self._criterion = criterion
        self._account(
            private_module,
            private_optimizer,
            loader,
            kernel=kernel,
            criterion=self._criterion,
            rand_on_empty=options.get("rand_on_empty", False),
            # Opacus may account at 1 / (n - 1) while drawing at 1 / n: the larger counts.
            sample_rate=max(1 / len(loader), sampler_rate),
        )
        return made

    def make_private_with_epsilon(
        self, *, module: nn.Module, data_loader: DataLoader[Any], **options: Any
    ) -> Any:
        """Choose the noise for a target epsilon as Opacus does, then make_private."""
        require_map_style(data_loader)
        require_supported(module, options)
        require_uniform_batches(data_loader)
        return super().make_private_with_epsilon(module=module, data_loader=data_loader, **options)

    def make_private_on(
        self,
        population: npt.ArrayLike,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        criterion: Any = None,
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
            criterion: Loss; needed in ghost mode and for refreshing unless training named it.
            steps: Number of batches of one pass over the loader.
            noise_generator: Source of the noise; None: torch's global generator.
            sampler_generator: Source of the batches; None: torch's global generator.
            collate_fn: Joins items to a batch. Default: torch's default_collate.

        Returns:
            The tuple of make_private.

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
        loss = self._criterion if criterion is None else criterion
        if loss is None and (kernel.grad_sample_mode == "ghost" or self._refresh_every):
            raise ValueError(
                "Expected criterion to be the loss to train with, got criterion=None. Pass it."
            )
        generator = self.secure_rng if self.secure_mode else sampler_generator
        loader = DPDataLoader(
            dataset,
            sample_rate=kernel.sample_rate,
            collate_fn=collate_fn,
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
            loader,
            kernel=kernel,
            criterion=loss,
            sample_rate=kernel.sample_rate,
            population=rows,
            steps=count,
        )
        if kernel.grad_sample_mode != "ghost":
            return private_module, private_optimizer, loader
        private_loss = self._prepare_criterion(
            module=private_module,
            optimizer=private_optimizer,
            criterion=loss,
            loss_reduction=kernel.loss_reduction,
        )
        return private_module, private_optimizer, private_loss, loader

    @contextmanager
    def batch(self, *, indices: npt.ArrayLike) -> Iterator[None]:
        """Say which rows the next step's batch holds, for loops with loaders of their own.

        The caller vouches that the rows were drawn by independent coins at the accounted rate.

        Args:
            indices: Rows of the data set, each once, in the order of the batch.
        """
        rows = check.index_array("indices", indices, size=self.per_instance.num_instances)
        trackers = [accounting.tracker for accounting in self._accountings]
        for tracker in trackers:
            tracker.set_explicit(rows)
        try:
            yield
        finally:
            for tracker in trackers:
                tracker.set_explicit(None)

    def refresh_norms(self, *, criterion: Any = None) -> Sweep:
        """Measure every instance at the current parameters; later steps charge these norms.

        Args:
            criterion: The loss trained with. Default: the one make_private was given.

        Raises:
            ValueError: No criterion is known, or a norm is not finite.
            UnsupportedError: norm_policy is "worst_case" or "capped", which charge no norms.
        """
        if self._norm_policy in ("worst_case", "capped"):
            raise UnsupportedError(
                f"Expected a norm policy that charges norms, got norm_policy="
                f"{self._norm_policy!r}. Use 'last_seen' or 'refresh'; "
                "opacus_pil.capture.sweep measures without charging."
            )
        if not self._accountings:
            raise ValueError("Expected make_private to be called first, got nothing to measure.")
        training = self._accountings[-1]
        if criterion is not None:
            training.criterion = criterion
        if training.criterion is None:
            raise ValueError(
                "Expected criterion to be the loss trained with, got none. Pass it here or to "
                "make_private."
            )
        found, _ = training.measure()
        self._charges().observe(found, max_grad_norm=training.clip_bound)
        return found

    # --- inside -------------------------------------------------------------------------------

    def _ready_charger(
        self,
        module: nn.Module,
        data_loader: DataLoader[Any],
        options: Mapping[str, Any],
        *,
        criterion_known: bool,
    ) -> Charger:
        """Return what will charge this training, after every check that needs no mutation."""
        require_map_style(data_loader)
        require_supported(module, options)
        require_uniform_batches(data_loader)
        size = len(data_loader.dataset)  # type: ignore[arg-type]
        if self._caps is not None and options.get("grad_sample_mode", "hooks") == "ghost":
            raise UnsupportedError(
                "Expected grad_sample_mode='hooks' with norm_policy='capped', got 'ghost'. Ghost "
                "clipping scales the losses inside backward(), before a cap could be applied."
            )
        if self._refresh_every is not None and not criterion_known:
            raise ValueError(
                "Expected criterion to be named with norm_policy='refresh', got Opacus's default. "
                "A full pass needs the loss you train with: make_private(criterion=...)."
            )
        if self._charger is not None:
            if self.per_instance.num_instances != size:
                raise UnsupportedError(
                    f"Expected the data set of {self.per_instance.num_instances} instances this "
                    f"engine accounts for, got one of {size}. Use a new engine for other data, or "
                    "make_private_on for part of the same."
                )
            return self._charger
        caps = None
        if self._caps is not None:
            # Clipping to a cap is exact up to rounding; the charge is raised by as much.
            dtypes = {torch.float32, *(p.dtype for p in module.parameters())}
            caps = raised(
                checked_caps(self._caps, num_instances=size),
                rounding=max(torch.finfo(dtype).eps for dtype in dtypes),
            )
        accountant = PerInstanceAccountant(
            size, orders=self._orders, levels=self._levels, caps=caps
        )
        return Charger(accountant, norm_policy=self._norm_policy, refresh_every=self._refresh_every)

    def _account(
        self,
        module: Any,
        optimizer: DPOptimizer,
        loader: DPDataLoader,
        *,
        kernel: TrainingKernel,
        criterion: Any,
        sample_rate: float,
        rand_on_empty: bool = False,
        population: IntArray | None = None,
        steps: int | None = None,
    ) -> None:
        """Record rows and norms of one training and charge this engine for its steps."""
        recorder = Recorder(
            record_indices(loader, population=population, steps=steps),
            caps=self._caps,
            rand_on_empty=rand_on_empty,
        )
        self._accountings.append(
            StepAccounting(
                module=module,
                optimizer=optimizer,
                recorder=recorder,
                charger=self._charges(),
                kernel=kernel,
                dataset=loader.dataset,
                collate_fn=loader.collate_fn.wrapped_collator_fn,
                population=population,
                criterion=criterion,
                sample_rate=sample_rate,
            )
        )
