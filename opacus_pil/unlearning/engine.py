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
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import _validate as check
from ..certificates import Certificate, DataProcessingCertificate, NoisyFineTuningCertificate
from ..errors import CertificateError
from ..privacy_engine import PerInstancePrivacyEngine
from .applicable import certificates_for
from .calibration import Calibration
from .methods import optimizer_like, plain_copy
from .phase import Phase
from .plan import METHODS, NOISE_FREE_METHODS, CertifiedPlan, RetrainPlan, UnlearningPlan
from .planning import Facts, make_plan, predicted_plan
from .queued_model import QueuedModel
from .result import CertifiedResult, RetrainedResult, UncertifiedResult, UnlearningResult
from .running import run_plan
from .saved_run import SavedRun, seeds
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
        criterion: The plain loss.
        privacy_engine: The engine that trained it. None: only plain fine-tuning is possible.
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
            training_steps=training_steps,
            feature_norm=feature_norm,
            batch_size=batch_size,
            make_model=make_model,
            requests=requests,
            progress=progress,
        )

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
            forget: Rows of the data set, each once, not all of them.
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
            ValueError: Rows out of range, repeated, empty, forgotten before, or the whole set;
                arguments that contradict each other.
            CertificateError: No certificate applies; the message names the broken assumption.
        """
        self._require_own_ledger()
        rows = self._checked_forget(forget)
        check.choice("method", method, METHODS)
        self._require_chargeable(method)
        if certificate is not None:
            _require_plain_descent(certificate, self._optimizer)
        facts = Facts(
            forget_set=rows,
            method=method,
            steps_retrain=self._training_steps,
            batch_size=self._batch_size,
            requests_served=self._requests_served,
            module=self._module,
            noisy=self._engine is not None and self._engine.kernel.noise_multiplier > 0.0,
        )
        if calibration is not None:
            if any(value is not None for value in (epsilon, delta, certificate, steps, strength)):
                raise ValueError(
                    "Expected calibration alone, got a target, a certificate, steps or strength "
                    "beside it. A calibrated plan makes no claim and takes its steps from pilots."
                )
            return self._bound(
                predicted_plan(
                    facts,
                    calibration,
                    log_loss=self.mean_log_loss(rows, order=calibration.order),
                    max_steps=max_steps,
                    step_grid=step_grid,
                )
            )

        def applicable() -> tuple[Certificate, Certificate | None]:
            return certificates_for(
                rows,
                method=method,
                measured=predict,
                adaptive=adaptive,
                module=self._module,
                optimizer=self._optimizer,
                criterion=self._criterion,
                dataset=self._dataset,
                privacy_engine=self._engine,
                feature_norm=self._feature_norm,
                phases=self._phases,
                forgotten=self._forgotten,
            )

        return self._bound(
            make_plan(
                facts,
                epsilon=epsilon,
                delta=delta,
                certificate=certificate,
                applicable=applicable,
                steps=steps,
                max_steps=max_steps,
                step_grid=step_grid,
                strength=strength,
                predict=predict,
                adaptive=adaptive,
            )
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
        until: Callable[[int, nn.Module], bool] | None = None,
    ) -> UnlearningResult:
        """Run a plan and return the unlearned model.

        Args:
            plan: From this engine, made after its last run.
            checkpoint_dir: Existing folder for a file that a killed run resumes from.
            checkpoint_every: Steps between two writes of that file.
            seed: Seed of batches and noise. Default: drawn from torch's global generator. Whoever
                knows it can remove the noise: fix it in experiments only.
            on_step: Called as on_step(step, module) before the first step and after every
                `record_every`-th one; what it returns (numbers in dictionaries or lists) becomes
                `history`.
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
        if isinstance(plan, RetrainPlan) and self._make_model is None:
            raise CertificateError(
                f"Expected a plan that unlearns, got 'retrain instead': {plan.reason} To retrain "
                "here, build the engine with make_model."
            )
        if until is not None and isinstance(plan, CertifiedPlan):
            raise CertificateError(
                "Expected a certified plan to run to its last step, got until=. Stopping on what "
                "the model shows voids the certificate; plan with steps alone."
            )
        if self._queue is not None and not self._serving:
            raise ValueError(
                "Expected submit and serve on an engine with requests, got unlearn: the next "
                "server would not know of this run. Build another engine without requests."
            )
        self._check_current(plan)
        every = check.integer("record_every", record_every, low=1)
        private_length = until is not None or not plan.fixed_length
        before = self._model_hash  # it was just compared with the weights
        number = int(torch.randint(2**62, ()).item())
        number = number if seed is None else check.integer("seed", seed, low=0)
        twin, optimizer = self._start(plan, seed=number)
        ledger = None if self._engine is None else self._engine.fork()
        reads_forget_set = plan.method == "gradient_difference"
        if ledger is not None and not reads_forget_set:
            ledger.forget(plan.forget_set)
        if ledger is not None and plan.method == "retraining":
            ledger.note_new_model()
        run = SavedRun(
            plan=plan,
            module=twin,
            optimizer=optimizer,
            privacy_engine=ledger,
            seed=number,
        )
        path = run.resume(checkpoint_dir)
        start = run.done

        def observed(step: int) -> bool:
            if step % every and step != plan.steps:
                return False
            if on_step is not None:
                run.history.append(_observed(on_step, step, twin))
            return until is not None and bool(_observed(until, step, twin))

        def after_step(taken: int) -> bool:
            run.done = start + taken
            stop = observed(run.done)
            due = run.done % checkpoint_every == 0 or run.done == plan.steps
            if path is not None and due and not stop:
                run.save(path)
            return stop

        stopped = start == 0 and observed(0)
        with tqdm(
            total=plan.steps,
            initial=start,
            desc="unlearning",
            disable=None if self._progress else True,
        ) as bar:
            if not stopped:
                stopped = run_plan(
                    plan,
                    run,
                    dataset=self._dataset,
                    criterion=self._criterion,
                    retain_set=np.setdiff1d(self.retain_set, plan.forget_set),
                    batch_size=self._batch_size,
                    after_step=after_step,
                    progress=bar,
                )
        if run.done != plan.steps and not stopped:
            raise RuntimeError(f"Expected {plan.steps} steps, got {run.done}. Nothing was changed.")
        if ledger is not None and self._engine is not None:
            if plan.method in NOISE_FREE_METHODS:
                ledger.charge_without_noise(run.done)
            if reads_forget_set:  # its members paid for these steps too
                ledger.forget(plan.forget_set)
            if private_length and ledger.per_instance.steps > self._ledger_steps:
                ledger.per_instance.weaken("estimate")
            self._engine.adopt(ledger)
        self._module, self._optimizer = twin, optimizer_like(optimizer, twin, twin)
        self._forgotten |= frozenset(plan.forget_set.tolist())
        phase = Phase(run.done, self._forgotten, plan.method, private_length)
        # What was there before a retraining left nothing in the model.
        self._phases = [phase] if plan.method == "retraining" else [*self._phases, phase]
        self._requests_served += 1
        self._note_ledger()
        if not self._serving:  # a server deletes it when the new state is safe on disk
            run.remove(path)
        kinds = {CertifiedPlan: CertifiedResult, RetrainPlan: RetrainedResult}
        kind: Any = kinds.get(type(plan), UncertifiedResult)
        hashes: dict[str, str] = {}
        if isinstance(plan, CertifiedPlan):
            hashes = {"model_before": before, "model_after": self._model_hash}
        result: UnlearningResult = kind(
            module=plain_copy(twin), plan=plan, steps=run.done, history=tuple(run.history), **hashes
        )
        return result

    # --- inside -------------------------------------------------------------------------------

    def _start(self, plan: UnlearningPlan, *, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model that the run starts from, the caller's own left alone."""
        if isinstance(plan, RetrainPlan):
            assert self._make_model is not None
            with torch.random.fork_rng():
                torch.manual_seed(seeds(seed)[0])
                return self._make_model()
        twin = plain_copy(self._module)
        return twin, optimizer_like(self._optimizer, self._module, twin)


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


def _observed(on_step: Callable[[int, nn.Module], Any], step: int, module: nn.Module) -> Any:
    """Let the caller look at the model without disturbing its mode or the random numbers."""
    mode, state = module.training, torch.random.get_rng_state()
    module.eval()
    try:
        return on_step(step, module)
    finally:
        module.train(mode)
        torch.random.set_rng_state(state)
