"""Serving the queue: the run of each batch, and what is on disk at every moment.

Knows the state of a model and the queue; how either keeps its promises is theirs. The order of
writes is the whole point. A batch is recorded with its seed before it runs. Then the new state lies
on disk under a name made of its content; `model.pt` becomes its model, so that no request is done
beside weights that still know who asked; then the certificate, so that it never lies beside weights
of before; then one transaction makes the state the served one and the requests done. What was
computed with the forget set is deleted after that, by the next server if need be. So whoever takes
over at any moment repeats the same run on the same model to the same bits. A batch that failed
after a try that was killed leaves neither its certificate nor its model: both are taken back first.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._validate import IntArray
from ...errors import CertificateError, LedgerError, UnsupportedError
from ...files.container import load_state, state_bytes, write_atomic
from ..goal import goal_from
from ..methods import METHOD
from ..plan import RetrainPlan, UnlearningPlan
from ..planning import Planning
from ..rehearsal import Rehearsals
from ..result import CertifiedResult, UnlearningResult
from ..run import Run, Watch, require_runnable
from ..saved_state import load, saved
from ..state import TrainedState
from .batching import Planned, together
from .belonging import folder_named, require_ours, require_served_model, untrained
from .model_file import remove_model, write_model
from .outcome import certified, summary
from .queue import Belonging, Request, RequestQueue
from .served import Served
from .served_run import ServedRun
from .server import Batch, Server

_LOG = logging.getLogger(__name__)
_KIND = "served model"
# What lies in the folder for the sake of a model: served states, runs in progress, and what a
# write leaves behind that was killed.
_OURS = re.compile(r"state-[0-9a-f]{32}\.pt|run-\d+|\.(state-|certificate-|model\.pt\.).*")
_NO_ROWS: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a serving goes.

    Attributes:
        server: Holds the right to write.
        wish: What is asked of plans, as the queue keeps it.
        max_batch: Most requests in one run; None: all that wait.
        seed: The seeds of all runs are drawn from this; None: from the system.
        checkpoint_every: Steps between two writes of a run in progress.
        finished: Requests that are done or failed, in that order.
        runs: What the page needs of each run, by its batch's number.
    """

    server: Server
    wish: Mapping[str, Any]
    max_batch: int | None
    seed: int | None
    checkpoint_every: int
    finished: list[str]
    runs: dict[int, ServedRun] = field(default_factory=dict)


class Serving:
    """A queue of requests, and the state of the model that is served from it.

    Args:
        queue: Of deletion requests.
        state: Becomes the one that was served last, if one was.
        progress: As in UnlearningEngine.

    Raises:
        LedgerError: The requests or what was served are of other data, another model or another
            engine.
    """

    def __init__(self, queue: RequestQueue, state: TrainedState, *, progress: bool) -> None:
        self.queue, self._state, self._progress = queue, state, progress
        self._rehearsals = Rehearsals(state)
        self._file: str | None = None  # name of the file with this state, once it was served
        self._untouched = False  # the model was looked at for this batch
        self._require_ours(queue.belonging)
        self._go_on()

    def submit(self, rows: IntArray, *, request_id: str) -> Request:
        """Put a request into the queue; errors and result as in `UnlearningEngine.submit`."""
        data = self._state.data
        if len(rows) == data.size:
            raise ValueError(
                f"Expected a forget set that leaves something to train on, got all {data.size} "
                "rows. Delete the model instead."
            )
        return self.queue.submit(
            request_id,
            rows,
            ids=data.ids.of(rows) if data.ids.given else None,
            data=data.state(),
            model=None if untrained(self._state) else self._state.model_hash,
            require=self._require_ours,
        )

    def serve(
        self,
        wish: Mapping[str, Any],
        *,
        max_batch: int | None,
        seed: int | None,
        checkpoint_every: int,
        wait: bool,
    ) -> Served:
        """Serve until nothing is queued; arguments and errors as in `UnlearningEngine.serve`."""
        if METHOD[wish["method"]].retrains and self._state.make_model is None:
            raise ValueError(
                "Expected make_model for method='retraining', got None. Build the engine with it."
            )
        finished: list[str] = []
        with self.queue.serving(wait=wait) as server:
            self._begin(server)
            service = Service(
                server=server, wish=wish, max_batch=max_batch, seed=seed,
                checkpoint_every=checkpoint_every, finished=finished,
            )  # fmt: skip
            while self._serve_next(service):
                pass
            self._clean_up(None)
            self._show_model()
        return Served(map(self.queue.get, finished), folder=self.queue.folder, runs=service.runs)

    # --- before the first batch ---------------------------------------------------------------

    def _require_ours(self, found: Belonging) -> None:
        require_ours(self._state, found, folder=self.queue.folder)

    def _go_on(self) -> None:
        """Become what was served last, unless that is known already.

        Raises:
            LedgerError: It is of another engine, or the file is missing or damaged. The state is
                left as it was.
        """
        while (path := self.queue.state_file) is not None and path.name != self._file:
            try:
                kept = load_state(path, kind=_KIND)
            except FileNotFoundError as error:
                if self.queue.state_file == path:  # else another process has served since: its file
                    raise LedgerError(
                        f"Expected the model served last at {path}, got no file. Use an earlier "
                        "copy of the folder."
                    ) from error
                continue
            with folder_named(self.queue.folder):
                load(self._state, kept)
            self._file = path.name

    def _begin(self, server: Server) -> None:
        """Refuse what nobody could be served with, and put the state that is there on disk."""
        state = self._state
        self._require_ours(self.queue.belonging)
        self._go_on()
        require_served_model(state, self.queue.belonging, folder=self.queue.folder)
        state.data.require_same()
        self._rehearsals = Rehearsals(state)
        self._rehearsals.without(_NO_ROWS)
        state.data.erase(state.forgotten)  # whom a killed server had served
        if self._file is None:
            state.require_untouched()  # what lies in the folder is taken for the deployed one
            self._file = _write_state(state, self.queue.folder)
        if self.queue.belonging.served_model is None:
            server.begin(self._file, data=state.data.state(), model=state.model_hash)
        if server.open_batch() is None:  # else model.pt may be of its run, which is repeated
            self._show_model()

    # --- one batch after the other ------------------------------------------------------------

    def _serve_next(self, service: Service) -> bool:
        """Serve the batch that was left behind, or the next one; return whether there was one."""
        self._untouched = False
        batch = service.server.open_batch()
        plan: UnlearningPlan | None = None
        self._clean_up(batch)
        if batch is None:
            batch, plan = self._next_batch(service)
        elif batch.rows:
            plan, reason = self._replanned(batch)
            if plan is None:  # whoever is refused here was never running, or is no more
                self._take_back(batch)
                service.server.fail(batch, reason=str(reason))
                service.finished.extend(batch.request_ids)
                return True
        if batch is None:
            return False
        if plan is None:
            self._finish_empty(batch, service.server)
        else:
            self._serve_batch(batch, plan, service)
        service.finished.extend(batch.request_ids)
        return True

    def _next_batch(self, service: Service) -> tuple[Batch | None, UnlearningPlan | None]:
        """Record the next batch, after refusing what no plan exists for; None: nothing waits."""
        server = service.server
        while waiting := self.queue.requests(state="queued")[: service.max_batch]:
            found = together(
                waiting,
                forgotten=self._state.forgotten,
                size=self._state.data.size,
                make_plan=lambda rows: self._planned(rows, service.wish),
            )
            for request_id, reason in found.refused.items():
                server.refuse(request_id, reason=reason)
                service.finished.append(request_id)
            if found.members:
                number, seed = server.next_number(), service.seed
                batch = Batch(
                    number=number,
                    request_ids=tuple(request.request_id for request in found.members),
                    rows=tuple(sorted(found.rows)),
                    goal=dict(service.wish),
                    steps=0 if found.plan is None else found.plan.steps,
                    seed=secrets.randbits(62) if seed is None else _drawn(seed, number),
                )
                server.plan(batch)
                return batch, found.plan
        return None, None

    def _planned(self, rows: frozenset[int], wish: Mapping[str, Any]) -> Planned:
        """Return the plan, or why there is none; neither where nothing is left to forget."""
        if not rows:
            return None, None
        try:
            plan = self._plan(sorted(rows), wish)
        except (CertificateError, UnsupportedError) as error:
            return None, str(error)
        if isinstance(plan, RetrainPlan) and not METHOD[wish["method"]].retrains:
            return None, f"retrain instead: {plan.reason}"
        return plan, None

    def _replanned(self, batch: Batch) -> Planned:
        """Return the plan of a batch that another process recorded, or why there is none now."""
        try:
            plan = self._plan(list(batch.rows), batch.goal)
        except (CertificateError, UnsupportedError) as error:
            return None, str(error)
        if plan.steps != batch.steps:
            raise LedgerError(
                f"Expected the plan of batch {batch.number} to take {batch.steps} steps as when it "
                f"was made, got {plan.steps}. Go on with the release and the engine that planned "
                "it."
            )
        return plan, None

    def _plan(self, rows: list[int], wish: Mapping[str, Any]) -> UnlearningPlan:
        state = self._state
        if not self._untouched:
            state.require_untouched()
            self._untouched = True
        gone = state.forgettable(np.array(rows, dtype=np.int64))
        return Planning(
            state, gone, goal_from(wish), rehearsals=self._rehearsals, progress=self._progress
        ).plan()

    # --- one batch ----------------------------------------------------------------------------

    def _finish_empty(self, batch: Batch, server: Server) -> None:
        """Finish a batch whose rows were all forgotten before."""
        server.run(batch)
        assert self._file is not None
        result = {
            "batch": batch.number, "rows_in_batch": 0,
            "status": "forgotten before", "steps": 0, "state_file": self._file,
        }  # fmt: skip
        server.finish(batch, state_file=self._file, model=self._state.model_hash, result=result)

    def _serve_batch(self, batch: Batch, plan: UnlearningPlan, service: Service) -> None:
        server = service.server
        server.run(batch)
        _LOG.info("batch %d: %d requests, %d steps", batch.number, len(batch.request_ids),
                  batch.steps)  # fmt: skip
        with self._state.whole_or_not():  # the file says what is served, and says: the old one
            try:
                done = self._run(batch, plan, checkpoint_every=service.checkpoint_every)
            except (CertificateError, UnsupportedError) as error:
                self._take_back(batch)
                server.fail(batch, reason=str(error))
                return
            except LedgerError as error:  # of the data or the engine, not of who asked
                server.interrupt(batch, reason=str(error))
                raise
            name = _write_state(self._state, self.queue.folder)
            self._take_back(batch)
            result = {
                "batch": batch.number,
                "rows_in_batch": len(batch.rows),
                **summary(done, adaptive=bool(batch.goal.get("adaptive"))),
                "state_file": name,
            }
            if isinstance(done, CertifiedResult):
                result |= certified(done, self._certificate(batch))
            server.finish(batch, state_file=name, model=self._state.model_hash, result=result)
            self._file = name
        service.runs[batch.number] = ServedRun.of(done)
        self._state.data.erase(self._state.forgotten)

    def _run(
        self, batch: Batch, plan: UnlearningPlan, *, checkpoint_every: int
    ) -> UnlearningResult:
        folder = self.queue.folder / f"run-{batch.number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        device = next(self._state.module.parameters()).device
        # What dropout draws must not depend on what the process did before either.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_drawn(batch.seed, 0))
            require_runnable(self._state, plan, untouched=True)
            run = Run(
                self._state, plan, seed=batch.seed, watch=Watch(),
                checkpoint_every=checkpoint_every, progress=self._progress,
            )  # fmt: skip
            run.resume(folder)
            run.take_steps()
            return run.settle()  # its file is deleted when the new state is safe on disk

    def _certificate(self, batch: Batch) -> Path:
        return self.queue.folder / f"certificate-{batch.number}.json"

    def _take_back(self, batch: Batch) -> None:
        """Let model.pt be the model as it is now, without a certificate of a try that was killed.

        The certificate goes first: it was about other weights, if the bits cannot be repeated.
        """
        certificate = self._certificate(batch)
        for path in (certificate, Path(f"{certificate}.key")):
            path.unlink(missing_ok=True)
        self._show_model()

    def _show_model(self) -> None:
        """Let model.pt be the model as it is now; none before anything was served."""
        state, folder = self._state, self.queue.folder
        if state.requests_served:
            write_model(folder, state.module, sha256=state.model_hash)
        else:
            remove_model(folder)

    def _clean_up(self, batch: Batch | None) -> None:
        """Delete every state but the served one and every run but the open one."""
        served = self.queue.state_file
        kept = {served.name if served else "", f"run-{batch.number}" if batch else ""}
        for path in self.queue.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in kept:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _write_state(state: TrainedState, folder: Path) -> str:
    """Write a state under a name made of its content; return the name."""
    data = state_bytes(saved(state), kind=_KIND)
    name = f"state-{hashlib.sha256(data).hexdigest()[:32]}.pt"
    write_atomic(folder / name, data)
    return name


def _drawn(seed: int, number: int) -> int:
    """Return 62 bits that depend on both, and are no bits that the run draws from its own seed."""
    sequence = np.random.SeedSequence(seed, spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0] >> 2)
