"""UnlearningEngine: from a deletion request to a plan, and from a plan to an unlearned model.

A façade: what is known of the model is `state.py`, plans are made by `planning.py`, carried out by
`run.py`, and requests served by `requests/`. The caller's module, optimizer and ledgers change only
when a run has ended well.
"""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy.typing as npt
import torch
import torch.nn as nn
from torch.utils.data import Dataset

from .. import _validate as check
from .._validate import IntArray
from ..accounting.instance_ids import InstanceIds
from ..capture.row_losses import LossOf
from ..certificates import Certificate, NoisyFineTuningCertificate
from ..privacy_engine import PerInstancePrivacyEngine
from ..training.task import Collate, Task
from .described import described_state
from .goal import checked_goal, plain_wish
from .options import Options, Trial, options_for
from .pilots import Calibration
from .plan import UnlearningPlan
from .planning import Planning, mean_log_loss_of
from .requests.queue import Request, RequestQueue
from .requests.served import Served
from .requests.serving import Serving
from .requirements import Requirements, requirements_of
from .result import UnlearningResult
from .run import Run, Watch, require_runnable
from .saved_state import load, saved
from .state import MakeModel
from .suggest import Suggestion, suggested


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
            was served there before, the engine goes on with it and its ledgers: a new process
            needs the architecture, not the trained model. A folder belongs to the model that the
            first request was submitted with; one that was trained anew is refused.
        progress: Show a progress bar when the output is a terminal.

    Raises:
        UnsupportedError: The model has BatchNorm that trains or updates: its buffers keep traces of
            forgotten instances.
        TypeError: An opacus.PrivacyEngine, which keeps no account of instances.
        LedgerError: The folder `requests` is of other data, of another order or of another model.

    Source: Sepahvand et al. (2025), arXiv:2505.18786, fine-tuning budgets from per-instance losses;
        certificates as each of them cites.
    """

    @check.known_keywords
    def __init__(
        self, module: nn.Module, *, optimizer: torch.optim.Optimizer, dataset: Dataset,
        criterion: Any = None, privacy_engine: PerInstancePrivacyEngine | None = None,
        loss_of: LossOf | None = None, collate_fn: Collate | None = None,
        instance_ids: npt.ArrayLike | None = None, training_steps: int | None = None,
        feature_norm: float | None = None, batch_size: int | None = None,
        make_model: MakeModel | None = None, requests: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:  # fmt: skip
        self._state = described_state(
            module, optimizer=optimizer, dataset=dataset, privacy_engine=privacy_engine,
            criterion=criterion, loss_of=loss_of, collate_fn=collate_fn, instance_ids=instance_ids,
            training_steps=training_steps, feature_norm=feature_norm, batch_size=batch_size,
            make_model=make_model,
        )  # fmt: skip
        self._progress = progress
        self._trial = False  # a branch, which leaves everything outside of it alone
        self._serving: Serving | None = None
        if requests is not None:
            self._serving = Serving(RequestQueue(requests), self._state, progress=progress)

    def __repr__(self) -> str:
        """Say in a line what is left and what has run."""
        state = self._state
        return (
            f"{type(self).__name__}({state.data.size:,} instances, {len(state.forgotten):,} "
            f"forgotten in {state.requests_served} runs)"
        )

    @property
    def module(self) -> nn.Module:
        """The plain model as it is now: trained, or unlearned by the last run."""
        return self._state.module

    @property
    def forgotten(self) -> frozenset[int]:
        """Rows forgotten so far."""
        return self._state.forgotten

    @property
    def retain_set(self) -> IntArray:
        """Rows that are still in the training set, ascending."""
        return self._state.retain_set

    @property
    def dataset(self) -> Dataset:
        """The training set, forgotten rows included."""
        dataset: Dataset = self._state.data.dataset
        return dataset

    @property
    def task(self) -> Task:
        """What training minimised, and how its batches are joined: unlearning does the same."""
        return self._state.task

    @property
    def instance_ids(self) -> InstanceIds:
        """The ids of the data set's rows."""
        return self._state.data.ids

    @property
    def requests(self) -> RequestQueue:
        """The queue, to be read.

        Raises:
            ValueError: The engine was built without requests.
        """
        return self._served().queue

    def branch(self) -> Self:
        """Return an engine in the same state, whose runs leave this one and its ledgers alone.

        It has no queue of requests. For trying out plans, as `evaluation.calibrate` does.
        """
        branch = copy.copy(self)
        branch._state, branch._serving = self._state.branch(), None
        branch._trial = True
        return branch

    @check.known_keywords
    def mean_log_loss(
        self, forget: npt.ArrayLike | None = None, *, rows: npt.ArrayLike | None = None,
        order: float = 2.0,
    ) -> float:  # fmt: skip
        """Return the mean over a set of the log of its privacy losses (RDP at `order`, in nats).

        What `calibrate` fits times to unlearn against. The labels of the losses are the ledger's.

        Args:
            forget: Instances, by their ids if there are ids, else by row.
            rows: Rows in their place.
            order: Rényi order, one of the ledger's.

        Raises:
            ValueError: No privacy_engine, an order the ledger does not have, losses of 0 or inf.
        """
        return mean_log_loss_of(self._state, self._state.named(forget, rows), order=order)

    @staticmethod
    @check.known_keywords
    def suggest(
        public: Dataset, *, epsilon: float, delta: float, num_instances: int, set_size: int = 1,
        steps: int = 100, feature_norm: float = 1.0, cap_factor: float = 1.5,
        cap_floor: float = 0.02, seed: int = 0, progress: bool = True,
    ) -> Suggestion:  # fmt: skip
        """Return constants of training, before it, for deletions that are cheap after it.

        Guarantee: none about accuracy, which is that of public rows; the steps are what the
            certificate will ask for, for members whose caps are at most the public 90 % quantile.

        Args:
            public: Of (features, class number); nothing private may be in it. At least 4 rows,
                better some hundred per class.
            epsilon, delta: Target of a deletion.
            num_instances: Size of the private training set.
            set_size: Instances forgotten together.
            steps: Most steps that a deletion may take.
            feature_norm: Bound on the features' norm, the constant included.
            cap_factor, cap_floor: Rule of `heads.caps_from_public_model`.
            seed: Of the split into halves and the noise.
            progress: Show a progress bar when the output is a terminal.

        Raises:
            CertificateError: Nothing on the grid reaches the target in so many steps.
            ValueError: A value outside its range.
        """
        return suggested(
            public, epsilon=epsilon, delta=delta, num_instances=num_instances, set_size=set_size,
            steps=steps, feature_norm=feature_norm, cap_factor=cap_factor, cap_floor=cap_floor,
            seed=seed, progress=progress,
        )  # fmt: skip

    def requirements(self, method: str = "langevin") -> Requirements:
        """Return everything that a method needs of this model, met or not, each with its cure.

        Looks at the model, its training and its data, and changes nothing. `print` shows the list.

        Args:
            method: As in `plan`.

        Raises:
            ValueError: An unknown method.
        """
        return requirements_of(self._state, method)

    @check.known_keywords
    def options(
        self, forget: npt.ArrayLike | None = None, *, rows: npt.ArrayLike | None = None,
        epsilon: float, delta: float, methods: Sequence[str] | None = None,
        certificate: NoisyFineTuningCertificate | None = None,
        score: Callable[[nn.Module], float] | None = None, max_steps: int | None = None,
    ) -> Options:  # fmt: skip
        """Return a table of methods: what is certified, its steps, its cost, and why not.

        Args:
            forget: Instances, by their ids if there are ids, else by row.
            rows: Rows in their place.
            epsilon, delta: Target of the methods that can be certified.
            methods: Some of those of `plan`. Default: all.
            certificate: For "noisy_finetuning", as in `plan`.
            score: Higher is better, of a plain model on a held-out split that you name: certified
                plans are then run on a branch, which changes nothing, and the difference is shown.
                It takes as long as these runs take.
            max_steps: As in `plan`.

        Raises:
            ValueError: As in `plan`, about the rows; an unknown method.

        Privacy: steps and scores are private: they show how much the forget set weighs.
        """
        named = self._state.forgettable(self._state.named(forget, rows))
        trial = Trial(
            plan=functools.partial(self.plan, rows=named),
            run=lambda plan: self.branch().unlearn(plan).module,
            score=score,
            before=math.nan if score is None else float(score(self.module)),
        )
        return options_for(
            trial, epsilon=epsilon, delta=delta, methods=methods, certificate=certificate,
            max_steps=max_steps,
        )  # fmt: skip

    @check.known_keywords
    def plan(
        self, forget: npt.ArrayLike | None = None, *, rows: npt.ArrayLike | None = None,
        epsilon: float | None = None, delta: float | None = None, method: str = "dp_sgd",
        certificate: Certificate | None = None, steps: int | None = None,
        max_steps: int | None = None, step_grid: int = 10, strength: float | None = None,
        predict: bool = False, calibration: Calibration | None = None, adaptive: bool = False,
    ) -> UnlearningPlan:  # fmt: skip
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
        state = self._state
        named = state.named(forget, rows)
        state.require_untouched()
        gone = state.forgettable(named)
        goal = checked_goal(
            epsilon=epsilon, delta=delta, method=method, certificate=certificate, steps=steps,
            max_steps=max_steps, step_grid=step_grid, strength=strength, predict=predict,
            calibration=calibration, adaptive=adaptive,
        )  # fmt: skip
        plan = Planning(state, gone, goal, progress=self._progress).plan()
        state.data.require_same()
        return plan

    @check.known_keywords
    def unlearn(
        self, plan: UnlearningPlan, *, checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 50, seed: int | None = None,
        on_step: Callable[[int, nn.Module], Any] | None = None, record_every: int = 1,
        until: Callable[[int, nn.Module], bool] | None = None,
    ) -> UnlearningResult:  # fmt: skip
        """Run a plan and return the unlearned model.

        What `heads.FrozenFeatures` keeps of the forgotten rows is erased after it; the original
        data are the caller's.

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
            TypeError: Instances in place of a plan.
            CertificateError: The plan says "retrain instead" and there is no `make_model`; `until`
                with a certified plan.
            ValueError: The plan is not this engine's latest state.
            LedgerError: A checkpoint of another run lies in `checkpoint_dir`.
        """
        require_runnable(
            self._state, plan, stops=until is not None, queued=self._serving is not None
        )
        run = Run(
            self._state, plan, seed=seed, checkpoint_every=checkpoint_every,
            watch=Watch(on_step=on_step, record_every=record_every, until=until),
            progress=self._progress,
        )  # fmt: skip
        run.resume(checkpoint_dir)
        run.take_steps()
        result = run.settle()
        run.remove()
        if not self._trial:
            self._state.data.erase(self._state.forgotten)
        return result

    @check.known_keywords
    def submit(
        self, forget: npt.ArrayLike | None = None, *, rows: npt.ArrayLike | None = None,
        request_id: str,
    ) -> Request:  # fmt: skip
        """Put a deletion request into the queue; nothing runs before `serve`, in any process.

        Args:
            forget: Instances, each once, not all of them: by their ids if there are instance_ids,
                else by row; or a boolean mask over all rows. Who is forgotten already, or named by
                another request as well, is fine.
            rows: Rows of the data set, in its place.
            request_id: The requester's name for it. Submitting the same again changes nothing.

        Returns:
            The request as it stands.

        Raises:
            ValueError: Rows that are not in the data set, ids that nobody has, repeated, none or
                all; or a known request_id for other rows. The queue is left as it was.
            LedgerError: The database is locked, read-only or no queue, or it is of other data or
                another model. Likewise.
        """
        serving = self._served()
        return serving.submit(self._state.named(forget, rows), request_id=request_id)

    @check.known_keywords
    def serve(
        self, *, epsilon: float | None = None, delta: float | None = None, method: str = "dp_sgd",
        steps: int | None = None, max_steps: int | None = None, step_grid: int = 10,
        strength: float | None = None, predict: bool = False, adaptive: bool = False,
        certificate: NoisyFineTuningCertificate | None = None, max_batch: int | None = None,
        checkpoint_every: int = 50, seed: int | None = None, wait: bool = True,
    ) -> Served:  # fmt: skip
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
            certificate: For method "noisy_finetuning", as in `plan`: of all certificates of a
                caller's only this one is about any forget set.
            max_batch: Most requests in one run; 1: one after the other. Default: all that wait.
            checkpoint_every: As in `unlearn`.
            seed: The seeds of all runs are drawn from this. Default: from the system; a run's seed
                is kept, privately, until the run is done. Fix it in experiments only.
            wait: Wait while another process serves; else raise.

        Returns:
            The requests that were done or failed, in that order: a list, whose
            `.verify(model=, ids=)` reads a certificate and recomputes it. `model.pt` in the folder
            holds the weights after the last of them.

        Raises:
            ValueError: Arguments that make no plan, or an engine without requests.
            TypeError: Another kind of certificate.
            LedgerError: The database is locked, read-only or no queue; another process serves and
                `wait` is False; the folder belongs to another engine or another model, or its rows
                are those of other data. The model is the one that was served last.
            UnsupportedError: The training cannot be run again as it is described.
        """
        if certificate is not None and type(certificate) is not NoisyFineTuningCertificate:
            raise TypeError(
                f"Expected a NoisyFineTuningCertificate to serve by, got "
                f"{type(certificate).__name__}: it speaks of one forget set. Leave it out."
            )
        wish = plain_wish(
            epsilon=epsilon, delta=delta, method=method, steps=steps, max_steps=max_steps,
            step_grid=step_grid, strength=strength, predict=predict, adaptive=adaptive,
            certificate=certificate,
        )  # fmt: skip
        return self._served().serve(
            wish,
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
        return saved(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, in an engine that was built like the one that saved it.

        Raises:
            LedgerError: Another data set size, kernel, model, optimizer, training or ledger.
                Nothing is changed.
        """
        load(self._state, state)

    def _served(self) -> Serving:
        if self._serving is None:
            raise ValueError(
                "Expected an engine with requests, got one without. Build it with requests=folder."
            )
        return self._serving
