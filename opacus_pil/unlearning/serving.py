"""Serving the queue: which requests run together, the run, and what is on disk at every moment.

Knows the engine and the queue; how either keeps its promises is theirs. The order of writes is the
whole point. A batch is recorded with its seed before it runs, the new state lies on disk under a
name made of its content before one transaction makes it the served one and the requests done, and
what was computed with the forget set is deleted after that, by the next server if need be. So
whoever takes over at any moment repeats the same run on the same model to the same bits.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..certificates import write_certificate
from ..certificates.fields import rebuilt
from ..checkpoint import load_state, state_bytes, write_atomic
from ..errors import CertificateError, LedgerError, UnsupportedError
from .certified_record import certified_record
from .engine_state import engine_state, load_engine_state
from .model_hash import model_hash
from .plan import CertifiedPlan, RetrainPlan, UnlearningPlan
from .request_server import Batch, Server
from .requests import Request, RequestQueue
from .result import UnlearningResult

if TYPE_CHECKING:
    from .engine import UnlearningEngine

_KIND = "served model"
# What lies in the folder for the sake of a model: served states, runs in progress, and what a
# write leaves behind that was killed.
_OURS = re.compile(r"state-[0-9a-f]{32}\.pt|run-\d+|\.(state|certificate)-.*")


def go_on(engine: UnlearningEngine, queue: RequestQueue) -> None:
    """Give the engine the model and ledgers that were served last, unless it has them already.

    Raises:
        LedgerError: They are of another engine, or the file is missing or damaged. The engine is
            left as it was.
    """
    while (path := queue.state_file) is not None and path.name != engine._state_name:
        try:
            state = load_state(path, kind=_KIND)
        except FileNotFoundError as error:
            if queue.state_file == path:  # else another process has served since: its file, then
                raise LedgerError(
                    f"Expected the model served last at {path}, got no file. Use an earlier copy "
                    "of the folder."
                ) from error
            continue
        load_engine_state(engine, state)
        engine._state_name = path.name


def serve(
    engine: UnlearningEngine,
    queue: RequestQueue,
    *,
    goal: Mapping[str, Any],
    max_batch: int | None,
    seed: int | None,
    checkpoint_every: int,
    wait: bool,
) -> list[Request]:
    """Serve until nothing is queued; arguments and errors as in `UnlearningEngine.serve`."""
    if goal["method"] == "retraining" and engine._make_model is None:
        raise ValueError(
            "Expected make_model for method='retraining', got None. Build the engine with it."
        )
    # As they are kept in the database: numpy's numbers are no plain values.
    goal = {k: v.item() if isinstance(v, np.generic) else v for k, v in goal.items()}
    finished: list[str] = []
    with queue.serving(wait=wait) as server:
        engine._require_queued_data()
        go_on(engine, queue)
        engine._data.require_same()
        engine._rehearsed(np.empty(0, dtype=np.int64))  # what nobody could be served with
        if queue.state_file is None:
            engine._state_name = _write_state(engine, queue.folder)
            server.begin(engine._state_name, data=engine._data.state())
        while True:
            batch = server.open_batch()
            _clean_up(queue, batch)
            if batch is None:
                batch = _next_batch(engine, queue, server, goal, max_batch, seed, finished)
            if batch is None:
                break
            _serve_batch(engine, queue, server, batch, checkpoint_every)
            finished += batch.request_ids
        _clean_up(queue, None)
    return [queue.get(request_id) for request_id in finished]


# --- which requests run together ------------------------------------------------------------------


def _next_batch(
    engine: UnlearningEngine,
    queue: RequestQueue,
    server: Server,
    goal: Mapping[str, Any],
    max_batch: int | None,
    seed: int | None,
    finished: list[str],
) -> Batch | None:
    """Record the next batch, after refusing what no plan exists for; None if nothing is queued."""
    while waiting := queue.requests(state="queued")[:max_batch]:
        members, rows, plan, refused = _together(engine, waiting, goal)
        for request_id, reason in refused.items():
            server.refuse(request_id, reason=reason)
            finished.append(request_id)
        if members:
            number = server.next_number()
            batch = Batch(
                number=number,
                request_ids=tuple(request.request_id for request in members),
                rows=tuple(sorted(rows)),
                goal=dict(goal),
                steps=0 if plan is None else plan.steps,
                seed=secrets.randbits(62) if seed is None else _drawn(seed, number),
            )
            server.plan(batch)
            return batch
    return None


def _together(
    engine: UnlearningEngine, waiting: list[Request], goal: Mapping[str, Any]
) -> tuple[list[Request], set[int], UnlearningPlan | None, dict[str, str]]:
    """Return requests with one plan, their rows, the plan, and why others have none at all.

    All of them, if there is a plan for all; else one after the other as long as there is one. Who
    has a plan alone but not with the others waits for the next batch.
    """
    members: list[Request] = []
    rows: set[int] = set()
    refused: dict[str, str] = {}
    for request in waiting:
        wrong = _wrong_rows(engine, request, rows)
        if wrong is None:
            members.append(request)
            rows |= set(request.rows) - engine.forgotten
        else:
            refused[request.request_id] = wrong
    plan, reason = _planned(engine, rows, goal)
    if reason is None or not members:
        return members, rows, plan, refused
    candidates, members, rows, plan = members, [], set(), None
    for request in candidates:
        own = set(request.rows) - engine.forgotten
        joint, reason = _planned(engine, rows | own, goal)
        if reason is None:
            members, rows, plan = [*members, request], rows | own, joint
            continue
        if rows:
            _, reason = _planned(engine, own, goal)
        if reason is not None:
            refused[request.request_id] = reason
    return members, rows, plan, refused


def _planned(
    engine: UnlearningEngine, rows: set[int], goal: Mapping[str, Any]
) -> tuple[UnlearningPlan | None, str | None]:
    """Return the plan, or why there is none; neither where nothing is left to forget."""
    if not rows:
        return None, None
    try:
        plan = engine._planned(np.array(sorted(rows), dtype=np.int64), **_arguments(goal))
    except (CertificateError, UnsupportedError) as error:
        return None, str(error)
    if isinstance(plan, RetrainPlan) and goal["method"] != "retraining":
        return None, f"retrain instead: {plan.reason}"
    return plan, None


def _arguments(goal: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `plan`, with the certificate that the database keeps as constants."""
    kept = goal.get("certificate")
    return {**goal, "certificate": None if kept is None else rebuilt(kept[0], kept[1])}


def _wrong_rows(engine: UnlearningEngine, request: Request, others: set[int]) -> str | None:
    """Return why nothing can be forgotten for these rows, whatever the plan."""
    if request.rows[-1] >= engine._size:
        return (
            f"Expected rows in [0, {engine._size - 1}], got {request.rows[-1]}, which the data set "
            "does not have."
        )
    if len(engine.forgotten | others | set(request.rows)) == engine._size:
        return (
            f"Expected something left to train on, got a request that takes the last of "
            f"{engine._size} rows. Delete the model instead."
        )
    return None


# --- one batch ------------------------------------------------------------------------------------


def _serve_batch(
    engine: UnlearningEngine,
    queue: RequestQueue,
    server: Server,
    batch: Batch,
    checkpoint_every: int,
) -> None:
    result: dict[str, Any] = {"batch": batch.number, "rows_in_batch": len(batch.rows)}
    if not batch.rows:
        server.run(batch)
        assert engine._state_name is not None
        result |= {"status": "forgotten before", "steps": 0, "state_file": engine._state_name}
        server.finish(batch, state_file=engine._state_name, result=result)
        return
    try:  # whoever is refused here was never running
        plan = engine._planned(np.array(batch.rows, dtype=np.int64), **_arguments(batch.goal))
    except (CertificateError, UnsupportedError) as error:
        server.fail(batch, reason=str(error))
        return
    if plan.steps != batch.steps:
        raise LedgerError(
            f"Expected the plan of batch {batch.number} to take {batch.steps} steps as when it was "
            f"made, got {plan.steps}. Go on with the release and the engine that planned it."
        )
    server.run(batch)
    before, hash_before = engine_state(engine), model_hash(engine.module)
    folder = queue.folder / f"run-{batch.number}"
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        try:
            done = _run(engine, plan, batch, folder, checkpoint_every)
        except (CertificateError, UnsupportedError) as error:
            server.fail(batch, reason=str(error))
            return
        except LedgerError as error:  # of the data or the engine, not of who asked
            server.interrupt(batch, reason=str(error))
            raise
        name = _write_state(engine, queue.folder)
        result |= {**_summary(done, adaptive=bool(batch.goal.get("adaptive"))), "state_file": name}
        if isinstance(plan, CertifiedPlan):
            path = queue.folder / f"certificate-{batch.number}.json"
            result |= _certify(engine, plan, hash_before, path)
        server.finish(batch, state_file=name, result=result)
        engine._state_name = name
    except BaseException:
        # The file says what is served, and it says: the old one.
        load_engine_state(engine, before, own=True)
        raise


def _run(
    engine: UnlearningEngine,
    plan: UnlearningPlan,
    batch: Batch,
    folder: Path,
    checkpoint_every: int,
) -> UnlearningResult:
    device = next(engine.module.parameters()).device
    # What dropout draws must not depend on what the process did before either.
    engine._serving = True
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_drawn(batch.seed, 0))
            return engine.unlearn(
                plan, checkpoint_dir=folder, checkpoint_every=checkpoint_every, seed=batch.seed
            )
    finally:
        engine._serving = False


def _certify(
    engine: UnlearningEngine, plan: CertifiedPlan, hash_before: str, path: Path
) -> dict[str, Any]:
    """Write the certificate file of a run; return its name, or why there is none."""
    try:
        record = certified_record(plan, before=hash_before, after=model_hash(engine.module))
    except CertificateError as error:
        return {"certificate_file": None, "no_certificate_file": str(error)}
    # Left from a killed run of this very batch, if there is one.
    write_certificate(record, path=path, overwrite=True)
    return {"certificate_file": path.name}


def _summary(done: UnlearningResult, *, adaptive: bool) -> dict[str, Any]:
    """Return what was run and what may be claimed, as plain values."""
    plan, epsilon = done.plan, done.epsilon
    certified = plan if isinstance(plan, CertifiedPlan) else None
    return {
        "status": plan.status,
        "method": plan.method,
        "steps": done.steps,
        "epsilon": epsilon if epsilon is not None and math.isfinite(epsilon) else None,
        "delta": certified.delta if certified else None,
        "certificate": type(certified.certificate).__name__ if certified else None,
        "adaptive": "covered: the bound is on everything that was ever released"
        if adaptive and certified
        else "not covered: requests are taken as chosen without a look at a model released before",
    }


def _drawn(seed: int, number: int) -> int:
    """Return 62 bits that depend on both, and are no bits that the run draws from its own seed."""
    sequence = np.random.SeedSequence(seed, spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0] >> 2)


# --- files ----------------------------------------------------------------------------------------


def _write_state(engine: UnlearningEngine, folder: Path) -> str:
    """Write the engine's state under a name made of its content; return the name."""
    data = state_bytes(engine_state(engine), kind=_KIND)
    name = f"state-{hashlib.sha256(data).hexdigest()[:32]}.pt"
    write_atomic(folder / name, data)
    return name


def _clean_up(queue: RequestQueue, batch: Batch | None) -> None:
    """Delete every state but the served one and every run but the open one."""
    served = queue.state_file
    kept = {served.name if served else "", f"run-{batch.number}" if batch else ""}
    for path in queue.folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in kept:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
