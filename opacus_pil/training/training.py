"""Training: the hook on one optimizer, from a noisy step to a charge of both ledgers.

Runs after clipping and noise and before the parameters move, so that a full pass measures the
parameters the step was computed at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.utils.data import default_collate

from .._validate import IntArray
from ..capture.norms import clipped_sum, record_norms
from ..capture.randomness import one_stream, watch_forward
from ..capture.recorder import Fact, Recorder, StepRecord
from ..capture.shards import Shard
from ..capture.sweep import Sweep, sweep
from ..errors import UnsupportedError
from ..files.fingerprint import Fingerprint
from .charger import Charger
from .data_order import DataOrder
from .kernel import TrainingKernel
from .layers import named_bounds, norm_left
from .probe import Probe
from .step import Step, facts_of
from .task import Task, evaluated_parts
from .unheld import Unheld
from .update import adaptive_noise, described_update
from .verdict import judged
from .weights import NoteWeights, WeightsLeft, renormed


class Training:
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
        policy = charger.policy
        self.probe: Probe | None = None
        if policy.probed:
            self.probe = Probe(
                task, dataset, module=module, random_rows=policy.whole_rows,
                dimension=0 if kernel.batch_first else 1,
            )  # fmt: skip
        if policy.fixed_batches:
            watch_forward(module._module, recorder)
        self._described: tuple[Any, str] | None = None
        self._noise_scale = 1.0  # declared; see `scale_noise`
        self.steps = 0  # of this training in this process
        self._clipped_at: tuple[float, float, int] | None = None
        self._unheld = Unheld(module._module, optimizer)
        self._dropouts = [p for p in module._module.modules() if isinstance(p, _DropoutNd)]
        self._order = DataOrder(dataset, began)
        self._renormed = renormed(module._module)
        self.evaluated: frozenset[str] | None = None  # parts in evaluation mode at every step
        self.weights = WeightsLeft(module._module)
        plain = optimizer.original_optimizer
        if policy.certifiable and isinstance(plain, Optimizer):
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
                record, module=self.module, parameters=clipped,
                clipped_norm=partial(norm_left, optimizer),
                sums=[clipped_sum(optimizer, p) for p in clipped],
            )  # fmt: skip
        std = record.noise_std
        # An instance is in at least one of k summed draws with probability at most k·q, and then
        # moves the sum by at most k clip bounds. Only steps of unknown rows have k > 1.
        batches = max(optimizer.accumulated_iterations, record.draws)
        count = self._released_count(std)
        verdict = judged(self._charger.policy.judged_as, self._facts(record, count))
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
        self.evaluated = evaluated_parts(self.module._module, among=self.evaluated)
        self._charger.note_update(self._update(record, std or 0.0, batches))
        self._charger.charge(step)
        self.steps += 1

    @property
    def sample_rate(self) -> float:
        """Largest rate that rows were drawn or accounted at: whoever raises it is charged for it.

        It never sinks, since batches are drawn ahead of their steps.
        """
        return max(self._sample_rate, self.tracker.rate)

    def scale_noise(self, scale: float) -> None:
        """Declare that the coming steps add so many times the noise of the kernel, and see to it.

        A step of such noise counts as one of the kernel's: more noise hides more.
        """
        if scale != self._noise_scale:
            self._noise_scale = scale
            self.optimizer.noise_multiplier = self.kernel.noise_multiplier * scale

    def taken_over(self) -> None:
        """A checkpoint was loaded: generators, buffers and ledgers went back together."""
        self.recorder.noise_seen.forget()
        self.tracker.forget_randomness()
        self._unheld.changed()

    @property
    def clip_bound(self) -> float:
        """Bound that gradients are clipped to: the module's own in ghost mode."""
        if self.kernel.output_bounds:  # Opacus rounds the norm of several
            return math.hypot(*map(float, self.optimizer.max_grad_norms))
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
            layer_bounds=named_bounds(self.optimizer, inner),
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

    def _update(self, record: StepRecord, noise_std: float, batches: int) -> str:
        """Return `described_update` of this step; most steps are like the one before."""
        if self._noise_scale != 1.0:
            z, clip = self.kernel.noise_multiplier, float(self.kernel.max_grad_norm)
            if noise_std == z * self._noise_scale * clip:
                self._charger.bursts.append(self._noise_scale)
                noise_std = z * clip  # as declared: more of the same noise
        clip_bound: Any = record.max_grad_norm
        if self.kernel.output_bounds and record.layer_bounds:
            clip_bound = record.layer_bounds
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
        facts = facts_of(record)
        if self.probe is not None:
            facts += self.probe.facts
        if self.random_forward():
            facts.append(Fact("random_gradient"))
        if self.kernel.rand_on_empty:
            facts.append(Fact("random_instance_on_empty"))
        if released_count:
            facts.append(Fact("count_released"))
        divisor, named = self.optimizer.expected_batch_size, self.kernel.expected_batch_size
        if divisor != named and self.kernel.loss_reduction == "mean":
            facts.append(Fact("divisor_changed", f"{divisor} instead of {named}"))
        changed = self._unheld.changed()
        if changed:
            facts.append(Fact("buffer_changed", changed))
        return facts + self._facts_of_rows()

    def _facts_of_rows(self) -> list[Fact]:
        """Return what takes away from the claim in the rows, and in how they were drawn."""
        facts = []
        if self._forgotten_rows():
            facts.append(Fact("forgotten_rows_drawn"))
        if self.kernel.poisson_sampling and one_stream(self.tracker.loader, self.optimizer):
            facts.append(Fact("coins_tell_noise"))
        if self._order.moved():
            facts.append(Fact("rows_exchanged", "the data set was put into another order"))
        if self._renormed:
            facts.append(Fact("weights_renormed", self._renormed))
        return facts

    def _forgotten_rows(self) -> bool:
        """Whether rows that were forgotten may still be drawn."""
        accountant = self._charger.accountant
        if not accountant.num_forgotten:
            return False
        gone = accountant.forgotten
        return bool((gone if self._population is None else gone[self._population]).any())

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
        self._charger.charge_unnoised(judged(self._charger.policy.judged_as, facts))

    def _note_changed(self) -> None:
        """The model is about to move by something else than what was noised and charged."""
        self._charger.find_later(Fact("noised_gradient_changed"))


_OTHER_SETTINGS = (
    "Expected noise, clip, caps and budgets as they were when the gradients were clipped, got "
    "others at the step. Budgets were tested for those. Change settings between steps, and step "
    "with each optimizer before the backward pass of another: after optimizer.step() and before "
    "the next batch's backward pass."
)
