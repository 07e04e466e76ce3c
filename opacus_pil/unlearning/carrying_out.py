"""One run of a plan: from an engine's state to its next one, whole or not at all.

Everything happens on copies; the engine's model, ledgers and phases change together, after the last
check. The steps themselves are `running.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from .. import _validate as check
from ..certificates import (
    BestCertificate,
    Certificate,
    ContractionCertificate,
    PoissonContractionCertificate,
)
from ..errors import CertificateError
from ..privacy_engine import PerInstancePrivacyEngine
from .glm import OneOutputRun
from .methods import optimizer_like, plain_copy
from .model_hash import model_hash
from .observer import Observer
from .phase import Phase
from .plan import NOISE_FREE_METHODS, CertifiedPlan, RetrainPlan, UnlearningPlan
from .result import CertifiedResult, RetrainedResult, UncertifiedResult, UnlearningResult
from .running import run_plan
from .saved_run import SavedRun, seeds

if TYPE_CHECKING:
    from .engine import UnlearningEngine

Look = Callable[[int, nn.Module], Any]


def carried_out(
    engine: UnlearningEngine,
    plan: UnlearningPlan,
    *,
    checkpoint_dir: str | os.PathLike[str] | None,
    checkpoint_every: int,
    seed: int | None,
    on_step: Look | None,
    record_every: int,
    until: Look | None,
) -> UnlearningResult:
    """Run a plan; arguments, errors and result as in `UnlearningEngine.unlearn`."""
    _require_runnable(engine, plan, stops=until is not None)
    every = check.integer("record_every", record_every, low=1)
    private_length = until is not None or not plan.fixed_length
    before = engine._model_hash  # it was just compared with the weights
    number = int(torch.randint(2**62, ()).item())
    number = number if seed is None else check.integer("seed", seed, low=0)
    if number in engine._seeds and isinstance(plan, CertifiedPlan):
        raise CertificateError(
            f"Expected a seed that no earlier run on this model had, got seed={number} again: its "
            "noise is in the model already, and hides nothing a second time. Leave seed out."
        )
    twin, optimizer = _start(engine, plan, seed=number)
    modes = [part.training for part in twin.modules()]
    ledger = _forked(engine, plan)
    run = SavedRun(plan=plan, module=twin, optimizer=optimizer, privacy_engine=ledger, seed=number)
    path = run.resume(checkpoint_dir)
    start = run.done
    observer = Observer(twin)

    def observed(step: int) -> bool:
        if step % every and step != plan.steps:
            return False
        if on_step is not None:
            run.history.append(observer.call(on_step, step))
        return until is not None and bool(observer.call(until, step))

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
        disable=None if engine._progress else True,
    ) as bar:
        if not stopped:
            stopped = run_plan(
                plan,
                run,
                dataset=engine._dataset,
                task=engine._task,
                evaluated=engine._evaluated,
                retain_set=np.setdiff1d(engine.retain_set, plan.forget_set),
                batch_size=engine._batch_size,
                after_step=after_step,
                progress=bar,
            )
    if run.done != plan.steps and not stopped:
        raise RuntimeError(f"Expected {plan.steps} steps, got {run.done}. Nothing was changed.")
    for part, mode in zip(twin.modules(), modes, strict=True):
        part.training = mode
    engine._data.require_same()  # whoever looked on may have moved rows: who was trained on, then?
    hashes: dict[str, str] = {}
    if isinstance(plan, CertifiedPlan):
        hashes = {"model_before": before, "model_after": model_hash(twin)}
        if plan.steps and before == hashes["model_after"]:
            raise CertificateError(
                f"Expected {plan.steps} steps to move the model, got the model that was there "
                "before. Nothing was forgotten, and nothing was changed."
            )
        _require_counted(engine, plan, module=twin, optimizer=optimizer, ledger=ledger)
    _settle(engine, plan, run, private_length=private_length)
    if not engine._serving:  # a server deletes it when the new state is safe on disk
        run.remove(path)
    kinds = {CertifiedPlan: CertifiedResult, RetrainPlan: RetrainedResult}
    kind: Any = kinds.get(type(plan), UncertifiedResult)
    result: UnlearningResult = kind(
        module=plain_copy(twin), plan=plan, steps=run.done, history=tuple(run.history), **hashes
    )
    return result


def _require_runnable(engine: UnlearningEngine, plan: UnlearningPlan, *, stops: bool) -> None:
    """Raise where a plan cannot be run by this engine as it is."""
    if isinstance(plan, RetrainPlan) and engine._make_model is None:
        raise CertificateError(
            f"Expected a plan that unlearns, got 'retrain instead': {plan.reason} To retrain "
            "here, build the engine with make_model."
        )
    if stops and isinstance(plan, CertifiedPlan):
        raise CertificateError(
            "Expected a certified plan to run to its last step, got until=. Stopping on what "
            "the model shows voids the certificate; plan with steps alone."
        )
    if engine._queue is not None and not engine._serving:
        raise ValueError(
            "Expected submit and serve on an engine with requests, got unlearn: the next "
            "server would not know of this run. Build another engine without requests."
        )
    engine._check_current(plan)
    engine._data.require_same()
    if isinstance(plan, CertifiedPlan):  # features are looked at again, on the rows that run
        _require_counted(
            engine, plan, module=engine._module, optimizer=engine._optimizer, ledger=engine._engine
        )


def _require_counted(
    engine: UnlearningEngine,
    plan: CertifiedPlan,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ledger: PerInstancePrivacyEngine | None,
) -> None:
    """Raise unless all steps are those that a certificate counts one by one, if it does."""
    if ledger is not None and _counts_steps(plan.certificate):
        OneOutputRun(
            module,
            optimizer=optimizer,
            task=engine._task,
            dataset=engine._dataset,
            present=engine.retain_set,
            privacy_engine=ledger,
            feature_norm=engine._feature_norm,
        )


def _counts_steps(certificate: Certificate) -> bool:
    """Whether a certificate of the package's own finding counts training and unlearning steps."""
    if isinstance(certificate, BestCertificate):
        return any(map(_counts_steps, certificate.members))
    contracting = isinstance(certificate, ContractionCertificate | PoissonContractionCertificate)
    return contracting and "supplied_by_caller" not in certificate.context


def _start(
    engine: UnlearningEngine, plan: UnlearningPlan, *, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model that the run starts from, the caller's own left alone."""
    if isinstance(plan, RetrainPlan):
        assert engine._make_model is not None
        with torch.random.fork_rng():
            torch.manual_seed(seeds(seed)[0])
            return engine._make_model()
    twin = plain_copy(engine._module)
    return twin, optimizer_like(engine._optimizer, engine._module, twin)


def _forked(engine: UnlearningEngine, plan: UnlearningPlan) -> PerInstancePrivacyEngine | None:
    """Return the ledgers that the run charges, a copy until it has ended."""
    if engine._engine is None:
        return None
    ledger = engine._engine.fork()
    if plan.method != "gradient_difference":  # which reads the forget set
        ledger.forget(plan.forget_set)
    if plan.method == "retraining":
        ledger.note_new_model()
    return ledger


def _settle(
    engine: UnlearningEngine, plan: UnlearningPlan, run: SavedRun, *, private_length: bool
) -> None:
    """Make the run's end the engine's state."""
    ledger, twin = run.privacy_engine, run.module
    if ledger is not None and engine._engine is not None:
        if plan.method in NOISE_FREE_METHODS:
            ledger.charge_without_noise(run.done)
        if plan.method == "gradient_difference":  # its members paid for these steps too
            ledger.forget(plan.forget_set)
        if private_length and ledger.per_instance.steps > engine._ledger_steps:
            ledger.per_instance.weaken("estimate")
        engine._engine.adopt(ledger)
    engine._module, engine._optimizer = twin, optimizer_like(run.optimizer, twin, twin)
    engine._seeds |= {run.seed}
    engine._forgotten |= frozenset(plan.forget_set.tolist())
    phase = Phase(run.done, engine._forgotten, plan.method, private_length)
    # What was there before a retraining left nothing in the model.
    retrained = plan.method == "retraining"
    if retrained:  # whatever was edited before is gone
        engine._weights = None if ledger is None else True
    engine._phases = [phase] if retrained else [*engine._phases, phase]
    engine._requests_served += 1
    engine._note_ledger()
