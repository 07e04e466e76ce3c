"""Run: a plan carried out, from a state to its next one, whole or not at all.

Everything happens on copies; the state's model, ledgers and phases change together, after the last
check. The steps themselves are `steps/`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ..errors import CertificateError, LedgerError
from ..files.container import arrays, load_state, save_state
from ..files.model_hash import model_hash
from .generators import Generators, seeds
from .glm import GlmRun, Ran
from .methods import METHOD
from .observer import Observer
from .optimizer_copy import fresh_optimizer
from .phase import Phase
from .plan import CertifiedPlan, RetrainPlan, UnlearningPlan
from .result import CertifiedResult, RetrainedResult, UncertifiedResult, UnlearningResult
from .state import TrainedState
from .steps.running import Stretch, take_steps
from .twin import twin_of

_KIND = "unlearning run"
_LOG = logging.getLogger(__name__)

Look = Callable[[int, nn.Module], Any]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the caller wants to see of a run.

    Attributes:
        on_step: Shown the model before the first step and after every `record_every`-th one.
        record_every: See there.
        until: Asked like `on_step`, after it, whether the run ends here.
    """

    on_step: Look | None = None
    record_every: int = 1
    until: Look | None = None


class Run:
    """One run of a plan, from its first step or from where a killed run left off.

    Args:
        state: What it starts from, and what `settle` makes it the next of.
        plan: Made for this state; see `require_runnable`.
        seed: Of batches and noise; None: drawn from torch's global generator.
        watch: What the caller wants to see.
        checkpoint_every: Steps between two writes of the file, if there is one.
        progress: Show a bar when the output is a terminal.
    """

    def __init__(
        self,
        state: TrainedState,
        plan: UnlearningPlan,
        *,
        seed: int | None,
        watch: Watch,
        checkpoint_every: int,
        progress: bool,
    ) -> None:
        self._every = check.integer("record_every", watch.record_every, low=1)
        drawn = int(torch.randint(2**62, ()).item())
        number = drawn if seed is None else check.integer("seed", seed, low=0)
        if isinstance(plan, CertifiedPlan) and number in state.seeds:
            raise CertificateError(
                f"Expected a seed that no earlier run on this model had, got seed={number} again: "
                "its noise is in the model already, and hides nothing a second time. Leave seed "
                "out."
            )
        self._seed = number
        self._state, self._plan, self._watch = state, plan, watch
        self._checkpoint_every, self._progress = checkpoint_every, progress
        self._module, self._optimizer = _start(state, plan, seed=number)
        self._modes = [part.training for part in self._module.modules()]
        self._account = state.fork_account()
        self._charge_from_the_start()
        training = state.privacy_engine
        self._generators = Generators(
            number,
            device=next(self._module.parameters()).device,
            secure=training is not None and training.secure_mode,
        )
        self._observer = Observer(self._module)
        self._path: Path | None = None
        self._done, self._resumed_at = 0, 0
        self._stopped = False
        self._history: list[Any] = []

    # --- the steps ----------------------------------------------------------------------------

    def take_steps(self) -> None:
        """Take the steps that are left, or until the caller ends it."""
        state, plan = self._state, self._plan
        self._stopped = self._done == 0 and self._observe()
        with tqdm(
            total=plan.steps,
            initial=self._done,
            desc="unlearning",
            disable=None if self._progress else True,
        ) as bar:
            if self._stopped:
                return
            stretch = Stretch(
                plan=plan,
                done=self._done,
                module=self._module,
                optimizer=self._optimizer,
                privacy_engine=state.privacy_engine,
                account=self._account,
                generators=self._generators,
                dataset=state.data.dataset,
                task=state.task,
                evaluated=state.evaluated,
                retain_set=np.setdiff1d(state.retain_set, plan.forget_set),
                batch_size=state.batch_size,
                after_step=self._step,
                progress=bar,
            )
            take_steps(stretch)

    def _step(self, taken: int) -> bool:
        """Note a step that was taken; return whether the caller ends the run here."""
        self._done = self._resumed_at + taken
        self._stopped = self._observe()
        due = self._done % self._checkpoint_every == 0 or self._done == self._plan.steps
        if self._path is not None and due and not self._stopped:
            self._save(self._path)
        return self._stopped

    def _observe(self) -> bool:
        """Show the model where that is due; return whether the caller ends the run here."""
        step, watch = self._done, self._watch
        if step % self._every and step != self._plan.steps:
            return False
        if watch.on_step is not None:
            self._history.append(self._observer.call(watch.on_step, step))
        return watch.until is not None and bool(self._observer.call(watch.until, step))

    # --- its file -----------------------------------------------------------------------------

    def resume(self, folder: str | os.PathLike[str] | None) -> None:
        """Save into a folder from now on (None: nowhere), and go on from what lies there.

        Raises:
            NotADirectoryError: `folder` is not an existing folder.
            LedgerError: The file there is damaged or belongs to another plan or model.
        """
        if folder is None:
            return
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"Expected checkpoint_dir to be a folder, got {folder}.")
        self._path = Path(folder) / "unlearning.pt"
        if self._path.exists():
            self._load(self._path)

    def remove(self) -> None:
        """Delete the file of a finished run: it was computed next to the forget set.

        So were the parts of it that writes left behind which were killed.
        """
        path = self._path
        if path is not None:
            for found in (path, *path.parent.glob(f".{path.name}.*")):
                found.unlink(missing_ok=True)

    def _save(self, path: Path) -> None:
        kept: dict[str, Any] = {
            "fingerprint": self._plan.basis,  # the request, its method and constants, the weights
            "done": self._done,
            "seed": self._seed,
            "history": self._history,
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            **self._generators.state(),
        }
        if self._account is not None:
            kept["ledgers"] = self._account.state()
        save_state(path, kept, kind=_KIND)

    def _load(self, path: Path) -> None:
        kept = load_state(path, kind=_KIND)
        if kept["fingerprint"] != self._plan.basis:
            raise LedgerError(
                f"Expected {path} to belong to this plan and model, got a run of others. "
                "Finish that one, or pass another checkpoint_dir."
            )
        self._module.load_state_dict(kept["module"])
        self._optimizer.load_state_dict(kept["optimizer"])
        if self._account is not None:
            self._account.load_state(arrays(kept["ledgers"]))
        self._generators.load(kept)
        self._seed = int(kept.get("seed", self._seed))  # its noise goes on, not this call's
        self._done = self._resumed_at = int(kept["done"])
        self._history = list(kept["history"])

    # --- its end ------------------------------------------------------------------------------

    def settle(self) -> UnlearningResult:
        """Make the run's end the state, after the last check, and return what it left.

        Raises:
            CertificateError: A certified run that is not what its certificate speaks of.
            LedgerError: Something was charged meanwhile. Nothing is changed, in either case.
        """
        plan = self._plan
        if self._done != plan.steps and not self._stopped:
            raise RuntimeError(
                f"Expected {plan.steps} steps, got {self._done}. Nothing was changed."
            )
        for part, mode in zip(self._module.modules(), self._modes, strict=True):
            part.training = mode
        # Whoever looked on may have moved rows: who was trained on, then?
        self._state.data.require_same()
        before, after = self._state.model_hash, model_hash(self._module)
        hashes: dict[str, str] = {}
        if isinstance(plan, CertifiedPlan):
            hashes = {"model_before": before, "model_after": after}
            self._require_certified(plan, moved=before != after)
        self._move_state(after)
        _LOG.info("forgot %d instances by %s in %d steps: %s", len(plan.forget_set), plan.method,
                  self._done, plan.status)  # fmt: skip
        kinds = {CertifiedPlan: CertifiedResult, RetrainPlan: RetrainedResult}
        kind: Any = kinds.get(type(plan), UncertifiedResult)
        result: UnlearningResult = kind(
            module=twin_of(self._module),
            plan=plan,
            steps=self._done,
            history=tuple(self._history),
            **hashes,
        )
        return result

    def _require_certified(self, plan: CertifiedPlan, *, moved: bool) -> None:
        if plan.steps and not moved:
            raise CertificateError(
                f"Expected {plan.steps} steps to move the model, got the model that was there "
                "before. Nothing was forgotten, and nothing was changed."
            )
        if self._account is not None and _counts_steps(plan.certificate):
            self._require_burst(plan)
            ran = Ran(module=self._module, optimizer=self._optimizer, account=self._account)
            GlmRun(self._state, ran=ran)

    def _require_burst(self, plan: CertifiedPlan) -> None:
        """Raise unless the ledger saw the noise of the first step that the certificate counts."""
        assert self._account is not None
        assert self._state.account is not None
        before, now = self._state.account.charger.bursts, self._account.charger.bursts
        counted = [plan.noise_burst] if plan.noise_burst != 1.0 and plan.steps else []
        if [*before, *counted] != now:
            raise CertificateError(
                f"Expected a first step with {plan.noise_burst:g} times the noise, got "
                f"{now[len(before) :] or 'none'}. Nothing was changed."
            )

    def _move_state(self, model_hash: str) -> None:
        state, plan, method = self._state, self._plan, METHOD[self._plan.method]
        private_length = self._watch.until is not None or not plan.fixed_length
        self._charge_at_the_end(private_length=private_length)
        gone = state.forgotten | frozenset(plan.forget_set.tolist())
        state.become(
            module=self._module,
            optimizer=fresh_optimizer(self._optimizer, module=self._module, twin=self._module),
            account=self._account,
            phase=Phase(self._done, gone, plan.method, private_length),
            seed=self._seed,
            retrained=method.retrains,
            model_hash=model_hash,
        )

    # --- its ledgers --------------------------------------------------------------------------

    def _charge_from_the_start(self) -> None:
        """Let the forget set go before the first step, unless the method reads it."""
        account, method = self._account, METHOD[self._plan.method]
        if account is None:
            return
        if not method.reads_forget_set:
            account.forget(self._plan.forget_set)
        if method.retrains:
            account.note_new_model()

    def _charge_at_the_end(self, *, private_length: bool) -> None:
        """Charge what the steps themselves did not."""
        account, method = self._account, METHOD[self._plan.method]
        if account is None:
            return
        if not method.noisy:
            account.charge_without_noise(self._done)
        if method.reads_forget_set:  # its members paid for these steps too
            account.forget(self._plan.forget_set)
        if private_length and account.per_instance.steps > self._state.ledger_steps:
            account.per_instance.weaken("estimate")


def require_runnable(
    state: TrainedState,
    plan: UnlearningPlan,
    *,
    stops: bool = False,
    queued: bool = False,
    untouched: bool = False,
) -> None:
    """Raise where a plan cannot be run from a state as it is.

    Args:
        state: To run from.
        plan: To be run.
        stops: The caller may end it early.
        queued: The state is served from a queue, and this is not the server.
        untouched: As in `TrainedState.require_current`.

    Raises:
        TypeError, CertificateError, ValueError, LedgerError: As `UnlearningEngine.unlearn`.
    """
    if not isinstance(plan, UnlearningPlan):
        raise TypeError(
            f"Expected a plan, got {type(plan).__name__}. Pass unlearning.plan([...]), which says "
            "first what these instances take."
        )
    if isinstance(plan, RetrainPlan) and state.make_model is None:
        raise CertificateError(
            f"Expected a plan that unlearns, got 'retrain instead': {plan.reason} To retrain "
            "here, build the engine with make_model."
        )
    if stops and isinstance(plan, CertifiedPlan):
        raise CertificateError(
            "Expected a certified plan to run to its last step, got until=. Stopping on what "
            "the model shows voids the certificate; plan with steps alone."
        )
    if queued:
        raise ValueError(
            "Expected submit and serve on an engine with requests, got unlearn: the next "
            "server would not know of this run. Build another engine without requests."
        )
    state.require_current(plan, untouched=untouched)
    state.data.require_same()
    if not isinstance(plan, CertifiedPlan) or state.account is None:
        return
    if _counts_steps(plan.certificate):
        GlmRun(state)  # features are looked at again, on the rows that run


def _counts_steps(certificate: Certificate) -> bool:
    """Whether a certificate of the package's own finding counts training and unlearning steps."""
    if isinstance(certificate, BestCertificate):
        return any(map(_counts_steps, certificate.members))
    contracting = isinstance(certificate, ContractionCertificate | PoissonContractionCertificate)
    return contracting and "supplied_by_caller" not in certificate.context


def _start(
    state: TrainedState, plan: UnlearningPlan, *, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model that the run starts from, the caller's own left alone."""
    if isinstance(plan, RetrainPlan):
        assert state.make_model is not None
        with torch.random.fork_rng():
            torch.manual_seed(seeds(seed)[0])
            return state.make_model()
    twin = twin_of(state.module)
    return twin, fresh_optimizer(state.optimizer, module=state.module, twin=twin)
