"""UnlearningEngine: from a deletion request to a plan, and from a plan to an unlearned model.

Works on copies: the caller's module, optimizer and ledgers change only when a run has ended well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from opacus.optimizers import DPOptimizer
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import _validate as check
from .._validate import IntArray
from ..certificates import Certificate, DataProcessingCertificate
from ..errors import CertificateError, UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from .glm import OneOutputRun
from .methods import noisy_steps, optimizer_like, plain_copy, plain_module, plain_steps
from .plan import CertifiedPlan, PredictedPlan, RetrainPlan, UnlearningPlan, certified_steps
from .result import CertifiedResult, UncertifiedResult, UnlearningResult
from .saved_run import SavedRun

METHODS = ("dp_sgd", "langevin", "finetuning")
_WORST_CASE_SEARCH = 1_000_000


class UnlearningEngine:
    """Forget instances of a trained model by noisy fine-tuning on the others.

    Guarantee: none by itself. A `CertifiedPlan` names the certificate and the assumptions its ε
        rests on; every other plan and result carries no ε at all.
    The run keeps the sample rate, expected batch size, clipping and noise of training instead of
    re-deriving them from the smaller data set, as the theory needs, and goes on charging the
    retained instances in the same ledgers.

    Args:
        module: The trained model, plain or as Opacus wrapped it. Never changed.
        optimizer: The optimizer it was trained with, plain or private. Its settings are kept, its
            state (momentum) is not: that was computed with the forget set.
        dataset: The training set, in the row order of training.
        criterion: The plain loss.
        privacy_engine: The engine that trained it. None: only plain fine-tuning is possible.
        training_steps: Steps of training. Default: those in the ledger.
        feature_norm: For method "langevin": public bound on the norm of every feature vector.
        batch_size: Without `privacy_engine`: batch size of plain fine-tuning.
        progress: Show a progress bar when the output is a terminal.

    Raises:
        UnsupportedError: The model has BatchNorm, whose buffers keep traces of forgotten instances.

    Source: Sepahvand et al. (2025), arXiv:2505.18786, fine-tuning budgets from per-instance losses;
        certificates as each of them cites.
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
        progress: bool = True,
    ) -> None:
        self._module = plain_module(module)
        for name, part in self._module.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                raise UnsupportedError(
                    f"Expected a model without BatchNorm, got one at {name or 'the top'!r}. Its "
                    "running statistics keep traces of forgotten instances. Use GroupNorm."
                )
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        self._optimizer = inner
        self._dataset = dataset
        self._criterion = getattr(criterion, "criterion", criterion)  # ghost mode wraps the loss
        self._engine = privacy_engine
        self._feature_norm = feature_norm
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
            steps = privacy_engine.per_instance.steps if training_steps is None else training_steps
            self._batch_size = float(kernel.expected_batch_size)
        else:
            cure = "It cannot be read off a ledger without privacy_engine."
            steps = check.integer("training_steps", training_steps, low=1, cure=cure)
            self._batch_size = float(check.integer("batch_size", batch_size, low=1, cure=cure))
        self._training_steps = check.integer("training_steps", steps, low=0)
        # What has run so far: steps, and the rows that had been forgotten before them.
        self._phases: list[tuple[int, frozenset[int]]] = [(self._training_steps, frozenset())]

    @property
    def module(self) -> nn.Module:
        """The plain model as it is now: trained, or unlearned by the last run."""
        return self._module

    @property
    def forgotten(self) -> frozenset[int]:
        """Rows forgotten so far."""
        return self._phases[-1][1]

    @property
    def retain_set(self) -> IntArray:
        """Rows that are still in the training set, ascending."""
        return np.setdiff1d(np.arange(self._size), list(self.forgotten))

    def plan(
        self,
        forget: npt.ArrayLike,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        method: str = "dp_sgd",
        certificate: Certificate | None = None,
        steps: int | None = None,
        max_steps: int | None = None,
    ) -> UnlearningPlan:
        """Say what forgetting these instances takes, before anything runs.

        Args:
            forget: Rows of the data set, each once, not all of them.
            epsilon: Target of a certified plan.
            delta: Its δ.
            method: "dp_sgd" (the training's own noisy steps), "langevin" (the same on full batches,
                where contraction is proved) or "finetuning" (no noise, no certificate).
            certificate: Use this one. Default: contraction for "langevin"; for "dp_sgd" what
                training itself gives, if the ledger's label is "bound".
            steps: Run exactly so many steps without any claim; then no epsilon, delta, certificate.
            max_steps: Most steps worth running. Default: one less than retraining takes.

        Returns:
            CertifiedPlan, PredictedPlan (with `steps`) or RetrainPlan.

        Raises:
            ValueError: Rows out of range, repeated, empty, forgotten before, or the whole set;
                arguments that contradict each other.
            CertificateError: No certificate applies; the message names the broken assumption.
        """
        rows = self._checked_forget(forget)
        check.choice("method", method, METHODS)
        common: dict[str, Any] = {
            "forget_set": rows,
            "method": method,
            "steps_retrain": self._training_steps,
            "batch_size": self._batch_size,
            "requests_served": len(self._phases) - 1,
        }
        if steps is not None:
            if not (epsilon is None and delta is None and certificate is None):
                raise ValueError(
                    "Expected either steps or a target, got both. Pass steps alone for a run "
                    "without a claim, or epsilon and delta for a certified one."
                )
            budget = check.integer("steps", steps, low=0)
            why = "a fixed budget chosen by the caller"
            return PredictedPlan(steps=budget, reason=why, **common)
        if method == "finetuning":
            raise CertificateError(
                "Expected steps with method='finetuning', got a target. Fine-tuning without noise "
                "has no certificate: pass steps, or choose a noisy method."
            )
        if epsilon is None or delta is None:
            raise ValueError("Expected epsilon and delta, or steps, got neither. Pass a target.")
        target, probability = check.epsilon(epsilon), check.delta(delta)
        limit = max(self._training_steps - 1, 0) if max_steps is None else max_steps
        worst: Certificate | None = None
        if certificate is None:
            certificate, worst = self._certificates(rows, method)
        goal = {"epsilon": target, "delta": probability}
        try:
            needed = certificate.steps_for(**goal, max_steps=limit)
        except CertificateError as error:
            common["method"] = "retraining"
            return RetrainPlan(
                steps=self._training_steps,
                reason=str(error),
                target_epsilon=target,
                delta=probability,
                **common,
            )
        return CertifiedPlan(
            steps=needed,
            reason=f"fewest steps at which {type(certificate).__name__} reaches the target",
            epsilon=certificate.epsilon(delta=probability, steps=needed),
            target_epsilon=target,
            delta=probability,
            certificate=certificate,
            steps_worst_case=(
                certified_steps(worst, **goal, max_steps=_WORST_CASE_SEARCH) if worst else None
            ),
            **common,
        )

    def unlearn(
        self,
        plan: UnlearningPlan,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 50,
        seed: int | None = None,
        on_step: Callable[[int, nn.Module], Any] | None = None,
        record_every: int = 1,
    ) -> UnlearningResult:
        """Run a plan to its last step and return the unlearned model.

        Args:
            plan: From this engine, made after its last run.
            checkpoint_dir: Existing folder for a file that a killed run resumes from.
            checkpoint_every: Steps between two writes of that file.
            seed: Seed of batches and noise. Default: drawn from torch's global generator. Whoever
                knows it can remove the noise: fix it in experiments only.
            on_step: Called as on_step(step, module) before the first step and after every
                `record_every`-th one; what it returns (numbers in dictionaries or lists) becomes
                `history`. It cannot stop the run: stopping on a private signal voids certificates.
            record_every: See `on_step`.

        Raises:
            CertificateError: The plan says "retrain instead".
            ValueError: The plan is not this engine's latest state.
            LedgerError: A checkpoint of another run lies in `checkpoint_dir`.
        """
        if isinstance(plan, RetrainPlan):
            raise CertificateError(
                f"Expected a plan that unlearns, got 'retrain instead': {plan.reason}"
            )
        self._check_current(plan)
        every = check.integer("record_every", record_every, low=1)
        retain = np.setdiff1d(self.retain_set, plan.forget_set)
        twin = plain_copy(self._module)
        optimizer = optimizer_like(self._optimizer, self._module, twin)
        ledger = None if self._engine is None else self._engine.fork()
        if ledger is not None:
            ledger.per_instance.forget(plan.forget_set)
        run = SavedRun(
            plan=plan,
            module=twin,
            optimizer=optimizer,
            privacy_engine=ledger,
            seed=int(torch.randint(2**62, ()).item()) if seed is None else seed,
        )
        path = run.resume(checkpoint_dir)
        start = run.done
        if on_step is not None and start == 0:
            run.history.append(_observed(on_step, 0, twin))
        with tqdm(
            total=plan.steps,
            initial=start,
            desc="unlearning",
            disable=None if self._progress else True,
        ) as bar:

            def after_step(number: int) -> None:
                run.done = start + number
                if on_step is not None and (run.done % every == 0 or run.done == plan.steps):
                    run.history.append(_observed(on_step, run.done, twin))
                if path is not None and run.done % checkpoint_every == 0:
                    run.save(path)

            common = {
                "optimizer": optimizer,
                "dataset": self._dataset,
                "criterion": self._criterion,
                "retain_set": retain,
                "steps": plan.steps - start,
                "sampler_generator": run.sampler_generator,
                "sampler_state": run.sampler_state,
                "after_step": after_step,
                "progress": bar,
            }
            if plan.steps == start:
                pass  # nothing left to run: already finished, or what is left of F needs no step
            elif plan.method == "finetuning":
                plain_steps(twin, batch_size=max(int(self._batch_size), 1), **common)
            else:
                assert ledger is not None
                noisy_steps(
                    twin, privacy_engine=ledger, noise_generator=run.noise_generator, **common
                )
        if run.done != plan.steps:
            raise RuntimeError(f"Expected {plan.steps} steps, got {run.done}. Nothing was changed.")
        if ledger is not None and self._engine is not None:
            if plan.method == "finetuning" and plan.steps:
                ledger.charge_without_noise(plan.steps)
            self._engine.adopt(ledger)
        self._module, self._optimizer = twin, optimizer_like(optimizer, twin, twin)
        forgotten = self.forgotten | frozenset(plan.forget_set.tolist())
        self._phases.append((plan.steps, forgotten))
        run.remove(path)
        result = plain_copy(twin)
        history = tuple(run.history)
        if isinstance(plan, CertifiedPlan):
            return CertifiedResult(module=result, plan=plan, history=history)
        return UncertifiedResult(module=result, plan=plan, history=history)

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

    def _certificates(self, rows: IntArray, method: str) -> tuple[Certificate, Certificate | None]:
        """Return the certificate for everything forgotten up to now, and its worst case."""
        if self._engine is None:
            raise CertificateError(
                "Expected privacy_engine for a certified plan, got None. Train with "
                "PerInstancePrivacyEngine, pass a certificate, or pass steps."
            )
        if method == "langevin":
            run = OneOutputRun(
                self._module,
                optimizer=self._optimizer,
                criterion=self._criterion,
                dataset=self._dataset,
                privacy_engine=self._engine,
                feature_norm=self._feature_norm,
            )
            everyone = sorted(self.forgotten.union(rows.tolist()))
            phases = [
                (steps, [row for row in everyone if row not in gone])
                for steps, gone in self._phases
            ]
            return run.certificate(phases=phases), run.certificate(phases=phases, worst_case=True)
        ledger = self._engine.per_instance
        if ledger.guarantee != "bound" or len(rows) + len(self.forgotten) > 1:
            raise CertificateError(
                "Expected one instance and a ledger labelled 'bound' for a certificate from "
                f"training alone, got {len(rows) + len(self.forgotten)} instances and "
                f"{ledger.guarantee!r}. A sum of per-instance losses does not bound a set. Pass a "
                "certificate, or steps for a run without a claim."
            )
        orders = ledger.orders.tolist()
        return (
            DataProcessingCertificate(ledger.rdp(rows)[0].tolist(), orders),
            DataProcessingCertificate(ledger.worst_case_rdp().tolist(), orders),
        )

    def _check_current(self, plan: UnlearningPlan) -> None:
        if plan.requests_served != len(self._phases) - 1:
            raise ValueError(
                f"Expected a plan made after {len(self._phases) - 1} served requests, got one made "
                f"after {plan.requests_served}. Plan again: the model has changed since."
            )
        self._checked_forget(plan.forget_set)


def _observed(on_step: Callable[[int, nn.Module], Any], step: int, module: nn.Module) -> Any:
    """Let the caller look at the model without disturbing its mode or the random numbers."""
    mode, state = module.training, torch.random.get_rng_state()
    module.eval()
    try:
        return on_step(step, module)
    finally:
        module.train(mode)
        torch.random.set_rng_state(state)
