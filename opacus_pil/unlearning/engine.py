"""UnlearningEngine: from a deletion request to a plan, and from a plan to an unlearned model.

Works on copies: the caller's module, optimizer and ledgers change only when a run has ended well.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from opacus.optimizers import DPOptimizer
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import _validate as check
from .._validate import IntArray
from ..certificates import Certificate, DataProcessingCertificate, NoisyFineTuningCertificate
from ..errors import CertificateError, LedgerError, UnsupportedError
from ..privacy_engine import PerInstancePrivacyEngine
from .applicable import certificates_for
from .calibration import Calibration, mean_log_loss
from .engine_state import engine_state, load_engine_state
from .methods import optimizer_like, plain_copy, plain_module
from .model_hash import model_hash
from .phase import Phase
from .plan import METHODS, NOISE_FREE_METHODS, CertifiedPlan, RetrainPlan, UnlearningPlan
from .planning import Facts, make_plan, predicted_plan
from .requests import Request, RequestQueue
from .result import CertifiedResult, RetrainedResult, UncertifiedResult, UnlearningResult
from .running import run_plan
from .saved_run import SavedRun, seeds
from .serving import go_on, serve

MakeModel = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]


class UnlearningEngine:
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
        self._module = plain_module(module)
        _require_no_running_statistics(self._module)
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        self._optimizer = inner
        self._dataset = dataset
        self._criterion = getattr(criterion, "criterion", criterion)  # ghost mode wraps the loss
        self._engine = privacy_engine
        self._feature_norm = feature_norm
        self._make_model = make_model
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
            steps = privacy_engine.per_instance.steps
            if training_steps not in (None, steps):
                raise ValueError(
                    f"Expected training_steps to be the {steps} steps of the ledger, got "
                    f"{training_steps}. Leave it out with privacy_engine."
                )
            self._batch_size = float(kernel.expected_batch_size)
        else:
            cure = "It cannot be read off a ledger without privacy_engine."
            steps = check.integer("training_steps", training_steps, low=1, cure=cure)
            self._batch_size = float(check.integer("batch_size", batch_size, low=1, cure=cure))
        self._training_steps = check.integer("training_steps", steps, low=0)
        self._phases = [Phase(self._training_steps, frozenset(), "training")]
        self._forgotten: frozenset[int] = frozenset()
        self._requests_served = 0
        self._ledger_steps = 0
        self._note_ledger()
        self._serving = False
        self._state_name: str | None = None  # of the file with this state, once it was served
        self._queue = None if requests is None else RequestQueue(requests)
        if self._queue is not None:
            go_on(self, self._queue)

    @property
    def module(self) -> nn.Module:
        """The plain model as it is now: trained, or unlearned by the last run."""
        return self._module

    @property
    def forgotten(self) -> frozenset[int]:
        """Rows forgotten so far."""
        return self._forgotten

    @property
    def retain_set(self) -> IntArray:
        """Rows that are still in the training set, ascending."""
        return np.setdiff1d(np.arange(self._size), list(self.forgotten))

    def branch(self) -> Self:
        """Return an engine in the same state, whose runs leave this one and its ledgers alone.

        It has no queue of requests. For trying out plans, as `evaluation.calibrate` does.
        """
        branch = copy.copy(self)
        branch._engine = None if self._engine is None else self._engine.fork()
        branch._phases = list(self._phases)
        branch._queue, branch._state_name = None, None
        return branch

    def mean_log_loss(self, rows: npt.ArrayLike, *, order: float = 2.0) -> float:
        """Return the mean over `rows` of the log of their privacy loss (RDP at `order`, in nats).

        What `calibrate` fits times to unlearn against. The labels of the losses are the ledger's.

        Raises:
            ValueError: No privacy_engine, an order the ledger does not have, losses of 0 or inf.
        """
        if self._engine is None:
            raise ValueError("Expected privacy_engine for privacy losses, got None. Pass it.")
        ledger = self._engine.per_instance
        return mean_log_loss(ledger.rdp(rows), orders=ledger.orders, order=order)

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
            _require_no_momentum(certificate, self._optimizer)
        facts = Facts(
            forget_set=rows,
            method=method,
            steps_retrain=self._training_steps,
            batch_size=self._batch_size,
            requests_served=self._requests_served,
            basis=self._basis(),
            module=self._module,
            noisy=self._engine is not None,
        )
        if calibration is not None:
            if any(value is not None for value in (epsilon, delta, certificate, steps, strength)):
                raise ValueError(
                    "Expected calibration alone, got a target, a certificate, steps or strength "
                    "beside it. A calibrated plan makes no claim and takes its steps from pilots."
                )
            return predicted_plan(
                facts,
                calibration,
                log_loss=self.mean_log_loss(rows, order=calibration.order),
                max_steps=max_steps,
                step_grid=step_grid,
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

        return make_plan(
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
        hashes = (
            {"model_before": model_hash(self._module)} if isinstance(plan, CertifiedPlan) else {}
        )
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
            origin=self._module,
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
            private_length = until is not None or not plan.fixed_length
            if private_length and ledger.per_instance.steps > self._ledger_steps:
                ledger.per_instance.weaken("estimate")
            self._engine.adopt(ledger)
        self._module, self._optimizer = twin, optimizer_like(optimizer, twin, twin)
        self._forgotten |= frozenset(plan.forget_set.tolist())
        phase = Phase(
            run.done, self._forgotten, plan.method, until is not None or not plan.fixed_length
        )
        # What was there before a retraining left nothing in the model.
        self._phases = [phase] if plan.method == "retraining" else [*self._phases, phase]
        self._requests_served += 1
        self._note_ledger()
        if not self._serving:  # a server deletes it when the new state is safe on disk
            run.remove(path)
        kinds = {CertifiedPlan: CertifiedResult, RetrainPlan: RetrainedResult}
        kind: Any = kinds.get(type(plan), UncertifiedResult)
        if hashes:
            hashes["model_after"] = model_hash(twin)
        result: UnlearningResult = kind(
            module=plain_copy(twin), plan=plan, steps=run.done, history=tuple(run.history), **hashes
        )
        return result

    # --- a durable queue of requests -----------------------------------------------------------

    @property
    def requests(self) -> RequestQueue:
        """The queue, to be read.

        Raises:
            ValueError: The engine was built without requests.
        """
        if self._queue is None:
            raise ValueError(
                "Expected an engine with requests, got one without. Build it with requests=folder."
            )
        return self._queue

    def submit(self, forget: npt.ArrayLike, *, request_id: str) -> Request:
        """Put a deletion request into the queue; nothing runs before `serve`, in any process.

        Args:
            forget: Rows of the data set, each once, not all of them. Rows that are forgotten
                already, or that another request names as well, are fine.
            request_id: The requester's name for it. Submitting the same again changes nothing.

        Returns:
            The request as it stands.

        Raises:
            ValueError: Rows that are not in the data set, repeated, none or all; or a known
                request_id for other rows. The queue is left as it was.
            LedgerError: The database is locked, read-only or no queue. Likewise.
        """
        queue = self.requests
        rows = check.index_array("forget", forget, size=self._size)
        if len(rows) == self._size:
            raise ValueError(
                f"Expected a forget set that leaves something to train on, got all {self._size} "
                "rows. Delete the model instead."
            )
        return queue.submit(request_id, rows)

    def serve(
        self,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        method: str = "dp_sgd",
        steps: int | None = None,
        max_steps: int | None = None,
        step_grid: int = 10,
        strength: float | None = None,
        predict: bool = False,
        adaptive: bool = False,
        max_batch: int | None = None,
        checkpoint_every: int = 50,
        seed: int | None = None,
        wait: bool = True,
    ) -> list[Request]:
        """Serve the queue until it is empty, and become the engine of the model served last.

        Requests that have a plan together are served by one run; an instance that several name is
        forgotten once. A run that another process left behind is finished first, as that planned
        it. A request that no plan exists for fails, with the reason; the others go on.

        Guarantee: killed at any moment and served again, by this or another process that built the
            same engine, no request is lost, none is run again once done, and the last model and
            ledgers equal bit for bit those of a serving that was not killed (on one machine with
            the same number of threads, if items and forward pass draw from torch's generator; not
            in secure mode). What is claimed about a request is what its plan claims. Everything
            forgotten so far is counted together, and requests are taken as chosen without a look
            at a model released in between unless `adaptive`; the result says which.
        Nothing computed with a forgotten instance is used again: optimizer state is dropped, its
        ledger row is marked and not charged any more, and the states and checkpoints of before are
        deleted once the new state is on disk. Checkpoints and copies elsewhere are the caller's.

        Args:
            epsilon, delta, method, steps, max_steps, step_grid, strength, predict, adaptive: As in
                `plan`.
            max_batch: Most requests in one run; 1: one after the other. Default: all that wait.
            checkpoint_every: As in `unlearn`.
            seed: The seeds of all runs are drawn from this. Default: from the system; a run's seed
                is kept, privately, until the run is done. Fix it in experiments only.
            wait: Wait while another process serves; else raise.

        Returns:
            The requests that were done or failed, in that order.

        Raises:
            ValueError: Arguments that make no plan, or an engine without requests.
            LedgerError: The database is locked, read-only or no queue; another process serves and
                `wait` is False; or the folder belongs to another engine. The model is the one that
                was served last.
        """
        return serve(
            self,
            self.requests,
            goal={
                "epsilon": epsilon,
                "delta": delta,
                "method": method,
                "steps": steps,
                "max_steps": max_steps,
                "step_grid": step_grid,
                "strength": strength,
                "predict": predict,
                "adaptive": adaptive,
            },
            max_batch=None if max_batch is None else check.integer("max_batch", max_batch, low=1),
            seed=None if seed is None else check.integer("seed", seed, low=0),
            checkpoint_every=check.integer("checkpoint_every", checkpoint_every, low=1),
            wait=wait,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return weights, phases, optimizer settings and both ledgers, to be saved.

        Tensors, arrays and plain values only; no optimizer state, which was computed with instances
        that are forgotten since.

        Privacy: the ledgers are not private to release.
        """
        return engine_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, in an engine that was built like the one that saved it.

        Raises:
            LedgerError: Another data set size, kernel, model, optimizer, training or ledger.
                Nothing is changed.
        """
        load_engine_state(self, state)

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

    def _start(self, plan: UnlearningPlan, *, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model that the run starts from, the caller's own left alone."""
        if isinstance(plan, RetrainPlan):
            assert self._make_model is not None
            with torch.random.fork_rng():
                torch.manual_seed(seeds(seed)[0])
                return self._make_model()
        twin = plain_copy(self._module)
        return twin, optimizer_like(self._optimizer, self._module, twin)

    def _note_ledger(self) -> None:
        """Remember how far the ledger is: whoever trains on without this engine is noticed."""
        self._ledger_steps = 0 if self._engine is None else self._engine.per_instance.steps

    def _require_own_ledger(self) -> None:
        """Raise if the ledger has steps or tombstones that this engine knows nothing about."""
        if self._engine is None:
            return
        ledger = self._engine.per_instance
        if ledger.steps != self._ledger_steps:
            raise LedgerError(
                f"Expected a ledger of {self._ledger_steps} steps, got {ledger.steps}: training "
                "went on since this engine was built. Build it after training."
            )
        gone = frozenset(np.flatnonzero(ledger.forgotten).tolist())
        if gone != self._forgotten:
            raise LedgerError(
                f"Expected the ledger to have the {len(self._forgotten)} forgotten rows of this "
                f"engine, got {len(gone)}: another engine has unlearned with it. Go on with that "
                "one, or load its state_dict()."
            )

    def _require_chargeable(self, method: str) -> None:
        """Raise where the ledger could not be charged for a method's steps."""
        unknown_rows = method in (*NOISE_FREE_METHODS, "noisy_finetuning")
        if unknown_rows and self._engine is not None and self._engine.per_instance.budgeted:
            raise UnsupportedError(
                f"Expected a method of the training's own steps with budgets, got {method!r}. It "
                "would charge everybody beyond their budget."
            )

    def _basis(self) -> str:
        """Return a digest of what a plan depends on."""
        digest = hashlib.sha256(model_hash(self._module).encode())
        groups = self._optimizer.state_dict()["param_groups"]
        kernel = None if self._engine is None else self._engine.kernel
        digest.update(
            f"{type(self._optimizer).__name__} {groups} {kernel} {self._ledger_steps} "
            f"{self._requests_served} {sorted(self._forgotten)} {self._batch_size}".encode()
        )
        return digest.hexdigest()

    def _check_current(self, plan: UnlearningPlan) -> None:
        if plan.requests_served != self._requests_served:
            raise ValueError(
                f"Expected a plan made after {self._requests_served} served requests, got one made "
                f"after {plan.requests_served}. Plan again: the model has changed since."
            )
        self._require_own_ledger()
        if plan.basis != self._basis():
            raise ValueError(
                "Expected a plan for this engine's model, optimizer and ledger as they are, got "
                "one for others. Plan again: something was changed since, or it is another's plan."
            )
        if isinstance(plan, CertifiedPlan):
            now = plan.certificate.epsilon(delta=plan.delta, steps=plan.steps)
            if now > plan.epsilon * (1.0 + 1e-12):
                raise CertificateError(
                    f"Expected a plan whose certificate gives epsilon={plan.epsilon:g}, got "
                    f"{now:g} after {plan.steps} steps. Plan again instead of editing a plan."
                )
        self._checked_forget(plan.forget_set)


def _require_no_momentum(certificate: Certificate, optimizer: torch.optim.Optimizer) -> None:
    """Raise where a caller's certificate cannot describe steps of this optimizer."""
    if isinstance(certificate, DataProcessingCertificate | NoisyFineTuningCertificate):
        return  # of any optimizer; and of one of its own
    for group in optimizer.param_groups:
        if group.get("momentum") or "betas" in group:
            raise CertificateError(
                f"Expected plain steps without momentum for a {type(certificate).__name__}, got "
                f"{type(optimizer).__name__} with momentum. Its state couples steps; train and "
                "unlearn with plain SGD."
            )


def _require_no_running_statistics(module: nn.Module) -> None:
    for name, part in module.named_modules():
        batch = isinstance(part, nn.modules.batchnorm._BatchNorm)
        if batch or getattr(part, "track_running_stats", False):
            raise UnsupportedError(
                f"Expected a model without BatchNorm or other running statistics, got "
                f"{type(part).__name__} at {name or 'the top'!r}. They keep traces of forgotten "
                "instances. Use GroupNorm."
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
