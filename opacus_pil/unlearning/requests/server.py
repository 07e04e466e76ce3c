"""What only the process that serves may write: which requests run together, and how it ended.

Knows rows, goals and file names; no model. Who may serve is decided in `queue.py`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import LedgerError
from .database import RequestDatabase, keep_data, keep_model, log


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that are served by one run, and all that the run depends on besides the model.

    Attributes:
        number: 1, 2, …
        request_ids: In the order they were submitted.
        rows: Rows that the run forgets, ascending; none if all had been forgotten before.
        goal: Arguments of the plan.
        steps: Steps of the plan, checked again by whoever resumes.
        seed: Of batches and noise. Whoever knows it can remove the noise: erased once it is done.
    """

    number: int
    request_ids: tuple[str, ...]
    rows: tuple[int, ...]
    goal: Mapping[str, Any]
    steps: int
    seed: int


class Server:
    """What only the process that holds the serving lock may do; each call is one transaction.

    Raises, everywhere:
        LedgerError: Somebody else took over, or the database cannot be written. Nothing is changed.
    """

    def __init__(self, database: RequestDatabase, *, owner: str, process: str) -> None:
        self._database, self._owner, self._process = database, owner, process

    def begin(self, state_file: str, *, data: Mapping[str, Any], model: str) -> None:
        """Record the state that the first request starts from, its data and its model's SHA-256."""
        with self._mine() as db:
            db.execute("UPDATE served SET state_file = ?", (state_file,))
            keep_data(db, data)
            keep_model(db, model, state_file=state_file)

    def open_batch(self) -> Batch | None:
        """Return the batch that was planned and is not done, if there is one."""
        with self._database.reading() as db:
            row = db.execute("SELECT * FROM batches WHERE open = 1").fetchone()
            if row is None:
                return None
            members = db.execute(
                "SELECT request_id FROM requests WHERE batch = ? ORDER BY position", (row["batch"],)
            ).fetchall()
        return Batch(
            number=row["batch"],
            request_ids=tuple(member[0] for member in members),
            rows=tuple(json.loads(row["rows"])),
            goal=json.loads(row["goal"]),
            steps=row["steps"],
            seed=row["seed"],
        )

    def next_number(self) -> int:
        """Return the number of the next batch."""
        with self._database.reading() as db:
            last = db.execute("SELECT max(batch) FROM batches").fetchone()[0]
        return 1 + (last or 0)

    def plan(self, batch: Batch) -> None:
        """Record a batch with its seed; its requests are planned."""
        with self._mine() as db:
            db.execute(
                "INSERT INTO batches (batch, rows, goal, steps, seed, open) "
                "VALUES (?, ?, ?, ?, ?, 1)",
                (
                    batch.number,
                    json.dumps(batch.rows),
                    json.dumps(dict(batch.goal)),
                    batch.steps,
                    batch.seed,
                ),
            )
            for request_id in batch.request_ids:
                changed = db.execute(
                    "UPDATE requests SET state = 'planned', batch = ? "
                    "WHERE request_id = ? AND state = 'queued'",
                    (batch.number, request_id),
                ).rowcount
                assert changed == 1, request_id
            log(db, batch.request_ids, "planned", f"batch {batch.number}, {batch.steps} steps")

    def run(self, batch: Batch) -> None:
        """Note that this process works on the batch, from now or again."""
        with self._mine() as db:
            db.execute("UPDATE requests SET state = 'running' WHERE batch = ?", (batch.number,))
            log(db, batch.request_ids, "running", self._process)

    def finish(
        self, batch: Batch, *, state_file: str, model: str, result: Mapping[str, Any]
    ) -> None:
        """Make the new state the served one and all requests of the batch done, at one stroke."""
        with self._mine() as db:
            self._close(db, batch, "done", result)
            db.execute("UPDATE served SET state_file = ?", (state_file,))
            keep_model(db, model, state_file=state_file)

    def interrupt(self, batch: Batch, *, reason: str) -> None:
        """Note that the batch does not run: its requests are planned, and are served again."""
        with self._mine() as db:
            db.execute("UPDATE requests SET state = 'planned' WHERE batch = ?", (batch.number,))
            log(db, batch.request_ids, "planned", reason)

    def fail(self, batch: Batch, *, reason: str) -> None:
        """Give a batch up; the served state stays."""
        with self._mine() as db:
            self._close(db, batch, "failed", {"reason": reason})

    def refuse(self, request_id: str, *, reason: str) -> None:
        """Give up a request that no plan exists for."""
        with self._mine() as db:
            db.execute(
                "UPDATE requests SET state = 'failed', result = ? WHERE request_id = ?",
                (json.dumps({"reason": reason}), request_id),
            )
            log(db, [request_id], "failed", reason)

    def _close(
        self, db: sqlite3.Connection, batch: Batch, state: str, result: Mapping[str, Any]
    ) -> None:
        db.execute("UPDATE batches SET open = 0, seed = NULL WHERE batch = ?", (batch.number,))
        db.execute(
            "UPDATE requests SET state = ?, result = ? WHERE batch = ?",
            (state, json.dumps(dict(result), allow_nan=False), batch.number),
        )
        note = str(result.get("reason", f"batch {batch.number}"))
        log(db, batch.request_ids, state, note)

    @contextlib.contextmanager
    def _mine(self) -> Iterator[sqlite3.Connection]:
        with self._database.writing() as db:
            found = db.execute("SELECT owner, process FROM served").fetchone()
            if found["owner"] != self._owner:
                raise LedgerError(
                    f"Expected to be the one who serves {self._database.path}, got "
                    f"{found['process']}, which took over. Let it finish; nothing was changed here."
                )
            yield db
