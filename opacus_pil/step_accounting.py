"""StepAccounting: the hook on one optimizer, from a noisy step to a charge of both ledgers.

Runs after clipping and noise and before the parameters move, so that a full pass measures the
parameters the step was computed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.utils.data import default_collate

from ._validate import IntArray
from .capture.norms import record_norms
from .capture.randomness import watch_forward
from .capture.recorder import Fact, Recorder, StepRecord
from .capture.shards import Shard
from .capture.sweep import Sweep, sweep
from .dataset_fingerprint import Fingerprint, dataset_fingerprint, quick_mark
from .errors import UnsupportedError
from .norm_policy import Charger, Step
from .training.evidence import judged
from .training.probe import Probe
from .training.task import Task, evaluated_parts
from .training.weights import NoteWeights, WeightsLeft, renormed
from .training_kernel import TrainingKernel

CERTIFIABLE = ("worst_case", "capped")  # policies whose label can carry a certificate
_COARSE = 1e-4  # float32 and its sequences are far below, half precisions above

# Policies whose label a probe can take away; the others are estimates whatever it finds.
PROBED = ("worst_case", "capped", "full", "participation")


class StepAccounting:
    """Called by Opacus's optimizer once per noisy step.

    Args:
        module: What Opacus made of the module: wrapper or hooks object.
        optimizer: Opacus's optimizer, its accounting hook already attached.
        recorder: Collects what happens at the step.
        charger: Turns it into charges.
        kernel: Constants of the training.
        dataset: Rows to measure in a full pass.
        task: What is minimised, and how items are joined to a batch.
        population: Rows that may be drawn; None: all.
        sample_rate: Largest of the accounted and the drawn rate.
        shard: Rows that the charger's instances are; None: all, in order.
        loaded: Whether batches come from a loader that is known here.
        began: What the data set holds now; None: it is not asked whether that changes.
    """

    def __init__(
        self,
        *,
        module: Any,
        optimizer: DPOptimizer,
        recorder: Recorder,
        charger: Charger,
        kernel: TrainingKernel,
        dataset: Any,
        task: Task,
        population: IntArray | None,
        sample_rate: float,
        shard: Shard | None = None,
        loaded: bool = True,
        began: Fingerprint | None = None,
    ) -> None:
        self.task = task
        self.tracker = recorder.tracker
        self.module = module
        self.optimizer = optimizer
        self.recorder = recorder
        self._charger = charger
        self.kernel = kernel
        self.dataset = dataset
        self._population = population
        self._sample_rate = sample_rate
        self._shard = shard
        self._loaded = loaded
        self._opacus_hook = optimizer.step_hook
        self._ghost = kernel.grad_sample_mode == "ghost"
        self.probe: Probe | None = None
        if charger.claims_as in PROBED:
            measured = charger.claims_as in ("full", "participation")
            self.probe = Probe(
                task, dataset, module=module, random_rows=measured,
                dimension=0 if kernel.batch_first else 1,
            )  # fmt: skip
        if charger.claims_as == "participation":
            watch_forward(module._module, recorder)
        self._described: tuple[Any, str] | None = None
        self.steps = 0  # of this training in this process
        self._clipped_at: tuple[float, float, int] | None = None
        self._unheld = Unheld(module._module, optimizer)
        self._dropouts = [p for p in module._module.modules() if isinstance(p, _DropoutNd)]
        self._began, self._mark, self._moved = began, quick_mark(dataset), False
        self._renormed = renormed(module._module)
        self.evaluated: frozenset[str] | None = None  # parts in evaluation mode while training
        self.weights = WeightsLeft(module._module)
        plain = optimizer.original_optimizer
        if charger.claims_as in CERTIFIABLE and isinstance(plain, Optimizer):
            plain.register_step_post_hook(NoteWeights(self.weights))
        record_norms(optimizer, recorder, module=module)
        optimizer.step_hook = self
        recorder.guards.append(self._require_unchanged_settings)
        recorder.unnoised_step = self._charge_without_noise
        recorder.ledger = charger
        recorder.changed_step = self._note_changed
        recorder.tracker.skipped_at_end = self._note_skipped
        recorder.guarded = True

    def __call__(self, optimizer: DPOptimizer) -> None:
        """Charge Opacus's ledger, then the per-instance one.

        Raises:
            UnsupportedError: Caps or budgets would not hold. The model has not moved, and neither
                ledger was charged.
        """
        record = self.recorder.take(max_grad_norm=self.clip_bound)
        if self.probe is not None and not self._renormed:  # its passes would move the weights
            clipped = self._clipped()
            self.probe.look(
                record, module=self.module, parameters=clipped, clipped_norm=self._norm,
                sums=[self._summed(p) for p in clipped],
            )  # fmt: skip
        std = record.noise_std
        # An instance is in at least one of k summed draws with probability at most k·q, and then
        # moves the sum by at most k clip bounds. Only steps of unknown rows have k > 1.
        batches = max(optimizer.accumulated_iterations, record.draws)
        count = self._released_count(std)
        verdict = judged(self._charger.claims_as, self._facts(record, count))
        if self._shard is not None and record.indices is not None:
            record = replace(record, indices=self._shard.positions(record.indices))
        multiplicity = max(record.draws, record.copies)
        step = Step(
            record,
            verdict,
            noise_multiplier=(std or 0.0) / multiplicity / record.max_grad_norm,
            sample_rate=1.0 if verdict.unamplified else min(self.sample_rate * batches, 1.0),
            measure=self.measure,
            random_forward=self.random_forward,
            released_count=count,
        )
        try:
            self._charger.require_enforced(step)
        except UnsupportedError:
            self.tracker.skipped += 1  # which steps there are then tells which were refused
            raise
        if self._clipped_at is not None and self._clipped_at != (
            step.noise_multiplier, self.sample_rate, self._charger.moment,
        ):  # fmt: skip
            raise UnsupportedError(_OTHER_SETTINGS)
        self._clipped_at = None
        self._opacus_hook(optimizer)
        noised_to = float(optimizer.max_grad_norm)
        if not math.isclose(record.max_grad_norm, noised_to, rel_tol=1e-6) and len(record.norms):
            self._charger.warn(
                "clip bound",
                f"Gradients are clipped to {record.max_grad_norm:g}, the noise is scaled to "
                f"{noised_to:g}. Instances are charged for what happened; Opacus's own epsilon is "
                "not.",
            )
        if self.sample_rate > self._sample_rate:
            self._charger.warn(
                "sample rate",
                f"Rows are drawn at rate {self.sample_rate:g}, Opacus accounts for "
                f"{self._sample_rate:g}. Instances are charged for what happened; Opacus's own "
                "epsilon is not.",
            )
        if self.evaluated is None:
            self.evaluated = evaluated_parts(self.module._module)
        self._charger.note_update(self._update(record.max_grad_norm, std or 0.0, batches))
        self._charger.charge(step)
        self.steps += 1

    @property
    def sample_rate(self) -> float:
        """Largest rate that rows were drawn or accounted at: whoever raises it is charged for it.

        It never sinks, since batches are drawn ahead of their steps.
        """
        return max(self._sample_rate, self.tracker.rate)

    def taken_over(self) -> None:
        """A checkpoint was loaded: generators, buffers and ledgers went back together."""
        self.recorder.noise_seen.forget()
        self.tracker.forget_randomness()
        self._unheld.changed()

    @property
    def clip_bound(self) -> float:
        """Bound that gradients are clipped to: the module's own in ghost mode."""
        holder = self.module if self._ghost else self.optimizer
        return float(holder.max_grad_norm)

    def coming_kernel(self) -> tuple[float, float]:
        """Return noise multiplier and sample rate that the step under way will be charged at.

        Whoever clips by it is held to it: a step at other settings is refused.
        """
        std = self.optimizer.noise_std()  # in the order of the charge, to the bit
        return std / self.clip_bound, self.sample_rate  # one batch per step: caps refuse several

    def clipping_at(self) -> tuple[float, float]:
        """Return `coming_kernel` for gradients that are being clipped now.

        Raises:
            UnsupportedError: Other parts of the step were clipped for other settings.
        """
        self._require_unchanged_settings()
        kernel = self.coming_kernel()
        self._clipped_at = (*kernel, self._charger.moment)
        return kernel

    @property
    def in_hand(self) -> bool:
        """Whether a batch is drawn, or clipped in part, that no step has used yet."""
        return self.recorder.midway or self.tracker.in_hand

    def random_forward(self) -> bool:
        """Whether the training's forward pass draws dropout masks."""
        return any(part.training and part.p > 0 for part in self._dropouts)

    def measure(self) -> Sweep:
        """Run a full pass over the instances in training.

        The pass's indices are the charger's, in a shard not the data set's.
        """
        rows = members = self._charger.active_rows()
        if self._population is not None:
            rows = members = np.intersect1d(rows, self._population)
        if self._shard is not None:
            rows = self._shard.rows[members]
        inner = self.module._module
        names = None
        if not self._ghost:  # flat clipping clips what the optimizer holds
            held = {id(p) for p in self.optimizer.params}
            names = {n for n, p in inner.named_parameters() if id(p) in held and p.requires_grad}
        found = sweep(
            self.module,
            self.dataset,
            loss_of=self.task.loss_of,
            indices=rows,
            loss_reduction=self.kernel.loss_reduction,
            batch_first=self.kernel.batch_first,
            collate_fn=self.task.collate_fn,
            parameters=names,
            layer_bounds=self._layer_bounds(),
            infinite=True,
        )
        return replace(found, indices=members)

    def left(self) -> dict[str, Any]:
        """Return how the last step left the model, for a file: plain values."""
        evaluated = None if self.evaluated is None else sorted(self.evaluated)
        return {"weights": self.weights.state(), "evaluated": evaluated}

    def load_left(self, state: Mapping[str, Any]) -> None:
        """Take over what `left` returned in an earlier process; {}: nothing is known."""
        self.weights.load(state.get("weights"))
        names = state.get("evaluated")
        self.evaluated = None if names is None else frozenset(names)

    # --- inside -------------------------------------------------------------------------------

    def _update(self, clip_bound: float, noise_std: float, batches: int) -> str:
        """Return `described_update` of this step; most steps are like the one before."""
        plain = self.optimizer.original_optimizer
        settings = [
            (name, value) for group in plain.param_groups for name, value in group.items()
            if name not in ("params", "initial_lr")
        ]  # fmt: skip
        divisor, reduction = self.optimizer.expected_batch_size, self.optimizer.loss_reduction
        now = (clip_bound, noise_std, batches, divisor, reduction, settings)
        simple = not any(isinstance(value, torch.Tensor | list) for _, value in settings)
        if self._described is None or not simple or self._described[0] != now:
            words = described_update(
                plain, clip_bound=clip_bound, noise_std=noise_std, divisor=divisor,
                loss_reduction=reduction, batches=batches,
                default_batches=self._loaded and self.task.collate_fn in (None, default_collate),
            )  # fmt: skip
            self._described = (now, words)
        return self._described[1]

    def _facts(self, record: StepRecord, released_count: float) -> list[Fact]:
        """Return everything that takes away from what may be claimed for this step."""
        facts = list(record.facts)
        if record.noise_std is None:
            facts.append(Fact("noise_not_seen"))
        if not record.order.apart:
            facts.append(Fact("rows_not_apart", record.order.why))
        if record.indices is None:
            facts.append(Fact("order_unknown", record.mismatch))
        if record.unfinite is not None and record.unfinite.any():
            facts.append(Fact("gradient_not_finite"))
        if self.probe is not None:
            facts += self.probe.facts
        if self.random_forward():
            facts.append(Fact("random_gradient"))
        if self.kernel.rand_on_empty:
            facts.append(Fact("random_instance_on_empty"))
        if released_count:
            facts.append(Fact("count_released"))
        if record.rounding > _COARSE:
            facts.append(Fact("coarse_rounding", f"rounded to {record.rounding:.1g}"))
        divisor, named = self.optimizer.expected_batch_size, self.kernel.expected_batch_size
        if divisor != named and self.kernel.loss_reduction == "mean":
            facts.append(Fact("divisor_changed", f"{divisor} instead of {named}"))
        changed = self._unheld.changed()
        if changed:
            facts.append(Fact("buffer_changed", changed))
        gone = self._charger.accountant.forgotten
        if bool((gone if self._population is None else gone[self._population]).any()):
            facts.append(Fact("forgotten_rows_drawn"))
        if self.kernel.poisson_sampling and self._one_stream():
            facts.append(Fact("coins_tell_noise"))
        if self._reordered():
            facts.append(Fact("rows_exchanged", "the data set was put into another order"))
        if self._renormed:
            facts.append(Fact("weights_renormed", self._renormed))
        return facts

    def _reordered(self) -> bool:
        """Whether the data set's rows were moved since the training was made private."""
        if self._began is None:
            return False
        mark = quick_mark(self.dataset)
        if mark != self._mark:
            self._mark = mark
            self._moved |= self._began.reordered(dataset_fingerprint(self.dataset))
        return self._moved

    def _one_stream(self) -> bool:
        """Whether coins and noise come from two generators that were seeded alike."""
        loader, noise = self.tracker.loader, self.optimizer.generator
        coins = None if loader is None else loader.batch_sampler.generator
        device = self.optimizer.params[0].device if self.optimizer.params else None
        if loader is None or coins is noise or self.optimizer.secure_mode or device is None:
            return False
        kinds = [device.type if g is None else g.device.type for g in (noise, coins)]
        kinds[1] = "cpu" if coins is None else kinds[1]
        seeds = [torch.initial_seed() if g is None else g.initial_seed() for g in (noise, coins)]
        return kinds == ["cpu", "cpu"] and seeds[0] == seeds[1]

    def _released_count(self, noise_std: float | None) -> float:
        """Return the released count's shift in units of the gradient's noise; 0: none is."""
        if self.kernel.clipping != "adaptive":
            return 0.0
        deviation = float(self.optimizer.unclipped_num_std)
        return adaptive_noise(float(self.optimizer.noise_multiplier), deviation)[1]

    def _clipped(self) -> list[torch.nn.Parameter]:
        """Return the parameters whose gradients are in the clipped norm."""
        holder = self.module.trainable_parameters if self._ghost else self.optimizer.params
        return list(holder)

    def _summed(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return the sum of the rows' clipped gradients; None: the optimizer does not hold it."""
        found: torch.Tensor | None = getattr(parameter, "summed_grad", None)
        shared = found is not None and parameter.grad is not None
        if not shared or parameter.grad.data_ptr() != found.data_ptr():  # type: ignore[union-attr]
            return found
        # A process that adds no noise divides the sum itself: its gradient is a view of it.
        optimizer = self.optimizer
        if optimizer.loss_reduction != "mean":
            return found
        return found * (optimizer.expected_batch_size * optimizer.accumulated_iterations)

    def _layer_bounds(self) -> dict[str, float] | None:
        """Return each parameter's own clip bound where layers are clipped one by one."""
        bounds = getattr(self.optimizer, "max_grad_norms", None)
        if bounds is None:
            return None
        own = dict(zip(map(id, self.optimizer.params), map(float, bounds), strict=False))
        named = self.module._module.named_parameters()
        return {name: own.get(id(p), math.inf) for name, p in named}

    def _norm(self, gradients: Sequence[torch.Tensor]) -> float:
        """Return what the recorder keeps of one row's gradients: per layer, what is left."""
        bounds = getattr(self.optimizer, "max_grad_norms", None)
        layers = [float(g.double().norm()) for g in gradients]
        if bounds is not None:
            limits = [*map(float, bounds), *[math.inf] * len(layers)]
            layers = [min(a, b) for a, b in zip(layers, limits, strict=False)]
        return math.hypot(*layers)

    def _require_unchanged_settings(self) -> None:
        """Refuse a step whose gradients were clipped by caps for other noise than it would have."""
        if self._clipped_at is None or not self.recorder.midway:
            return
        if self._clipped_at != (*self.coming_kernel(), self._charger.moment):
            raise UnsupportedError(_OTHER_SETTINGS)

    def _note_skipped(self, stepped: bool) -> bool:
        """A pass ended with draws that made no step: note it, unless the loader was only looked at.

        Args:
            stepped: Whether other draws of the pass did.
        """
        trained = stepped or (self.probe is not None and self.probe.model_trains)
        if trained:
            self._charger.find_later(Fact("draw_skipped"))
        return trained

    def _charge_without_noise(self) -> None:
        """The plain optimizer is about to step by gradients that nobody noised."""
        facts = [Fact("not_noised", "the plain optimizer stepped by itself")]
        self._charger.charge_unnoised(judged(self._charger.claims_as, facts))

    def _note_changed(self) -> None:
        """The model is about to move by something else than what was noised and charged."""
        self._charger.find_later(Fact("noised_gradient_changed"))


_OTHER_SETTINGS = (
    "Expected noise, clip, caps and budgets as they were when the gradients were clipped, got "
    "others at the step. Budgets were tested for those. Change settings between steps, and step "
    "with each optimizer before the backward pass of another: after optimizer.step() and before "
    "the next batch's backward pass."
)


class Unheld:
    """Notices, by their versions, whether buffers of a module change, and parameters that train
    and that an optimizer does not hold.
    """

    def __init__(self, module: torch.nn.Module, optimizer: Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._places = [
            (f"{name}.{own}".lstrip("."), tensors, own)
            for name, part in module.named_modules()
            for tensors in (part._buffers, part._parameters)
            for own, tensor in tensors.items()
            if id(tensor) not in held
        ]
        self._seen = self._versions()

    def changed(self) -> str:
        """Return the name of one that has changed since it was asked last; "": none."""
        before, self._seen = self._seen, self._versions()
        changed = (name for name, v in self._seen.items() if before.get(name, v) != v)
        return next(changed, "")

    def _versions(self) -> dict[str, tuple[int, int]]:
        found = ((name, tensors.get(own)) for name, tensors, own in self._places)
        return {
            name: (t.data_ptr(), t._version)
            for name, t in found
            if t is not None and (t.requires_grad or not isinstance(t, torch.nn.Parameter))
        }


def described_update(
    optimizer: Optimizer,
    *,
    clip_bound: float,
    noise_std: float,
    divisor: int | None,
    loss_reduction: str,
    batches: int,
    default_batches: bool,
) -> str:
    """Return in words what makes a step of a batch; equal words mean equal steps.

    Args:
        optimizer: The plain one.
        clip_bound: That gradients are clipped to.
        noise_std: On their sum.
        divisor: What a mean is divided by.
        loss_reduction: "mean" or "sum".
        batches: How many drawn batches the step may have summed.
        default_batches: Whether torch's default_collate joins the data set's items to a batch.
    """
    return (
        f"{type(optimizer).__name__} {described_groups(optimizer)}, {batches} drawn, clipped to "
        f"{float(clip_bound)!r}, noise {float(noise_std)!r} on the {loss_reduction}, over "
        f"{divisor}, joined by {'default_collate' if default_batches else 'another collate_fn'}"
    )


def described_groups(optimizer: Optimizer) -> str:
    """Return the settings of all groups, numbers with every digit, whatever their type."""
    groups = [
        {k: _plain(v) for k, v in group.items() if k not in ("params", "initial_lr")}
        for group in optimizer.param_groups
    ]
    return repr(groups)


def _plain(value: Any) -> Any:
    """Return a setting as Python numbers: a tensor prints four digits only."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(value) if type(value) is int else value


def adaptive_noise(noise_multiplier: float, unclipped_num_std: float) -> tuple[float, float]:
    """Return adaptive clipping's noise on gradients, and its count's shift in units of that noise.

    It splits the nominal noise: gradients get (z^-2 - (2σ)^-2)^(-1/2), the count of unclipped rows
    gets σ. The count is a sum of zeros and ones, so that an instance moves it by 1, not by the 1/2
    that the split assumes.

    Source: Andrew et al. (2021), arXiv:1905.03871, Theorem 1, as in Opacus's AdaClipDPOptimizer.

    >>> adaptive_noise(1.0, 10.0)[1] > 0.1
    True
    """
    if noise_multiplier == 0.0:
        return 0.0, 0.0
    noise = (noise_multiplier**-2 - (2.0 * unclipped_num_std) ** -2) ** -0.5
    return noise, noise / unclipped_num_std
