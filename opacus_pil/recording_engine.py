"""RecordingEngine: watches trainings that Opacus made private, and charges both ledgers.

Here capture meets accounting; neither knows the other. Making training private is
`privacy_engine.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.data_loader import DPDataLoader
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)
from torch import nn
from torch.utils.data import DataLoader

from . import _validate as check
from ._validate import FloatArray, IntArray
from .accounting import PerInstanceAccountant
from .capture.clipping import checked_caps
from .capture.ghost import SEQUENCE_ROUNDING
from .capture.indices import BatchTracker, record_indices
from .capture.norms import chained, require_known
from .capture.recorder import Recorder
from .capture.row_losses import LossOf
from .capture.shards import Shard
from .capture.sweep import Sweep
from .dataset_fingerprint import dataset_fingerprint
from .distributed import separate_coins
from .errors import UnsupportedError
from .ledgers import LedgerEngine
from .norm_policy import Charger, raised
from .step_accounting import StepAccounting, adaptive_noise
from .training.task import Task
from .training_kernel import (
    TrainingKernel,
    is_distributed,
    require_map_style,
    require_supported,
)


class RecordingEngine(LedgerEngine):
    """An engine that accounts for trainings made private by Opacus.

    Args and Raises: those of PerInstancePrivacyEngine.
    """

    # --- a training of somebody else ----------------------------------------------------------

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
        if not isinstance(optimizer, DPOptimizer):
            raise TypeError(
                check.expected(
                    "optimizer", "to be Opacus's DPOptimizer", type(optimizer).__name__,
                    "Attach after make_private; a plain optimizer adds no noise.",
                )
            )  # fmt: skip
        require_known(optimizer)
        if data_loader is not None:
            if dataset is not None or sample_rate is not None:
                raise ValueError(
                    "Expected data_loader or dataset with sample_rate, got both. Pass one."
                )
            require_map_style(data_loader)
            if not isinstance(data_loader, DPDataLoader):
                raise UnsupportedError(
                    f"Expected Opacus's DPDataLoader, got {type(data_loader).__name__}. Pass "
                    "dataset and sample_rate, and say batch(indices=...) around each step."
                )
            dataset, rate = data_loader.dataset, float(data_loader.sample_rate)
        else:
            if dataset is None:
                raise ValueError(
                    "Expected data_loader, or dataset with sample_rate, got neither. Pass one."
                )
            rate = check.probability(
                "sample_rate", sample_rate, "Pass the rate your loader draws every row at."
            )
        moved = any(p.grad is not None for p in optimizer.params)
        if moved or optimizer.original_optimizer.state:
            raise ValueError(
                "Expected an optimizer that has made no step, got one with gradients or state. "
                "Steps before attach are not charged: attach right after make_private, and call "
                "optimizer.zero_grad(set_to_none=True) if there was a backward pass only."
            )
        ghost = isinstance(optimizer, DPOptimizerFastGradientClipping)
        clipping = "flat"
        if isinstance(optimizer, DPPerLayerOptimizer):
            clipping = "per_layer"
        elif isinstance(optimizer, AdaClipDPOptimizer):
            clipping = "adaptive"
        options: dict[str, Any] = {
            "grad_sample_mode": "ghost" if ghost else "hooks",
            "clipping": clipping,
        }
        if clipping == "adaptive":
            options["unclipped_num_std"] = optimizer.unclipped_num_std
        policy = self._policy_for(poisson_sampling=True)
        require_supported(module, options, norm_policy=policy)
        shard = self._attached_shard(module, data_loader)
        charger = self._ready_charger(
            module, dataset, options, shard=shard, policy=policy,
            noise_multiplier=float(optimizer.noise_multiplier),
            loss_known=criterion is not None or loss_of is not None,
        )  # fmt: skip
        kernel = TrainingKernel(
            sample_rate=rate,
            expected_batch_size=optimizer.expected_batch_size,
            noise_multiplier=float(optimizer.noise_multiplier),
            max_grad_norm=float(optimizer.max_grad_norm),
            loss_reduction=optimizer.loss_reduction,
            grad_sample_mode=options["grad_sample_mode"],
            batch_first=getattr(module, "batch_first", True),
            num_instances=len(dataset),
            clipping=clipping,
            world_size=1 if shard is None else shard.world_size,
            rand_on_empty=data_loader is not None and data_loader.collate_fn.rand_on_empty,
        )
        tracker = BatchTracker() if data_loader is None else record_indices(data_loader)
        collate = None if data_loader is None else data_loader.collate_fn.wrapped_collator_fn
        if shard is not None and not optimizer.secure_mode:
            separate_coins(data_loader.batch_sampler)  # type: ignore[union-attr]
        counts = self.accountant.get_optimizer_hook_fn(sample_rate=rate)
        previous = optimizer.step_hook
        optimizer.step_hook = counts if previous is None else chained(previous, counts)
        self._settle(charger, shard)
        self._kernels.append(kernel)
        task = Task(
            criterion=criterion, own_loss=loss_of, collate_fn=collate,
            reduction=kernel.loss_reduction, per_row=ghost,
        )  # fmt: skip
        self._account(
            module, optimizer, tracker, kernel=kernel, dataset=dataset, task=task,
            sample_rate=rate, loaded=data_loader is not None,
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
        size, shard = self.per_instance.num_instances, self._shard
        size = size if shard is None else shard.num_instances
        named = self._ids.rows(indices, rows=rows, size=size)
        if shard is not None:
            shard.positions(named)
        trackers = [accounting.tracker for accounting in self._accountings]
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
        if self._norm_policy in ("worst_case", "capped"):
            raise UnsupportedError(
                f"Expected a norm policy that charges norms, got norm_policy="
                f"{self._norm_policy!r}. Use 'last_seen' or 'refresh'; "
                "opacus_pil.capture.sweep measures without charging."
            )
        if not self._accountings:
            raise ValueError("Expected make_private to be called first, got nothing to measure.")
        training = self._accountings[-1]
        task = self.task_with(criterion=criterion, loss_of=loss_of)
        if not task.named:
            raise ValueError(
                "Expected criterion or loss_of to be the loss trained with, got none. Pass it here "
                "or to make_private."
            )
        training.task = self._task = task
        found = training.measure()
        self._charges().observe(found, max_grad_norm=training.clip_bound)
        if self._shard is None:
            return found
        return replace(found, indices=self._shard.rows[found.indices])

    def set_caps(self, caps: npt.ArrayLike) -> None:
        """Clip each instance to another cap from the next step on.

        Guarantee: with a budget the ledger stays "bound" if each cap is a function of the released
            models and of the instance's own record only; without one it becomes "output_specific".

        Args:
            caps: Shape (instances,), in units of max_grad_norm, in [0, 1]; in a distributed
                training of the whole data set, on every rank.

        Raises:
            ValueError: Not one finite cap per instance; norm_policy is not "capped"; or steps
                labelled "bound" were charged already and there is no budget.
            UnsupportedError: A batch is in hand: caps are fixed before a step's rows are drawn.
        """
        if self._norm_policy != "capped":
            raise ValueError(
                f"Expected norm_policy='capped', got norm_policy={self._norm_policy!r}. "
                "Caps are enforced under that policy only."
            )
        if any(training.in_hand for training in self._accountings):
            raise UnsupportedError(
                "Expected caps to be set between steps, got a drawn batch in hand that no step has "
                "used. Caps that could depend on who was drawn bound nothing: call set_caps after "
                "optimizer.step() and before the next batch is taken from the loader."
            )
        charges, shard = self._charges(), self._shard
        size = charges.accountant.num_instances if shard is None else shard.num_instances
        checked = checked_caps(caps, num_instances=size)
        if shard is not None:
            checked = checked[shard.rows]
        charges.set_caps(raised(checked, rounding=self._cap_rounding))
        self._caps = checked

    # --- inside -------------------------------------------------------------------------------

    _cap_rounding = float(torch.finfo(torch.float32).eps)

    def _ready_charger(
        self,
        module: Any,
        dataset: Any,
        options: Mapping[str, Any],
        *,
        shard: Shard | None,
        policy: str,
        noise_multiplier: float,
        loss_known: bool,
    ) -> Charger:
        """Return what will charge this training, after every check that needs no mutation."""
        total = len(dataset)
        size = total if shard is None else check.integer(
            "rows of this rank", len(shard.rows), low=1, cure="Train on fewer processes."
        )  # fmt: skip
        self._ids.require_size(total)
        clipping = options.get("clipping", "flat")
        if policy == "capped" and clipping != "flat":
            raise UnsupportedError(
                f"Expected clipping='flat' with norm_policy='capped', got {clipping=}. A cap "
                "bounds the whole gradient of an instance."
            )
        if self._refresh_every is not None and not loss_known:
            raise ValueError(
                f"Expected criterion to be named with norm_policy={policy!r}, got "
                "Opacus's default. A full pass needs the loss you train with: "
                "make_private(criterion=...), or loss_of=... for batches that are no pairs."
            )
        if self._charger is not None:
            if self.per_instance.num_instances != size:
                raise UnsupportedError(
                    f"Expected the data set of {self.per_instance.num_instances} instances this "
                    f"engine accounts for, got one of {size}. Use a new engine for other data, or "
                    "make_private_on for part of the same."
                )
            exchanged = self._exchanged(dataset) if policy == "capped" else ""
            if exchanged:
                raise UnsupportedError(
                    "Expected the data set this engine accounts for, since caps and budgets belong "
                    f"to its rows, got another one: {exchanged}. Use a new engine for other data."
                )
            return self._charger
        caps, budget = None, self._budget
        if policy == "capped":
            # Clipping to a cap is exact up to rounding; the charge is raised by as much.
            dtypes = {torch.float32, *(p.dtype for p in _parameters(module))}
            self._cap_rounding = max(float(torch.finfo(dtype).eps) for dtype in dtypes)
            if options.get("grad_sample_mode") == "ghost":
                self._cap_rounding = max(self._cap_rounding, SEQUENCE_ROUNDING)
            if self._caps is None:
                self._caps = np.ones(total)
            caps = checked_caps(self._caps, num_instances=total)
            if shard is not None:
                caps = caps[shard.rows]
                budget = shard_of_budget(budget, shard)
            caps = raised(caps, rounding=self._cap_rounding)
        top = 1.0
        if clipping == "adaptive":
            deviation = float(options.get("unclipped_num_std", math.inf))
            top = math.hypot(1.0, adaptive_noise(noise_multiplier, deviation)[1])
        accountant = PerInstanceAccountant(
            size,
            orders=self._orders,
            levels=self._levels,
            max_sensitivity=top,
            caps=caps,
            budget=budget,
            history=self._history,
            instance_ids=self._ids.array if shard is None else shard.rows,
        )
        return Charger(accountant, norm_policy=policy, refresh_every=self._refresh_every)

    @staticmethod
    def _attached_shard(module: Any, data_loader: Any) -> Shard | None:
        """Return this process's shard of a distributed training that was made private already."""
        if not is_distributed(module):
            return None
        if data_loader is None or not data_loader.distributed:
            raise UnsupportedError(
                "Expected Opacus's distributed DPDataLoader with a distributed module, got none: "
                "which rows belong to this rank is not known. Pass data_loader."
            )
        return Shard.of_process(len(data_loader.dataset))

    def _account(
        self,
        module: Any,
        optimizer: DPOptimizer,
        tracker: BatchTracker,
        *,
        kernel: TrainingKernel,
        dataset: Any,
        task: Task,
        sample_rate: float,
        population: IntArray | None = None,
        loaded: bool = True,
    ) -> None:
        """Record rows and norms of one training and charge this engine for its steps."""
        caps = None
        tracker.coins = self._coins_seen
        if self._norm_policy == "capped":
            caps = functools.partial(self._caps_in_force, len(self._accountings))
        if not task.named:  # of several trainings the same loss is taken to be meant
            named = {"criterion": self._task.criterion, "own_loss": self._task.own_loss}
            task = replace(task, **named)
        self._task = task
        certifiable = self._charges().claims_as in ("worst_case", "capped")
        fresh = certifiable and self._fingerprint is None and population is None
        if fresh:
            self._fingerprint = self.fingerprint_of(dataset)  # before anybody changes it
        attributed = self._charges().claims_as in ("capped", "full", "participation")
        began = None
        if attributed and population is None and self._given_fingerprint is None:
            began = self._fingerprint if fresh else dataset_fingerprint(dataset)
        recorder = Recorder(
            tracker,
            caps=caps,
            caps_rounding=self._cap_rounding,
            rand_on_empty=kernel.rand_on_empty,
            noise_seen=self._noise_seen,
        )
        exchanged = self._exchanged(dataset)
        if exchanged:
            recorder.note("rows_exchanged", exchanged, lasting=True)
        self._accountings.append(
            StepAccounting(
                module=module,
                optimizer=optimizer,
                recorder=recorder,
                charger=self._charges(),
                kernel=kernel,
                dataset=dataset,
                task=task,
                population=population,
                sample_rate=sample_rate,
                shard=self._shard,
                loaded=loaded,
                began=began,
            )
        )

    def _exchanged(self, dataset: Any) -> str:
        """Return how a data set is not that of the training before; "": nothing says so."""
        before = self._accountings[-1].dataset if self._accountings else dataset
        if before is dataset:
            return ""
        return self.fingerprint_of(dataset).differs(self.fingerprint_of(before))

    def _caps_in_force(self, training: int, rows: IntArray) -> FloatArray:
        """Return the caps that `rows` are clipped to in the step under way."""
        assert self._caps is not None
        rows = rows if self._shard is None else self._shard.positions(rows)
        noise, rate = self._accountings[training].clipping_at()
        charged = self.per_instance.caps_for(noise_multiplier=noise, sample_rate=rate)[rows]
        # The ledger has the last word: a loaded one may have smaller caps, or budgets of its own.
        return np.minimum(self._caps[rows], charged)


def shard_of_budget(budget: Any, shard: Shard) -> Any:
    """Return the part of a budget that belongs to a shard; one for everybody stays as it is."""
    target, delta = budget if isinstance(budget, tuple) else (budget, None)
    if target is None or np.ndim(target) == (0 if delta is not None else 1):
        return budget
    values = np.asarray(target)
    check.same_length("budget", values, "instances", shard.num_instances)
    return values[shard.rows] if delta is None else (values[shard.rows], delta)


def _parameters(module: Any) -> list[nn.Parameter]:
    inner = module if isinstance(module, nn.Module) else module._module
    return list(inner.parameters())
