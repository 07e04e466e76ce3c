"""UnlearningEngine: from a deletion request to a plan, and from a plan to an unlearned model.

Works on copies: the caller's module, optimizer and ledgers change only when a run has ended well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from .. import _validate as check
from .._validate import IntArray
from ..capture.row_losses import LossOf
from ..certificates import Certificate, DataProcessingCertificate, NoisyFineTuningCertificate
from ..errors import CertificateError
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Collate
from .applicable import certificates_for
from .calibration import Calibration
from .carrying_out import carried_out
from .grounds import require_still_weights
from .grounds import training_codes as trained_codes
from .plan import METHODS, UnlearningPlan
from .planning import Facts, make_plan, predicted_plan
from .queued_model import QueuedModel
from .rehearsal import Rehearsal
from .result import UnlearningResult
from .trained_model import MakeModel


class UnlearningEngine(QueuedModel):
    """Forget instances of a trained model by fine-tuning on the others, or by training again.

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
        criterion: Plain loss of (outputs, targets). Default: what `privacy_engine` trained with,
            its loss_of and collate_fn included (`privacy_engine.task`); another loss than that
            takes its place.
        privacy_engine: The engine that trained it. None: only plain fine-tuning is possible.
        loss_of: In place of criterion, where batches are no pairs (inputs, targets) or the loop
            does more: loss_of(module, batch) -> one loss per row, shape (rows,), unreduced.
        collate_fn: Joins items to a batch. Default: the training's; without one torch's.
        instance_ids: Without `privacy_engine`: your own ids of the rows, as it takes them. With
            ids every call that names instances takes ids, and rows by `rows=`.
        training_steps: Without `privacy_engine`: steps of training. Else those in the ledger.
        feature_norm: For method "langevin": public bound on the norm of every feature vector.
        batch_size: Without `privacy_engine`: batch size of fine-tuning.
        make_model: For method "retraining": make_model() -> (plain module, plain optimizer),
            freshly initialised from torch's global generator.
        requests: Folder of a durable queue for `submit` and `serve`, see `RequestQueue`. If a model
            was served there before, the engine goes on with it and its ledgers, whatever weights
            `module` holds: a new process needs the architecture, not the trained model.
        progress: Show a progress bar when the output is a terminal.

    Raises:
        UnsupportedError: The model has BatchNorm that trains or updates: its buffers keep traces of
            forgotten instances.
        TypeError: An opacus.PrivacyEngine, which keeps no account of instances.
        LedgerError: A model was served from `requests` before, on other data or in another order.

    Source: Sepahvand et al. (2025), arXiv:2505.18786, fine-tuning budgets from per-instance losses;
        certificates as each of them cites.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        criterion: Any = None,
        privacy_engine: PerInstancePrivacyEngine | None = None,
        loss_of: LossOf | None = None,
        collate_fn: Collate | None = None,
        instance_ids: npt.ArrayLike | None = None,
        training_steps: int | None = None,
        feature_norm: float | None = None,
        batch_size: int | None = None,
        make_model: MakeModel | None = None,
        requests: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            module,
            optimizer=optimizer,
            dataset=dataset,
            criterion=criterion,
            privacy_engine=privacy_engine,
            loss_of=loss_of,
            collate_fn=collate_fn,
            instance_ids=instance_ids,
            training_steps=training_steps,
            feature_norm=feature_norm,
            batch_size=batch_size,
            make_model=make_model,
            requests=requests,
            progress=progress,
        )

    def plan(
        self,
        forget: npt.ArrayLike | None = None,
        *,
        rows: npt.ArrayLike | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        method: str = "dp_sgd",
        certificate: Certificate | None = None,
        steps: int | None = None,
        max_steps: int | None = None,
        step_grid: int = 10,
        strength: float | None = None,
        predict: bool = False,
        calibration: Calibration | None = None,
        adaptive: bool = False,
    ) -> UnlearningPlan:
        """Say what forgetting these instances takes, before anything runs.

        With epsilon and delta: as few steps as reach the target. With steps and delta: the ε after
        so many steps. With steps alone: a run without a claim. With calibration alone: steps that
        the pilot sets predict.

        Methods:
            dp_sgd              the training's own noisy steps; certified by what training gave away
            langevin            the same steps where contraction is proved, on full batches or
                                Poisson mini-batches
            noisy_finetuning    any model: clipped once, averaged gradients clipped, much noise; its
                                constants are those of `certificate`
            finetuning          no noise, no certificate
            l1_sparse           the same with an L1 penalty (Jia et al. 2023)
            gradient_difference the same, ascending on the forget set (Liu et al. 2022)
            retraining          from the start, without the forget set

        Args:
            forget: Instances, each once, not all of them: by their ids if there are instance_ids,
                else by row; or a boolean mask over all rows.
            rows: Rows of the data set, in its place.
            epsilon: Target of a certified plan.
            delta: Its δ.
            method: One of the above.
            certificate: Use this one. Default: the least of those that apply. For
                "noisy_finetuning" a NoisyFineTuningCertificate, which the run then follows.
            steps: Run exactly so many.
            max_steps: Most steps worth running. Default: one less than retraining takes.
            step_grid: Steps found for a target are rounded up to a multiple of this, because they
                show how much the forget set weighs.
            strength: Weight of what "l1_sparse" (default 1e-4) and "gradient_difference" (default
                1) add to the loss.
            predict: Compute the steps from the norms that the deployed run's ledger stands at. The
                plan is predicted then, whatever formula gave it.
            calibration: From `opacus_pil.evaluation.calibrate`; its method, and the upper end of
                its interval, rounded up.
            adaptive: Whoever chose these rows had seen a model released before. Only what training
                alone gives away covers that, and needs no allowance: its bound is on everything
                that was ever released. The other certificates are not used then.

        Returns:
            CertifiedPlan, PredictedPlan or RetrainPlan.

        Raises:
            ValueError: Rows out of range, repeated, empty, forgotten before, or the whole set; ids
                that nobody has; arguments that contradict each other.
            CertificateError: No certificate applies; the message names the broken assumption. Or
                steps that would not move the model.
            UnsupportedError: The training cannot be run again as it is described.
            LedgerError: The data set, the weights or the ledger are not what they were.
        """
        plan = self._planned(
            self._named(forget, rows),
            epsilon=epsilon,
            delta=delta,
            method=method,
            certificate=certificate,
            steps=steps,
            max_steps=max_steps,
            step_grid=step_grid,
            strength=strength,
            predict=predict,
            calibration=calibration,
            adaptive=adaptive,
        )
        self._data.require_same()
        return plan

    def unlearn(
        self,
        plan: UnlearningPlan,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 50,
        seed: int | None = None,
        on_step: Callable[[int, nn.Module], Any] | None = None,
        record_every: int = 1,
        until: Callable[[int, nn.Module], bool] | None = None,
    ) -> UnlearningResult:
        """Run a plan and return the unlearned model.

        Args:
            plan: From this engine, made after its last run.
            checkpoint_dir: Existing folder for a file that a killed run resumes from.
            checkpoint_every: Steps between two writes of that file.
            seed: Seed of batches and noise. Default: drawn from torch's global generator. Whoever
                knows it can remove the noise: fix it in experiments only.
            on_step: Called as on_step(step, copy of the model) before the first step and after
                every `record_every`-th one; what it returns (numbers in dictionaries or lists)
                becomes `history`. The copy is one object, refreshed before each call.
            record_every: See `on_step`.
            until: Stop an uncertified run early: called like `on_step`, after it, and the run ends
                where it returns True. A certified run goes to its last step, since stopping on a
                private signal voids the certificate.

        Raises:
            CertificateError: The plan says "retrain instead" and there is no `make_model`; `until`
                with a certified plan.
            ValueError: The plan is not this engine's latest state.
            LedgerError: A checkpoint of another run lies in `checkpoint_dir`.
        """
        return carried_out(
            self,
            plan,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            seed=seed,
            on_step=on_step,
            record_every=record_every,
            until=until,
        )

    # --- inside -------------------------------------------------------------------------------

    def _planned(
        self, rows: IntArray, *, method: str, certificate: Certificate | None = None, **wish: Any
    ) -> UnlearningPlan:
        """Return the plan for these rows; whether the data are the training's is not asked."""
        self._require_own_ledger()
        rows = self._checked_forget(rows)
        check.choice("method", method, METHODS)
        self._require_chargeable(method)
        if certificate is not None:
            _require_plain_descent(certificate, self._optimizer)
        ledger = None if self._engine is None else self._engine.per_instance
        facts = Facts(
            forget_set=rows,
            ids=tuple(self._ids.of(rows)),
            method=method,
            steps_retrain=self._training_steps,
            batch_size=self._batch_size,
            requests_served=self._requests_served,
            module=self._module,
            noisy=self._engine is not None and self._engine.kernel.noise_multiplier > 0.0,
            label=None if ledger is None else tuple(ledger.reasons),
            progress=self._progress,
        )
        calibration, predict = wish.pop("calibration", None), wish["predict"]
        if calibration is not None:
            others = [wish[name] for name in ("epsilon", "delta", "steps", "strength")]
            if certificate is not None or any(value is not None for value in others):
                raise ValueError(
                    "Expected calibration alone, got a target, a certificate, steps or strength "
                    "beside it. A calibrated plan makes no claim and takes its steps from pilots."
                )
            plan = predicted_plan(
                facts,
                calibration,
                log_loss=self.mean_log_loss(rows=rows, order=calibration.order),
                max_steps=wish["max_steps"],
                step_grid=wish["step_grid"],
            )
            self._rehearsed(rows)
            return self._bound(self._moving(plan))
        seen: list[Rehearsal] = []

        def evidence() -> None:
            self._rehearsed(rows, seen)  # what cannot be run at all is said first
            assert self._engine is not None
            self._engine.require_evidence()

        def applicable() -> tuple[Certificate, Certificate | None]:
            return certificates_for(
                rows,
                method=method,
                measured=predict,
                adaptive=wish["adaptive"],
                module=self._module,
                optimizer=self._optimizer,
                task=self._task,
                evidence=evidence,
                random_rows=lambda: self._rehearsed(rows, seen).random_rows,
                dataset=self._dataset,
                present=self.retain_set,
                privacy_engine=self._engine,
                feature_norm=self._feature_norm,
                phases=self._phases,
                forgotten=self._forgotten,
            )

        def run_codes() -> tuple[str, ...]:
            rehearsal = self._rehearsed(rows, seen)
            rehearsal.require_independent_rows()
            require_still_weights(self._module)
            return (*self._data.codes(), *rehearsal.codes)

        def training_codes(*, rests_on_ledger: bool) -> tuple[str, ...]:
            return trained_codes(
                self._engine if rests_on_ledger else None,
                module=self._module,
                weights=self._weights,
            )

        plan = make_plan(
            facts,
            certificate=certificate,
            applicable=applicable,
            run_codes=run_codes,
            training_codes=training_codes,
            **wish,
        )
        self._rehearsed(rows, seen)
        return self._bound(self._moving(plan))


def _require_plain_descent(certificate: Certificate, optimizer: torch.optim.Optimizer) -> None:
    """Raise where a caller's certificate cannot describe steps of this optimizer."""
    if isinstance(certificate, DataProcessingCertificate | NoisyFineTuningCertificate):
        return  # of any optimizer; and of one of its own
    moving = any(group.get("momentum") for group in optimizer.param_groups)
    if moving or type(optimizer) is not torch.optim.SGD:
        raise CertificateError(
            f"Expected torch.optim.SGD without momentum for a {type(certificate).__name__}, got "
            f"{type(optimizer).__name__}{' with momentum' if moving else ''}. What it remembers "
            "couples steps; train and unlearn with plain SGD."
        )
